"""Other ways to choose what a KV cache keeps, as small classes with PrefixKV's interface.

A class that follows a paper names it, and overrides only what the paper does differently. All keep as many tokens as
PrefixKV does at the same budget. All but H2O, Local and Cover also evict as PrefixKV does while decoding, so that only
the choice of tokens differs; Elastic also merges tokens. In every method the heads of a layer share one set of kept
tokens. `METHODS` has their names on the command line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixkv import Compressor, PrefixKV, importance, require_finite, retain

GOLDEN = (5**0.5 - 1) / 2  # the fractional parts of its multiples spread most evenly over 0 to 1


def spread(total: int, target: Tensor, low: int, high: int) -> Tensor:
    """Whole numbers [L] near `target` [L], each in low .. high, that sum to `total`. Early layers win ties in rounding.

    `total` lies in low * L .. high * L. If a layer is stopped at a bound, the others share the difference equally.
    """
    shares, counts = target.tolist(), [0.0] * len(target)
    free, left = set(range(len(shares))), float(total)  # layers that are not at a bound, and what they share
    while free:
        # Shift all free layers equally to reach the total. Then fix those past a bound, on the side that is off most.
        shift = (left - sum(shares[layer] for layer in free)) / len(free)
        for layer in free:
            counts[layer] = shares[layer] + shift
        over, under = {i for i in free if counts[i] > high}, {i for i in free if counts[i] < low}
        if not over and not under:
            break
        too_much, too_little = sum(counts[i] - high for i in over), sum(low - counts[i] for i in under)
        past, bound = (over, high) if too_much >= too_little else (under, low)
        for layer in past:
            counts[layer] = bound
        free, left = free - past, left - bound * len(past)
    whole = [math.floor(count + 1e-9) for count in counts]
    room = [layer for layer, count in enumerate(whole) if count < high]
    for layer in sorted(room, key=lambda layer: whole[layer] - counts[layer])[: total - sum(whole)]:
        whole[layer] += 1
    return torch.tensor(whole)


def last(present: Tensor, count: Tensor) -> Tensor:
    """The last `count` tokens of `present` [B, N]: count [B] -> bool [B, N], or [L, B] -> [L, B, N]."""
    order = present.cumsum(-1)
    return present & (order > order[:, -1:] - count[..., None])


def question(present: Tensor, image: Tensor, window: int = 32) -> Tensor:
    """The tokens behind the last image, which ask about it: bool [B, N]. Where there are none, the last `window`."""
    behind = present & (image.flip(1).cumsum(1).flip(1) == 0) & image.any(1, keepdim=True)
    return torch.where(behind.any(1, keepdim=True), behind, last(present, torch.full_like(present.sum(-1), window)))


def words(present: Tensor, image: Tensor) -> Tensor:
    """What a method keeps first: bool [B, N]. All tokens that are not an image's; without an image, the `question`."""
    return torch.where(image.any(1, keepdim=True), present & ~image, question(present, image))


def best(scores: Tensor, counts: Tensor, among: Tensor) -> Tensor:
    """Of tokens `among` [.., N], the `counts` [..] with the highest scores [.., N]: bool [.., N]. Ties go either way.

    `among` has at least `counts` tokens.
    """
    most = int(counts.max())
    ranked = scores.masked_fill(~among, -torch.inf).topk(most).indices  # [.., most], the highest first
    chosen = (torch.arange(most, device=scores.device) < counts[..., None]).expand_as(ranked)
    return torch.zeros_like(among).scatter(-1, ranked, chosen)


