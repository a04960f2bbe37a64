"""LLaVA in one file: CLIP vision tower, projector, Llama decoder, KV cache, generation.

Read it from top to bottom: whatever a line uses stands above it. A comment such as
`# [B, N, D]` at the end of a line is the shape of what that line makes; a test checks them all.

    B prompts in the batch    I images             L layers            V vocabulary
    N prompt tokens           P patches an image   H query heads       G query heads a KV head
    T tokens in all           R pixels a side      Hkv key-value heads Dh head size
    S cache slots             Dv vision width      Hv vision heads     D decoder width

Every prompt of a batch is padded on the left to the same N; `attention_mask` is 0 on the padding.
Numbers agree with `transformers` (LlavaForConditionalGeneration); where a choice had to be made,
the comment names the class whose behaviour is matched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefixkv import PrefixKV


class LlavaError(ValueError):
    """Input that cannot be used, told in one sentence: what was found, what was expected, what to do."""


def require(condition: object, sentence: str) -> None:
    """Raises LlavaError with the sentence unless the condition holds."""
    if not condition:
        raise LlavaError(sentence)


# ---------------------------------------------------------------- configuration


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 · x), the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu, "silu": F.silu}


@dataclass(frozen=True)
class VisionConfig:
    """CLIP's vision tower; the names and defaults of `CLIPVisionConfig`."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @property
    def num_patches(self) -> int:
        """Patches of one image; a border narrower than a patch is cut off, as a strided convolution does."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    """The Llama decoder; the names and defaults of `LlamaConfig`."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: one for every query head
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # None, or {"rope_type": "linear" | "llama3", "factor": ...}

    @property
    def kv_heads(self) -> int:
        """Heads that keys and values have."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Numbers a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class LlavaConfig:
    """The whole model: its two parts, and how image features enter the text."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    image_token_id: int = 32000
    vision_feature_layer: int = -2  # 0 is the input of the first layer, -1 the output of the last
    vision_feature_select_strategy: str = "default"  # "default" drops CLS, "full" keeps it
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    mm_projector_type: str = "mlp2x_gelu"  # or "linear": one layer, as in the first LLaVA
    eos_token_id: tuple[int, ...] = (2,)
    pad_token_id: int = 0

    @property
    def num_image_tokens(self) -> int:
        """Decoder positions that one image takes."""
        return self.vision.num_patches + (self.vision_feature_select_strategy == "full")


# ---------------------------------------------------------------- CLIP vision tower


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
    """CLIP ViT: cuts the image into patches and lets them look at each other."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(config.num_patches + 1, width)
        self.pre_layrnorm = nn.LayerNorm(width, eps=config.layer_norm_eps)  # spelt so in every checkpoint
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        # Part of every CLIP checkpoint; LLaVA takes its features before it.
        self.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, layer: int) -> Tensor:
        """[I, 3, R, R] -> [I, P + 1, Dv], CLS first, after `layer` layers (negative: from the end)."""
        patches = self.patch_embedding(pixel_values)  # [I, Dv, R // patch, R // patch]
        patches = patches.flatten(2).transpose(1, 2)  # [I, P, Dv]
        cls = self.class_embedding.expand(len(patches), 1, -1)  # [I, 1, Dv]
        hidden = torch.cat([cls, patches], dim=1) + self.position_embedding.weight  # [I, P + 1, Dv]
        hidden = self.pre_layrnorm(hidden)
        depth = layer if layer >= 0 else len(self.layers) + 1 + layer
        for block in self.layers[:depth]:  # the layers above are never run
            hidden = block(hidden)
        return hidden


class Projector(nn.Module):
    """Carries image features into the decoder's embedding space (LLaVA-1.5: a two-layer MLP)."""

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


# ---------------------------------------------------------------- KV cache


