"""Other ways to choose what a KV cache keeps, as small classes with PrefixKV's interface.

A class that follows a paper names it, and overrides only what the paper does differently. All keep as many tokens as
PrefixKV does at the same budget. All but H2O and Local also evict as PrefixKV does while decoding, so that only the
choice of tokens differs. In every method the heads of a layer share one set of kept tokens. `METHODS` has their names
on the command line.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixkv import Compressor, PrefixKV, importance, retain


def spread(total: int, target: Tensor, low: int, high: int) -> Tensor:
    """Whole numbers [L] near `target` [L], each in low .. high, that sum to `total`. Early layers win ties in rounding.

    `total` lies in low * L .. high * L. If a layer is stopped at a bound, the others share the difference equally.
    """
    shares, counts = target.double(), torch.zeros(len(target), dtype=torch.double)
    free = torch.ones(len(target), dtype=torch.bool)
    while free.any():
        # Shift all free layers equally to reach the total. Then fix those past a bound, on the side that is off most.
        counts[free] = shares[free] + (total - counts[~free].sum() - shares[free].sum()) / free.sum()
        over, under = free & (counts > high), free & (counts < low)
        bound = over if (counts[over] - high).sum() >= (low - counts[under]).sum() else under
        if not bound.any():
            break
        counts[bound] = high if bound is over else low
        free &= ~bound
    whole = (counts + 1e-9).floor().long()
    room = (whole < high).nonzero()[:, 0]
    rest = (counts - whole)[room].sort(descending=True, stable=True).indices[: total - int(whole.sum())]
    whole[room[rest]] += 1
    return whole


def last(present: Tensor, count: Tensor) -> Tensor:
    """The last `count` [B] tokens of every prompt: bool [B, N]."""
    order = present.long().cumsum(-1)
    return present & (order > order[:, -1:] - count[:, None])


class Recorder(Compressor):
    """Keeps everything, and remembers the importance of every key: `scores` [L, B, N] and `present` [B, N]."""

    def score(self, query: Tensor, key: Tensor, present: Tensor) -> Tensor:
        return importance(query, key, present)

    def allocate(self, scores: Tensor, present: Tensor) -> Tensor:
        self.scores, self.present = scores, present
        return super().allocate(scores, present)


class Uniform(PrefixKV):
    """PrefixKV with the same size for every layer. The difference to PrefixKV is what the search adds."""

    def sizes(self, total: int, layers: int, low: int, high: int) -> Tensor:
        """Sizes [L] that sum to `total`: equal, or one token apart."""
        return spread(total, torch.ones(layers), low, high)

    def allocate(self, scores: Tensor, present: Tensor) -> Tensor:
        """Tokens that each layer keeps of each prompt: scores [L, B, N] -> [L, B], from `sizes`, whatever the scores.

        The total of a prompt is PrefixKV's: round(budget * L * n), and never less than the protected tokens.
        """
        layers, counts = len(scores), []
        for length in present.sum(-1).tolist():
            protected = min(length, self.start + 1)
            total = max(round(self.budget * layers * length), layers * protected)
            counts.append(self.sizes(total, layers, protected, length))
        return torch.stack(counts, dim=1).to(present.device)


class Local(Uniform):
    """Attention sinks and the most recent tokens, as a window that moves on while decoding.

    StreamingLLM (arXiv 2309.17453), section 3.2: the first four tokens, then the newest.
    """

    def __init__(self, budget: float = 0.2, start: int = 4):
        super().__init__(budget, start)

    def score(self, query: Tensor, key: Tensor, present: Tensor) -> Tensor:
        return present.cumsum(-1).float()  # the later the better

    def victim(self, position: Tensor, kept: Tensor) -> Tensor:
        """The oldest token that is not a sink. Free slots have position -1, below all sinks."""
        return position.masked_fill(position < self.start, torch.iinfo(position.dtype).max).argmin(-1)


class Random(Uniform):
    """Tokens drawn at random, different ones in every layer and for every seed."""

    def __init__(self, budget: float = 0.2, seed: int = 0):
        super().__init__(budget)
        self.seed, self.layer = seed, 0

    def score(self, query: Tensor, key: Tensor, present: Tensor) -> Tensor:
        drawn = torch.zeros(present.shape)
        for row, mask in zip(drawn, present.cpu()):  # a sample draws the same alone and in a batch
            generator = torch.Generator().manual_seed(self.seed * 1000 + self.layer)
            row[mask] = torch.rand(int(mask.sum()), generator=generator)
        self.layer += 1
        return drawn.to(present.device)

    def allocate(self, scores: Tensor, present: Tensor) -> Tensor:
        self.layer = 0
        return super().allocate(scores, present)


class H2O(Uniform):
    """Half of the kept tokens have received most attention so far; half are the most recent. New tokens add theirs.

    H2O (arXiv 2306.14048), algorithm 1. A full layer drops, of the tokens not recent, the one with least attention.
    """

    def allocate(self, scores: Tensor, present: Tensor) -> Tensor:
        positions = (present.cumsum(-1) - 1).clamp(min=0)  # [B, N]
        self.received = torch.zeros_like(scores).scatter_add(2, positions.expand_as(scores), scores)  # [L, B, T]
        return super().allocate(scores, present)

    def retain(self, scores: Tensor, counts: Tensor, present: Tensor) -> Tensor:
        recent = last(present, counts // 2)
        return retain(scores.masked_fill(recent, torch.inf), counts, present, self.start)

    def observe(self, layer: int, query: Tensor, key: Tensor, position: Tensor) -> None:
        """Adds the attention of a new token's query [B, H, 1, Dh] to the keys [B, Hkv, S, Dh] at `position` [B, S]."""
        grouped = query.unflatten(1, (key.shape[1], -1)).squeeze(3)  # [B, Hkv, G, Dh]
        scores = (grouped @ key.transpose(-1, -2)).float() * key.shape[-1] ** -0.5
        scores = scores.masked_fill(position[:, None, None] < 0, torch.finfo(torch.float32).min)
        longest = int(position.max()) + 1
        if longest > self.received.shape[2]:
            self.received = F.pad(self.received, (0, longest - self.received.shape[2] + 64))
        self.received[layer].scatter_add_(1, position.clamp(min=0), scores.softmax(-1).mean(dim=(1, 2)))

    def victim(self, position: Tensor, kept: Tensor) -> Tensor:
        at = position.clamp(min=0)
        received = self.received.gather(2, at.clamp(max=self.received.shape[2] - 1))
        # Recent ones: half of what the layer kept, less the token that is about to enter.
        rank = position.argsort(-1, descending=True).argsort(-1)
        spared = (position < self.start) | (rank < (kept // 2 - 1).clamp(min=0)[..., None])
        return received.masked_fill(spared, torch.inf).argmin(-1)


class SnapKV(Uniform):
    """Keeps what the last tokens of the prompt attend to, with its neighbours; these last tokens stay too.

    SnapKV (arXiv 2404.14469), section 4: attention of the last `window` queries, summed and max-pooled. If the budget
    is less than two windows, the window is half the budget.
    """

    def __init__(self, budget: float = 0.2, window: int = 32, kernel: int = 7):
        super().__init__(budget)
        self.window, self.kernel = window, kernel

    def width(self, present: Tensor) -> Tensor:
        """Tokens in the window of each sample: [B]."""
        return ((self.budget * present.sum(-1)).long() // 2).clamp(min=1, max=self.window)

    def score(self, query: Tensor, key: Tensor, present: Tensor) -> Tensor:
        in_window = last(present, self.width(present))[:, -self.window :]  # [B, W]
        width, length = in_window.shape[1], present.shape[1]
        grouped = query[:, :, -width:].unflatten(1, (key.shape[1], -1))  # [B, Hkv, G, W, Dh]
        scores = (grouped @ key[:, :, None].transpose(-1, -2)).float() * key.shape[-1] ** -0.5
        causal = torch.ones(width, length, dtype=torch.bool, device=key.device).tril(length - width)
        seen = (causal & present[:, None])[:, None, None]  # [B, 1, 1, W, N]
        weight = scores.masked_fill(~seen, torch.finfo(torch.float32).min).softmax(-1).mean(dim=(1, 2))  # [B, W, N]
        received = (weight * in_window[..., None]).sum(1).masked_fill(~present, 0.0)
        pooled = F.max_pool1d(received[:, None], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]
        return pooled.masked_fill(~present, 0.0)

    def retain(self, scores: Tensor, counts: Tensor, present: Tensor) -> Tensor:
        window = last(present, self.width(present).minimum(counts - self.start))
        return retain(scores.masked_fill(window, torch.inf), counts, present, self.start)


class PyramidKV(SnapKV):
    """SnapKV's scores, with sizes that fall in equal steps from the first layer to the last.

    PyramidKV (arXiv 2406.02069), its arithmetic sequence: k / (beta * L) tokens for the last layer and
    2 * k / L - k / (beta * L) for the first, of k in all, with beta 20.
    """

    def sizes(self, total: int, layers: int, low: int, high: int) -> Tensor:
        mean = total / layers
        return spread(total, torch.linspace(2 * mean - mean / 20, mean / 20, layers, dtype=torch.double), low, high)


class Elastic(Uniform):
    """Merges dropped tokens: each anchor becomes the mean of itself and the dropped tokens nearest to it.

    Elastic Cache (arXiv 2407.18121), its cache merging: importance is accumulated attention, a bucket is an anchor
    and the dropped tokens to which it is the nearest; its fixed-point elimination is PrefixKV's way to decode.
    """

    def merge(self, key: Tensor, value: Tensor, keep: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value [B, Hkv, N, Dh] with every anchor replaced by its bucket's mean; keep, present [B, N].

        The first tokens and the last one are kept but are no anchors. Of two equally near anchors the earlier one wins.
        """
        length = keep.shape[1]
        order = present.long().cumsum(-1)
        anchor = keep & (order > self.start) & (order < order[:, -1:])
        place = torch.arange(length, device=keep.device)
        distance = (place[:, None] - place).abs().expand(len(keep), -1, -1)  # [B, N, N]
        nearest = distance.masked_fill(~anchor[:, None], 2 * length).argmin(-1)  # [B, N]
        dropped = present & ~keep & anchor.any(-1, keepdim=True)
        index = torch.where(dropped, nearest, place)[:, None, :, None]  # the others are their own bucket

        def merged(source: Tensor) -> Tensor:
            means = torch.zeros_like(source).scatter_reduce(
                2, index.expand_as(source), source, "mean", include_self=False
            )
            return torch.where(anchor[:, None, :, None], means, source)

        return merged(key), merged(value)


METHODS: dict[str, type[PrefixKV]] = {
    "random": Random, "local": Local, "h2o": H2O, "snapkv": SnapKV, "pyramidkv": PyramidKV, "elastic": Elastic,
    "uniform": Uniform, "prefixkv": PrefixKV,
}  # fmt: skip
