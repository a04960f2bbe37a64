"""Everything in this project that is there for speed only. In float32 it changes how tokens are computed, not which.

With weights in 16 bits, a CPU computes in float32 and rounds where the dtype says. Logits are then about as far from
those in float32 as the plain ones are, but not the same: where two tokens are nearly equally likely, the choice may
differ.

`optimize(model)` swaps the classes of a loaded model's modules for the faster ones below. The weights keep their names
and values. `weights.load(..., fast=True)` calls it. `compile_steps(model)` also compiles the reading of single tokens.

    python -m bench.speed --parts    # what each class gains: the model without it, beside the model with all of them

8 layers of width 512, 8 prompts of 1,024 tokens, full cache, two threads of a busy machine, medians of two rounds:
49.9 ms a step with all of them, 57.3 with none. Without FastLinear 51.0. Without FastAttention 65.3, and without
FastLlava, so without its cache, 74.6: these two pay only together. FastTopLayer saves 126 MB of a prompt's peak (664
to 538); its gain in time was lost in the noise. The table is in bench/results/speed.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.checks import LlavaError, check_logits, check_no_training, check_read
from minillava.compressors import LeastAttended, Weighted
from minillava.config import TextConfig
from minillava.files import free_memory
from minillava.model import (
    Attention,
    Compressor,
    CosSin,
    DecoderLayer,
    KVCache,
    Llava,
    VisionLayer,
    apply_rope,
    merge_heads,
    split_heads,
)
from minillava.quantised import PART, Int8Linear
from prefixkv import PrefixKV

HALF = (torch.float16, torch.bfloat16)
FREE_PART = 8  # a cache held in float32 takes at most the free memory divided by this
INT8_KERNEL = getattr(torch, "_weight_int8pack_mm", None)  # not public: a version of torch may lack it


def matvec(matrix: Tensor, vectors: Tensor) -> Tensor:
    """A matrix [..., rows, width] times a few vectors [..., count, width]: [..., count, rows]. Reads the matrix once.

    Compiled, it is one loop over the matrix with a running sum in float32 for each vector, and the operations before
    and after it join that loop. A matrix in 16 bits is read as it is, and widened number by number.
    """
    if torch.compiler.is_compiling():
        sums = [(matrix.float() * vector[..., None, :].float()).sum(-1) for vector in vectors.unbind(-2)]
        return torch.stack(sums, dim=-2)
    # The rows of value.mT have the layer's free slots between them. With more than 64, `vectors @ matrix.mT` is faster.
    gaps = matrix.stride(-2) - matrix.shape[-1] > 64
    return vectors @ matrix.mT if gaps else (matrix @ vectors.mT).mT


def linear_parts(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """`F.linear` of a weight in 8 or 16 bits in float32, rounded once at the end: [..., in] -> [..., out].

    A part of the weight is widened and used before the next one, so that it never leaves the processor's cache. The
    scale [out] of each row, if there is one, is left for the product.
    """
    wide, product = x.float(), x.new_empty(*x.shape[:-1], len(weight))
    rows = max(1, PART // x.shape[-1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        sums = F.linear(wide, weight[part].float())
        sums = sums if scale is None else sums * scale[part]
        product[..., part] = sums if bias is None else sums + bias[part]
    return product


def sdpa_float32(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """`F.scaled_dot_product_attention` of many queries in float32, rounded at the end. In 16 bits it would be slower.

    For a single new token it would copy the whole cache, so `FastAttention` does not use it there.
    """
    mask = attn_mask.float() if attn_mask is not None and attn_mask.dtype != torch.bool else attn_mask
    context = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), mask, **options)
    return context.to(query.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rope`. Compiled, each `cat` would be a pass over memory of its own; moved indices join the loop around."""
    if not torch.compiler.is_compiling():
        return apply_rope(x, cos, sin)
    half = x.shape[-1] // 2
    first = torch.arange(2 * half, device=x.device) < half
    other = x.roll(half, dims=-1)
    return x * cos + torch.where(first, -other, other) * sin


