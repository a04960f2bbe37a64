"""`cover` with one of its parts removed: methods of `bench.quality` that are not in its table unless named.

python -m bench.quality --out runs/cover --methods full cover "cover without words" ...
"""

from __future__ import annotations

import torch
from torch import Tensor

from minillava.compressors import Cover
from prefixkv import PrefixKV


class WithoutWords(Cover):
    """Words are tokens like any other."""

    def begin(self, present: Tensor, image: Tensor) -> None:
        super().begin(present, image)
        self.words = torch.zeros_like(present)


class WithoutAttention(Cover):
    """All but the words is evenly spaced; eviction still goes by attention."""

    LOOKED_AT = 0.0


class WithoutSpacing(Cover):
    """All but the words is what those behind the image attend to most."""

    LOOKED_AT = 1.0


class WithoutShift(Cover):
    """The spacing is the same in every layer."""

    def retain(self, scores: Tensor, counts: Tensor, present: Tensor) -> Tensor:
        self.layer = 0
        return super().retain(scores, counts, present)


class WithoutLooking(Cover):
    """While decoding, the token goes that has waited longest in PrefixKV's queue."""

    def observe(self, layer: int, query: Tensor, key: Tensor, position: Tensor) -> None:
        """Attention is not looked at."""

    def victim(self, position: Tensor, kept: Tensor) -> Tensor:
        return PrefixKV.victim(self, position, kept)


class WithPrefixSizes(Cover):
    """Layers have the sizes of PrefixKV's search, made of the words' attention."""

    def allocate(self, scores: Tensor, present: Tensor) -> Tensor:
        super().allocate(scores, present)
        return PrefixKV.allocate(self, scores, present)


VARIANTS: dict[str, type[PrefixKV]] = {
    "cover without words": WithoutWords,
    "cover without attention": WithoutAttention,
    "cover without spacing": WithoutSpacing,
    "cover without shift": WithoutShift,
    "cover without looking": WithoutLooking,
    "cover, PrefixKV's sizes": WithPrefixSizes,
}
