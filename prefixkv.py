"""PrefixKV (arXiv 2412.03409): each layer of a KV cache is cut to a size that follows from its own attention.

    importance        the attention that a key receives, summed over the prompt's queries
    P(k)              the share of a layer's importance that its k most important keys, its prefix, hold
    threshold         p: every layer keeps its shortest prefix with P(k) >= p, and p is as large as the budget allows
    kept, held        tokens of the prompt that a layer kept; tokens that it holds now
    capacity          tokens that it may hold: the ratio that it kept of the prompt, applied to the text so far
    protected         first and last tokens of the prompt, kept whatever their importance
    pinned, queued    a layer's first tokens, never dropped later; all after them, which leave in turn, the oldest first

At the same threshold, a layer with concentrated attention keeps few tokens, and one with flat attention keeps many.
Sums favour early keys, since more queries see them: with flat attention over N tokens, key j receives about ln(N/j).
The last token of the prompt is protected when the prompt is cut, but it is queued, and may be dropped later.

Shapes: B prompts, N tokens, L layers, H query and Hkv KV heads, S keys. `present` [B, N] is False on left padding.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

QUEUED = 25  # the last 25 tokens that a layer kept of the prompt are queued, and every later token
LOWEST = torch.finfo(torch.float32).min  # hides a key; -infinity would make NaN of padding, which sees no key at all


def hide(seen: Tensor) -> Tensor:
    """What to add to scores so that only keys that are `seen` count: 0 where seen, else LOWEST. float32."""
    return torch.zeros(seen.shape, dtype=torch.float32, device=seen.device).masked_fill_(~seen, LOWEST)


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Attention weights, which the fused call does not return: [B, H, N, S], float32.

    query [B, H, N, Dh], key [B, Hkv, S, Dh], both after RoPE. A mask [.., N, W] is added to the scores of the last W
    keys, and all queries see those before.
    """
    # The queries that share a key form one matrix, so that no key is copied. Scaled first: float16 could overflow.
    rows = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3) * query.shape[3] ** -0.5  # [B, Hkv, G * N, Dh]
    scores = (rows @ key.mT).float().view(*query.shape[:3], key.shape[2])  # [B, H, N, S]
    if mask is not None:
        scores[..., key.shape[2] - mask.shape[-1] :] += mask
    return scores.softmax(-1)


def importance(query: Tensor, key: Tensor, present: Tensor, block: int = 64) -> Tensor:
    """Attention that each key receives: the sum over queries of the mean over heads. [B, N], float32.

    query [B, H, N, Dh], key [B, Hkv, N, Dh]. The weights are computed `block` queries at a time against the keys up to
    the block's end: about the work of one of attention's two products, and memory for block x N numbers per head.
    """
    heads, length = query.shape[1:3]
    key, padded = key.contiguous(), not present.all()  # contiguous: else every block's product would copy its keys
    order = torch.arange(length, device=key.device)
    counts = (present.float() / heads)[:, None, None]  # [B, 1, 1, N]: a mean over heads, without the padding's queries
    total = torch.zeros(present.shape, dtype=torch.float32, device=key.device)  # [B, N]
    for start in range(0, length, block):
        end = min(start + block, length)
        first = 0 if padded else start  # without padding, a query sees every key before its own block
        seen = (order[first:end] <= order[start:end, None]) & present[:, None, None, first:end]  # [B, 1, N, W]
        weights = attention_weights(query[:, :, start:end], key[:, :, :end], hide(seen))
        total[:, :end] += (counts[..., start:end] @ weights).sum((1, 2))
    return total.masked_fill(~present, 0.0)


def priority(scores: Tensor) -> Tensor:
    """P(0), P(1) .. P(N) of each layer, from 0 to 1: scores [L, N] -> [L, N + 1], float64."""
    scores = scores.double().sort(descending=True).values  # [L, N]
    scores = torch.where(scores.sum(-1, keepdim=True) > 0, scores, 1.0)  # all zero counts as all equal
    sums = torch.nn.functional.pad(scores.cumsum(-1), (1, 0))  # [L, N + 1]
    return sums / sums[:, -1:]


def search(curve: Tensor, total: int, protected: int) -> tuple[float, Tensor]:
    """The largest threshold p whose sizes sum to at most `total`, and the sizes [L], filled up to sum to `total`.

    curve [L, N + 1] is what `priority` returns; `total` is L * protected to L * N. A layer's shortest prefix that holds
    p has k(p) = min{k : P(k) >= p} tokens. Its size is min(N, k(p) + protected): room for protected tokens outside it.
    Each token left over lengthens the prefix that holds the smallest share; at a tie, the one whose next holds less.
    """
    length = curve.shape[1] - 1

    def sizes(threshold: float) -> Tensor:
        shortest = (curve < threshold).sum(-1)  # [L]: P(0) .. P(k - 1) are the k shares below the threshold
        return (shortest + protected).clamp(max=length)

    candidates = curve.unique().tolist()  # sizes grow only where p passes one of these; sorted, from 0 to 1
    threshold = candidates[bisect_right(candidates, total, key=lambda p: int(sizes(p).sum())) - 1]
    counts, shares = sizes(threshold).tolist(), curve.tolist()

    def share(layer: int) -> tuple[float, float, int]:
        k = counts[layer] - protected  # the length of its prefix; last, for what is still tied, the shorter prefix
        return shares[layer][k], shares[layer][k + 1], k

    # If p grew further, layers would grow in this order. So a larger budget adds tokens and never takes one away.
    for _ in range(total - sum(counts)):
        growing = [layer for layer, count in enumerate(counts) if count < length]
        counts[min(growing, key=share)] += 1
    return threshold, torch.tensor(counts, device=curve.device)


