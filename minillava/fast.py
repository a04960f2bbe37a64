"""The same tokens sooner: everything in this project that is there for speed alone.

`speed_up(model)` changes the classes of a loaded model's modules; the names and values of its weights stay.
`weights.load` calls it on a CPU, unless it is told `fast=False`. `compile_steps(model)` compiles the decode step too.

What each class gains, as a decode step (`FastTopLayer`: the prefill) without it over one with all of them:

    python -m bench.speed --contenders full "full without FastLinear" "full without FastAttention" ...

GAINS
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.model import Attention, CosSin, DecoderLayer, KVCache, Llava, apply_rope, merge_heads, split_heads
from prefixkv import Compressor


def times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """A matrix [..., R, C] times a few vectors [..., G, C]: [..., G, R]. Reads the matrix once, row by row.

    Compiled, it is one loop over the matrix that keeps a running sum for each vector, and the operations around it
    become part of that loop.
    """
    if torch.compiler.is_compiling():
        return torch.stack([(matrix * vector[..., None, :]).sum(-1) for vector in vectors.unbind(-2)], dim=-2)
    # Rows of the values with many free slots between them are read faster by the product the other way round.
    gaps = matrix.stride(-2) - matrix.shape[-1] > 64
    return vectors @ matrix.mT if gaps else (matrix @ vectors.mT).mT


class FastLinear(nn.Linear):
    """nn.Linear that uses every thread of a CPU when there is one token a sample.

    Such a product takes as long as reading the weights does, and the matrix library leaves that to one thread. Cut into
    up to 16 parts, the weights become a batch of products, which it shares out. Up to 4 samples are faster by `times`.
    Small weights lie in the caches, and there is nothing to gain.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, in] -> [B, N, out]."""
        one_loop = torch.compiler.is_compiling() and len(x) <= 8  # with more sums the processor's registers run out
        if not (x.is_cpu and x.shape[1] == 1 and (one_loop or self.weight.numel() >= 2**16)):
            return F.linear(x, self.weight, self.bias)
        parts = 1 if one_loop else math.gcd(self.out_features, 16)
        weight = self.weight.view(parts, -1, self.in_features)  # [parts, rows, width]
        vectors = x[:, 0].expand(parts, -1, -1)  # [parts, B, width]
        product = times(weight, vectors) if one_loop or len(x) <= 4 else vectors @ weight.mT  # [parts, B, rows]
        # Contiguous: `times` leaves a token's numbers B apart in memory, which would slow down what follows.
        product = product.transpose(0, 1).reshape(len(x), 1, -1).contiguous()  # [B, 1, out]
        return product if self.bias is None else product + self.bias


class FastAttention(Attention):
    """One new token reads the cache in two products of a matrix and the G queries of a group; no key is repeated.

    Its query and key are turned together, which halves the small operations of RoPE.
    """

    def project(self, x: Tensor, rope: CosSin) -> tuple[Tensor, Tensor, Tensor]:
        """As `Attention.project`."""
        if x.shape[1] > 1:
            return super().project(x, rope)
        both = torch.cat([self.q_proj(x), self.k_proj(x)], dim=-1)  # [B, 1, (H + Hkv) * Dh]
        both = apply_rope(split_heads(both, self.num_heads + self.kv_heads), *rope)  # [B, H + Hkv, 1, Dh]
        value = split_heads(self.v_proj(x), self.kv_heads)  # [B, Hkv, 1, Dh]
        return both[:, : self.num_heads], both[:, self.num_heads :], value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """As `Attention.attend`: [B, H, N, Dh]."""
        if query.shape[2] > 1:
            return super().attend(query, key, value, mask)
        grouped = query.unflatten(1, (self.kv_heads, -1)).squeeze(3)  # [B, Hkv, G, Dh]
        if key.dtype != torch.float32:  # products would round the scores to 16 bits; the fused call does not
            context = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask)  # [B, Hkv, G, Dh]
        else:
            scores = times(key, grouped * query.shape[3] ** -0.5)  # [B, Hkv, G, S]
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf)
            context = times(value.mT, scores.softmax(-1))  # [B, Hkv, G, Dh]
        return context.flatten(1, 2)[:, :, None]


class FastTopLayer(DecoderLayer):
    """The top layer computes the last token of a prompt alone, since nothing reads the others."""

    def forward(self, hidden: Tensor, rope: CosSin, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """[B, N, D] -> [B, 1, D] with a cache, else as `DecoderLayer`."""
        if cache is None or hidden.shape[1] == 1:
            return super().forward(hidden, rope, mask, cache)
        attention = self.self_attn
        query, key, value = attention.project(self.input_layernorm(hidden), rope)
        key, value, mask = cache.update(attention.layer, query, key, value)
        mask = None if mask is None else mask[:, :, -1:]
        context = attention.attend(query[:, :, -1:], key, value, mask)  # [B, H, 1, Dh]
        hidden = hidden[:, -1:] + attention.o_proj(merge_heads(context))  # [B, 1, D]
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class FastKVCache(KVCache):
    """Values lie as `times` reads them, and how many slots are filled is asked once a step, not once a layer.

    compiled: steps are compiled, so each reads all slots under a mask: shapes that change would be compiled again.
    """

    def __init__(self, *arguments: Any, compiled: bool = False):
        super().__init__(*arguments)
        self.compiled = compiled

    def store(self, key: Tensor, value: Tensor, keep: Tensor) -> None:
        """As `KVCache.store`."""
        super().store(key, value, keep)
        if value.dtype == torch.float32:  # columns of the values are read from end to end
            self.value[-1] = self.value[-1].mT.contiguous().mT  # [B, Hkv, S, Dh]
        # A spare column: if the table were as wide as a layer, torch.compile would take the two for one size, and
        # compile again for caches in which another layer is the widest.
        if self.position.shape[2] == self.key[-1].shape[2]:
            self.position = F.pad(self.position, (0, 1), value=-1)

    def advance(self) -> None:
        """As `KVCache.advance`."""
        super().advance()
        if not self.compiled:
            self.most, self.fewest = self.held.amax(1).tolist(), self.held.amin(1).tolist()

    def read(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `KVCache.read`, or all slots."""
        key, value = self.key[layer], self.value[layer]
        filled = key.shape[2] if self.compiled else self.most[layer]
        even = not self.compiled and filled == self.fewest[layer]
        mask = None if even else (self.position[layer, :, :filled] >= 0)[:, None, None]
        return key[:, :, :filled], value[:, :, :filled], mask