class FastLinear(nn.Linear):
    """nn.Linear that uses every thread of a CPU for one token per sample.

    Reading the weights takes most of the time, and the matrix library reads them with one thread. Cut into up to 16
    equal parts, they form a batch of products, and the library shares a batch among threads. For up to 4 samples,
    `matvec` is faster still. Small weights fit in the processor's own cache, and there is nothing to gain. A compiled
    step computes a product in loops of its own.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, in] -> [B, N, out]."""
        compiling, single = torch.compiler.is_compiling(), x.shape[1] == 1
        if x.is_cpu and self.weight.dtype in HALF and not compiling:
            # Few processors multiply 16-bit numbers as fast as float32. For up to 8 tokens, reading the weight takes
            # the time, and 16 bits are read in half of it.
            few = x.numel() <= 8 * x.shape[-1]
            return F.linear(x, self.weight, self.bias) if few else linear_parts(x, self.weight, self.bias)
        if compiling and single and x.is_cpu and len(x) <= 8:  # more sums do not fit in the registers
            return self.one_loop(x)
        if not (x.is_cpu and single and self.weight.numel() >= 2**16):
            return F.linear(x, self.weight, self.bias)
        weight = self.weight.view(math.gcd(self.out_features, 16), -1, self.in_features)  # [parts, rows, width]
        vectors = x[:, 0].expand(len(weight), -1, -1)  # [parts, B, width]
        product = matvec(weight, vectors) if len(x) <= 4 else vectors @ weight.mT  # [parts, B, rows]
        # `matvec` leaves neighbouring numbers of a token B places apart, which would slow down what follows.
        product = product.transpose(0, 1).reshape(len(x), 1, -1).contiguous()  # [B, 1, out]
        return product if self.bias is None else product + self.bias

    def one_loop(self, x: Tensor) -> Tensor:
        """The product of a compiled step: [B, 1, in] -> [B, 1, out].

        For one sample and a weight beyond the processor's cache, a loop reads four rows side by side: each row has a
        sum of its own, and one sum need not wait for another. With small weights the loops that this adds cost more.
        """
        large = len(x) == 1 and self.weight.numel() >= 2**20
        parts = self.weight.chunk(math.gcd(self.out_features, 4)) if large else [self.weight]
        products = [matvec(part, x[:, 0]) for part in parts]
        product = (torch.cat(products, dim=-1) if large else products[0])[:, None]  # [B, 1, out], float32
        return (product if self.bias is None else product + self.bias).to(x.dtype)


class FastInt8Linear(Int8Linear):
    """Int8Linear with a kernel of torch's for up to 7 tokens, which widens numbers as it reads them.

    It is fast for bfloat16 only. It reads rows in vectors, and beyond their end where these do not fit.
    """

    def forward(self, x: Tensor) -> Tensor:
        """As `Int8Linear.forward`."""
        if not x.is_cpu:
            return super().forward(x)
        check_no_training(x, self.training)
        rows = x.reshape(-1, x.shape[-1])
        if INT8_KERNEL is None or len(rows) > 7 or x.dtype != torch.bfloat16 or x.shape[-1] % 32:
            return linear_parts(x, self.weight, self.bias, self.scale)
        product = INT8_KERNEL(rows.contiguous(), self.weight, self.scale).view(*x.shape[:-1], -1)
        return product if self.bias is None else product + self.bias


