"""PrefixKV (arXiv 2412.03409): each layer of a KV cache is cut to a size that follows from its own attention.

A few keys of a prompt receive most of the attention. How many they are differs from layer to layer. PrefixKV
sorts a layer's keys by importance: the k most important are its prefix, and P(k) is the share of all
importance that they hold. All layers have one threshold p, the paper's global prefix configuration. Each
keeps its shortest prefix with P(k) >= p. Binary search finds the largest p that fits the budget.

    importance  the attention that each key receives from the prompt's queries
    priority    P(k), the share of all importance in the k most important keys, for every k
    search      the threshold p, and the layers' sizes, which spend the budget exactly
    retain      which tokens of the prompt a layer keeps
    Plan        layers' shares, found once on a few samples, in place of a search for every prompt
    Compressor  the calls that a KV cache makes to a compression method
    PrefixKV    this method, with eviction while decoding

Shapes as in minillava/model.py: B prompts of N tokens, L layers, H query and Hkv key-value heads,
S cache slots. Prompts are padded on the left; `present` [B, N] is False on the padding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

RECENT = 25  # while decoding, a layer may drop the last 25 of the prompt tokens that it kept, and all new ones


def importance(query: Tensor, key: Tensor, present: Tensor, block: int = 64) -> Tensor:
    """Attention that each key receives: the sum over queries of the mean over heads. [B, N], float32.

    query [B, H, N, Dh] and key [B, Hkv, N, Dh] after RoPE. Fused attention does not return its weights. So
    they are computed again, `block` queries at a time against the keys up to the block's end: the work of
    about one of attention's two products, and memory for block x N numbers per head.
    """
    batch, heads, length, size = query.shape
    groups = heads // key.shape[1]
    query = query.unflatten(1, (-1, groups)) * size**-0.5  # [B, Hkv, G, N, Dh]
    key = key.contiguous()  # else every block's product would copy its keys
    # The weight of each query in the sum: a mean over heads, without the padding's queries.
    share = (present / heads)[:, None, None, None]  # [B, 1, 1, 1, N]
    lowest = torch.finfo(torch.float32).min  # not -infinity: padding may see no key, and its softmax would be NaN
    total = query.new_zeros(batch, length, dtype=torch.float32)  # [B, N]
    for start in range(0, length, block):
        end = min(start + block, length)
        count = end - start
        # The queries of a group form one matrix, so that no key is repeated for them.
        rows = query[:, :, :, start:end].flatten(2, 3)  # [B, Hkv, G * count, Dh]
        scores = (rows @ key[:, :, :end].mT).float().unflatten(2, (groups, count))  # [B, Hkv, G, count, end]
        later = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
        scores[..., start:].masked_fill_(later, lowest)  # a query sees every key before its own block
        if not present.all():
            scores.masked_fill_(~present[:, None, None, None, :end], lowest)
        received = share[..., start:end] @ scores.softmax(-1)  # [B, Hkv, G, 1, end]
        total[:, :end] += received.sum(dim=(1, 2, 3))
    return total.masked_fill(~present, 0.0)


def priority(scores: Tensor) -> Tensor:
    """P(0), P(1) .. P(N) of each layer, from 0 to 1: scores [L, N] -> [L, N + 1], float64.

    A layer whose scores are all zero, as a method of your own may have, counts as one whose scores are all equal.
    """
    scores = scores.double().sort(descending=True).values  # [L, N]
    scores = torch.where(scores.sum(-1, keepdim=True) > 0, scores, 1.0)
    sums = torch.nn.functional.pad(scores.cumsum(-1), (1, 0))  # [L, N + 1]
    return sums / sums[:, -1:]


def search(curve: Tensor, total: int, protected: int) -> tuple[float, Tensor]:
    """The largest threshold p whose sizes sum to at most `total`, and the sizes [L], filled up to sum to `total`.

    curve [L, N + 1] is what `priority` returns. The shortest prefix that holds p has k(p) = min{k : P(k) >= p} tokens,
    and a layer's size is min(N, k(p) + protected): protected tokens always stay, and not all of them are among the k
    most important. Tokens left over go one by one to the layer whose prefix holds the smallest share; ties go to the
    layer whose next prefix holds less. `total` is at least L * protected and at most L * N.
    """
    length = curve.shape[1] - 1

    def sizes(threshold: float) -> Tensor:
        shortest = (curve < threshold).sum(-1)  # [L]: P(0) .. P(k - 1) are the k shares below the threshold
        return (shortest + protected).clamp(max=length)

    candidates = curve.unique().tolist()  # sizes change only where p passes one of these. Sorted, from 0 to 1
    # candidates[low] always fits: p = 0 keeps only the protected tokens. candidates[high] does not, or is past the end.
    low, high = 0, len(candidates)
    while high - low > 1:
        middle = (low + high) // 2
        if int(sizes(candidates[middle]).sum()) <= total:
            low = middle
        else:
            high = middle
    threshold = candidates[low]
    counts, shares = sizes(threshold).tolist(), curve.tolist()

    def held(layer: int) -> tuple[float, float, int]:
        k = counts[layer] - protected
        return shares[layer][k], shares[layer][k + 1], k

    # Tokens are left over where several shares equal the threshold; with real scores they are few. A growing p would
    # let the layers grow in this order, so a larger budget only adds tokens.
    for _ in range(total - sum(counts)):
        growing = [layer for layer, count in enumerate(counts) if count < length]
        counts[min(growing, key=held)] += 1
    return threshold, torch.tensor(counts, device=curve.device)


def retain(scores: Tensor, counts: Tensor, present: Tensor, start: int = 1) -> Tensor:
    """Which tokens a layer keeps, by their scores [B, N]: bool [B, N], with counts[b] of them True in row b.

    The first `start` tokens and the last one stay, then the most important; ties go to the earlier token.
    """
    number = present.long().cumsum(1)  # 1 for a prompt's first token
    protected = present & ((number <= start) | (number == number[:, -1:]))
    scores = scores.masked_fill(protected, torch.inf).masked_fill(~present, -torch.inf)
    ranked = scores.argsort(descending=True, stable=True)
    chosen = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return torch.zeros_like(present).scatter(1, ranked, chosen)


def require_finite(scores: Tensor) -> None:
    """Raises ValueError if the scores [L, B, N] hold NaN or infinity."""
    if not scores.isfinite().all():
        broken = int((~scores.isfinite()).nonzero()[0, 0])
        raise ValueError(
            f"The importance of layer {broken} holds NaN or infinity; expected finite numbers. "
            "Check the weights and the dtype of the model."
        )


@dataclass(frozen=True)
class Plan:
    """The share of a prompt that each layer keeps; the paper estimates it offline on about ten samples."""

    budget: float
    ratios: Sequence[float]  # one a layer
    model: str = ""
    samples: int = 0

    @classmethod
    def estimate(cls, budget: float, kept: Tensor, prompt_lengths: Tensor, model: str = "") -> Plan:
        """The mean shares of some samples: tokens kept [B, L] of prompts of `prompt_lengths` [B] tokens."""
        ratios = (kept.double() / prompt_lengths[:, None]).mean(0).tolist()
        return cls(budget, ratios, model, len(kept))

    def to_json(self) -> str:
        """The text of the file that `load` reads."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads what `to_json` wrote, or a published plan: a list of the shares that the layers forget."""
        try:
            with open(path, "rb") as file:
                raw = json.loads(file.read(10**6))  # a plan is far shorter; a device may never end
            shares = [1 - share for share in raw] if isinstance(raw, list) else raw["ratios"]
            if not shares or not all(0 <= float(share) <= 1 for share in shares):
                raise ValueError("shares between 0 and 1, one a layer, are missing")
            known = {} if isinstance(raw, list) else raw
            budget = float(known.get("budget", sum(shares) / len(shares)))
            return cls(budget, [float(s) for s in shares], str(known.get("model", "")), int(known.get("samples", 0)))
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} holds no plan ({error}); expected what --save-plan writes.") from None