class FastLlava(Llava):
    """`Llava` with the cache above, and its decode step compiled after `compile_steps`."""

    compiled_step: Callable[[Llava, Tensor, KVCache], Tensor] | None = None

    def new_cache(self, present: Tensor, max_new_tokens: int, compressor: Any) -> KVCache:
        """A method that observes every token runs uncompiled: its code is not made for torch.compile."""
        observes = isinstance(compressor, Compressor) and type(compressor).observe is not Compressor.observe
        compiled = self.compiled_step is not None and not observes
        return FastKVCache(present, self.config.text.num_hidden_layers, max_new_tokens, compressor, compiled=compiled)

    def next_logits(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        """[B] -> [B, V], compiled where the cache was made for it."""
        if self.compiled_step is not None and isinstance(cache, FastKVCache) and cache.compiled:
            return self.compiled_step(self, token_ids, cache)
        return super().next_logits(token_ids, cache)


def speed_up(model: Llava) -> Llava:
    """Changes the classes of the model's modules, in place; returns the model. Everything gives the same tokens."""
    model.__class__ = FastLlava
    model.language_model.layers[-1].__class__ = FastTopLayer
    for module in [*model.language_model.modules(), model.lm_head]:
        if type(module) is nn.Linear:
            module.__class__ = FastLinear
        elif type(module) is Attention:
            module.__class__ = FastAttention
    return model


def compile_steps(model: Llava) -> None:
    """Compiles the decode step: few kernels, so that less of a step is launching them and passing data on.

    The first steps then take a minute or two, with a compressor and without it, and for every batch of up to eight
    anew. On a CPU a C++ compiler is needed.
    """
    speed_up(model)
    assert isinstance(model, FastLlava)
    # A graph for each batch size and method; beyond its own limit of eight torch would go on uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # Threshold 0: what several products read is computed once, before them, and not again for every row.
    options: dict[str, Any] = {"realize_reads_threshold": 0}
    model.compiled_step = torch.compile(Llava.next_logits, dynamic=True, options=options)