class FastAttention(Attention):
    """For one new token, two products per KV head: keys with its G queries, then values with their weights.

    No key is copied for the queries that share it. RoPE rotates query and key in one call, which halves its small
    operations.
    """

    def project(self, x: Tensor, rope: CosSin) -> tuple[Tensor, Tensor, Tensor]:
        """As `Attention.project`."""
        if x.shape[1] > 1:
            return super().project(x, rope)
        both = torch.cat([self.q_proj(x), self.k_proj(x)], dim=-1)  # [B, 1, (H + Hkv) * Dh]
        both = rotate(split_heads(both, self.num_heads + self.kv_heads), *rope)  # [B, H + Hkv, 1, Dh]
        value = split_heads(self.v_proj(x), self.kv_heads)  # [B, Hkv, 1, Dh]
        return both[:, : self.num_heads], both[:, self.num_heads :], value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """As `Attention.attend`: [B, H, N, Dh]."""
        if query.shape[2] > 1:
            if query.is_cpu and query.dtype in HALF:
                return sdpa_float32(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            return super().attend(query, key, value, mask)
        # The fused call keeps scores in float32; a product would round them to 16 bits.
        if key.dtype != torch.float32 and not torch.compiler.is_compiling():
            grouped = query.unflatten(1, (self.kv_heads, -1)).squeeze(3)  # [B, Hkv, G, Dh]
            context = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask)  # [B, Hkv, G, Dh]
            return context.flatten(1, 2)[:, :, None]
        return self.attend_one_token(query, key, value, mask)[0]

    def attend_one_token(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of one new token, the context [B, H, 1, Dh] and the weights [B, H, 1, S]."""
        grouped = query.unflatten(1, (self.kv_heads, -1)).squeeze(3)  # [B, Hkv, G, Dh]
        scores = matvec(key, grouped.to(key.dtype) * query.shape[3] ** -0.5)  # [B, Hkv, G, S]
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(-1)  # [B, Hkv, G, S]
        context = matvec(value.mT, weights).to(query.dtype)  # [B, Hkv, G, Dh]
        return context.flatten(1, 2)[:, :, None], weights.flatten(1, 2)[:, :, None]

    def forward(self, x: Tensor, rope: CosSin, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """As `Attention.forward`. A method that adds up attention is given the weights, and computes none itself."""
        if not isinstance(cache, FastKVCache):
            return super().forward(x, rope, mask, cache)
        query, key, value = self.project(x, rope)
        key, value, mask = cache.update(self.layer, query, key, value)
        if cache.handed is None:
            context = self.attend(query, key, value, mask)  # [B, H, N, Dh]
        else:
            context, weights = self.attend_one_token(query, key, value, mask)
            assert isinstance(cache.compressor, LeastAttended)
            cache.compressor.note(self.layer, weights, cache.handed)
        return self.o_proj(merge_heads(context))


class FastVisionLayer(VisionLayer):
    """Attention between patches in float32, where the weights have 16 bits."""

    def forward(self, hidden: Tensor) -> Tensor:
        """As `VisionLayer.forward`."""
        if not (hidden.is_cpu and hidden.dtype in HALF):
            return super().forward(hidden)
        x = self.layer_norm1(hidden)
        heads = [split_heads(project(x), self.num_heads) for project in (self.q_proj, self.k_proj, self.v_proj)]
        hidden = hidden + self.out_proj(merge_heads(sdpa_float32(*heads)))
        return hidden + self.fc2(self.activation(self.fc1(self.layer_norm2(hidden))))


class FastTopLayer(DecoderLayer):
    """Computes the output of a prompt's last token only, since no layer above reads the others.

    The keys and values of all tokens still go to the cache, and their queries to the compressor's scores.
    """

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
    """Stores values in the order in which `matvec` reads them, and does less for a single token.

    compiled: the step is compiled. Each layer then reads all its slots under a mask, so that shapes stay the same from
    step to step. fast_attention: all layers have FastAttention. Then a method that adds up attention is given its
    weights. And on a CPU, keys and values of 16 bits are held in float32, where there is memory for it, since products
    in 16 bits would take more than twice as long. `held_bytes` counts what is held.
    """

    def __init__(self, config: TextConfig, room: int, compressor: Compressor | None = None, compiled: bool = False,
                 fast_attention: bool = False):  # fmt: skip
        super().__init__(config, room, compressor)
        attend = type(self.compressor).attend
        self.attends = attend not in (Compressor.attend, PrefixKV.attend)
        self.hands_over = fast_attention and attend is LeastAttended.attend
        self.compiled = compiled and not self.attends  # torch.compile may not handle what a method does there
        self.widen = fast_attention and not compiled
        self.handed: Tensor | None = None  # positions [B, S] of the keys whose weights the method is to be given

    def new_slots(self, key: Tensor, value: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.new_slots`."""
        if self.widen and key.is_cpu and key.dtype in HALF:
            key, value = key.float(), value.float()
        keys, values = super().new_slots(key, value, kept)
        slots = keys.shape[2]
        if values.dtype == torch.float32 or self.compiled:  # `matvec` reads one dimension of all slots, then the next
            values = values.view(*values.shape[:2], values.shape[3], slots).mT  # [B, Hkv, S, Dh]
        # torch.compile takes equal sizes for one. If `position` were as wide as a layer, a cache in which another layer
        # is the widest would be compiled again. One spare column keeps the sizes different.
        if self.compiled and self.position.shape[2] == slots:
            self.position = F.pad(self.position, (0, 1), value=-1)
        return keys, values

    def begin(self, present: Tensor, image: Tensor) -> Tensor:
        """As `KVCache.begin`; asks whether there is memory for float32."""
        if self.widen:
            width = 2 * self.config.num_hidden_layers * self.config.kv_heads * self.config.head_size  # of a token
            size = 4 * width * len(present) * (present.shape[1] + self.room)  # bytes, if all tokens are kept
            self.widen = size <= (free_memory() or 0) / FREE_PART
        return super().begin(present, image)

    def advance(self, count: int) -> Tensor:
        """As `KVCache.advance`; counts the filled slots of all layers at once."""
        positions = super().advance(count)
        self.row = torch.arange(len(positions), device=positions.device)  # [B]
        if not self.compiled:
            self.most, self.fewest = self.held.amax(1).tolist(), self.held.amin(1).tolist()  # of each layer's texts
        return positions

    def update(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `KVCache.update`. A single token is the latest, so it sees every slot that is filled."""
        self.handed = None
        if layer >= len(self.key):  # the prompt; its keys and values change the dtype as they are stored
            return super().update(layer, query, key, value)
        dtype = self.key[layer].dtype
        query, key, value = query.to(dtype), key.to(dtype), value.to(self.value[layer].dtype)
        if self.slot is None:  # a turn
            return super().update(layer, query, key, value)
        keys, values, row, slot = self.key[layer], self.value[layer], self.row, self.slot[layer]
        keys[row, :, slot], values[row, :, slot] = key.squeeze(2), value.squeeze(2)
        filled = keys.shape[2] if self.compiled else self.most[layer]
        key, value, position = keys[:, :, :filled], values[:, :, :filled], self.position[layer, :, :filled]
        even = not self.compiled and filled == self.fewest[layer]
        seen = None if even else (position >= 0)[:, None, None]
        bias = None
        if self.hands_over and dtype == torch.float32:
            self.handed = position
            bias = self.compressor.bias(layer, position) if isinstance(self.compressor, Weighted) else None
        elif self.attends:
            bias = self.compressor.attend(layer, query, key, seen, position)
        if bias is None:
            return key, value, seen
        bias = bias[:, None, None].to(key.dtype)
        return key, value, bias if seen is None else torch.where(seen, bias, -math.inf)


def single_token(model: Llava, input_ids: Tensor, cache: KVCache) -> Tensor:
    """What `Llava.read` does to one new token of every prompt, [B, 1] -> [B, V]: the part that is compiled."""
    positions = cache.advance(1)
    hidden = model.language_model(model.language_model.embed_tokens(input_ids), positions, cache=cache)
    return model.lm_head(hidden)[:, 0]


class FastLlava(Llava):
    """`Llava` with a FastKVCache. After `compile_steps`, single tokens are read by compiled code."""

    compiled_step: Callable[[Llava, Tensor, KVCache], Tensor] | None = None

    def new_cache(self, room: int = 128, compressor: Compressor | None = None) -> KVCache:
        """An empty FastKVCache, for compiled steps after `compile_steps`."""
        compiled = self.compiled_step is not None
        fast_attention = all(type(each.self_attn) is FastAttention for each in self.language_model.layers)
        return FastKVCache(self.config.text, room, compressor, compiled, fast_attention)

    @torch.inference_mode()
    def read(self, input_ids: Tensor, cache: KVCache, pixel_values: Tensor | None = None,
             attention_mask: Tensor | None = None, image_sizes: Tensor | None = None) -> Tensor:  # fmt: skip
        """As `Llava.read`, compiled for a single token where the cache was made for it."""
        step, single = self.compiled_step, input_ids.shape[1:] == (1,) and pixel_values is None
        if step is None or not single or not cache.key or not isinstance(cache, FastKVCache) or not cache.compiled:
            return super().read(input_ids, cache, pixel_values, attention_mask, image_sizes)
        check_read(self.config.text, cache, input_ids, attention_mask)
        cache.room -= 1
        return check_logits(step(self, input_ids, cache))


def optimize(model: Llava) -> Llava:
    """Swaps the classes of the model's modules in place; returns the model. Your own classes are left as they are."""
    if type(model) is Llava:
        model.__class__ = FastLlava
    if type(model.language_model.layers[-1]) is DecoderLayer:
        model.language_model.layers[-1].__class__ = FastTopLayer
    for module in model.modules():
        for fast in (FastLinear, FastInt8Linear, FastAttention, FastVisionLayer):
            if type(module) is fast.__base__:
                module.__class__ = fast
    return model


def guard_filter(checks: Sequence[Any]) -> list[bool]:
    """Which of torch.compile's checks ("guards") are made before every step: of the modules, only those of tensors.

    A layer's modules have some 200 others, named such as "self._modules['lm_head']". They took a quarter of a small
    model's step.
    """
    tensors = ("TENSOR_MATCH", "DUPLICATE_INPUT")  # shape and dtype, and whether two names are one tensor
    return [check.guard_type in tensors or "_modules" not in check.name for check in checks]


def compile_steps(model: Llava) -> None:
    """Compiles the decode step into a few kernels, to save launches and passes over memory.

    Each batch size up to eight is compiled by itself, and again with a compressor. Each takes a minute or two for 8
    layers, five for 22. If two layers have equally many slots at first and not later, it is compiled once more. On a
    CPU a C++ compiler is needed. In 16 bits a compiled step may round otherwise than an eager one. Weights may be
    changed afterwards; modules, their settings and their hooks may not: a step would not notice.
    """
    optimize(model)
    if not isinstance(model, FastLlava):
        raise LlavaError(f"The model is a {type(model).__name__}; compile_steps expects a Llava.")
    # One graph per batch size and compression method. After its default of eight, torch would silently run uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # Threshold 0: what several products read is computed once, not again for every row.
    options: dict[str, Any] = {"realize_reads_threshold": 0}
    if hasattr(torch.compiler, "keep_tensor_guards_unsafe"):  # only then does torch.compile know the option
        options["guard_filter_fn"] = guard_filter
    # torch.compile keeps its graphs beside a function's code. A copy of the code gives this model graphs of its own,
    # since they do not check which model they are for.
    step = FunctionType(single_token.__code__.replace(), single_token.__globals__)
    model.compiled_step = torch.compile(step, dynamic=True, options=options)
