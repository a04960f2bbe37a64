"""Methods of `bench.quality` beside the plain ones: one part of a method replaced, and the published code's rules.

    random+words      the tokens that are no image's are kept first
    h2o~equal         every layer has the same size; `~prefix`: PrefixKV's search finds the sizes, from these scores
    random/queue      while decoding, PrefixKV's queue: the oldest token after the pinned ones is dropped
    random/least      cover's rule: the token with the least attention from the question and the new words
    random/keep       nothing is dropped; fewer tokens of the prompt are kept, so that as many are held at the end
    random@4          what is kept is stored in 4 bits; `full@4` keeps all of it
    random!           new tokens stand at the positions that the published code gives them

Parts of a name stand in this order, as in `vlcache+words/least@8`. `VARIANTS` has further methods: cover with one of
its parts taken out or replaced; two methods as ElasticCache's code has them; `pooled`, the plainest way to cover a
picture; and `kvzip`, which reads the picture twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.checks import LlavaError, require
from minillava.compressors import (
    GOLDEN,
    H2O,
    METHODS,
    Cover,
    Elastic,
    LeastAttended,
    Random,
    Weighted,
    equally,
    last_n,
    question_mask,
    question_queries,
    question_weights,
)
from minillava.fast import FastKVCache
from minillava.model import KeepAll, KVCache, Llava, Waiting
from minillava.quantised import BITS, new_cache
from prefixkv import PrefixKV, attention_weights, hide

NAME = re.compile(
    r"(?P<base>[^+~/@!]+)(?P<words>\+words)?(~(?P<sizes>equal|prefix))?(/(?P<rule>queue|least|keep))?(@(?P<bits>\d+))?"
    r"(?P<short>!)?"
)


# ---------------------------------------------------------------- cover, one part out or replaced


class WithoutWords(Cover):
    """Words are tokens like any other."""

    def begin(self, present: Tensor, image: Tensor, layers: int) -> None:
        super().begin(present, image, layers)
        self.words = torch.zeros_like(present)


class WithoutWeights(Cover):
    """A token that is kept stands for itself only."""

    def bias(self, layer: int, position: Tensor) -> Tensor | None:
        return None


class WithoutSquares(Cover):
    """Attention is summed as it is."""

    sum_of = H2O.sum_of


class WithRandomPatches(Cover):
    """What is evenly spaced in cover is drawn at random."""

    def along(self, number: Tensor, layers: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.rand(layers, 4096, generator=generator, dtype=torch.float64).to(number.device)
        return drawn[:, number % 4096]


def grid(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column [B, N] of every patch of square pictures, image [B, N], and their width in patches [B, 1]."""
    patches = image.cumsum(1) - 1  # [B, N]
    width = image.sum(1, keepdim=True).float().sqrt().round().long().clamp(min=1)  # [B, 1]
    return patches // width, patches % width, width


class WithTwoWays(Cover):
    """What is evenly spaced in cover is so in rows and in columns: steps of the plastic number's powers (R2)."""

    PLASTIC = 1.32471795724474602596  # x^3 = x + 1

    def along(self, number: Tensor, layers: int) -> Tensor:
        row, column, _ = grid(self.image)
        place = torch.where(self.image, row / self.PLASTIC + column / self.PLASTIC**2, number.double() * GOLDEN)
        return (place.double() + torch.arange(layers, device=number.device)[:, None, None] / layers) % 1


# ---------------------------------------------------------------- further methods


