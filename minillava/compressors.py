"""Other ways to choose what a KV cache keeps, as small classes with PrefixKV's hooks.

A class that follows a paper names it, and overrides only what the paper does differently: `score` (which tokens
matter), `allocate` (how many each layer keeps), `choose` (which), `victim` and `attend` (what is dropped later). All
keep as many tokens as PrefixKV does at the same budget (Local at least its four first). All but H2O, Local and Cover
evict as PrefixKV does. Elastic merges tokens, and AttentionMatching fits values and weights. In every method the
heads of a layer share one set of kept tokens. `METHODS` has their names on the command line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.model import KeepAll, Waiting
from prefixkv import PrefixKV, attention_weights, hide, importance, retain

GOLDEN = (5**0.5 - 1) / 2  # the fractional parts of its multiples spread most evenly over 0 to 1


def apportion(total: int, target: Tensor, low: int, high: int) -> Tensor:
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
    counts = [round(count * 1024) / 1024 for count in counts]  # so that float32's noise decides no tie
    whole = [math.floor(count) for count in counts]
    room = [layer for layer, count in enumerate(whole) if count < high]
    for layer in sorted(room, key=lambda layer: whole[layer] - counts[layer])[: total - sum(whole)]:
        whole[layer] += 1
    return torch.tensor(whole)


def last_n(present: Tensor, count: Tensor) -> Tensor:
    """The last `count` tokens of `present` [B, N]: count [B] -> bool [B, N], or [L, B] -> [L, B, N]."""
    order = present.cumsum(-1)
    return present & (order > order[:, -1:] - count[..., None])


def question_mask(present: Tensor, image: Tensor, window: int = 32) -> Tensor:
    """The tokens after the last image, which ask about it: bool [B, N]. Where there are none, the last `window`."""
    after = present & (image.flip(1).cumsum(1).flip(1) == 0) & image.any(1, keepdim=True)
    return torch.where(after.any(1, keepdim=True), after, last_n(present, torch.full_like(present.sum(-1), window)))


def topk_mask(scores: Tensor, counts: Tensor, among: Tensor) -> Tensor:
    """Of tokens `among` [.., N], the `counts` [..] with the highest scores [.., N]: bool [.., N]. Ties go either way.

    `among` has at least `counts` tokens.
    """
    most = int(counts.max())
    ranked = scores.masked_fill(~among, -torch.inf).topk(most).indices  # [.., most], the highest first
    chosen = (torch.arange(most, device=scores.device) < counts[..., None]).expand_as(ranked)
    return torch.zeros_like(among).scatter(-1, ranked, chosen)


def question_queries(present: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """What `question_weights` needs: a mask [B, 1, W, N], and which of the last W queries are asked, [B, 1, W, 1].

    `asked` [B, N] is True for the queries whose attention a method reads. W tokens reach from the first of them in any
    prompt to the end. The mask hides later keys and padding.
    """
    place = torch.arange(present.shape[1], device=present.device)
    first = int(asked.any(0).long().argmax())
    return hide(present[:, None, None] & (place <= place[first:, None])), asked[:, None, first:, None]


def question_weights(query: Tensor, key: Tensor, mask: Tensor, asked: Tensor) -> Tensor:
    """Attention weights of the last W queries: query [B, H, N, Dh], key [B, Hkv, N, Dh] -> [B, H, W, N], float32.

    mask [B, 1, W, N] and asked [B, 1, W, 1] as `question_queries` makes them. Rows of queries that are not asked are 0.
    All these numbers are in memory at once; unlike `importance`, it is meant for few queries.
    """
    return attention_weights(query[:, :, -mask.shape[2] :], key, mask).mul_(asked)


def divide(method: PrefixKV, ratios: Tensor) -> Tensor:
    """Tokens that each layer keeps of each prompt, [L, B], in the proportions of `ratios` [L, B].

    The total of a prompt is that of `PrefixKV.limits`.
    """
    layers, counts = len(ratios), []
    for ratio, length in zip(ratios.double().cpu().unbind(1), method.present.sum(-1).tolist()):
        total, protected = method.limits(layers, length)
        counts.append(apportion(total, total * ratio / ratio.sum(), protected, length))
    return torch.stack(counts, dim=1).to(method.present.device)


def equally(method: PrefixKV, scores: Tensor) -> Tensor:
    """The same number of tokens for every layer, but for rounding: scores [L, B, N] -> [L, B]."""
    return divide(method, torch.ones(scores.shape[:2]))


class Recorder(KeepAll):
    """Keeps everything, and remembers the importance of every key: `scores` [L, B, N]."""

    def begin(self, present: Tensor, image: Tensor, layers: int) -> None:
        super().begin(present, image, layers)
        self.scores = torch.zeros(layers, *present.shape, dtype=torch.float32, device=present.device)  # [L, B, N]

    def score(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.scores[layer] = importance(query, key, self.present)
        return self.scores[layer]


class Uniform(PrefixKV):
    """PrefixKV with the same size for every layer. Comparing the two shows what the search adds.

    Methods that size all layers alike, and differ in something else, begin with this class.
    """

    def allocate(self, scores: Tensor) -> Tensor:
        return equally(self, scores)


class Local(Uniform):
    """Attention sinks and the most recent tokens, as a window that moves on while decoding.

    The tokens are those of StreamingLLM (arXiv 2309.17453), section 3.2: the first four, then the newest. Its positions
    are places in the cache; here, as in all methods, they remain those of the text.
    """

    def __init__(self, budget: float = 0.2, num_sinks: int = 4):
        super().__init__(budget, num_sinks)

    def score(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.present.cumsum(-1).float()  # the later the better

    def victim(self, position: Tensor, kept: Tensor) -> Tensor:
        """The oldest token that is not a sink. Free slots have position -1, below all sinks."""
        return position.masked_fill(position < self.num_sinks, torch.iinfo(position.dtype).max).argmin(-1)


class Random(Uniform):
    """Tokens drawn at random, different ones in every layer and for every seed."""

    def __init__(self, budget: float = 0.2, seed: int | Sequence[int] = 0):
        """seed: one for all prompts, or one for each prompt of the batch."""
        super().__init__(budget)
        self.seed = seed

    def score(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        drawn = torch.zeros(self.present.shape, dtype=torch.float32)
        seeds = [self.seed] * len(drawn) if isinstance(self.seed, int) else self.seed
        for row, mask, seed in zip(drawn, self.present.cpu(), seeds):  # the same draws as without the batch
            generator = torch.Generator().manual_seed(seed * 1000 + layer)
            row[mask] = torch.rand(int(mask.sum()), generator=generator, dtype=torch.float32)
        return drawn.to(self.present.device)


class LeastAttended(PrefixKV):
    """When a layer is full, drops the token that has received least attention. The defaults are those of `Cover`.

    Subclasses call `watch` in `allocate`, which sees the scores of all layers. `super()` is `Weighted` in `Cover`.
    """

    def begin(self, present: Tensor, image: Tensor, layers: int) -> None:
        if self.plan is not None:
            raise ValueError("This method takes no plan, since it begins with the scores of all layers.")
        super().begin(present, image, layers)

    def watch(self, scores: Tensor, drop_last: Tensor) -> None:
        """Begins with what the prompt's tokens have received, scores [L, B, N], by position: T of them in all.

        Those in drop_last [B, N] go when there are no others.
        """
        at = (self.present.cumsum(-1) - 1).clamp(min=0)  # [B, N]: positions
        self.received = torch.zeros_like(scores).scatter_add(2, at.expand_as(scores), scores)  # [L, B, T]
        self.drop_last = torch.zeros_like(drop_last).scatter_add(1, at, drop_last)  # [B, T]

    @property
    def notes_bytes(self) -> int:
        """Bytes of what is noted of each token of the text, those that were dropped included."""
        return self.received.nbytes + self.drop_last.nbytes + int(getattr(super(), "notes_bytes", 0))

    def sum_of(self, weights: Tensor) -> Tensor:
        """What the keys receive in all from queries with these weights: [B, H, N, S] -> [B, S]."""
        return weights.square().sum((1, 2))

    def num_recent(self, kept: Tensor) -> Tensor:
        """How many of the newest tokens are spared: kept [L, B] of the prompt -> [L, B]."""
        return (kept // 4).clamp(max=8)

    def attend(self, layer: int, query: Tensor, key: Tensor, seen: Tensor | None, position: Tensor) -> Tensor | None:
        bias = super().attend(layer, query, key, seen, position)  # [B, S], or None
        mask = None if seen is None else hide(seen)
        if bias is not None:
            mask = bias[:, None, None] if mask is None else mask + bias[:, None, None]
        self.note(layer, attention_weights(query, key, mask), position)
        return bias

    def note(self, layer: int, weights: Tensor, position: Tensor) -> None:
        """Adds what a layer's keys at position [B, S] received: weights [B, H, N, S], 0 in free slots."""
        more = int(position.max()) + 1 - self.received.shape[2]
        if more > 0:
            self.received = F.pad(self.received, (0, more + 64))
            self.drop_last = F.pad(self.drop_last, (0, more + 64))
        self.received[layer].scatter_add_(1, position.clamp(min=0), self.sum_of(weights))

    def victim(self, position: Tensor, kept: Tensor) -> Tensor:
        """The slot [L, B] of the token that has received least. Neither the first tokens nor the newest are dropped."""
        at = position.clamp(0, self.received.shape[2] - 1)  # [L, B, S]
        newest = position.sort(-1, descending=True).values  # [L, B, S]
        count = self.num_recent(kept).minimum((kept - self.num_sinks - 1).clamp(min=0))  # [L, B]: one can always go
        is_recent = position >= newest.gather(2, (count - 1).clamp(min=0)[..., None])  # [L, B, S]
        spared = (position < self.num_sinks) | (is_recent & (count > 0)[..., None])  # [L, B, S]
        or_last = spared | self.drop_last.expand(len(at), -1, -1).gather(2, at)  # [L, B, S]
        spared = torch.where(or_last.all(-1, keepdim=True), spared, or_last)  # [L, B, S]
        return self.received.gather(2, at).masked_fill(spared, torch.inf).argmin(-1)


