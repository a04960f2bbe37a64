"""Numbers in few bits: weights in 8, the KV cache in 2, 3, 4 or 8.

Of the weights, each row of a matrix has a scale. The cache by itself keeps every token. KIVI (2402.02750): keys are
quantised per channel and values per token, since a key's large numbers stand in the same channels for all tokens. 32
numbers share a scale and a zero, each in 16 bits; so b bits take b + 1 in all. The newest tokens wait until there are
32, on average over the batch. A compressor may drop tokens, too: a new one then takes a place in an old group.

    cache = QuantisedKVCache(model.config.text, room, bits=4)
    logits = model.read(**inputs, cache=cache)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.checks import check_no_training, require
from minillava.config import TextConfig
from minillava.model import Compressor, KVCache, Llava

BITS = (2, 3, 4, 8)
GROUP = 32  # numbers that share a scale and a zero; and newest tokens that are not quantised yet
LARGEST = torch.finfo(torch.float16).max  # larger magnitudes become this, since scale and zero are float16
PART = 2**21  # numbers of a weight that are converted at once: 8 MB in float32


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [out, in] as int8, from -127 to 127, and a scale for each row: bfloat16 [out], above 0.

    A number is about scale * int8, off by half a scale at most. The scale is the row's largest magnitude / 127. It is
    rounded to bfloat16 first, which the kernel in `fast.py` asks for. A few rows at a time are widened.
    """
    codes = weight.new_empty(weight.shape, dtype=torch.int8)
    scale = weight.new_empty(len(weight), dtype=torch.bfloat16)
    rows = max(1, PART // weight.shape[1])
    parts = zip(weight.split(rows), codes.split(rows), scale.split(rows))
    for part, code, step in () if weight.is_meta else parts:  # meta arithmetic would import 70 MB
        step.copy_((part.float().abs().amax(1) / 127).clamp(min=torch.finfo(step.dtype).tiny))  # above 0
        code.copy_((part.float() / step.float()[:, None]).round_())
    return codes, scale


class Int8Linear(nn.Module):
    """An nn.Linear with an 8-bit weight. Computes in the dtype that input and bias share; in training, LlavaError."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        parts = quantise_rows(linear.weight.data)
        self.weight, self.scale = (nn.Parameter(part, requires_grad=False) for part in parts)
        self.bias, self.training = linear.bias, linear.training

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        check_no_training(x, self.training)
        weight = (self.weight * self.scale.float()[:, None]).to(x.dtype)  # [out, in]
        return F.linear(x, weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """What `.to(..)` and `.half()` call. Weight and scale may change the device, but not the dtype."""
        return super()._apply(lambda t: fn(t) if t is self.bias else t.to(fn(t).device), recurse)


def to_int8(model: Llava) -> Llava:
    """Changes a model in place: matrices of decoder and output layer to 8 bits, all else to bfloat16.

    A tied output layer gets its own copy. Gradients go off. Call `fast.optimize` afterwards, not before.
    """
    for module in (model, *model.language_model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    return model.bfloat16().requires_grad_(False)


def quantise(x: Tensor, bits: int, used: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of numbers [.., G] as codes (uint8 [.., G], from 0 to 2^bits - 1), scale and zero (float16 [.., 1]).

    A number is about zero + code * scale: off by half a scale at most, and by float16's rounding of the two. Numbers
    that are not `used`, bool [.., G], are left out of account.
    """
    x = x.float().clamp(-LARGEST, LARGEST)
    low = torch.where(used, x, torch.inf).amin(-1, keepdim=True)
    high = torch.where(used, x, -torch.inf).amax(-1, keepdim=True)
    low, high = (torch.where(used.any(-1, keepdim=True), end, 0.0) for end in (low, high))  # nothing used: 0 to 0
    zero = low.half()
    scale = ((high - zero.float()) / (2**bits - 1)).clamp(min=2**-24).half()  # above 0, to divide by
    codes = ((x - zero.float()) / scale.float()).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return codes, scale, zero


def dequantise(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The numbers that `quantise` made codes of, float32."""
    return (codes * scale.float() + zero.float()).clamp(-LARGEST, LARGEST)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits, uint8 [.., 8 n] -> bytes [.., bits * n]: eight of them in `bits` bytes."""
    if bits == 8:
        return codes
    eights = codes.unflatten(-1, (-1, 8)).long()  # [.., n, 8]
    word = (eights << (bits * torch.arange(8, device=codes.device))).sum(-1)  # [.., n], below 2^32
    return torch.stack([(word >> (8 * byte)) & 255 for byte in range(bits)], dim=-1).to(torch.uint8).flatten(-2)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """The codes that `pack_bits` took."""
    if bits == 8:
        return packed
    parts = packed.unflatten(-1, (-1, bits)).long()  # [.., n, bits]
    word = (parts << (8 * torch.arange(bits, device=packed.device))).sum(-1, keepdim=True)  # [.., n, 1]
    codes = (word >> (bits * torch.arange(8, device=packed.device))) & (2**bits - 1)  # [.., n, 8]
    return codes.to(torch.uint8).flatten(-2)


class Packed:
    """Keys or values [B, Hkv, S, Dh] of a layer's slots, in few bits: as much of a tensor as a KVCache uses.

    per_token: 32 channels of a token form a group (values), else 32 slots of a channel (keys). A read is a copy. If a
    token is written into a group of keys, the others are quantised again, from what they had become: after ten such
    passes, a random number that stayed was 2.6 to 3.2 times as far off as after one.
    """

    def __init__(self, like: Tensor, bits: int, per_token: bool):
        self.shape, self.dtype, self.bits, self.per_token = like.shape, like.dtype, bits, per_token
        self.group = min(GROUP, like.shape[3]) if per_token else GROUP  # numbers in a group
        self.used = torch.zeros(like.shape[0], like.shape[2], dtype=torch.bool, device=like.device)  # slots with tokens
        self.newest: list[tuple[Any, Tensor]] = []  # what was written and is not quantised yet: where, and the numbers
        self.pack(like)

    def groups(self, x: Tensor) -> Tensor:
        """[B, Hkv, S, Dh] -> values [B, Hkv, S, Dh / G, G]; keys [B, Hkv, Dh, S / G, G], slots filled up with zeros."""
        x = x if self.per_token else F.pad(x, (0, 0, 0, -self.shape[2] % GROUP)).mT
        return x.unflatten(-1, (-1, self.group))

    def pack(self, x: Tensor) -> None:
        """Quantises all slots [B, Hkv, S, Dh]. A group whose range has not changed stays but for rounding."""
        used = self.used[:, None, :, None].expand(self.shape)
        codes, self.scale, self.zero = quantise(self.groups(x), self.bits, self.groups(used))
        self.codes = pack_bits(codes, self.bits)  # the codes of a group in G * bits / 8 bytes
        self.newest.clear()

    def unpack(self) -> Tensor:
        """All slots, [B, Hkv, S, Dh]."""
        x = dequantise(unpack_bits(self.codes, self.bits), self.scale, self.zero).flatten(-2).to(self.dtype)
        x = x if self.per_token else x.mT[:, :, : self.shape[2]]
        for index, value in self.newest:
            x[index] = value
        return x

    def __getitem__(self, index: Any) -> Tensor:
        return self.unpack()[index]

    def __setitem__(self, index: tuple[Any, slice, Any], value: Tensor | Packed) -> None:
        """Writes as a tensor is written, at (texts, all heads, slots); a KVCache does so in three ways.

        A text's slots (a number, a slice): value [Hkv, n, Dh]. Pairs of texts and slots ([n], [n]): [n, Hkv, Dh]. All
        texts' first slots (slices): another Packed.
        """
        self.used[index[0], index[2]] = value.used if isinstance(value, Packed) else True
        value = value.unpack() if isinstance(value, Packed) else value
        self.newest.append((index, value.to(self.dtype, copy=True)))
        full = sum(value.numel() for _, value in self.newest) >= GROUP * self.shape[:2].numel() * self.shape[3]
        if full and not isinstance(index[0], int):  # after the last text of a prompt, `store` packs all of them
            self.pack(self.unpack())

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros of all slots, and of the newest tokens."""
        return sum(t.nbytes for t in (self.codes, self.scale, self.zero, *(value for _, value in self.newest)))


class QuantisedKVCache(KVCache):
    """A KVCache whose slots hold numbers of `bits` bits. A read widens all of a layer, which takes time."""

    def __init__(self, config: TextConfig, room: int, compressor: Compressor | None = None, bits: int = 4):
        super().__init__(config, room, compressor)
        known, size = ", ".join(map(str, BITS)), config.head_size
        require(type(bits) is int and bits in BITS, f"The KV cache is to have {bits!r} bits; expected {known}.")
        fits = size % 8 == 0 and (size <= GROUP or size % GROUP == 0)
        require(fits, f"Heads of {size} numbers cannot be packed; expected 8, 16, 24 or n x {GROUP}.")
        self.bits = bits

    def new_slots(self, key: Tensor, value: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.new_slots`, packed."""
        keys, values = super().new_slots(key[:], value[:], kept)  # of tensors, also where these are packed
        return cast(tuple[Tensor, Tensor], (Packed(keys, self.bits, False), Packed(values, self.bits, True)))

    def store(self, key: Tensor, value: Tensor, keep: Tensor) -> None:
        """As `KVCache.store`; a prompt is quantised whole."""
        super().store(key, value, keep)
        for part in cast(list[Packed], [self.key[-1], self.value[-1]]):
            part.pack(part.unpack())

    @property
    def newest_bytes(self) -> int:
        """Bytes of the newest tokens, which are not quantised yet."""
        parts = cast(list[Packed], [*self.key, *self.value])
        return sum(value.nbytes for part in parts for _, value in part.newest)

    @property
    def held_bytes(self) -> int:
        """Bytes of the held tokens: codes, a scale and a zero for each group in use, and the newest again in full."""
        total = self.newest_bytes + getattr(self.compressor, "notes_bytes", 0)
        for tensors in (self.key, self.value) if self.key else ():
            for held, part in zip(self.held.tolist(), cast(list[Packed], tensors)):
                heads, size = part.shape[1], part.shape[3]
                groups = sum(n * size // part.group if part.per_token else -(-n // GROUP) * size for n in held)
                total += heads * (sum(held) * size * self.bits // 8 + 4 * groups)
        return total


def new_cache(model: Llava, room: int, compressor: Compressor | None, bits: int | None) -> KVCache:
    """An empty cache that keeps what the compressor says, None for all, in `bits` bits a number, None for all."""
    if bits is None:
        return model.new_cache(room, compressor)
    return QuantisedKVCache(model.config.text, room, compressor, bits)
