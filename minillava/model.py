"""LLaVA in one file: CLIP or SigLIP vision tower, projector, Llama or Qwen2 decoder, KV cache, generation.

Read it from top to bottom: what a line uses is defined above it. Only the cache, which layers are
handed, comes after them. A comment such as `# [B, N, D]` at the end of a line gives the shape of the
line's result; a test checks every one.

    B prompts in the batch    I images               L layers              V vocabulary
    N prompt tokens           P patches per image    H query heads         G query heads per KV head
    S cache slots             R pixels per side      Hkv key-value heads   Dh head size
                              Dv vision width        Hv vision heads       D decoder width

Every prompt of a batch is padded on the left to the same N; `attention_mask` is 0 on the padding.
Numbers agree with `transformers` (LlavaForConditionalGeneration). Where implementations differ, a
comment names the class that this one follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.anyres import pack
from minillava.checks import check_images, check_prompt, check_sampling, require, require_left_padding
from minillava.config import LlavaConfig, TextConfig, VisionConfig

# ---------------------------------------------------------------- vision tower


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 · x), the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"), "quick_gelu": quick_gelu, "silu": F.silu,
}  # fmt: skip


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, heads·Dh] -> [B, heads, N, Dh]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, N, Dh] -> [B, N, heads·Dh]."""
    return x.transpose(1, 2).flatten(2)


class VisionLayer(nn.Module):
    """Pre-norm transformer layer: every patch attends to every patch."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """[I, P + 1, Dv] -> [I, P + 1, Dv]."""
        x = self.layer_norm1(hidden)
        query = split_heads(self.q_proj(x), self.num_heads)  # [I, Hv, P + 1, Dv // Hv]
        key = split_heads(self.k_proj(x), self.num_heads)
        value = split_heads(self.v_proj(x), self.num_heads)
        context = F.scaled_dot_product_attention(query, key, value)  # [I, Hv, P + 1, Dv // Hv]
        hidden = hidden + self.out_proj(merge_heads(context))  # [I, P + 1, Dv]
        return hidden + self.fc2(self.activation(self.fc1(self.layer_norm2(hidden))))


class VisionTower(nn.Module):
    """ViT: cuts the image into patches and runs a transformer over them. SigLIP has no CLS and no norm before it."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        clip = config.has_cls
        self.class_embedding = nn.Parameter(torch.zeros(width)) if clip else None
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=not clip)
        self.position_embedding = nn.Embedding(config.num_patches + clip, width)
        # The name is as every checkpoint spells it.
        self.pre_layrnorm = nn.LayerNorm(width, eps=config.layer_norm_eps) if clip else nn.Identity()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        # Never used, since LLaVA takes its features earlier. Checkpoints have it.
        self.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, layer: int) -> Tensor:
        """[I, 3, R, R] -> [I, P + 1, Dv] after `layer` layers (negative: from the end); SigLIP's are [I, P, Dv]."""
        patches = self.patch_embedding(pixel_values)  # [I, Dv, R // patch, R // patch]
        hidden = patches.flatten(2).transpose(1, 2)  # [I, P, Dv]
        if self.class_embedding is not None:
            cls = self.class_embedding.expand(len(hidden), 1, -1)  # [I, 1, Dv]
            hidden = torch.cat([cls, hidden], dim=1)  # [I, P + 1, Dv]
        hidden = self.pre_layrnorm(hidden + self.position_embedding.weight)
        depth = layer if layer >= 0 else len(self.layers) + 1 + layer
        for block in self.layers[:depth]:  # the layers above are never run
            hidden = block(hidden)
        return hidden


class Projector(nn.Module):
    """Maps image features into the decoder's embedding space (LLaVA-1.5: a two-layer MLP)."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        bias, width = config.multimodal_projector_bias, config.text.hidden_size
        self.linear_1 = nn.Linear(config.vision.hidden_size, width, bias=bias)
        self.linear_2 = None if config.mm_projector_type == "linear" else nn.Linear(width, width, bias=bias)
        self.activation = ACTIVATIONS[config.projector_hidden_act]

    def forward(self, features: Tensor) -> Tensor:
        """[I, P, Dv] -> [I, P, D]."""
        hidden = self.linear_1(features)
        return hidden if self.linear_2 is None else self.linear_2(self.activation(hidden))


# ---------------------------------------------------------------- decoder


class RMSNorm(nn.Module):
    """x / rms(x) · weight, computed in float32 for every dtype (`LlamaRMSNorm`)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)