class KVCache:
    """Keys and values of every layer, in slots that are allocated once and overwritten in place.

    Keys are cached after RoPE, so attention does not care in which order the slots lie: a token that
    the compressor gives up is overwritten by the newest, and nothing is ever moved or concatenated.
    Layers and samples may hold different numbers of tokens; slots beyond a sample's own are masked.

    A compressor has PrefixKV's methods, and two more if it needs them: `merge(key, value, keep, present)`
    changes a prompt's keys and values before some are dropped; `observe(layer, query, key, position)` sees
    every new token's query, the keys it reads and where they stand.
    """

    def __init__(self, attention_mask: Tensor, num_layers: int, new_tokens: int, compressor: PrefixKV | None):
        self.compressor, self.new_tokens = compressor, new_tokens
        self.present = attention_mask.bool()  # [B, N]
        self.seen = attention_mask.sum(-1)  # [B]
        self.prompt = self.seen.clone()  # [B]
        self.padding = attention_mask.shape[1] - self.prompt  # [B]
        self.key: list[Tensor] = []  # of each layer [B, Hkv, S, Dh]; S differs between layers
        self.value: list[Tensor] = []
        self.kept = self.prompt.repeat(num_layers, 1)  # [L, B]
        self.used = self.kept.clone()  # [L, B]
        # The position of the token in each slot, -1 in a free one. One slot wider than the widest layer: if they were
        # equally wide, a compiled step would hold only for caches in which the same layer is the widest.
        self.position = self.seen.new_full((num_layers, len(self.seen), 0), -1)

    def room(self, kept: Tensor, seen: Tensor) -> Tensor:
        """Tokens a layer may hold once `seen` tokens have passed, of which it kept `kept` [..., B] of the prompt."""
        if self.compressor is None:
            return kept + seen - self.prompt
        return self.compressor.room(kept, self.prompt, seen)

    def store(self, index: int, key: Tensor, value: Tensor, keep: Tensor) -> None:
        """Allocates layer `index` and copies into it the prompt's key and value [B, Hkv, N, Dh] where keep [B, N]."""
        if merge := getattr(self.compressor, "merge", None):  # dropped tokens may leave something in those that stay
            key, value = merge(key, value, keep, self.present)
        count = keep.sum(-1)  # [B]
        self.kept[index] = self.used[index] = count
        order = (~keep).byte().argsort(dim=-1, stable=True)[:, : int(count.max())]  # kept tokens first, in order
        slots = int(self.room(count, self.prompt + self.new_tokens).max())
        batch, heads, _, size = key.shape
        # Zeros, since a masked slot is multiplied by an attention weight of 0, and 0 · NaN is NaN. In float32 the
        # values lie transposed in memory, so that the products of `Attention.step` read both from end to end.
        self.key.append(key.new_zeros(batch, heads, slots, size))  # [B, Hkv, S, Dh]
        turned = value.new_zeros(batch, heads, size, slots).mT  # [B, Hkv, S, Dh]
        self.value.append(turned if value.dtype == torch.float32 else turned.contiguous())  # [B, Hkv, S, Dh]
        for held, source in ((self.key, key), (self.value, value)):
            kept = source.gather(2, order[:, None, :, None].expand(-1, heads, -1, size))
            held[index][:, :, : order.shape[1]] = kept
        free = torch.arange(order.shape[1], device=order.device) >= count[:, None]
        position = (order - self.padding[:, None]).masked_fill(free, -1)
        if slots >= self.position.shape[2]:
            self.position = F.pad(self.position, (0, slots + 1 - self.position.shape[2]), value=-1)
        self.position[index, :, : order.shape[1]] = position

    def advance(self) -> None:
        """Gives the token about to be computed a slot in every layer: a free one, or one that is given up."""
        room = self.room(self.kept, self.seen + 1)  # [L, B]
        self.slot = self.used  # [L, B]
        if self.compressor is not None:
            self.slot = torch.where(self.used < room, self.used, self.compressor.evict(self.position, self.kept))
        self.used = torch.minimum(self.used + 1, room)  # [L, B]
        self.position.scatter_(2, self.slot[..., None], self.seen.expand_as(self.slot)[..., None])
        self.seen = self.seen + 1
        if not torch.compiler.is_compiling():  # numbers on the host would split what is compiled
            self.longest, self.shortest = self.used.amax(1).tolist(), self.used.amin(1).tolist()

    def write(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Puts the new token's key and value [B, Hkv, 1, Dh] in their slots; returns what attention reads."""
        keys, values, row = self.key[index], self.value[index], torch.arange(len(key), device=key.device)
        keys[row, :, self.slot[index]], values[row, :, self.slot[index]] = key.squeeze(2), value.squeeze(2)
        if torch.compiler.is_compiling():  # all slots and a mask: shapes that stay the same from step to step
            filled, even = keys.shape[2], False
        else:
            filled, even = self.longest[index], self.longest[index] == self.shortest[index]
        mask = None if even else (self.position[index, :, :filled] >= 0)[:, None, None]
        return keys[:, :, :filled], values[:, :, :filled], mask

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values held now; free slots are not counted."""
        token = [2 * key.shape[1] * key.shape[3] * key.element_size() for key in self.key]
        return int((self.used.sum(1) * torch.tensor(token, device=self.used.device)).sum())


# ---------------------------------------------------------------- Llama decoder


def times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """A matrix [..., R, C] and a few vectors [..., G, C] that it is multiplied with: [..., G, R].

    Reads the matrix once, each row as it lies in memory, which is most of what a decode step takes. Compiled, the
    sums of products of all vectors become one loop over it, which may melt into what stands around it.
    """
    if not torch.compiler.is_compiling():
        apart = matrix.stride(-2) - matrix.shape[-1] > 64  # slots still free stand between the rows of the values
        return vectors @ matrix.mT if apart else (matrix @ vectors.mT).mT
    return torch.stack([(matrix * vector[..., None, :]).sum(-1) for vector in vectors.unbind(-2)], dim=-2)


class Linear(nn.Linear):
    """nn.Linear that keeps every thread of a CPU busy where there is one token a sample to multiply with.

    Reading the weights is then all the work, and the matrix library leaves it to a single thread. A batch of products,
    each with one of up to 16 parts of the weights, is shared out; with up to 4 tokens, `times` is the faster product.
    Small weights are in the caches, where nothing is gained.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, in] -> [B, N, out]."""
        melts = torch.compiler.is_compiling() and len(x) <= 8  # one loop, see `times`; more sums fill the registers
        if not (x.is_cpu and x.shape[1] == 1 and (melts or self.weight.numel() >= 2**16)):
            return F.linear(x, self.weight, self.bias)
        parts = 1 if melts else math.gcd(self.out_features, 16)
        weight = self.weight.view(parts, -1, self.in_features)  # [parts, rows, width]
        vectors = x[:, 0].expand(parts, -1, -1)  # [parts, B, width]
        product = times(weight, vectors) if melts or len(x) <= 4 else vectors @ weight.mT  # [parts, B, rows]
        # Contiguous: after `times` a token's numbers stand B apart in memory, and every product that follows is slower.
        product = product.transpose(0, 1).reshape(len(x), 1, -1).contiguous()  # [B, 1, out]
        return product if self.bias is None else product + self.bias


class RMSNorm(nn.Module):
    """x / rms(x) · weight, the mean square taken in float32 whatever x is (`LlamaRMSNorm`)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)


