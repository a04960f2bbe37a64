"""Methods of `bench.quality` beside the plain ones: a method's choice with another's eviction, words kept, few bits.

    random+words      the tokens that are no image's are kept first
    random/queue      while decoding, PrefixKV's queue: the oldest token behind the pinned ones is dropped
    random/least      cover's rule: the token with the least attention from the question and the new words
    random/keep       nothing is dropped; fewer tokens of the prompt are kept, so that as many are held at the end
    random@4          what is kept is stored in 4 bits; `full@4` keeps all of it

Parts of a name stand in this order, as in `vlcache+words/least@8`. `VARIANTS` are cover without one of its parts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from minillava.checks import LlavaError
from minillava.compressors import METHODS, Accumulated, Cover, Random, last_n, question_mask, question_queries
from minillava.compressors import question_weights as weights_of_question
from minillava.quantised import BITS
from prefixkv import PrefixKV, attention_weights, hide

NAME = re.compile(r"(?P<base>[^+/@]+)(?P<words>\+words)?(/(?P<rule>queue|least|keep))?(@(?P<bits>\d+))?")


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


# ---------------------------------------------------------------- one part of a method replaced


class Words(PrefixKV):
    """Before a method's own choice come the words of the prompt; the last of them, if there is no room for all."""

    def choose(self, layer: int, scores: Tensor, counts: Tensor) -> Tensor:
        protected = self.present.sum(-1).clamp(max=self.num_sinks + 1)
        words = last_n(self.present & ~self.image, counts - protected)
        return super().choose(layer, scores.masked_fill(words, torch.inf), counts)


class Queue(PrefixKV):
    """PrefixKV's eviction."""

    def victim(self, position: Tensor, kept: Tensor) -> Tensor:
        return PrefixKV.victim(self, position, kept)


class Least(PrefixKV):
    """Cover's eviction: its sums of squared attention from the question and all later tokens, words last."""

    def begin(self, present: Tensor, image: Tensor, layers: int) -> None:
        super().begin(present, image, layers)
        self.asked = question_queries(present, question_mask(present, image))
        self.received: list[Tensor] = []

    def score(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.received.append(weights_of_question(query, key, *self.asked).square().sum((1, 2)))
        return super().score(layer, query, key, value)

    def allocate(self, scores: Tensor) -> Tensor:
        counts, received = super().allocate(scores), torch.stack(self.received)
        go_last = self.present & ~self.image & self.image.any(1, keepdim=True)
        self.least = Accumulated(torch.where(go_last, received + 1e6, received), self.present)
        return counts

    def attend(self, layer: int, query: Tensor, key: Tensor, seen: Tensor | None, position: Tensor) -> Tensor | None:
        bias = super().attend(layer, query, key, seen, position)
        mask = None if seen is None else hide(seen)
        if bias is not None:
            mask = bias[:, None, None] if mask is None else mask + bias[:, None, None]
        self.least.add(layer, attention_weights(query, key, mask).square().sum((1, 2)), position)
        return bias

    def victim(self, position: Tensor, kept: Tensor) -> Tensor:
        one_can_go = (kept - self.num_sinks - 1).clamp(min=0)
        return self.least.least(position, self.num_sinks, (kept // 4).clamp(max=8).minimum(one_can_go))


RULES: dict[str, type[PrefixKV]] = {"queue": Queue, "least": Least, "keep": PrefixKV}


def make(name: str, budget: float, seeds: Sequence[int] = (0,), further: int = 0, prompt: int = 1) -> PrefixKV | None:
    """The compressor of a name, None for the full cache; Random draws with a seed for each prompt.

    further: tokens that will be read after a prompt of `prompt` tokens; with /keep, room is left for them. Raises
    LlavaError for a name that is none, or a budget that these tokens alone exceed.
    """
    parts = parsed(name)
    if parts["base"] == "full":
        return None
    base = (METHODS | VARIANTS)[parts["base"]]
    mixed = [part for part in (parts["words"] and Words, RULES.get(parts["rule"] or "")) if part]
    bases = tuple(part for part in mixed if part is not PrefixKV)
    cls: type[PrefixKV] = type(name, (*bases, base), {}) if bases else base
    if parts["rule"] == "keep":
        budget = (budget * (prompt + further) - further) / prompt
        if budget <= 0:
            raise LlavaError(f"{name}: {further} further tokens are more than the budget; nothing is left to keep.")
    made = cls(budget, seeds) if issubclass(cls, Random) else cls(budget)
    if parts["rule"] == "keep":
        made.decode = "keep"
    return made


def parsed(name: str) -> dict[str, str]:
    """The parts of a method's name; raises LlavaError for one that is none."""
    found = NAME.fullmatch(name)
    if found is None or found["base"] not in ("full", *METHODS, *VARIANTS):
        raise LlavaError(
            f"There is no method {name!r}; known are full, {', '.join(METHODS)}, and see bench/variants.py."
        )
    if found["bits"] and int(found["bits"]) not in BITS:
        raise LlavaError(f"{name!r} asks for {found['bits']} bits; known are {', '.join(map(str, BITS))}.")
    if found["base"] == "full" and (found["words"] or found["rule"]):
        raise LlavaError(f"{name!r} keeps every token; there is nothing to choose or to drop.")
    return found.groupdict()


def bits_of(name: str) -> int | None:
    """The bits that a name asks for."""
    bits = parsed(name)["bits"]
    return int(bits) if bits else None