def rope_frequencies(config: TextConfig, device: torch.device | str = "cpu") -> Tensor:
    """The angle by which RoPE turns each pair of dimensions per position: [Dh / 2] (RoFormer, section 3.2.2)."""
    size, scaling = config.head_size, config.rope_scaling
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, size, 2, device=device).float() / size)
    if scaling is None:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    # Llama 3.1: leave fast pairs alone, slow the slow ones down, blend between (`_compute_llama3_parameters`).
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequency / scaling["factor"] + blend * frequency


CosSin = tuple[Tensor, Tensor]  # both [B, 1, N, Dh], of the angles at the tokens' positions


def rotate_half(x: Tensor) -> Tensor:
    """The halves of every head exchanged, one of them negated: (first, second) -> (-second, first). [..., Dh]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turns each pair of a head's numbers by an angle that grows with the position. [B, heads, N, Dh] unchanged.

    Llama's checkpoints pair x[i] with x[i + Dh/2]; the RoFormer paper pairs neighbours.
    """
    return x * cos + rotate_half(x) * sin


def causal_mask(present: Tensor) -> Tensor | None:
    """Which keys each query sees: bool [B, 1, N, N]. None stands for plain causal attention, without padding."""
    if present.all():
        return None
    causal = present.new_ones(present.shape[1], present.shape[1]).tril()  # [N, N]
    itself = torch.eye(len(causal), dtype=torch.bool, device=present.device)  # [N, N]: no row of the softmax is empty
    return ((causal & present[:, None]) | itself)[:, None]


def manual_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Grouped-query attention by its definition: context [B, H, N, Dh] and weights [B, H, N, S].

    query [B, H, N, Dh]; key and value [B, Hkv, S, Dh], each read by G = H / Hkv query heads. The mask is True where
    a query sees a key, or it holds numbers that are added to the scores. Without one, the queries are the last N of S
    tokens, and attention is causal. The model uses the fused `Attention.attend`, which tests compare with this.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.mT * query.shape[-1] ** -0.5  # [B, H, N, S]
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool).tril(key.shape[2] - query.shape[2])  # [B, H, N, S]
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask  # [B, H, N, S]
    weights = scores.softmax(-1)  # [B, H, N, S]
    return weights @ value, weights