def retain(scores: Tensor, counts: Tensor, present: Tensor, num_sinks: int = 1) -> Tensor:
    """Which tokens a layer keeps, by their scores [B, N]: bool [B, N], with counts[b] of them True in row b.

    The first `num_sinks` tokens and the last one are protected. The most important follow; ties go to the earlier one.
    """
    number = present.long().cumsum(1)  # 1 for a prompt's first token
    protected = present & ((number <= num_sinks) | (number == number[:, -1:]))
    scores = scores.masked_fill(protected, torch.inf).masked_fill(~present, -torch.inf)
    ranked = scores.argsort(descending=True, stable=True)
    chosen = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return torch.zeros_like(present).scatter(1, ranked, chosen)


@dataclass(frozen=True)
class Plan:
    """The ratio of a prompt that each layer keeps, found once on a few samples (the paper: about ten)."""

    budget: float  # the ratio of the whole cache that these ratios were found for
    ratios: Sequence[float]  # one per layer
    model: str = ""
    samples: int = 0


class PrefixKV:
    """The method, with the hooks that minillava/model.py calls: see `Compressor` there.

    budget: the ratio of the prompt's cache to keep, over all layers. num_sinks: first tokens that each layer keeps.
    decode: "ratio" applies each layer's ratio to the growing text, "keep" drops nothing after the prompt. plan: its
    budget and ratios replace `budget` and the search, so that each layer is cut before the next one runs.
    """

    def __init__(self, budget: float = 0.2, num_sinks: int = 1, decode: str = "ratio", plan: Plan | None = None):
        budget = budget if plan is None else plan.budget
        if not 0 < budget <= 1:
            raise ValueError(f"The budget is {budget}; expected a part of the cache above 0 and at most 1.")
        if not isinstance(num_sinks, int) or num_sinks < 0:
            raise ValueError(f"num_sinks is {num_sinks}; expected a number of tokens, 0 or more.")
        if plan is not None and not all(0 <= ratio <= 1 for ratio in plan.ratios):
            raise ValueError(f"The plan has the ratios {plan.ratios}; expected numbers from 0 to 1.")
        if decode not in ("ratio", "keep"):
            raise ValueError(f"decode is {decode!r}; expected 'ratio' or 'keep'.")
        self.budget, self.num_sinks, self.decode, self.plan = budget, num_sinks, decode, plan

    def begin(self, present: Tensor, image: Tensor, layers: int) -> None:
        if self.plan is not None and len(self.plan.ratios) != layers:
            raise ValueError(f"The plan is for {len(self.plan.ratios)} layers; the model has {layers}.")
        self.present, self.image, self.layers = present, image, layers

    def score(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return importance(query, key, self.present)

    def limits(self, layers: int, length: int) -> tuple[int, int]:
        """For a prompt of `length` tokens: how many to keep over all layers, and how many each layer protects."""
        protected = min(length, self.num_sinks + 1)
        return max(round(self.budget * layers * length), layers * protected), protected

    def allocate(self, scores: Tensor) -> Tensor:
        """Sizes: scores [L, B, N] -> [L, B], for each prompt with the total of `limits`."""
        prompts = [padded[:, tokens] for padded, tokens in zip(scores.unbind(1), self.present)]  # without the padding
        return torch.stack([search(priority(own), *self.limits(*own.shape))[1] for own in prompts], dim=1)

    def choose(self, layer: int, scores: Tensor, counts: Tensor) -> Tensor:
        """Which tokens of a layer stay: scores [B, N], counts [B] -> bool [B, N]."""
        return retain(scores, counts, self.present, self.num_sinks)

    def compress(self, waiting: list[tuple[int, Tensor, Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if self.plan is None and len(waiting) < self.layers:
            return  # sizes follow from the scores of all layers
        for layer, _, _, scores in waiting:
            if not scores.isfinite().all():
                raise ValueError(f"The importance of layer {layer} holds NaN or infinity; check the weights and dtype.")
        if self.plan is None:
            sizes = list(self.allocate(torch.stack([scores for _, _, _, scores in waiting])))
        else:
            lengths, ratio = self.present.sum(-1), self.plan.ratios[waiting[0][0]]
            sizes = [(lengths.float() * ratio).round().long().clamp(min=self.num_sinks + 1).minimum(lengths)]
        for counts in sizes:
            layer, key, value, scores = waiting.pop(0)  # so that each layer's memory is freed in turn
            yield key, value, self.choose(layer, scores, counts)

    def capacity(self, kept: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
        if self.decode == "keep":
            return kept + lengths - prompt_lengths
        # lengths * kept / prompt, rounded up. Written with the ratio that was dropped, in float64, to round as the
        # published code does: where the product is a whole number, the rounding error may add one token.
        return (lengths * (1 - (prompt_lengths - kept).double() / prompt_lengths)).ceil().long()

    def victim(self, position: Tensor, kept: Tensor) -> Tensor:
        """The slot of the oldest queued token, [L, B]. As published, 26 kept tokens pin one, and up to 25 half."""
        pinned = torch.where(kept > QUEUED, kept - QUEUED, kept // 2).maximum((kept - 1).clamp(max=self.num_sinks))
        queued = (torch.arange(position.shape[-1], device=position.device) >= pinned[..., None]) & (position >= 0)
        return position.masked_fill(~queued, torch.iinfo(position.dtype).max).argmin(-1)

    def attend(self, layer: int, query: Tensor, key: Tensor, seen: Tensor | None, position: Tensor) -> Tensor | None:
        return None  # further tokens change nothing: the queue goes by age