def asking(present: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """What `last_attention` needs: a mask [B, 1, W, N], and which of the last W queries are asked, [B, 1, W, 1].

    `asked` [B, N] is True for the queries that a method asks. W tokens reach from the first of them in any prompt to
    the end. The mask is added to scores: 0 for keys that a query sees, the lowest number for later keys and padding.
    """
    place = torch.arange(present.shape[1], device=present.device)
    first = int(asked.any(0).long().argmax())
    seen = present[:, None, None] & (place <= place[first:, None])  # [B, 1, W, N]
    lowest = torch.finfo(torch.float32).min  # not -infinity: padding may see no key, and its softmax would be NaN
    return torch.where(seen, 0.0, lowest), asked[:, None, first:, None]


def last_attention(query: Tensor, key: Tensor, mask: Tensor, asked: Tensor) -> Tensor:
    """Attention weights of the last W queries: query [B, H, N, Dh], key [B, Hkv, N, Dh] -> [B, H, W, N], float32.

    mask [B, 1, W, N] and asked [B, 1, W, 1] as `asking` makes them. Rows of queries that are not asked are 0. All these
    numbers are in memory at once; unlike `importance`, it is meant for few queries.
    """
    width = mask.shape[2]
    # The H / Hkv neighbouring query heads that share a key head form one matrix, so that no key is copied for them.
    rows = query[:, :, -width:].reshape(len(key), key.shape[1], -1, key.shape[3])  # [B, Hkv, G * width, Dh]
    rows = rows * key.shape[3] ** -0.5  # before the product, which could be too large for float16
    scores = (rows @ key.mT).float().view(len(key), -1, width, key.shape[2])  # [B, H, width, N]
    return scores.add_(mask).softmax(-1).mul_(asked)


class Recorder(Compressor):
    """Keeps everything, and remembers the importance of every key: `scores` [L, B, N] and `present` [B, N]."""

    def score(self, query: Tensor, key: Tensor, present: Tensor) -> Tensor:
        return importance(query, key, present)

    def allocate(self, scores: Tensor, present: Tensor) -> Tensor:
        self.scores, self.present = scores, present
        return super().allocate(scores, present)


class Uniform(PrefixKV):
    """PrefixKV with the same size for every layer, so without a plan. Comparing the two shows what the search adds."""

    def __init__(self, budget: float = 0.2, start: int = 1, decode: str = "ratio"):
        super().__init__(budget, start, decode)

    def shares(self, layers: int, batch: int) -> Tensor:
        """How the layers share a prompt's budget: [L, B], of which only the ratios count."""
        return torch.ones(layers, batch)

    def allocate(self, scores: Tensor, present: Tensor) -> Tensor:
        """Tokens that each layer keeps of each prompt: scores [L, B, N] -> [L, B], from `shares`, whatever the scores.

        The total of a prompt is PrefixKV's: round(budget * L * n), and never less than the protected tokens.
        """
        require_finite(scores)
        layers, counts = len(scores), []
        shares = self.shares(*scores.shape[:2]).double().cpu()  # [L, B]
        for share, length in zip(shares.unbind(1), present.sum(-1).tolist()):
            protected = min(length, self.start + 1)
            total = max(round(self.budget * layers * length), layers * protected)
            counts.append(spread(total, total * share / share.sum(), protected, length))
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

    def __init__(self, budget: float = 0.2, seed: int | Sequence[int] = 0):
        """seed: one for all prompts, or one for each prompt of the batch."""
        super().__init__(budget)
        self.seed = seed

    def begin(self, present: Tensor, image: Tensor) -> None:
        self.layer = 0

    def score(self, query: Tensor, key: Tensor, present: Tensor) -> Tensor:
        drawn = torch.zeros(present.shape)
        seeds = [self.seed] * len(present) if isinstance(self.seed, int) else self.seed
        for row, mask, seed in zip(drawn, present.cpu(), seeds):  # a sample draws the same alone and in a batch
            generator = torch.Generator().manual_seed(seed * 1000 + self.layer)
            row[mask] = torch.rand(int(mask.sum()), generator=generator)
        self.layer += 1
        return drawn.to(present.device)


class H2O(Uniform):
    """Half of the kept tokens have received the most attention so far, half are the newest. New tokens add theirs.

    H2O (arXiv 2306.14048), algorithm 1. A full layer drops, of the tokens not recent, the one with least attention.
    """

    def allocate(self, scores: Tensor, present: Tensor) -> Tensor:
        positions = (present.cumsum(-1) - 1).clamp(min=0)  # [B, N]
        self.received = torch.zeros_like(scores).scatter_add(2, positions.expand_as(scores), scores)  # [L, B, T]
        return super().allocate(scores, present)

    def retain(self, scores: Tensor, counts: Tensor, present: Tensor) -> Tensor:
        recent = last(present, (counts // 2).minimum(counts - self.start))
        return retain(scores.masked_fill(recent, torch.inf), counts, present, self.start)

    def received_by(self, weights: Tensor) -> Tensor:
        """What the keys receive in all from queries with these weights: [B, H, W, N] -> [B, N]."""
        return weights.mean(1).sum(1)

    def observe(self, layer: int, query: Tensor, key: Tensor, position: Tensor) -> None:
        """Adds the attention of a new token's query [B, H, 1, Dh] to the keys [B, Hkv, S, Dh] at `position` [B, S]."""
        grouped = query.unflatten(1, (key.shape[1], -1)).squeeze(3) * key.shape[-1] ** -0.5  # [B, Hkv, G, Dh]
        scores = (grouped @ key.mT).float().flatten(1, 2)[:, :, None]  # [B, H, 1, S]
        bias = self.bias(layer, position)  # [B, S], or None
        if bias is not None:
            scores = scores + bias[:, None, None]
        scores = scores.masked_fill(position[:, None, None] < 0, torch.finfo(torch.float32).min)
        longest = int(position.max()) + 1
        if longest > self.received.shape[2]:
            self.received = F.pad(self.received, (0, longest - self.received.shape[2] + 64))
        self.received[layer].scatter_add_(1, position.clamp(min=0), self.received_by(scores.softmax(-1)))

    def newest(self, kept: Tensor) -> Tensor:
        """How many of the newest tokens are spared: [L, B]. Half of those kept, less the one that is about to enter."""
        return (kept // 2 - 1).clamp(min=0)

    def victim(self, position: Tensor, kept: Tensor) -> Tensor:
        at = position.clamp(min=0)
        received = self.received.gather(2, at.clamp(max=self.received.shape[2] - 1))
        rank = position.argsort(-1, descending=True).argsort(-1)
        newest = self.newest(kept).minimum((kept - self.start - 1).clamp(min=0))  # [L, B]: one token can always go
        spared = (position < self.start) | (rank < newest[..., None])
        return received.masked_fill(spared, torch.inf).argmin(-1)


class SnapKV(Uniform):
    """Keeps what the last tokens of the prompt attend to, with its neighbours; these last tokens stay too.

    SnapKV (arXiv 2404.14469), section 4: attention of the last `window` queries to the keys before them, summed and
    max-pooled. If the budget is less than two windows, the window is half the budget.
    """

    def __init__(self, budget: float = 0.2, window: int = 32, kernel: int = 7):
        super().__init__(budget)
        self.window, self.kernel = window, kernel

    def width(self, present: Tensor) -> Tensor:
        """Tokens in the window of each sample: [B]."""
        return ((self.budget * present.sum(-1)).long() // 2).clamp(min=1, max=self.window)

    def score(self, query: Tensor, key: Tensor, present: Tensor) -> Tensor:
        window = last(present, self.width(present))  # [B, N]
        received = last_attention(query, key, *asking(present, window)).mean(1).sum(1)  # [B, N]
        before = received.masked_fill(window, 0.0)[:, None]  # [B, 1, N]: the window's own keys are not pooled
        pooled = F.max_pool1d(before, self.kernel, stride=1, padding=self.kernel // 2)[:, 0]  # [B, N]
        return torch.where(window, received, pooled).masked_fill(~present, 0.0)

    def retain(self, scores: Tensor, counts: Tensor, present: Tensor) -> Tensor:
        window = last(present, self.width(present).minimum(counts - self.start))
        return retain(scores.masked_fill(window, torch.inf), counts, present, self.start)


class PyramidKV(SnapKV):
    """SnapKV's scores, with sizes that fall in equal steps from the first layer to the last.

    PyramidKV (arXiv 2406.02069), its arithmetic sequence: k / (beta * L) tokens for the last layer and
    2 * k / L - k / (beta * L) for the first, of k in all, with beta 20.
    """

    def shares(self, layers: int, batch: int) -> Tensor:
        return torch.linspace(2 - 1 / 20, 1 / 20, layers, dtype=torch.double)[:, None].expand(-1, batch)


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


class VLCache(Uniform):
    """Keeps what the words behind the image attend to; a layer's size follows from how dense that attention is.

    VL-Cache (arXiv 2410.23317), sections 4.1 and 4.2: a layer's density is the share, over all words and heads, of
    the weights that are at least a hundredth of a word's largest one.
    """

    def begin(self, present: Tensor, image: Tensor) -> None:
        self.asked = question(present, image)  # [B, N]
        self.density: list[Tensor] = []  # of each layer [B]

    def score(self, query: Tensor, key: Tensor, present: Tensor) -> Tensor:
        weight = last_attention(query, key, *asking(present, self.asked))  # [B, H, W, N]
        dense = (weight > 0) & (weight >= 0.01 * weight.amax(-1, keepdim=True))  # [B, H, W, N]
        seen = (present.cumsum(-1) * self.asked).sum(-1)  # [B]: keys that each word sees, over all words
        self.density.append(dense.sum((1, 2, 3)) / (seen * query.shape[1]))
        return weight.mean(1).sum(1)

    def shares(self, layers: int, batch: int) -> Tensor:
        return torch.stack(self.density)


class TGVKV(Uniform):
    """Keeps words first, and the patches that weighty words attend to; a layer's size follows from that attention.

    TGV-KV (arXiv 2606.03075), equations 7 and 8: a word weighs what it and later words attend to it, on average. A
    layer's share of the budget is the words' attention to the image.
    """

    def begin(self, present: Tensor, image: Tensor) -> None:
        self.asked = question(present, image)  # [B, N]
        self.image = image
        self.looks: list[Tensor] = []  # of each layer [B]

    def score(self, query: Tensor, key: Tensor, present: Tensor) -> Tensor:
        weight = last_attention(query, key, *asking(present, self.asked)).mean(1)  # [B, W, N]
        later = self.asked.flip(1).cumsum(1).flip(1)  # [B, N]: words from here on, this one included
        weighty = (weight.sum(1) / later.clamp(min=1))[:, -weight.shape[1] :]  # [B, W]
        self.looks.append((weight.sum(1) * self.image).sum(-1))
        return (weighty[..., None] * weight).sum(1)

    def shares(self, layers: int, batch: int) -> Tensor:
        looks = torch.stack(self.looks)  # [L, B]
        return torch.where(looks.sum(0) > 0, looks, 1.0)  # without an image all layers are alike

    def retain(self, scores: Tensor, counts: Tensor, present: Tensor) -> Tensor:
        return super().retain(scores + words(present, self.image) * present.shape[1], counts, present)


class Cover(H2O):
    """Keeps the words, a little of what they attend to, and an even cover of the picture that stands for all of it.

    The first and the last token stay anyway. Up to half of a layer's tokens are words of the prompt: the last of them,
    if there are more. Of the rest, a share of LOOKED_AT are those that the words behind the image attend to most
    (VL-Cache, TGV-KV). All others are evenly spaced over the tokens left: the picture, and words that found no room.
    These tokens are laid around a circle in steps of the golden ratio, and one arc of it is kept. In a grid 24 wide,
    every sixth patch would form four columns; an arc spreads in both directions, unless the grid is 13, 21 or 34 wide
    (Fibonacci's numbers). From layer to layer the arc moves on by a turn / L: if L arcs fill the circle, the layers
    together see all of the picture.

    A spaced token also stands for dropped ones. If one of n is kept, log n is added to its score, so that a new token
    counts it n times (ToMe's proportional attention, arXiv 2210.09461, section 3). One that is dropped while decoding
    takes its weight with it. Without a picture there is nothing to cover: half are the newest tokens, the others those
    that the last 32 attend to most.

    While decoding, the token with the least attention from the question and the new words is dropped (H2O's eviction,
    with these queries alone). A quarter, the newest, is spared, but 8 at most; the words of a prompt with a picture go
    last. Attention is squared before it is summed, as errors are: a token that one word needs matters more than one
    that all words glance at.
    """

    LOOKED_AT = 0.2
    TURNS = 1.0  # how far the arc would have moved after the last layer

    def begin(self, present: Tensor, image: Tensor) -> None:
        self.queries, self.layer = asking(present, question(present, image)), 0
        self.words, self.pictured = present & ~image, image.any(1)  # [B, N], [B]

    def score(self, query: Tensor, key: Tensor, present: Tensor) -> Tensor:
        return self.received_by(last_attention(query, key, *self.queries))

    def received_by(self, weights: Tensor) -> Tensor:
        return weights.square().sum((1, 2))

    def allocate(self, scores: Tensor, present: Tensor) -> Tensor:
        spared = self.words & self.pictured[:, None]  # [B, N]
        counts = super().allocate(scores + spared * 1e6, present)  # more than any attention, so that words go last
        self.chosen = self.cover(scores, counts, present)  # of all layers at once, which is faster
        return counts

    def cover(self, scores: Tensor, counts: Tensor, present: Tensor) -> Tensor:
        """Which tokens the layers keep: scores [L, B, N], counts [L, B] -> bool [L, B, N]. Notes their weights."""
        number = present.cumsum(1)  # [B, N]: 1 for a prompt's first token
        kept = present & ((number <= self.start) | (number == number[:, -1:]))  # [B, N]
        most = torch.minimum((counts // 2).clamp(min=1), counts - kept.sum(-1))  # [L, B]
        kept = kept | last(self.words, most)  # [L, B, N]
        room = counts - kept.sum(-1)  # [L, B]
        looked_at = (torch.where(self.pictured, self.LOOKED_AT, 1.0) * room).round()  # [L, B]
        kept = kept | best(scores, looked_at, present & ~kept)  # [L, B, N]
        others, room = present & ~kept, room - looked_at  # [L, B, N], [L, B]
        turn = torch.arange(len(scores), device=scores.device) * (self.TURNS / len(scores))  # [L]
        angle = (number.double() * GOLDEN + turn[:, None, None]) % 1  # [L, B, N]: in turns
        spaced = best(-angle, room, others)
        stand_for = (others.sum(-1) / room)[..., None]  # [L, B, 1]; not read where there is no room
        log_weights = torch.where(spaced, stand_for.log(), 0.0)  # [L, B, N]
        self.log_weights = F.pad(log_weights, (0, 1))  # [L, B, N + 1]: the last one is that of all new tokens
        self.padding = present.shape[1] - number[:, -1:]  # [B, 1]: the column of position 0
        return kept | spaced

    def retain(self, scores: Tensor, counts: Tensor, present: Tensor) -> Tensor:
        """What `allocate` has chosen: the cache asks once for each layer, in order."""
        self.layer += 1
        return self.chosen[self.layer - 1]

    def bias(self, layer: int, position: Tensor) -> Tensor | None:
        weights = self.log_weights[layer]  # [B, T]
        return weights.gather(1, (position + self.padding).clamp(0, weights.shape[1] - 1))

    def newest(self, kept: Tensor) -> Tensor:
        """How many of the newest tokens are spared: [L, B]. A quarter of those kept, but 8 at most."""
        return (kept // 4).clamp(max=8)


METHODS: dict[str, type[PrefixKV]] = {
    "random": Random, "local": Local, "h2o": H2O, "snapkv": SnapKV, "pyramidkv": PyramidKV, "elastic": Elastic,
    "vlcache": VLCache, "tgvkv": TGVKV, "cover": Cover, "uniform": Uniform, "prefixkv": PrefixKV,
}  # fmt: skip