class Attention(nn.Module):
    """Grouped-query self-attention: G = H / Hkv query heads read the same keys and values."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        size, bias = config.head_size, config.attention_bias or config.model_type == "qwen2"
        self.layer, self.num_heads, self.kv_heads = layer, config.num_attention_heads, config.kv_heads
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * size, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * size, config.hidden_size, bias=config.attention_bias)

    def project(self, x: Tensor, rope: CosSin) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, D] -> query [B, H, N, Dh], key and value [B, Hkv, N, Dh]; query and key after RoPE."""
        query = apply_rope(split_heads(self.q_proj(x), self.num_heads), *rope)  # [B, H, N, Dh]
        key = apply_rope(split_heads(self.k_proj(x), self.kv_heads), *rope)  # [B, Hkv, N, Dh]
        value = split_heads(self.v_proj(x), self.kv_heads)  # [B, Hkv, N, Dh]
        return query, key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """The context of `manual_attention`, [B, H, N, Dh], in one fused call, which does not return the weights."""
        causal = mask is None and query.shape[2] > 1  # a single token sees every key there is
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=self.kv_heads != self.num_heads
        )

    def forward(self, x: Tensor, rope: CosSin, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]. With a cache, the cache supplies the keys, the values and the mask."""
        query, key, value = self.project(x, rope)
        if cache is not None:
            key, value, mask = cache.update(self.layer, query, key, value)
        context = self.attend(query, key, value, mask)  # [B, H, N, Dh]
        return self.o_proj(merge_heads(context))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: TextConfig):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm Llama layer."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, rope: CosSin, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]: in training, for a prompt, and for one new token of every prompt."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rope, mask, cache)  # [B, N, D]
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Decoder(nn.Module):
    """Token embeddings, layers and final norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers: Sequence[DecoderLayer] = nn.ModuleList(  # type: ignore[assignment]
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def cos_sin(self, positions: Tensor) -> CosSin:
        """cos and sin at positions [B, N]. Angles are float32: bfloat16 rounds 257 to 256."""
        angle = positions[:, None, :, None] * rope_frequencies(self.config, positions.device)  # [B, 1, N, Dh // 2]
        angle = torch.cat([angle, angle], dim=-1)  # [B, 1, N, Dh]
        dtype = self.embed_tokens.weight.dtype
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def forward(self, hidden: Tensor, positions: Tensor, mask: Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:  # fmt: skip
        """Embeddings [B, N, D] of tokens at positions [B, N] -> [B, N, D], ready for the output layer."""
        rope = self.cos_sin(positions)
        for layer in self.layers:
            hidden = layer(hidden, rope, mask, cache)
        return self.norm(hidden)


# ---------------------------------------------------------------- KV cache


class KVCache:
    """Keys and values of every layer, in slots that are allocated once and overwritten in place.

    The first `update` of a layer brings its prompt; every later one brings a single new token. Without a compressor the
    whole prompt is stored. A compressor (an object with the methods of `Compressor`) chooses which of its tokens are. A
    new token takes a free slot, or that of a token which the compressor drops; nothing is ever moved. Keys are cached
    after RoPE, so the order of slots does not matter. Layers and prompts may hold different numbers of tokens.
    """

    def __init__(self, present: Tensor, num_layers: int, new_tokens: int, compressor: Any = None):
        self.num_layers, self.new_tokens, self.compressor = num_layers, new_tokens, compressor
        self.steps = 0  # new tokens so far
        self.present = present  # [B, N]: False on the padding
        self.mask = causal_mask(present)
        self.prompt_positions = (present.cumsum(-1) - 1).clamp(min=0)  # [B, N]
        self.prompt_lengths = present.sum(-1)  # [B]
        self.lengths = self.prompt_lengths.clone()  # [B]: of the text so far, tokens that were dropped included
        self.waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # key, value, scores of layers that are not stored yet
        self.key: list[Tensor] = []  # of each stored layer [B, Hkv, S, Dh]; S differs between layers
        self.value: list[Tensor] = []
        self.kept = self.prompt_lengths.repeat(num_layers, 1)  # [L, B]: tokens of the prompt; set by `store`
        self.held = self.kept.clone()  # [L, B]: tokens now
        # [L, B, S]: the position of each slot's token, -1 if it is free; S slots as in the widest layer.
        self.position = self.lengths.new_full((num_layers, len(present), 0), -1)
        self.slot = self.held  # [L, B]: where the next token goes; set by `advance`

    def update(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Takes a layer's key and value [B, Hkv, N, Dh]; returns the key, value and mask that attention reads.

        For a prompt they are the ones passed in, uncompressed. For a new token (N = 1) they are what the layer holds,
        and the mask is bool or, from a compressor's `bias`, numbers to add to the scores.
        """
        if len(self.key) < self.num_layers:  # the prompt is still being read
            mask = self.mask
            self.read_prompt(layer, query, key, value)
            if len(self.key) == self.num_layers:
                self.mask = None  # N x N numbers that nobody needs any more
            return key, value, mask
        row, slot = torch.arange(len(key), device=key.device), self.slot[layer]  # [B], [B]
        self.key[layer][row, :, slot] = key.squeeze(2)
        self.value[layer][row, :, slot] = value.squeeze(2)
        key, value, mask = self.read(layer)
        if self.compressor is not None:
            position = self.position[layer, :, : key.shape[2]]  # [B, S]
            self.compressor.observe(layer, query, key, position)
            bias = self.compressor.bias(layer, position)  # [B, S], or None
            if bias is not None:
                mask = bias.masked_fill(position < 0, -math.inf)[:, None, None].to(key.dtype)  # [B, 1, 1, S]
        return key, value, mask

    def read_prompt(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Stores a layer's prompt. Without a plan it waits, since sizes are known once every layer is scored."""
        if self.compressor is None:
            return self.store(key, value, self.present)
        scores = self.compressor.score(query, key, self.present)  # [B, N]
        planned = self.compressor.planned(layer, self.num_layers, self.prompt_lengths)  # tokens to keep [B], or None
        if planned is not None:
            return self.store(key, value, self.compressor.retain(scores, planned, self.present))
        self.waiting.append((key, value, scores))
        if len(self.waiting) == self.num_layers:
            all_scores = torch.stack([scores for _, _, scores in self.waiting])  # [L, B, N]
            for counts in self.compressor.allocate(all_scores, self.present):
                key, value, scores = self.waiting.pop(0)  # pop: a layer's prompt is freed once its copy is made
                self.store(key, value, self.compressor.retain(scores, counts, self.present))

    def store(self, key: Tensor, value: Tensor, keep: Tensor) -> None:
        """Allocates the next layer and copies into it the prompt's key and value [B, Hkv, N, Dh] where keep [B, N]."""
        if self.compressor is not None:
            key, value = self.compressor.merge(key, value, keep, self.present)
        layer, count = len(self.key), keep.sum(-1)  # count: [B]
        self.kept[layer] = self.held[layer] = count
        slots = int(self.capacity(count, self.prompt_lengths + self.new_tokens).max())  # of the prompt that needs most
        self.position = F.pad(self.position, (0, max(0, slots - self.position.shape[2])), value=-1)
        new_key, new_value = self.allocate(key, value, slots)
        self.key.append(new_key)  # [B, Hkv, S, Dh]
        self.value.append(new_value)  # [B, Hkv, S, Dh]
        for row, tokens in enumerate(keep):
            filled = int(count[row])
            self.key[layer][row, :, :filled] = key[row, :, tokens]
            self.value[layer][row, :, :filled] = value[row, :, tokens]
            self.position[layer, row, :filled] = self.prompt_positions[row, tokens]

    def allocate(self, key: Tensor, value: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """Free slots for keys and values like these [B, Hkv, N, Dh]: two of [B, Hkv, S, Dh]."""
        shape = (*key.shape[:2], slots, key.shape[3])
        return key.new_zeros(shape), value.new_zeros(shape)  # zeros, since a masked NaN would still be a NaN

    def capacity(self, kept: Tensor, lengths: Tensor) -> Tensor:
        """Tokens a layer may hold after `lengths` [B] in all, if it kept `kept` of the prompt. Shaped as `kept`."""
        if self.compressor is None:
            return kept + lengths - self.prompt_lengths
        return self.compressor.capacity(kept, self.prompt_lengths, lengths)

    def advance(self) -> None:
        """Gives the next token a slot in every layer: the first free one while there is room, else the victim's.

        Sets `slot` and `held` [L, B], writes the token's position into `position` [L, B, S], adds 1 to `lengths` [B].
        """
        capacity = self.capacity(self.kept, self.lengths + 1)  # [L, B]
        self.slot = self.held  # [L, B]: slots fill up in order; without a compressor there is always a free one
        if self.compressor is not None:
            victim = self.compressor.victim(self.position, self.kept)  # [L, B]
            self.slot = torch.where(self.held < capacity, self.held, victim)  # [L, B]
        self.held = torch.minimum(self.held + 1, capacity)  # [L, B]
        self.position.scatter_(2, self.slot[..., None], self.lengths.expand_as(self.slot)[..., None])
        self.lengths = self.lengths + 1

    def read(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Key and value [B, Hkv, S, Dh] of the filled slots, and a mask [B, 1, 1, S] if some prompt fills fewer."""
        held = self.held[layer]  # [B]
        filled = int(held.max())
        mask = None if (held == filled).all() else (self.position[layer, :, :filled] >= 0)[:, None, None]
        return self.key[layer][:, :, :filled], self.value[layer][:, :, :filled], mask

    @property
    def held_bytes(self) -> int:
        """Bytes of the keys and values held now; free slots are not counted."""
        return int(self.held.sum()) * (self.key[0][0, :, 0].nbytes + self.value[0][0, :, 0].nbytes)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all slots, the free ones too."""
        return sum(tensor.nbytes for tensor in (*self.key, *self.value))


# ---------------------------------------------------------------- LLaVA


@dataclass
class Generation:
    """What `generate` returns."""

    token_ids: Tensor  # [B, new tokens]; after its end a sample is padded with the pad id
    kept: Tensor  # [B, L] prompt tokens each layer kept after prefill
    cache_bytes: int  # bytes of keys and values held at the end, all layers and samples
    allocated_bytes: int  # bytes of all cache slots, room for further tokens included


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token id per row of logits [B, V]: the likeliest at temperature 0, else drawn; returns [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / max(temperature, 1e-6)  # below that logits overflow, and the likeliest wins anyway
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -math.inf)
    if top_p < 1:
        sorted_logits, order = logits.sort(descending=True)
        probability = sorted_logits.softmax(-1)
        before = probability.cumsum(-1) - probability  # nucleus: out is what comes after top_p in all
        logits = logits.scatter(1, order, sorted_logits.masked_fill(before >= top_p, -math.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


class Llava(nn.Module):
    """Vision tower, projector, decoder, and generation."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision)
        self.multi_modal_projector = Projector(config)
        self.language_model = Decoder(config.text)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        tiled = len(config.image_grid_pinpoints) > 0  # LLaVA-NeXT
        self.image_newline = nn.Parameter(torch.zeros(config.text.hidden_size)) if tiled else None
        self.tie_weights()

    def tie_weights(self) -> None:
        """Shares the embedding with the output layer where the config says so."""
        if self.config.text.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight

    def image_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """[I, 3, R, R] -> [I, P, D]: what the decoder sees in place of each `<image>`.

        LLaVA-NeXT: pixels of all pictures' tiles, and each picture's (height, width) -> [tokens of all pictures, D].
        """
        config = self.config
        features = self.vision_tower(pixel_values, config.vision_feature_layer)  # [I, P + 1, Dv]
        if config.vision_feature_select_strategy == "default":
            features = features[:, 1:]  # [I, P, Dv]
        features = self.multi_modal_projector(features)  # [I, P, D]
        if self.image_newline is None or image_sizes is None:
            return features
        return pack(features, [config.tiling(size) for size in image_sizes.tolist()], self.image_newline)

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None, image_sizes: Tensor | None = None) -> Tensor:
        """Token embeddings [B, N, D], with projected patches written over the image positions, in order."""
        embeddings = self.language_model.embed_tokens(input_ids)  # [B, N, D]
        is_image = input_ids == self.config.image_token_id  # [B, N]
        check_images(self.config, int(is_image.sum()), pixel_values, image_sizes)
        if pixel_values is None:
            return embeddings
        features = self.image_features(pixel_values.to(embeddings.dtype), image_sizes)  # [I, P, D], or packed
        return embeddings.masked_scatter(is_image[..., None], features.to(embeddings.dtype))  # bfloat16 under autocast

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None,
                image_sizes: Tensor | None = None) -> Tensor:  # fmt: skip
        """Logits [B, N, V] of every position; differentiable, so a caller can train on them."""
        present = check_prompt(self.config.text, input_ids, attention_mask)  # [B, N]
        positions = (present.cumsum(-1) - 1).clamp(min=0)  # [B, N]
        hidden = self.embed(input_ids, pixel_values, image_sizes)  # [B, N, D]
        return self.lm_head(self.language_model(hidden, positions, causal_mask(present)))

    def new_cache(self, present: Tensor, max_new_tokens: int, compressor: Any) -> KVCache:
        """An empty cache for prompts with tokens where present [B, N]."""
        return KVCache(present, self.config.text.num_hidden_layers, max_new_tokens, compressor)

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None,
                image_sizes: Tensor | None = None, max_new_tokens: int = 128,
                compressor: Any = None) -> tuple[Tensor, KVCache]:  # fmt: skip
        """Reads the prompt: logits [B, V] for the first new token, and the cache, compressed if asked."""
        present = check_prompt(self.config.text, input_ids, attention_mask, max_new_tokens)  # [B, N]
        require_left_padding(present)
        cache = self.new_cache(present, max_new_tokens, compressor)
        if compressor is not None:
            compressor.begin(present, input_ids == self.config.image_token_id)
        hidden = self.embed(input_ids, pixel_values, image_sizes)  # [B, N, D]
        hidden = self.language_model(hidden, cache.prompt_positions, cache=cache)
        logits = self.lm_head(hidden[:, -1:])[:, 0]  # [B, V]
        require(logits.isfinite().all(), "The logits hold NaN or infinity; check the weights, or choose a wider dtype.")
        return logits, cache

    @torch.inference_mode()
    def decode_step(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        """Reads one new token of every prompt: ids [B] -> logits [B, V] for the next. The cache changes in place."""
        enough = cache.steps < cache.new_tokens
        require(enough, f"The cache was made for {cache.new_tokens} new tokens; give prefill a larger max_new_tokens.")
        cache.steps += 1
        return self.next_logits(token_ids, cache)

    def next_logits(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        """The arithmetic of `decode_step`, without its check: [B] -> [B, V]."""
        positions = cache.lengths[:, None]  # [B, 1]: in the text, whatever the cache has dropped of it
        cache.advance()
        hidden = self.language_model.embed_tokens(token_ids[:, None])  # [B, 1, D]
        return self.lm_head(self.language_model(hidden, positions, cache=cache))[:, 0]

    @torch.inference_mode()
    def decode(self, logits: Tensor, cache: KVCache, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
               seed: int | None = None,
               eos_token_id: int | Sequence[int] | None = None) -> Iterator[Tensor]:  # fmt: skip
        """Yields token ids [B], one step at a time, from what `prefill` returned.

        Ends when every sample has reached one of `eos_token_id` (default: the checkpoint's; () for none), or after
        the max_new_tokens of `prefill`. Temperature 0 takes the likeliest token; top_k 0 and top_p 1 switch these
        two off. A sample that has ended yields the pad id.
        """
        check_sampling(temperature, top_k, top_p)
        ends = self.config.eos_token_id if eos_token_id is None else eos_token_id
        stops = torch.tensor([ends] if isinstance(ends, int) else list(ends), dtype=torch.long, device=logits.device)
        generator = None if seed is None else torch.Generator(logits.device).manual_seed(seed)
        ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        for step in range(cache.new_tokens):
            token_ids = sample(logits, temperature, top_k, top_p, generator)  # [B]
            token_ids = token_ids.masked_fill(ended, self.config.pad_token_id)
            yield token_ids
            ended = ended | torch.isin(token_ids, stops)
            if step + 1 == cache.new_tokens or ended.all():
                return
            logits = self.decode_step(token_ids, cache)

    def stream(self, input_ids: Tensor, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None,
               image_sizes: Tensor | None = None, max_new_tokens: int = 128, compressor: Any = None,
               **sampling: Any) -> Iterator[Tensor]:  # fmt: skip
        """Yields token ids [B] as they are made; `sampling` as in `decode`."""
        logits, cache = self.prefill(input_ids, pixel_values, attention_mask, image_sizes, max_new_tokens, compressor)
        yield from self.decode(logits, cache, **sampling)

    def generate(self, input_ids: Tensor, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None,
                 image_sizes: Tensor | None = None, max_new_tokens: int = 128, compressor: Any = None,
                 **sampling: Any) -> Generation:  # fmt: skip
        """All new tokens at once, with what the cache kept; `sampling` as in `decode`."""
        logits, cache = self.prefill(input_ids, pixel_values, attention_mask, image_sizes, max_new_tokens, compressor)
        tokens = list(self.decode(logits, cache, **sampling))
        token_ids = torch.stack(tokens, dim=1) if tokens else input_ids.new_zeros(len(input_ids), 0)
        return Generation(token_ids, cache.kept.T, cache.held_bytes, cache.allocated_bytes)