def rope_frequencies(config: TextConfig, device: torch.device | str = "cpu") -> Tensor:
    """Radians a position turns each pair of dimensions by: [Dh / 2], float32 (RoFormer, section 3.2.2)."""
    size = config.head_size
    exponent = torch.arange(0, size, 2, dtype=torch.int64).to(device=device, dtype=torch.float32) / size
    frequency = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    # Llama 3.1: leave fast pairs alone, slow the slow ones down, blend between (`_compute_llama3_parameters`).
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequency / scaling["factor"] + blend * frequency


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turns the pair (x[i], x[i + Dh/2]) of every head by its position's angle. Shape stays [B, heads, N, Dh].

    Llama checkpoints pair dimension i with i + Dh/2 (`rotate_half`), not with its neighbour as the paper does.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin  # `rope` has made the first half of sin negative


class Attention(nn.Module):
    """Grouped-query self-attention: G = H / Hkv query heads read the same keys and values."""

    def __init__(self, config: TextConfig):
        super().__init__()
        size, bias = config.head_size, config.attention_bias
        self.num_heads, self.kv_heads = config.num_attention_heads, config.kv_heads
        self.q_proj = Linear(config.hidden_size, self.num_heads * size, bias=bias)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * size, bias=bias)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * size, bias=bias)
        self.o_proj = Linear(self.num_heads * size, config.hidden_size, bias=bias)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, D] -> query [B, H, N, Dh], key and value [B, Hkv, N, Dh]; query and key after RoPE."""
        query = rotate(split_heads(self.q_proj(x), self.num_heads), *rope)  # [B, H, N, Dh]
        key = rotate(split_heads(self.k_proj(x), self.kv_heads), *rope)  # [B, Hkv, N, Dh]
        value = split_heads(self.v_proj(x), self.kv_heads)  # [B, Hkv, N, Dh]
        return query, key, value

    def prompt(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Causal attention of a whole prompt: [B, N, D]. Without padding `mask` is None."""
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=self.kv_heads != self.num_heads
        )  # [B, H, N, Dh]
        return self.o_proj(merge_heads(context))

    def step(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """One new token reads the cache: query [B, H, 1, Dh], key and value [B, Hkv, S, Dh] -> [B, 1, D].

        Two products of a matrix and G vectors, the query heads of a group, so no key is repeated in memory.
        """
        grouped = query.unflatten(1, (self.kv_heads, -1)).squeeze(3)  # [B, Hkv, G, Dh]
        if key.dtype != torch.float32:  # products would round the scores to 8 or 11 bits; this kernel does not
            context = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask)
            return self.o_proj(context.flatten(1)[:, None])
        score = times(key, grouped * query.shape[3] ** -0.5)  # [B, Hkv, G, S]
        if mask is not None:
            score = score.masked_fill(~mask, -math.inf)
        context = times(value.mT, score.softmax(-1))  # [B, Hkv, G, Dh]
        return self.o_proj(context.flatten(1)[:, None])


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: TextConfig):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(width, inner, bias=bias)
        self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm Llama layer."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, hidden: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, last_only: bool = False
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """A whole prompt: [B, N, D] -> [B, N, D], and the layer's query, key and value.

        last_only: the last token's output alone, [B, 1, D]; of the top layer, a prefill reads no other.
        """
        query, key, value = self.self_attn.project(self.input_layernorm(hidden), rope)
        if last_only:
            mask = None if mask is None else mask[:, :, -1:]
            hidden = hidden[:, -1:] + self.self_attn.step(query[:, :, -1:], key, value, mask)  # [B, 1, D]
        else:
            hidden = hidden + self.self_attn.prompt(query, key, value, mask)  # [B, N, D]
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), (query, key, value)

    def step(self, hidden: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache, index: int) -> Tensor:
        """One new token: [B, 1, D] -> [B, 1, D]; its key and value enter the cache of layer `index`."""
        query, key, value = self.self_attn.project(self.input_layernorm(hidden), rope)
        keys, values, mask = cache.write(index, key, value)
        if observe := getattr(cache.compressor, "observe", None):
            observe(index, query, keys, cache.position[index, :, : keys.shape[2]])
        hidden = hidden + self.self_attn.step(query, keys, values, mask)  # [B, 1, D]
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Decoder(nn.Module):
    """Token embeddings, the layers, the final norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers: Sequence[DecoderLayer] = nn.ModuleList(  # type: ignore[assignment]
            DecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for positions [B, N]; angles are float32, since bfloat16 cannot tell 257 from 256."""
        angle = positions[:, None, :, None] * rope_frequencies(self.config, positions.device)  # [B, 1, N, Dh // 2]
        cos = torch.cat([angle.cos(), angle.cos()], dim=-1)  # [B, 1, N, Dh]
        sin = torch.cat([-angle.sin(), angle.sin()], dim=-1)  # [B, 1, N, Dh]
        dtype = self.embed_tokens.weight.dtype
        return cos.to(dtype), sin.to(dtype)


