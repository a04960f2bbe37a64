"""`cover` with one of its parts removed or replaced: methods of `bench.quality` that are not in its table unless named.

python -m bench.quality --out runs/cover --methods full cover "cover without words" ...
"""

from __future__ import annotations

import torch
from torch import Tensor

from minillava.compressors import Cover
from prefixkv import PrefixKV


class WithoutWords(Cover):
    """Words are tokens like any other."""

    def begin(self, present: Tensor, image: Tensor, layers: int) -> None:
        super().begin(present, image, layers)
        self.words = torch.zeros_like(present)


class WithoutAttention(Cover):
    """Everything but the words is evenly spaced; eviction still goes by attention."""

    LOOKED_AT = 0.0


class WithoutSpacing(Cover):
    """Everything but the words is chosen by the attention of those behind the image."""

    LOOKED_AT = 1.0


class WithoutShift(Cover):
    """The spacing is the same in every layer."""

    TURNS = 0.0


class WithoutWeights(Cover):
    """A token that is kept stands for itself only."""

    def bias(self, layer: int, position: Tensor) -> Tensor | None:
        return None


class WithoutSquares(Cover):
    """Attention is summed as it is."""

    def sum_of(self, weights: Tensor) -> Tensor:
        return weights.mean(1).sum(1)


class WithoutLooking(Cover):
    """While decoding, the token goes that has waited longest in PrefixKV's queue."""

    def attend(self, layer: int, query: Tensor, key: Tensor, seen: Tensor | None, position: Tensor) -> Tensor | None:
        return self.bias(layer, position)  # attention is not looked at

    def victim(self, position: Tensor, kept: Tensor) -> Tensor:
        return PrefixKV.victim(self, position, kept)


class WithPrefixSizes(Cover):
    """Layers have the sizes of PrefixKV's search, made of the words' attention."""

    def allocate(self, scores: Tensor) -> Tensor:
        super().allocate(scores)
        counts = PrefixKV.allocate(self, scores)
        self.chosen = self.cover(scores, counts)
        return counts


VARIANTS: dict[str, type[PrefixKV]] = {
    "cover without words": WithoutWords,
    "cover without attention": WithoutAttention,
    "cover without spacing": WithoutSpacing,
    "cover without shift": WithoutShift,
    "cover without weights": WithoutWeights,
    "cover without squares": WithoutSquares,
    "cover without looking": WithoutLooking,
    "cover, PrefixKV's sizes": WithPrefixSizes,
}