class Compressor:
    """The calls that a KV cache makes. This class keeps every token; a method overrides what it does differently.

    1. `begin`: once, before a prompt is read.
    2. `score`, then `planned`: for each layer of a prompt. A plan gives the sizes of all layers, or there is no plan.
    3. `allocate`: without a plan, once all layers are scored.
    4. `retain`, then `merge`: for each layer, when its size is known.
    5. `capacity`, then `victim`: for each new token, for all layers at once.
    6. `observe`, then `bias`: for each new token and layer.

    An object may keep notes between these calls, so it serves one batch at a time.
    """

    budget = 1.0  # the share of the prompt's cache to keep
    start = 1  # first tokens that `retain` always keeps

    def begin(self, present: Tensor, image: Tensor) -> None:
        """Tells which tokens of the prompts are no padding, and which are an image's: both bool [B, N]."""

    def score(self, query: Tensor, key: Tensor, present: Tensor) -> Tensor:
        """How much each key matters: query [B, H, N, Dh], key [B, Hkv, N, Dh] -> [B, N]."""
        return torch.zeros_like(present, dtype=torch.float32)

    def planned(self, layer: int, layers: int, prompt_lengths: Tensor) -> Tensor | None:
        """How many tokens one of `layers` layers keeps of each prompt, [B], if there is a plan; else None."""
        return None

    def allocate(self, scores: Tensor, present: Tensor) -> Tensor:
        """Tokens that each layer keeps of each prompt: scores [L, B, N] -> [L, B]."""
        return present.sum(-1).repeat(len(scores), 1)

    def retain(self, scores: Tensor, counts: Tensor, present: Tensor) -> Tensor:
        """Which tokens one layer keeps: scores [B, N], counts [B] -> bool [B, N]."""
        return retain(scores, counts, present, self.start)

    def merge(self, key: Tensor, value: Tensor, keep: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value [B, Hkv, N, Dh], of which those where keep [B, N] are cached; dropped ones may be merged in."""
        return key, value

    def capacity(self, kept: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
        """Tokens a layer may hold after `lengths` [B] in all, if it kept `kept` of the prompt. Shaped as `kept`."""
        return kept + lengths - prompt_lengths

    def victim(self, position: Tensor, kept: Tensor) -> Tensor:
        """The slot to overwrite in full layers: [L, B]. position [L, B, S] of each slot's token; -1 in free slots."""
        return torch.zeros_like(kept)  # not used: this class always has room

    def observe(self, layer: int, query: Tensor, key: Tensor, position: Tensor) -> None:
        """Called with a new token's query [B, H, 1, Dh], the keys [B, Hkv, S, Dh] it reads, their positions [B, S].

        Its own key is one of them. Free slots have position -1.
        """

    def bias(self, layer: int, position: Tensor) -> Tensor | None:
        """Numbers [B, S] added to a new token's scores before the softmax, for the keys at `position` [B, S]; or None.

        The cache masks free slots, whatever stands there.
        """
        return None


class PrefixKV(Compressor):
    """The method; `budget` is the share of the prompt's cache to keep.

    start: first tokens of the prompt that every layer keeps. decode: with "ratio" a layer holds the share of
    the text that it kept of the prompt, and drops its oldest unpinned token for a new one; with "keep" it drops
    nothing more. plan: fixed shares in place of a search, so each layer is compressed before the next one runs.
    """

    def __init__(self, budget: float = 0.2, start: int = 1, decode: str = "ratio", plan: Plan | None = None):
        budget = budget if plan is None else plan.budget
        if not 0 < budget <= 1:
            raise ValueError(f"The budget is {budget}; expected a share of the cache above 0 and at most 1.")
        if start < 0:
            raise ValueError(f"start is {start}; expected a number of tokens, 0 or more.")
        if decode not in ("ratio", "keep"):
            raise ValueError(f"decode is {decode!r}; expected 'ratio' or 'keep'.")
        self.budget, self.start, self.decode, self.plan = budget, start, decode, plan

    def score(self, query: Tensor, key: Tensor, present: Tensor) -> Tensor:
        return importance(query, key, present)

    def planned(self, layer: int, layers: int, prompt_lengths: Tensor) -> Tensor | None:
        if self.plan is None:
            return None
        if len(self.plan.ratios) != layers:
            raise ValueError(f"The plan is for {len(self.plan.ratios)} layers; the model has {layers}.")
        counts = (prompt_lengths * self.plan.ratios[layer]).round().long()
        return counts.clamp(min=self.start + 1).minimum(prompt_lengths)

    def allocate(self, scores: Tensor, present: Tensor) -> Tensor:
        """A prompt of n tokens gets round(budget * L * n) in all, or the protected ones if they are more."""
        require_finite(scores)
        counts = []
        for padded, tokens in zip(scores.unbind(1), present):
            own = padded[:, tokens]  # without the padding
            layers, length = own.shape
            protected = min(length, self.start + 1)
            total = max(round(self.budget * layers * length), layers * protected)
            counts.append(search(priority(own), total, protected)[1])
        return torch.stack(counts, dim=1)

    def capacity(self, kept: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
        if self.decode == "keep":
            return super().capacity(kept, prompt_lengths, lengths)
        # lengths * kept / prompt, rounded up. Written with the share that was dropped, in float64, as in the published
        # code: where the product is a whole number, the rounding error may add one token.
        return (lengths * (1 - (prompt_lengths - kept).double() / prompt_lengths)).ceil().long()

    def victim(self, position: Tensor, kept: Tensor) -> Tensor:
        """The slot of the oldest queued token. The first kept - 25 are pinned (of up to 25, half); the others queue."""
        pinned = torch.where(kept > RECENT, kept - RECENT, kept // 2)
        slots = torch.arange(position.shape[-1], device=position.device)
        queued = (slots >= pinned[..., None]) & (position >= 0)
        return position.masked_fill(~queued, torch.iinfo(position.dtype).max).argmin(-1)