# ---------------------------------------------------------------- LLaVA


@dataclass
class Generation:
    """What `generate` returns."""

    token_ids: Tensor  # [B, new tokens]; a sample that ended earlier is filled up with the pad id
    kept: Tensor  # [B, L] prompt tokens each layer kept after prefill
    cache_bytes: int  # bytes of keys and values held at the end, all layers and samples


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token id per row of logits [B, V]: the likeliest at temperature 0, else drawn; returns [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -math.inf)
    if top_p < 1:
        sorted_logits, order = logits.sort(descending=True)
        probability = sorted_logits.softmax(-1)
        before = probability.cumsum(-1) - probability  # nucleus: stop once the likelier ones sum to top_p
        logits = logits.scatter(1, order, sorted_logits.masked_fill(before >= top_p, -math.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


class Llava(nn.Module):
    """Vision tower, projector, decoder, and the loop that makes text."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision)
        self.multi_modal_projector = Projector(config)
        self.language_model = Decoder(config.text)
        self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Shares the embedding with the output layer where the config says so."""
        if self.config.text.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """[I, 3, R, R] -> [I, P, D]: what the decoder sees in place of each `<image>`."""
        config = self.config
        features = self.vision_tower(pixel_values, config.vision_feature_layer)  # [I, P + 1, Dv]
        if config.vision_feature_select_strategy == "default":
            features = features[:, 1:]  # [I, P, Dv]
        return self.multi_modal_projector(features)

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Token embeddings [B, N, D], with projected patches written over the image positions, in order."""
        embeddings = self.language_model.embed_tokens(input_ids)  # [B, N, D]
        image = input_ids == self.config.image_token_id  # [B, N]
        images = 0 if pixel_values is None else len(pixel_values)
        tokens, expected = int(image.sum()), images * self.config.num_image_tokens
        require(tokens == expected, f"input_ids hold {tokens} image tokens, but {images} images make {expected}.")
        if pixel_values is None:
            return embeddings
        features = self.image_features(pixel_values.to(embeddings.dtype))
        return embeddings.masked_scatter(image[..., None], features)

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits [B, N, V] of every position; differentiable, so a caller can train on them."""
        hidden = self.embed(input_ids, pixel_values)
        rope, mask = self.positions(input_ids, attention_mask)
        for layer in self.language_model.layers:
            hidden, _ = layer(hidden, rope, mask)
        return self.lm_head(self.language_model.norm(hidden))  # [B, N, V]

    def positions(
        self, input_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """cos and sin for every token, counted without padding, and who may look at whom (None: plain causal)."""
        length = input_ids.shape[1]
        limit = self.config.text.max_position_embeddings
        require(length <= limit, f"The prompt has {length} tokens; this model has {limit} positions. Shorten it.")
        if attention_mask is None or attention_mask.all():
            return self.language_model.rope(torch.arange(length, device=input_ids.device)[None]), None
        present = attention_mask.bool()  # [B, N]
        causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()  # [N, N]
        # Padding looks at itself, so that no row of the softmax is empty; nobody looks at padding.
        mask = (causal & present[:, None]) | torch.eye(length, dtype=torch.bool, device=input_ids.device)  # [B, N, N]
        positions = (present.cumsum(-1) - 1).clamp(min=0)  # [B, N]
        return self.language_model.rope(positions), mask[:, None]

    @torch.inference_mode()
    def prefill(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 128,
        compressor: PrefixKV | None = None,
    ) -> tuple[Tensor, KVCache]:
        """Reads the prompt: logits [B, V] for the first new token, and the cache, compressed if asked."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        left = (attention_mask.diff(dim=-1) >= 0).all() and attention_mask[:, -1:].all()
        require(left, "attention_mask has padding after the prompt; pad prompts on the left to generate.")
        length, limit = input_ids.shape[1], self.config.text.max_position_embeddings
        require(
            length + max_new_tokens <= limit,
            f"{length} prompt tokens and {max_new_tokens} new ones exceed the model's {limit} positions; "
            "shorten the prompt or ask for fewer.",
        )
        hidden = self.embed(input_ids, pixel_values)
        rope, mask = self.positions(input_ids, attention_mask)
        layers = self.language_model.layers
        cache = KVCache(attention_mask, len(layers), max_new_tokens, compressor)
        present = cache.present  # [B, N]
        waiting = []  # layers whose share is not known before all have been scored
        for index, layer in enumerate(layers):
            hidden, (query, key, value) = layer(hidden, rope, mask, last_only=index + 1 == len(layers))
            if compressor is None:
                cache.store(index, key, value, present)
            elif compressor.plan is None:
                waiting.append((key, value, compressor.score(query, key, present)))
            else:
                count = compressor.planned(index, len(layers), cache.prompt)  # [B]
                cache.store(index, key, value, compressor.retain(compressor.score(query, key, present), count, present))
            del query, key, value  # else they would still be there while the next layer makes its own
        if waiting:
            assert compressor is not None
            counts = compressor.allocate(torch.stack([importance for _, _, importance in waiting]), present)  # [L, B]
            for index, count in enumerate(counts):
                key, value, importance = waiting.pop(0)  # released layer by layer, as the smaller copy is made
                cache.store(index, key, value, compressor.retain(importance, count, present))
        logits = self.lm_head(self.language_model.norm(hidden))[:, 0]  # [B, V]
        require(logits.isfinite().all(), "The logits hold NaN or infinity; check the weights, or choose a wider dtype.")
        return logits, cache

    def step(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        """`decode_step` inside inference mode, where it can be compiled: [B] -> [B, V]."""
        rope = self.language_model.rope(cache.seen[:, None])  # the token's true position, whatever was evicted
        cache.advance()
        hidden = self.language_model.embed_tokens(token_ids[:, None])  # [B, 1, D]
        for index, layer in enumerate(self.language_model.layers):
            hidden = layer.step(hidden, rope, cache, index)  # [B, 1, D]
        return self.lm_head(self.language_model.norm(hidden))[:, 0]  # [B, V]

    @torch.inference_mode()
    def decode_step(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        """One step for every sample: token ids [B] -> logits [B, V] for the next; the cache is updated in place."""
        return self.step(token_ids, cache)

    def compile_steps(self) -> None:
        """Makes the kernels of later decode steps few, so that less of a step is launching them and passing data on.

        The first steps then take a minute or two, with a compressor and without it, and for every batch of up to eight
        anew. On a CPU a C++ compiler is needed.
        """
        # Threshold 0: what several products read is computed once, before them, and not again for every row.
        options: dict[str, Any] = {"realize_reads_threshold": 0}
        self.step = torch.compile(self.step, dynamic=True, options=options)  # type: ignore[method-assign]

    @torch.inference_mode()
    def decode(
        self,
        logits: Tensor,
        cache: KVCache,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """Yields token ids [B], one step at a time, from what `prefill` returned.

        Ends when every sample has made one of `eos_token_id` (default: the checkpoint's; () never ends)
        or the tokens that the cache has room for are made. Temperature 0 takes the likeliest token;
        top_k 0 and top_p 1 take all. A sample that has ended yields the pad id.
        """
        sane = temperature >= 0 and top_k >= 0 and 0 < top_p <= 1
        require(sane, f"temperature {temperature}, top_k {top_k} or top_p {top_p} is out of range: >= 0, >= 0, 0 .. 1.")
        if eos_token_id is None:
            eos_token_id = self.config.eos_token_id
        ends = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id), dtype=torch.long)
        ends = ends.to(logits.device)
        generator = None if seed is None else torch.Generator(logits.device).manual_seed(seed)
        ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        for step in range(cache.new_tokens):
            token_ids = sample(logits, temperature, top_k, top_p, generator)  # [B]
            token_ids = token_ids.masked_fill(ended, self.config.pad_token_id)
            yield token_ids
            ended = ended | torch.isin(token_ids, ends)
            if step + 1 == cache.new_tokens or ended.all():
                return
            logits = self.decode_step(token_ids, cache)

    def stream(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 128,
        compressor: PrefixKV | None = None,
        **sampling: Any,
    ) -> Iterator[Tensor]:
        """Yields token ids [B] as they are made; `sampling` as in `decode`."""
        yield from self.decode(
            *self.prefill(input_ids, pixel_values, attention_mask, max_new_tokens, compressor), **sampling
        )

    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 128,
        compressor: PrefixKV | None = None,
        **sampling: Any,
    ) -> Generation:
        """All new tokens at once, with what the cache kept; `sampling` as in `decode`."""
        logits, cache = self.prefill(input_ids, pixel_values, attention_mask, max_new_tokens, compressor)
        tokens = list(self.decode(logits, cache, **sampling))
        token_ids = torch.stack(tokens, dim=1) if tokens else input_ids.new_zeros(len(input_ids), 0)
        return Generation(token_ids=token_ids, kept=cache.kept.T, cache_bytes=cache.bytes)