class Pooled(Weighted):
    """Every 2 x 2 patches become one: the mean of their keys and values, counted four times, whatever the budget.

    All words stay, and the means stand in the slots of each square's first patch. An odd last row or column has
    smaller squares. Pictures are square.
    """

    def compress(self, waiting: list[Waiting]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if len(waiting) < self.layers:
            return
        row, column, width = grid(self.image)
        start = self.image.long().argmax(1, keepdim=True)
        first = (start + row // 2 * 2 * width + column // 2 * 2) * self.image  # [B, N]: its square's
        place = torch.arange(self.present.shape[1], device=first.device)
        to = torch.where(self.image, first, place)  # [B, N]
        keep = self.present & (to == place)
        size = torch.zeros_like(to).scatter_add(1, to, torch.ones_like(to))  # [B, N]
        weights = F.pad(torch.where(keep & self.image, size, 1).float().log(), (0, 1))  # [B, N + 1]
        self.log_weights = weights.expand(self.layers, -1, -1)
        while waiting:
            _, key, value, _ = waiting.pop(0)
            index = to[:, None, :, None].expand_as(key)
            key, value = (
                torch.zeros_like(x).scatter_reduce(2, index, x, "mean", include_self=False) for x in (key, value)
            )
            yield key, value, keep


class KVzip(PrefixKV):
    """Keeps the keys that are looked at most when the picture is read a second time, whatever will be asked.

    KVzip (arXiv 2505.23416): a key's score is the largest attention that it receives from any query of the repetition;
    one ranking over all layers, so layers have sizes of their own. There heads have, too, and what is repeated is text.
    `twice` makes the scores. Everything but the two passes is as in PrefixKV.
    """

    scores: Tensor  # [L, B, N]

    def score(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.scores[layer]

    def allocate(self, scores: Tensor) -> Tensor:
        counts = []
        for padded, tokens in zip(scores.unbind(1), self.present):
            own = padded[:, tokens].clone()  # [L, n]
            own[:, : self.num_sinks] = own[:, -1] = torch.inf  # protected
            total = max(round(self.budget * own.numel()), int(own.isinf().sum()))
            chosen = own.flatten().topk(total).indices  # of all layers together
            counts.append(torch.bincount(chosen // own.shape[1], minlength=len(own)))
        return torch.stack(counts, dim=1)


class Twice(KeepAll):
    """Keeps every token, and notes the largest attention [L, B, N] that each receives from a further block."""

    def begin(self, present: Tensor, image: Tensor, layers: int) -> None:
        super().begin(present, image, layers)
        self.scores = torch.zeros(layers, *present.shape, dtype=torch.float32, device=present.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, seen: Tensor | None, position: Tensor) -> Tensor | None:
        most = attention_weights(query, key, None if seen is None else hide(seen)).amax((1, 2))  # [B, S]
        for row, mask in enumerate(self.present):
            count = int(mask.sum())
            self.scores[layer, row, mask] = most[row, :count]  # slots of the full cache are in the text's order
        return None


def twice(model: Llava, inputs: dict[str, Tensor]) -> Tensor:
    """Scores [L, B, N] for KVzip: the prompts are read, then all up to the pictures' ends once more."""
    note, ids = Twice(), inputs["input_ids"]
    starts = inputs["attention_mask"].long().argmax(1).tolist()
    ends = (ids.shape[1] - (ids == model.config.image_token_id).flip(1).long().argmax(1)).tolist()
    again = torch.stack([row[start:end] for row, start, end in zip(ids, starts, ends)])  # as long in every prompt
    cache = model.new_cache(again.shape[1], note)
    model.read(**inputs, cache=cache)
    pictures = {name: tensor for name, tensor in inputs.items() if name not in ("input_ids", "attention_mask")}
    model.read(again, cache, **pictures)
    return note.scores


# ---------------------------------------------------------------- as in the published code


def entries_as_ranks(scores: Tensor, counts: Tensor, present: Tensor, num_sinks: int) -> Tensor:
    """Which tokens a layer keeps: as `prefixkv.retain`, bool [B, N], but with an argsort's entries taken for ranks.

    Between the first `num_sinks` tokens and the last one, which stay, place i is kept if the i-th smallest score stands
    among the last places, as many as there is room for. That says little about the score of place i. (The published
    comparison keeps one token fewer still; here methods hold equally many.)
    """
    kept = torch.zeros_like(present)
    for row, count in enumerate(counts.tolist()):
        own = present[row].nonzero()[:, 0]
        between = own[num_sinks:-1]
        order = scores[row, between].argsort(stable=True)
        kept[row, own[:num_sinks]] = kept[row, own[-1]] = True
        kept[row, between[order >= len(between) - (count - num_sinks - 1)]] = True
    return kept


class PublishedElastic(Elastic):
    """Elastic with the selection and the merging of `ElasticCache.__call__` in ElasticCache's kv_cache.py.

    The places of dropped tokens are counted from the first token that is not protected (start_size 1), and then used as
    if from the first of all. So what is merged is the left neighbour of every dropped token.
    """

    def choose(self, layer: int, scores: Tensor, counts: Tensor) -> Tensor:
        return entries_as_ranks(scores, counts, self.present, self.num_sinks)

    def merge(self, key: Tensor, value: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        anchor, nearest = self.anchors(keep)
        merged = F.pad((self.present & ~keep)[:, self.num_sinks :], (0, self.num_sinks)) & anchor.any(1, keepdim=True)
        index, merged = torch.where(merged, nearest, 0)[:, None, :, None], merged[:, None, :, None]

        def mean(source: Tensor) -> Tensor:
            added = source.clone().scatter_add(2, index.expand_as(source), source * merged)
            count = torch.ones_like(index).scatter_add(2, index, merged.long())  # the anchor itself is one of them
            return torch.where(anchor[:, None, :, None], added / count, source)

        return mean(key), mean(value)


class PublishedH2O(H2O):
    """H2O with the selection of `H2OCache.__call__` in ElasticCache's kv_cache.py.

    Scores are a mean over all layers, so that all keep the same tokens. Neither the first token nor the recent half is
    protected when the prompt is cut, only the last token. Eviction of single tokens afterwards is left as it is in H2O.
    """

    def allocate(self, scores: Tensor) -> Tensor:
        self.mean = scores.mean(0)  # [B, N]
        return super().allocate(self.mean.expand_as(scores))

    def choose(self, layer: int, scores: Tensor, counts: Tensor) -> Tensor:
        return entries_as_ranks(self.mean, counts, self.present, 0)


class ShortPositions(FastKVCache):
    """A new token's position is the number of tokens that the first layer holds, whatever the others hold.

    `LlamaModel.forward` in transformers 4.31.0, where it is called with past_key_values and without position_ids, as by
    eval_ppl.py of PrefixKV's and ElasticCache's repositories. Keys keep the positions at which they were rotated.
    """

    def advance(self, count: int) -> Tensor:
        positions = self.held[0][:, None] + torch.arange(count, device=self.held.device)
        super().advance(count)
        return positions


VARIANTS: dict[str, type[PrefixKV]] = {
    "cover without words": WithoutWords,
    # Everything but the words is evenly spaced; eviction still goes by attention.
    "cover without attention": type("WithoutAttention", (Cover,), {"LOOKED_AT": 0.0}),
    # Everything but the words is chosen by the attention of those after the image.
    "cover without spacing": type("WithoutSpacing", (Cover,), {"LOOKED_AT": 1.0}),
    # The spacing is the same in every layer.
    "cover without shift": type("WithoutShift", (Cover,), {"TURNS": 0.0}),
    "cover without weights": WithoutWeights,
    "cover without squares": WithoutSquares,
    # While decoding, the token goes that has waited longest in PrefixKV's queue.
    "cover without looking": type("WithoutLooking", (Cover,), {"attend": Weighted.attend, "victim": PrefixKV.victim}),
    "cover, random patches": WithRandomPatches,
    "cover, even both ways": WithTwoWays,
    "pooled": Pooled,
    "kvzip": KVzip,
    "h2o as published": PublishedH2O,
    "elastic as published": PublishedElastic,
}


# ---------------------------------------------------------------- one part of a method replaced


class Words(PrefixKV):
    """Before a method's own choice come the words of the prompt; the last of them, if there is no room for all."""

    def choose(self, layer: int, scores: Tensor, counts: Tensor) -> Tensor:
        protected = self.present.sum(-1).clamp(max=self.num_sinks + 1)
        words = last_n(self.present & ~self.image, counts - protected)
        return super().choose(layer, scores.masked_fill(words, torch.inf), counts)


class Equal(PrefixKV):
    """Layers of equal sizes."""

    sizes = equally

    def allocate(self, scores: Tensor) -> Tensor:
        super().allocate(scores)  # for what the method notes
        counts = self.sizes(scores)
        if isinstance(self, Cover):  # it chooses for all layers at once
            self.chosen = self.cover(scores, counts)
        return counts


class Prefix(Equal):
    """Layers of the sizes that PrefixKV's search finds for a method's scores."""

    sizes = PrefixKV.allocate


class Queue(PrefixKV):
    """PrefixKV's eviction."""

    victim = PrefixKV.victim


class Least(LeastAttended):
    """Cover's eviction: its sums of squared attention from the question and all later tokens, words last."""

    sum_of, num_recent = LeastAttended.sum_of, LeastAttended.num_recent  # rather than H2O's

    def begin(self, present: Tensor, image: Tensor, layers: int) -> None:
        super().begin(present, image, layers)
        self.asked = question_queries(present, question_mask(present, image))
        self.by_question: list[Tensor] = []

    def score(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.by_question.append(self.sum_of(question_weights(query, key, *self.asked)))
        return super().score(layer, query, key, value)

    def allocate(self, scores: Tensor) -> Tensor:
        counts = super().allocate(scores)
        self.watch(torch.stack(self.by_question), self.present & ~self.image & self.image.any(1, keepdim=True))
        return counts


PARTS: dict[str, type[PrefixKV]] = {"+words": Words, "equal": Equal, "prefix": Prefix, "queue": Queue, "least": Least}


def make(name: str, budget: float, seeds: Sequence[int] = (0,), further: int = 0, prompt: int = 1) -> PrefixKV | None:
    """The compressor of any name but plan, None for the full cache; Random draws with a seed for each prompt.

    further: tokens that will be read after a prompt of `prompt` tokens; with /keep, room is left for them. Raises
    LlavaError for a name that is none, or a budget that these tokens exceed by themselves.
    """
    parts = parsed(name)
    if parts["base"] == "full":
        return None
    if parts["rule"] == "keep":
        budget = (budget * (prompt + further) - further) / prompt
        require(budget > 0, f"{name}: {further} further tokens are more than the budget; nothing is left to keep.")
    bases = [PARTS[parts[part]] for part in ("words", "sizes", "rule") if parts[part] in PARTS]
    cls: type[PrefixKV] = type(name, (*bases, (METHODS | VARIANTS)[parts["base"]]), {})
    made = cls(budget, seeds) if issubclass(cls, Random) else cls(budget)
    if parts["rule"] == "keep":
        made.decode = "keep"
    return made


def parsed(name: str) -> dict[str, str]:
    """The parts of a method's name; raises LlavaError for one that is none."""
    found = NAME.fullmatch(name)
    if found is None or found["base"] not in ("full", "plan", *METHODS, *VARIANTS):
        raise LlavaError(
            f"There is no method {name!r}; known are full, plan, {', '.join(METHODS)}, and see bench/variants.py."
        )
    base, bits, words = found["base"], found["bits"], found["words"]
    require(
        not (bits and found["short"]),
        f"{name!r} asks for few bits and short positions; only one of the two can be had.",
    )
    require(not bits or int(bits) in BITS, f"{name!r} asks for {bits} bits; known are {', '.join(map(str, BITS))}.")
    require(
        base not in ("full", "plan", "pooled") or not (words or found["sizes"] or found["rule"]),
        f"{name!r}: {base} leaves nothing to choose; it can be combined with bits only.",
    )
    require(
        found["rule"] != "least" or not base.startswith("cover "),
        f"{name!r}: this method has an eviction of its own; leave out /least.",
    )
    require(
        not words or not (base.startswith("cover") or base == "h2o as published"),
        f"{name!r}: this method does not ask for scores when it chooses; leave out +words.",
    )
    return found.groupdict()


def empty_cache(name: str, model: Llava, room: int, compressor: PrefixKV | None) -> KVCache:
    """The cache that a name asks for, with this compressor."""
    parts = parsed(name)
    if parts["short"]:
        return ShortPositions(model.config.text, room, compressor)
    return new_cache(model, room, compressor, int(parts["bits"]) if parts["bits"] else None)
