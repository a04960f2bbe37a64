"""LLaVA in one file: CLIP or SigLIP vision tower, projector, Llama or Qwen2 decoder, KV cache, generation.

Read it from top to bottom: what a line uses is defined above it. Only the cache, which layers are handed, comes after
them. A comment such as `# [B, N, D]` at the end of a line gives the shape of its result; a test checks every one.

    B prompts in the batch    I images               L layers              V vocabulary
    N tokens of a block       P patches per image    H query heads         G query heads per KV head
    S cache slots             R pixels per side      Hkv key-value heads   Dh head size
    F filled slots            Dv vision width        Hv vision heads       D decoder width

A block is what the decoder reads at once: a prompt, a further turn, or one new token. Every prompt of a batch is padded
on the left to the same N; `attention_mask` is 0 on the padding. A position counts the tokens before it in the text,
without padding; padding and free slots have position -1. Numbers agree with `transformers`; where implementations
differ, a comment names the class that this one follows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.anyres import pack
from minillava.checks import check_cache, check_images, check_logits, check_prompt, check_read, check_sampling
from minillava.config import LlavaConfig, TextConfig, VisionConfig

# ---------------------------------------------------------------- vision tower


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 · x), the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}
CosSin = tuple[Tensor, Tensor]  # of RoPE's angles at the positions of tokens, both [B, 1, N, Dh]
Waiting = tuple[int, Tensor, Tensor, Tensor]  # a layer that waits to be cached: its number, key, value and scores


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
        width, patch, clip = config.hidden_size, config.patch_size, config.has_cls
        self.class_embedding = nn.Parameter(torch.zeros(width)) if clip else None
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=not clip)
        self.position_embedding = nn.Embedding(config.num_patches + clip, width)
        # "layrnorm" is how every checkpoint spells it.
        self.pre_layrnorm = nn.LayerNorm(width, eps=config.layer_norm_eps) if clip else nn.Identity()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)  # in checkpoints, but never used

    def forward(self, pixel_values: Tensor, layer: int) -> Tensor:
        """[I, 3, R, R] -> [I, P + 1, Dv] after `layer` layers (negative: from the end); SigLIP's are [I, P, Dv]."""
        patches = self.patch_embedding(pixel_values)  # [I, Dv, R // patch, R // patch]
        hidden = patches.flatten(2).transpose(1, 2)  # [I, P, Dv]
        if self.class_embedding is not None:
            hidden = torch.cat([self.class_embedding.expand(len(hidden), 1, -1), hidden], dim=1)  # [I, P + 1, Dv]
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
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / frequency)  # in the length of training
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequency / scaling["factor"] + blend * frequency


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turns each pair of a head's numbers by an angle that grows with the position. [B, heads, N, Dh] unchanged.

    Llama's checkpoints pair x[i] with x[i + Dh/2]; the RoFormer paper pairs neighbours.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def visible(asking: Tensor, position: Tensor) -> Tensor:
    """The rule of every mask: a key is seen if a token is there, and not later than the query's: bool [B, 1, N, S].

    asking [B, N] are positions of queries. Padding asks as if at position 0, so that no row of the softmax is empty.
    """
    return ((position >= 0)[:, None] & (position[:, None] <= asking.clamp(min=0)[..., None]))[:, None]


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
        """[B, N, D] -> [B, N, D]: in training, and for every block of generation."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rope, mask, cache)  # [B, N, D]
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Decoder(nn.Module):
    """Token embeddings, layers and final norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = (DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.layers: Sequence[DecoderLayer] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def cos_sin(self, positions: Tensor) -> CosSin:
        """cos and sin at positions [B, N]. Angles are float32: bfloat16 rounds 257 to 256."""
        angle = positions[:, None, :, None] * rope_frequencies(self.config, positions.device)  # [B, 1, N, Dh // 2]
        angle = torch.cat([angle, angle], dim=-1)  # [B, 1, N, Dh]
        dtype = self.embed_tokens.weight.dtype
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def forward(
        self, hidden: Tensor, positions: Tensor, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Embeddings [B, N, D] of tokens at positions [B, N] -> [B, N, D], ready for the output layer."""
        rope = self.cos_sin(positions)
        for layer in self.layers:
            hidden = layer(hidden, rope, mask, cache)
        return self.norm(hidden)


# ---------------------------------------------------------------- KV cache


class Compressor(Protocol):
    """What a KV cache asks of a compression method. The bodies here keep every token.

    A prompt: `begin`, then in each layer `score` and `compress`, and `capacity` of a layer that is stored. A single
    token: `capacity` and `victim` of all layers, then `attend` in each. A turn: `attend` in each layer, then for each
    token `capacity` and `victim` of all. Capacities never fall. An object has notes, so it serves one cache at a time.
    """

    present: Tensor  # which tokens of the prompts are not padding, [B, N]

    def begin(self, present: Tensor, image: Tensor, layers: int) -> None:
        """Before the prompts are read: tokens stand where present [B, N], those of images where image [B, N]."""
        self.present = present

    def score(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """How much each key matters: query [B, H, N, Dh], key and value [B, Hkv, N, Dh] -> [B, N]."""
        return torch.zeros_like(self.present, dtype=torch.float32)

    def compress(self, waiting: list[Waiting]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Takes the layers of known size off the front of `waiting`: key, value, and keep [B, N], what to cache."""
        while waiting:
            _, key, value, _ = waiting.pop(0)
            yield key, value, self.present

    def capacity(self, kept: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
        """Tokens to hold at most of texts of `lengths` [B], shaped as `kept` of the prompts: [L, B] or [B] of one."""
        return kept + lengths - prompt_lengths

    def victim(self, position: Tensor, kept: Tensor) -> Tensor:
        """The slot [L, B] whose token is dropped where a layer is full; position [L, B, S] of each slot's token."""
        return torch.zeros_like(kept)  # never used here, since there is always room

    def attend(self, layer: int, query: Tensor, key: Tensor, seen: Tensor | None, position: Tensor) -> Tensor | None:
        """Looks on while a later block's query [B, H, N, Dh] reads key [B, Hkv, S, Dh] of tokens at position [B, S].

        seen [B, 1, N, S] is the mask; None: all are seen. May return numbers [B, S] to add to the keys' scores.
        """
        return None


class KeepAll(Compressor):
    """The full cache."""


class KVCache:
    """Keys and values of every layer, in slots that are allocated once and overwritten in place.

    A text is read in blocks: the prompt, then turns or single tokens. `begin` (the prompt) or `advance` gives a block's
    positions; then every layer calls `update` and attends to what it returns. `compressor` decides what a layer keeps
    of the prompt, and how many tokens it may hold later. When a layer is full, a new token takes the slot of a victim.
    A single token takes its slot first, and then attends to the slots. A turn first attends to all that is held and to
    itself; then its tokens take slots one by one. If they took slots first, they could push each other out unread.
    """

    def __init__(self, config: TextConfig, room: int, compressor: Compressor | None = None):
        check_cache(config, 0, room, compressor)
        self.config, self.compressor, self.room = config, compressor or KeepAll(), room  # tokens that may still come
        self.key: list[Tensor] = []  # of each stored layer, [B, Hkv, S, Dh]; after RoPE, so slots need no order
        self.value: list[Tensor] = []
        self.waiting: list[Waiting] = []  # layers of the prompt that are not stored yet
        self.turn: list[tuple[Tensor, Tensor]] = []  # key and value of a turn, of the layers that have read it
        self.slot: Tensor | None = None  # where a single token goes, [L, B]; None for a prompt or a turn

    def begin(self, present: Tensor, image: Tensor) -> Tensor:
        """Before the prompts are read: tokens stand where present [B, N]. Returns their positions [B, N]."""
        self.compressor.begin(present, image, self.config.num_hidden_layers)
        self.block = torch.where(present, present.cumsum(-1) - 1, -1)  # [B, N]
        self.mask = None if present.all() else visible(self.block, self.block)
        self.prompt_lengths = present.sum(-1)  # [B]
        self.lengths = self.prompt_lengths.clone()  # [B]: of the text so far, dropped tokens included
        self.kept = self.lengths.new_zeros(self.config.num_hidden_layers, len(present))  # [L, B]: of the prompt
        self.held = self.kept.clone()  # [L, B]: tokens now, in the first slots
        self.position = self.lengths.new_full((*self.kept.shape, 0), -1)  # [L, B, S]: of each slot's token; -1: free
        return self.block.clamp(min=0)

    def advance(self, count: int) -> Tensor:
        """Before `count` further tokens are read: returns their positions [B, N]. A single one takes its slots now."""
        self.block = self.lengths[:, None] + torch.arange(count, device=self.lengths.device)  # [B, N]
        self.lengths = self.lengths + count
        self.mask = None  # of the prompt: N x N numbers, no longer needed
        self.slot = self.take_slot(self.block[:, 0]) if count == 1 else None
        return self.block

    def take_slot(self, position: Tensor) -> Tensor:
        """Gives the token at `position` [B] a slot [L, B] in every layer: a free one, or in a full layer a victim's."""
        capacity = self.compressor.capacity(self.kept, self.prompt_lengths, position + 1)  # [L, B]
        victim = self.compressor.victim(self.position, self.kept)  # [L, B]
        slot = torch.where(self.held < capacity, self.held, victim)  # [L, B]
        self.held = torch.minimum(self.held + 1, capacity)  # [L, B]
        self.position.scatter_(2, slot[..., None], position.expand_as(slot)[..., None])
        return slot

    def update(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Takes a layer's query [B, H, N, Dh], key and value [B, Hkv, N, Dh] of a block; returns what attention reads.

        That is key and value [B, Hkv, S, Dh], and a mask: None for plain causal attention, bool where a query sees a
        key, or numbers to add to the scores.
        """
        if layer >= len(self.key):  # nothing is stored of this layer yet: this is the prompt
            self.waiting.append((layer, key, value, self.compressor.score(layer, query, key, value)))
            for stored in self.compressor.compress(self.waiting):
                self.store(*stored)
            return key, value, self.mask
        fewest, filled = (int(held) for held in self.held[layer].aminmax())  # slots, of all texts of the batch
        position = self.position[layer, :, :filled]  # [B, F]
        if self.slot is not None:  # a single token: it is in its slot before it is read
            row, slot = torch.arange(len(key), device=key.device), self.slot[layer]  # [B], [B]
            self.key[layer][row, :, slot], self.value[layer][row, :, slot] = key.squeeze(2), value.squeeze(2)
            key, value = self.key[layer][:, :, :filled], self.value[layer][:, :, :filled]
        else:
            self.turn.append((key, value))
            key = torch.cat([self.key[layer][:, :, :filled], key], dim=2)  # [B, Hkv, F + N, Dh]
            value = torch.cat([self.value[layer][:, :, :filled], value], dim=2)  # [B, Hkv, F + N, Dh]
            position = torch.cat([position, self.block], dim=1)  # [B, F + N]
        all_seen = self.slot is not None and fewest == filled  # by a single token; a turn must stay causal
        seen = None if all_seen else visible(self.block, position)
        bias = self.compressor.attend(layer, query, key, seen, position)
        if len(self.turn) == self.config.num_hidden_layers:
            self.settle()  # slots may change now: the last layer is about to read copies
        if bias is None:
            return key, value, seen
        bias = bias[:, None, None].to(key.dtype)  # [B, 1, 1, S]
        return key, value, bias if seen is None else torch.where(seen, bias, -math.inf)

    def store(self, key: Tensor, value: Tensor, keep: Tensor) -> None:
        """Gives the next layer slots and copies the prompt's key and value [B, Hkv, N, Dh] there, where keep [B, N]."""
        layer, count = len(self.key), keep.sum(-1)  # count: [B]
        self.kept[layer] = self.held[layer] = count
        new_key, new_value = self.new_slots(key, value, count)
        for row, tokens in enumerate(keep):
            filled = int(count[row])
            new_key[row, :, :filled], new_value[row, :, :filled] = key[row, :, tokens], value[row, :, tokens]
            self.position[layer, row, :filled] = self.block[row, tokens]
        self.key.append(new_key)
        self.value.append(new_value)

    def settle(self) -> None:
        """Stores a turn that every layer has read. Its tokens take slots one by one; a long one loses its start."""
        slot = torch.stack([self.take_slot(position) for position in self.block.unbind(1)], dim=2)  # [L, B, N]
        stays = self.position.gather(2, slot) == self.block  # [L, B, N]: False where a later one took the slot
        for layer, (key, value) in enumerate(self.turn):
            row, token = stays[layer].nonzero(as_tuple=True)
            to = slot[layer, row, token]
            self.key[layer][row, :, to], self.value[layer][row, :, to] = key[row, :, token], value[row, :, token]
        self.turn.clear()

    def new_slots(self, key: Tensor, value: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Slots for all the room after `kept` [B] tokens: two of [B, Hkv, S, Dh], zeros. Widens `position` to S."""
        slots = int(self.compressor.capacity(kept, self.prompt_lengths, self.lengths + self.room).max())
        self.position = F.pad(self.position, (0, max(0, slots - self.position.shape[2])), value=-1)
        shape = (*key.shape[:2], slots, key.shape[3])
        return key.new_zeros(shape), value.new_zeros(shape)  # zeros, since a masked NaN would still be a NaN

    @torch.inference_mode()
    def reserve(self, count: int) -> None:
        """Makes room for `count` further tokens. Raises LlavaError if the model has no positions for them."""
        check_cache(self.config, self.room + (int(self.lengths.max()) if self.key else 0), count, self.compressor)
        self.room += count
        for layer, (key, value) in enumerate(zip(self.key, self.value)):
            wide, filled = self.new_slots(key, value, self.kept[layer]), key.shape[2]
            wide[0][:, :, :filled], wide[1][:, :, :filled] = key, value
            self.key[layer], self.value[layer] = wide

    @torch.inference_mode()
    def fork(self) -> KVCache:
        """An independent copy, with the compressor and its notes: one picture, read once, for several questions."""
        return copy.deepcopy(self)

    @property
    def held_bytes(self) -> int:
        """Bytes of the keys and values held now, without free slots, and of what a method notes of each token."""
        numbers = int(self.held.sum()) * sum(t[0][0, :, 0].nbytes for t in (self.key, self.value)) if self.key else 0
        return numbers + getattr(self.compressor, "notes_bytes", 0)

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
        logits = logits.scatter(1, order, sorted_logits.masked_fill(before >= max(top_p, 1e-30), -math.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


class Llava(nn.Module):
    """Vision tower, projector, decoder, and generation. LLaVA-NeXT, which cuts images into tiles, has a newline."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision)
        self.multi_modal_projector = Projector(config)
        self.language_model = Decoder(config.text)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.image_newline = nn.Parameter(torch.zeros(config.text.hidden_size)) if config.image_grid_pinpoints else None
        if config.text.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight

    def image_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """[I, 3, R, R] -> [I, P, D]: what the decoder sees instead of each `<image>`.

        LLaVA-NeXT: pixels of all pictures' tiles, and each picture's (height, width) -> [tokens of all pictures, D].
        """
        features = self.vision_tower(pixel_values, self.config.vision_feature_layer)  # [I, P + 1, Dv]
        if self.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]  # [I, P, Dv]
        features = self.multi_modal_projector(features)  # [I, P, D]
        if self.image_newline is None or image_sizes is None:
            return features
        return pack(features, [self.config.tiling(size) for size in image_sizes.tolist()], self.image_newline)

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None, image_sizes: Tensor | None = None) -> Tensor:
        """Token embeddings [B, N, D], with projected patches written over the image positions, in order."""
        embeddings = self.language_model.embed_tokens(input_ids)  # [B, N, D]
        if pixel_values is None and input_ids.shape[1] == 1:
            return embeddings  # a model may write an image token by itself, which then has no image
        is_image = input_ids == self.config.image_token_id  # [B, N]
        check_images(self.config, is_image, pixel_values, image_sizes)
        if pixel_values is None:
            return embeddings
        features = self.image_features(pixel_values.to(embeddings.dtype), image_sizes)  # [I, P, D], or packed
        return embeddings.masked_scatter(is_image[..., None], features.to(embeddings.dtype))  # bfloat16 under autocast

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None,
                image_sizes: Tensor | None = None) -> Tensor:  # fmt: skip
        """Logits [B, N, V] of every position; differentiable, so a caller can train on them."""
        present = check_prompt(self.config.text, input_ids, attention_mask)  # [B, N]
        positions = torch.where(present, present.cumsum(-1) - 1, -1)  # [B, N]
        hidden = self.embed(input_ids, pixel_values, image_sizes)  # [B, N, D]
        mask = None if present.all() else visible(positions, positions)  # None: plain causal attention, without a table
        return self.lm_head(self.language_model(hidden, positions.clamp(min=0), mask))

    def new_cache(self, room: int = 128, compressor: Compressor | None = None) -> KVCache:
        """An empty cache for a prompt and `room` tokens after it; compressor None keeps every token."""
        return KVCache(self.config.text, room, compressor)

    @torch.inference_mode()
    def read(self, input_ids: Tensor, cache: KVCache, pixel_values: Tensor | None = None,
             attention_mask: Tensor | None = None, image_sizes: Tensor | None = None) -> Tensor:  # fmt: skip
        """Reads the next block of every text, [B, N] -> logits [B, V] for the token after it.

        First a prompt with its images, then turns or single tokens. What cannot be read raises LlavaError and leaves
        the cache as it was. Logits that are not finite raise it when all is read. After other errors, drop the cache.
        """
        present = check_read(self.config.text, cache, input_ids, attention_mask, pixel_values)  # [B, N]
        hidden = self.embed(input_ids, pixel_values, image_sizes)  # [B, N, D]
        if cache.key:
            positions = cache.advance(input_ids.shape[1])  # [B, N]
            cache.room -= input_ids.shape[1]
        else:
            positions = cache.begin(present, input_ids == self.config.image_token_id)  # [B, N]
        hidden = self.language_model(hidden, positions, cache=cache)
        return check_logits(self.lm_head(hidden[:, -1:])[:, 0])

    @torch.inference_mode()
    def decode(self, logits: Tensor, cache: KVCache, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
               seed: int | None = None,
               eos_token_id: int | Sequence[int] | None = None) -> Iterator[Tensor]:  # fmt: skip
        """Yields token ids [B], one step at a time: the first from logits [B, V], which `read` returned.

        Ends when every sample has reached one of `eos_token_id` (default: the checkpoint's; () for none), or when the
        cache has no more room. The last token is not read: begin the next turn with it. Temperature 0 takes the
        likeliest; top_k 0 and top_p 1 switch these two off. A sample that has ended yields the pad id, and reads it.
        """
        check_sampling(temperature, top_k, top_p)
        ends = self.config.eos_token_id if eos_token_id is None else eos_token_id
        stops = torch.as_tensor(ends, dtype=torch.long, device=logits.device).flatten()
        generator = None if seed is None else torch.Generator(logits.device).manual_seed(seed)
        ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        for left in range(cache.room, 0, -1):
            token_ids = sample(logits, temperature, top_k, top_p, generator)  # [B]
            token_ids = token_ids.masked_fill(ended, self.config.pad_token_id)
            yield token_ids
            ended = ended | torch.isin(token_ids, stops)
            if left == 1 or ended.all():
                return
            logits = self.read(token_ids[:, None], cache)

    def stream(self, input_ids: Tensor, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None,
               image_sizes: Tensor | None = None, max_new_tokens: int = 128,
               compressor: Compressor | None = None, **sampling: Any) -> Iterator[Tensor]:  # fmt: skip
        """Yields token ids [B] as they are made; `sampling` as in `decode`."""
        cache = self.new_cache(max_new_tokens, compressor)
        logits = self.read(input_ids, cache, pixel_values, attention_mask, image_sizes)
        yield from self.decode(logits, cache, **sampling)

    def generate(self, input_ids: Tensor, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None,
                 image_sizes: Tensor | None = None, max_new_tokens: int = 128,
                 compressor: Compressor | None = None, **sampling: Any) -> Generation:  # fmt: skip
        """All new tokens at once, with what the cache kept; `sampling` as in `decode`."""
        cache = self.new_cache(max_new_tokens, compressor)
        logits = self.read(input_ids, cache, pixel_values, attention_mask, image_sizes)
        tokens = list(self.decode(logits, cache, **sampling))
        token_ids = torch.stack(tokens, dim=1) if tokens else input_ids.new_zeros(len(input_ids), 0)
        return Generation(token_ids, cache.kept.T, cache.held_bytes, cache.allocated_bytes)