class H2O(LeastAttended):
    """Half of the kept tokens have received the most attention so far, half are the newest. New tokens add theirs.

    H2O (arXiv 2306.14048), algorithm 1. A full layer drops, of the tokens not recent, the one with least attention.
    """

    def allocate(self, scores: Tensor) -> Tensor:
        self.watch(scores, torch.zeros_like(self.present))
        return equally(self, scores)

    def choose(self, layer: int, scores: Tensor, counts: Tensor) -> Tensor:
        recent = last_n(self.present, (counts // 2).minimum(counts - self.num_sinks))
        return retain(scores.masked_fill(recent, torch.inf), counts, self.present, self.num_sinks)

    def sum_of(self, weights: Tensor) -> Tensor:
        return weights.mean(1).sum(1)

    def num_recent(self, kept: Tensor) -> Tensor:
        """Half of those kept, less the one that is about to enter."""
        return (kept // 2 - 1).clamp(min=0)


class SnapKV(Uniform):
    """Keeps what the last tokens of the prompt attend to, with its neighbours; these last tokens stay too.

    SnapKV (arXiv 2404.14469), section 4: attention of the last `window` queries to the keys before them, summed and
    max-pooled. If the budget is less than two windows, the window is half the budget.
    """

    def __init__(self, budget: float = 0.2, window: int = 32, kernel: int = 7):
        super().__init__(budget)
        if window < 1 or kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"window is {window} and kernel {kernel}; expected 1 or more, and an odd number.")
        self.window, self.kernel = window, kernel

    def width(self) -> Tensor:
        """Tokens in the window of each sample: [B]."""
        return ((self.budget * self.present.sum(-1).float()).long() // 2).clamp(min=1, max=self.window)

    def score(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        window = last_n(self.present, self.width())  # [B, N]
        weights = question_weights(query, key, *question_queries(self.present, window))  # [B, H, W, N]
        received = weights.mean(1).sum(1)  # [B, N]
        before = received.masked_fill(window, 0.0)[:, None]  # [B, 1, N]: the window's own keys are not pooled
        pooled = F.max_pool1d(before, self.kernel, stride=1, padding=self.kernel // 2)[:, 0]  # [B, N]
        return torch.where(window, received, pooled).masked_fill(~self.present, 0.0)

    def choose(self, layer: int, scores: Tensor, counts: Tensor) -> Tensor:
        window = last_n(self.present, self.width().minimum(counts - self.num_sinks))
        return retain(scores.masked_fill(window, torch.inf), counts, self.present, self.num_sinks)


class PyramidKV(SnapKV):
    """SnapKV's scores, with sizes that fall in equal steps from the first layer to the last.

    PyramidKV (arXiv 2406.02069), its arithmetic sequence: k / (beta * L) tokens for the last layer and
    2 * k / L - k / (beta * L) for the first, of k in all, with beta 20. As in its code, every layer's window comes on
    top, and k is what the windows leave.
    """

    def allocate(self, scores: Tensor) -> Tensor:
        falling = torch.linspace(2 - 1 / 20, 1 / 20, len(scores), dtype=torch.double)[:, None]  # [L, 1]
        window = self.width().cpu()  # [B]
        rest = (self.budget * self.present.sum(-1).cpu() - window).clamp(min=0)  # [B]: of k / L
        return divide(self, window + falling * rest)


class Elastic(Uniform):
    """Merges dropped tokens: each anchor becomes the mean of itself and the dropped tokens nearest to it.

    Elastic Cache (arXiv 2407.18121), its cache merging: importance is accumulated attention, a bucket is an anchor
    and the dropped tokens to which it is the nearest. While decoding it drops at a fixed place, as PrefixKV does.
    """

    def compress(self, waiting: list[Waiting]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for key, value, keep in super().compress(waiting):
            yield *self.merge(key, value, keep), keep

    def anchors(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the kept tokens are anchors, bool [B, N], and the place of each token's nearest one, [B, N].

        The first tokens and the last one are kept but are no anchors. Of two equally near anchors the earlier one wins.
        """
        length = keep.shape[1]
        order = self.present.long().cumsum(-1)
        anchor = keep & (order > self.num_sinks) & (order < order[:, -1:])
        place = torch.arange(length, device=keep.device)
        before = torch.where(anchor, place, -length).cummax(-1).values  # [B, N]: the nearest anchor up to here
        after = torch.where(anchor, place, 2 * length).flip(-1).cummin(-1).values.flip(-1)  # [B, N]
        return anchor, torch.where(place - before <= after - place, before, after)

    def merge(self, key: Tensor, value: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value [B, Hkv, N, Dh] with every anchor replaced by its bucket's mean; keep [B, N]."""
        anchor, nearest = self.anchors(keep)
        place = torch.arange(keep.shape[1], device=keep.device)
        dropped = self.present & ~keep & anchor.any(-1, keepdim=True)
        index = torch.where(dropped, nearest, place)[:, None, :, None]  # the others are their own bucket

        def merged(source: Tensor) -> Tensor:
            means = torch.zeros_like(source).scatter_reduce(
                2, index.expand_as(source), source, "mean", include_self=False
            )
            return torch.where(anchor[:, None, :, None], means, source)

        return merged(key), merged(value)


class VLCache(PrefixKV):
    """Keeps what the words after the image attend to; a layer's size follows from how dense that attention is.

    VL-Cache (arXiv 2410.23317), sections 4.1 and 4.2: a layer's density is the share, over all words and heads, of
    the weights that are at least a hundredth of a word's largest one.
    """

    def begin(self, present: Tensor, image: Tensor, layers: int) -> None:
        super().begin(present, image, layers)
        self.question = question_mask(present, image)  # [B, N]
        self.density: list[Tensor] = []  # of each layer [B]

    def score(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = question_weights(query, key, *question_queries(self.present, self.question))  # [B, H, W, N]
        dense = (weights > 0) & (weights >= 0.01 * weights.amax(-1, keepdim=True))  # [B, H, W, N]
        seen = (self.present.cumsum(-1) * self.question).sum(-1)  # [B]: keys that each word sees, over all words
        self.density.append(dense.sum((1, 2, 3)).float() / (seen * query.shape[1]))
        return weights.mean(1).sum(1)

    def allocate(self, scores: Tensor) -> Tensor:
        return divide(self, torch.stack(self.density))


class TGVKV(PrefixKV):
    """Keeps words first, and the patches that weighty words attend to; a layer's size follows from that attention.

    TGV-KV (arXiv 2606.03075), equations 7 and 8: a word weighs what it and later words attend to it, on average. A
    layer's part of the budget is the words' attention to the image.
    """

    def begin(self, present: Tensor, image: Tensor, layers: int) -> None:
        super().begin(present, image, layers)
        self.question = question_mask(present, image)  # [B, N]
        self.looks: list[Tensor] = []  # of each layer [B]

    def score(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = question_weights(query, key, *question_queries(self.present, self.question)).mean(1)  # [B, W, N]
        later = self.question.flip(1).cumsum(1).flip(1)  # [B, N]: words from here on, this one included
        weighty = (weights.sum(1) / later.clamp(min=1))[:, -weights.shape[1] :]  # [B, W]
        self.looks.append((weights.sum(1) * self.image).sum(-1))
        return (weighty[..., None] * weights).sum(1)

    def allocate(self, scores: Tensor) -> Tensor:
        looks = torch.stack(self.looks)  # [L, B]
        return divide(self, torch.where(looks.sum(0) > 0, looks, 1.0))  # without an image all layers are alike

    def choose(self, layer: int, scores: Tensor, counts: Tensor) -> Tensor:
        first = torch.where(self.image.any(1, keepdim=True), self.present & ~self.image, self.question)  # [B, N]
        return retain(scores + first * self.present.shape[1], counts, self.present, self.num_sinks)


class MixKV(SnapKV):
    """SnapKV's scores mixed with diversity: how far a key points away from its head's mean direction.

    MixKV (arXiv 2510.20707): the more alike the keys of a head are (the mean cosine of two of them), the more its
    diversity counts. The least diverse key counts 0, and all are scaled to the mean of the scores. Here, heads share
    their tokens.
    """

    def score(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended, mask = super().score(layer, query, key, value)[:, None], self.present[:, None]  # [B, 1, N] each
        number = mask.sum(-1, keepdim=True).float()  # [B, 1, 1]
        unit = F.normalize(key.float(), dim=-1) * mask[..., None]  # [B, Hkv, N, Dh]
        mean = unit.sum(2) / number  # [B, Hkv, Dh]
        pairs = (number**2 * mean.square().sum(-1, keepdim=True) - number) / (number**2 - number).clamp(min=1)
        alike = pairs.clamp(0, 1)  # [B, Hkv, 1]
        apart = -(unit @ mean[..., None])[..., 0]  # [B, Hkv, N]
        low = apart.masked_fill(~mask, torch.inf).amin(-1, keepdim=True)  # [B, Hkv, 1]
        apart = (apart - low).masked_fill(~mask, 0.0)
        apart = apart * attended.sum(-1, keepdim=True) / apart.sum(-1, keepdim=True).clamp(min=1e-12)
        return ((1 - alike) * attended + alike * apart).mean(1)


class Weighted(PrefixKV):
    """A method whose kept tokens stand for others: `log_weights` [L, B, N + 1] are added to the scores of their keys.

    The last column is that of all tokens after the prompt. A token that is dropped takes its weight with it.
    """

    log_weights: Tensor

    def begin(self, present: Tensor, image: Tensor, layers: int) -> None:
        super().begin(present, image, layers)
        self.padding = (~present).sum(-1, keepdim=True)  # [B, 1]: the column of position 0

    @property
    def notes_bytes(self) -> int:
        """Bytes of the weights."""
        return self.log_weights.nbytes

    def bias(self, layer: int, position: Tensor) -> Tensor | None:
        """What is added to the scores of keys at `position` [B, S]: log n for a key that counts n times."""
        weights = self.log_weights[layer]  # [B, N + 1]
        return weights.gather(1, (position + self.padding).clamp(0, weights.shape[1] - 1))

    def attend(self, layer: int, query: Tensor, key: Tensor, seen: Tensor | None, position: Tensor) -> Tensor | None:
        return self.bias(layer, position)


class AttentionMatching(Weighted):
    """Keeps the keys with the largest root-mean-square attention; fits their weights, then their values.

    Attention Matching (arXiv 2602.16284): a few reference queries shall find, in what is kept, the same mass (weights
    of the keys by non-negative least squares) and the same output (values by least squares) as in the whole prompt.
    Here the queries are the prompt's last REFERENCE, and heads share tokens and weights.
    """

    REFERENCE, ROUNDS, RIDGE = 256, 200, 1e-4

    def begin(self, present: Tensor, image: Tensor, layers: int) -> None:
        super().begin(present, image, layers)
        self.queries = question_queries(present, last_n(present, torch.full_like(present.sum(-1), self.REFERENCE)))
        self.attention: list[Tensor] = []  # of each layer, the reference queries' weights [B, H, W, N]
        shape = (layers, present.shape[0], present.shape[1] + 1)
        self.log_weights = torch.zeros(shape, dtype=torch.float32, device=present.device)

    def score(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.attention.append(question_weights(query, key, *self.queries))
        return self.attention[-1].square().sum((1, 2))

    def allocate(self, scores: Tensor) -> Tensor:
        return equally(self, scores)

    def compress(self, waiting: list[Waiting]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for layer, (key, value, keep) in enumerate(super().compress(waiting)):
            weights, self.attention[layer] = self.attention[layer], keep.new_zeros(0)  # frees each layer's in turn
            fitted = [self.fit(layer, row, *parts) for row, parts in enumerate(zip(weights, value, keep))]
            yield key, torch.stack(fitted), keep

    def fit(self, layer: int, row: int, weights: Tensor, value: Tensor, keep: Tensor) -> Tensor:
        """The values [Hkv, N, Dh] of one text, fitted where keep [N]; notes the weights that make up for the others.

        weights [H, W, N] are the reference queries' attention to the whole prompt, so a query's mass is 1.
        """
        asked = weights[0].sum(-1) > 0  # [W]: not padding
        weights = weights[:, asked].double()  # [H, A, N]: A queries are asked
        kept = weights[..., keep]  # [H, A, F]
        flat = kept.flatten(0, 1)  # [H * A, F]
        square, mass = flat.mT @ flat, flat.sum(0)  # [F, F], [F]
        times = torch.ones_like(mass)  # [F]: how often a key counts
        for _ in range(self.ROUNDS):  # multiplicative updates (Lee and Seung): they keep the sign
            times = times * mass / (square @ times).clamp(min=1e-12)
        times = times.clamp(min=1e-6)
        self.log_weights[layer, row, :-1][keep] = times.log().float()
        output = weights.unflatten(0, (len(value), -1)) @ value[:, None].double()  # [Hkv, G, A, Dh]
        share = (kept * times) / (kept * times).sum(-1, keepdim=True).clamp(min=1e-12)  # [H, A, F]
        share = share.unflatten(0, (len(value), -1)).flatten(1, 2)  # [Hkv, G * A, F]
        # Ridge: values that the queries hardly see stay what they were.
        old, ridge = value[:, keep].double(), self.RIDGE * torch.eye(len(mass), dtype=torch.double, device=keep.device)
        change = torch.linalg.solve(share.mT @ share + ridge, share.mT @ (output.flatten(1, 2) - share @ old))
        fitted = value.clone()
        fitted[:, keep] = (old + change).to(value.dtype)
        return fitted


class Cover(LeastAttended, Weighted):
    """Keeps the words, a little of what they attend to, and an even cover of the picture that stands for all of it.

    The first and the last token stay anyway. Up to half of a layer's tokens are words of the prompt: the last of them,
    if there are more. Of the rest, LOOKED_AT are those that the words after the image attend to most (VL-Cache,
    TGV-KV). All others are evenly spaced over the tokens left: the picture, and words that found no room. These tokens
    are laid around a circle in steps of the golden ratio, and one arc of it is kept. In a grid 24 wide, every sixth
    patch would form four columns; an arc spreads in both directions, unless the grid is 13, 21 or 34 wide (Fibonacci's
    numbers). From layer to layer the arc moves on by a turn / L: if L arcs fill the circle, the layers together see all
    of the picture.

    A spaced token also stands for dropped ones. If one of n is kept, log n is added to its score, so that a new token
    counts it n times (ToMe's proportional attention, arXiv 2210.09461, section 3). One that is dropped while decoding
    takes its weight with it. Without a picture there is nothing to cover: half are the newest tokens, the others those
    that the last 32 attend to most.

    While decoding, the token with the least attention from the question and the new words is dropped (H2O's eviction,
    with these queries only). A quarter, the newest, is spared, but 8 at most; the words of a prompt with a picture go
    last. Attention is squared before it is summed, as errors are: a token that one word needs matters more than one
    that all words glance at.
    """

    LOOKED_AT = 0.2
    TURNS = 1.0  # how far the arc would have moved after the last layer

    def begin(self, present: Tensor, image: Tensor, layers: int) -> None:
        super().begin(present, image, layers)
        self.queries = question_queries(present, question_mask(present, image))
        self.words, self.has_image = present & ~image, image.any(1)  # [B, N], [B]

    def score(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.sum_of(question_weights(query, key, *self.queries))

    def allocate(self, scores: Tensor) -> Tensor:
        self.watch(scores, drop_last=self.words & self.has_image[:, None])
        counts = equally(self, scores)
        self.chosen = self.cover(scores, counts)  # of all layers at once, which is faster
        return counts

    def cover(self, scores: Tensor, counts: Tensor) -> Tensor:
        """Which tokens the layers keep: scores [L, B, N], counts [L, B] -> bool [L, B, N]. Notes their weights."""
        present = self.present
        number = present.cumsum(1)  # [B, N]: 1 for a prompt's first token
        kept = present & ((number <= self.num_sinks) | (number == number[:, -1:]))  # [B, N]
        most = torch.minimum((counts // 2).clamp(min=1), counts - kept.sum(-1))  # [L, B]
        kept = kept | last_n(self.words, most)  # [L, B, N]
        room = counts - kept.sum(-1)  # [L, B]
        part = torch.ones(room.shape[1:], dtype=torch.float32, device=room.device)  # [B]
        looked_at = (part.masked_fill(self.has_image, self.LOOKED_AT) * room).round()  # [L, B]
        kept = kept | topk_mask(scores, looked_at, present & ~kept)  # [L, B, N]
        others, room = present & ~kept, room - looked_at  # [L, B, N], [L, B]
        spaced = topk_mask(-self.along(number, len(scores)), room, others)
        cluster_size = (others.sum(-1) / room)[..., None]  # [L, B, 1]; not read where there is no room
        log_sizes = torch.where(spaced, cluster_size.log(), 0.0)  # [L, B, N]
        self.log_weights = F.pad(log_sizes, (0, 1))  # [L, B, N + 1]
        return kept | spaced

    def along(self, number: Tensor, layers: int) -> Tensor:
        """Where tokens lie around each layer's circle, from 0 to 1: numbers [B, N] in the text -> [L, B, N]."""
        turn = torch.arange(layers, device=number.device).float() * (self.TURNS / layers)  # [L]
        return (number.double() * GOLDEN + turn[:, None, None]) % 1

    def choose(self, layer: int, scores: Tensor, counts: Tensor) -> Tensor:
        return self.chosen[layer]


METHODS: dict[str, type[PrefixKV]] = {
    "random": Random, "local": Local, "h2o": H2O, "snapkv": SnapKV, "pyramidkv": PyramidKV, "elastic": Elastic,
    "vlcache": VLCache, "tgvkv": TGVKV, "mixkv": MixKV, "matching": AttentionMatching, "cover": Cover,
    "uniform": Uniform, "prefixkv": PrefixKV,
}  # fmt: skip
