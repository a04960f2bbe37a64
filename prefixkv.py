"""PrefixKV (arXiv 2412.03409): give every layer of a KV cache the size its own attention asks for.

A prompt's keys differ in how much attention they receive, and layers differ in how many keys share
most of it. PrefixKV sorts each layer's keys by importance; the k most important ones are the layer's
prefix, and its priority P(k) is the share of all importance that they hold. One threshold p for all
layers, the paper's global prefix configuration, then sets every layer's size: the shortest prefix
with P(k) >= p. Binary search finds the largest p whose sizes fit the budget. In the order of the file:

    importance  attention that each key receives from the prompt's queries
    priority    share of all importance in the k largest, for every k
    search      the threshold p that spends the budget exactly
    retain      which tokens of the prompt a layer keeps
    Plan        shares found once, offline, on a few samples, in place of a search for every prompt
    PrefixKV    the steps together, and eviction while decoding

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

RECENT = 25  # decoding leaves the recent window this many of a layer's tokens to begin with


def importance(query: Tensor, key: Tensor, present: Tensor, block: int = 64) -> Tensor:
    """Attention each key receives: the sum over queries of the mean over heads. [B, N], float32.

    query [B, H, N, Dh] and key [B, Hkv, N, Dh] after RoPE. Fused attention does not hand out its
    weights, so they are computed again, `block` queries at a time against the keys up to the block's
    end: half of one of attention's two products and its softmax, in memory of block x N per head.
    """
    batch, heads, length, size = query.shape
    groups = heads // key.shape[1]
    query = query.unflatten(1, (-1, groups)) * size**-0.5  # [B, Hkv, G, N, Dh]
    key = key.contiguous()  # else every block's product would copy its keys anew
    asking = (present / heads)[:, None, None, None]  # [B, 1, 1, 1, N]
    unseen, padded = torch.finfo(torch.float32).min, not present.all()
    total = query.new_zeros(batch, length, dtype=torch.float32)  # [B, N]
    for start in range(0, length, block):
        end = min(start + block, length)
        count = end - start
        # The queries of a group stand side by side, so that no key is repeated for them.
        rows = query[:, :, :, start:end].flatten(2, 3)  # [B, Hkv, G * count, Dh]
        scores = (rows @ key[:, :, :end].mT).float().unflatten(2, (groups, count))  # [B, Hkv, G, count, end]
        later = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
        scores[..., start:].masked_fill_(later, unseen)  # all keys before the block are seen by all of it
        if padded:
            scores.masked_fill_(~present[:, None, None, None, :end], unseen)
        received = asking[..., start:end] @ scores.softmax(-1)  # [B, Hkv, G, 1, end]
        total[:, :end] += received.sum(dim=(1, 2, 3))
    return total.masked_fill(~present, 0.0)


def priority(importance: Tensor) -> Tensor:
    """P(1) .. P(N) of every layer: importance [L, N] -> [L, N], float64, non-decreasing, ending at 1.

    A layer to which nothing matters counts as one to which all tokens matter alike.
    """
    largest_first = importance.double().sort(descending=True).values
    largest_first = torch.where(largest_first.sum(-1, keepdim=True) > 0, largest_first, 1.0)
    prefix = largest_first.cumsum(-1)
    return prefix / prefix[:, -1:]


def search(priority: Tensor, total: int, protected: int) -> tuple[float, Tensor]:
    """The largest threshold p whose sizes o_l(p) = min(N, k_l(p) + protected) sum to at most `total`.

    `protected` is at most N, `total` between L * protected and L * N.
    Returns p and the sizes [L], which sum to `total`: tokens left over go one by one to the layer whose
    next prefix is smallest. Sizes change only where p passes a value of `priority` [L, N], so the search
    runs over those values, halves them at every step, and ends after log2(L * N) of them.
    """
    layers, length = priority.shape
    prefix = priority[:, : length - protected].contiguous()  # longer prefixes change no size

    def sizes(threshold: Tensor) -> Tensor:
        below = torch.searchsorted(prefix, threshold.expand(layers, 1).contiguous())[:, 0]  # P_l(k) < p
        return (below + 1 + protected).clamp(max=length)

    thresholds = torch.cat([prefix.flatten(), priority[0, -1:]]).unique()  # sorted, up to 1
    low, high = 0, len(thresholds)  # sizes fit for all thresholds before `low`, for none from `high` on
    while low < high:
        middle = (low + high) // 2
        if int(sizes(thresholds[middle]).sum()) <= total:
            low = middle + 1
        else:
            high = middle
    counts = sizes(thresholds[low - 1]) if low else torch.full((layers,), protected, device=priority.device)
    # Prefixes only grow, so taking the smallest next one again and again is taking the smallest of all
    # that remain; equal ones go by length, then by layer, hence the transposition before a stable sort.
    remaining = torch.arange(length - protected, device=priority.device)[:, None] >= counts - protected
    order = torch.where(remaining, prefix.T, 2.0).flatten().sort(stable=True).indices
    extra = order[: total - int(counts.sum())] % layers
    counts = counts + torch.bincount(extra, minlength=layers)
    return float(thresholds[low - 1]) if low else 0.0, counts


def retain(importance: Tensor, counts: Tensor, present: Tensor, start: int = 1) -> Tensor:
    """Which tokens a layer keeps: bool [B, N], counts [B] of them in each row.

    The first `start` tokens and the last one stay, then the most important; ties go to the earlier token.
    """
    order = present.long().cumsum(1)  # 1 for a prompt's first token
    protected = present & ((order <= start) | (order == order[:, -1:]))
    rank_by = importance.masked_fill(protected, torch.inf).masked_fill(~present, -torch.inf)
    ranked = rank_by.argsort(descending=True, stable=True)
    chosen = torch.arange(importance.shape[1], device=importance.device) < counts[:, None]
    return torch.zeros_like(present).scatter(1, ranked, chosen)


@dataclass(frozen=True)
class Plan:
    """The share of a prompt that each layer keeps; the paper estimates it offline on about ten samples."""

    budget: float
    ratios: Sequence[float]  # one a layer
    model: str = ""
    samples: int = 0

    @classmethod
    def estimate(cls, budget: float, kept: Tensor, prompt: Tensor, model: str = "") -> Plan:
        """The mean shares of some samples: tokens kept [B, L] of prompts of `prompt` [B] tokens."""
        ratios = (kept.double() / prompt[:, None]).mean(0).tolist()
        return cls(budget, ratios, model, len(kept))

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, whole or not at all."""
        temporary = Path(f"{path}.part")
        try:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads what `save` wrote, or a published plan: a list with the share that each layer forgets."""
        try:
            with open(path, "rb") as file:
                raw = json.loads(file.read(10**6))  # a plan is far shorter, and some files never end
            shares = [1 - share for share in raw] if isinstance(raw, list) else raw["ratios"]
            if not shares or not all(0 <= float(share) <= 1 for share in shares):
                raise ValueError("shares between 0 and 1, one a layer, are missing")
            known = {} if isinstance(raw, list) else raw
            budget = float(known.get("budget", sum(shares) / len(shares)))
            return cls(budget, [float(s) for s in shares], str(known.get("model", "")), int(known.get("samples", 0)))
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} holds no plan ({error}); expected what --save-plan writes.") from None


class PrefixKV:
    """The method as a compressor for `Llava.generate`; `budget` is the share of the prompt's cache to keep.

    start: first tokens that are never dropped. decode: "ratio" lets a layer grow with the text at its own
    ratio of kept to prompt tokens and drops the oldest recent token beyond it; "keep" drops nothing more.
    plan: takes the place of budget and search, so that each layer is compressed before the next one runs.
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
        """Importance [B, N] of one layer's keys, as its queries and keys pass by."""
        return importance(query, key, present)

    def allocate(self, importance: Tensor, present: Tensor) -> Tensor:
        """Tokens that each layer of each sample keeps: importance [L, B, N] -> [L, B].

        A sample's counts sum to round(budget * L * N), N its own length, or to its protected tokens if those are more.
        """
        broken = ~importance.isfinite().flatten(1).all(1)
        if broken.any():
            raise ValueError(
                f"The importance of layer {int(broken.nonzero()[0])} holds NaN or infinity; expected finite numbers. "
                "Check the weights and the dtype of the model."
            )
        counts = []
        for sample, mask in zip(importance.unbind(1), present):
            scores = sample[:, mask]  # without the padding
            layers, length = scores.shape
            protected = min(length, self.start + 1)
            total = max(round(self.budget * layers * length), layers * protected)
            counts.append(search(priority(scores), total, protected)[1])
        return torch.stack(counts, dim=1)

    def planned(self, layer: int, layers: int, prompt: Tensor) -> Tensor:
        """Tokens that one layer keeps by the plan, for prompts of `prompt` [B] tokens: [B]."""
        assert self.plan is not None
        if len(self.plan.ratios) != layers:
            raise ValueError(f"The plan is for {len(self.plan.ratios)} layers; the model has {layers}.")
        return (prompt * self.plan.ratios[layer]).round().long().clamp(min=self.start + 1).minimum(prompt)

    def retain(self, importance: Tensor, counts: Tensor, present: Tensor) -> Tensor:
        """Which tokens one layer keeps: bool [B, N]."""
        return retain(importance, counts, present, self.start)

    def room(self, kept: Tensor, prompt: Tensor, seen: Tensor) -> Tensor:
        """Tokens a layer that kept `kept` [L, B] of `prompt` [B] tokens may hold after `seen` [B]: [L, B]."""
        if self.decode == "keep":
            return kept + seen - prompt
        # The ratio of prefill, rounded up. Taken from the share that was dropped, in float64, as the published
        # code does: where seen * kept / prompt is whole, its rounding error decides about one token more.
        return (seen * (1 - (prompt - kept).double() / prompt)).ceil().long()

    def evict(self, position: Tensor, kept: Tensor) -> Tensor:
        """The slot that each layer gives up, from position [L, B, S], -1 in free slots: [L, B].

        A layer's first `kept` - 25 tokens are pinned; the rest queue up, and the oldest of them goes.
        """
        pinned = torch.where(kept > RECENT, kept - RECENT, kept // 2)
        slots = torch.arange(position.shape[-1], device=position.device)
        queued = (slots >= pinned[..., None]) & (position >= 0)
        return position.masked_fill(~queued, torch.iinfo(position.dtype).max).argmin(-1)
