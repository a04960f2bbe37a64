"""PrefixKV (arXiv 2412.03409): every layer of a KV cache gets the size that its own attention asks for.

Some keys of a prompt receive far more attention than others, and layers differ in how many keys share
most of it. PrefixKV sorts a layer's keys by importance. The k most important are the layer's prefix, and
P(k) is the share of all importance that they hold. One threshold p for all layers, the paper's global
prefix configuration, then sets every layer's size: the shortest prefix with P(k) >= p. Binary search
finds the largest p whose sizes fit the budget. In the order of the file:

    importance  the attention that each key receives from the prompt's queries
    priority    the share of all importance in the k most important keys, for every k
    search      the threshold p that spends the budget exactly
    retain      which tokens of the prompt a layer keeps
    Plan        shares found once, on a few samples, in place of a search for every prompt
    Compressor  what a KV cache asks of this method, or of any other
    PrefixKV    the answers: all of the above, and eviction while decoding

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

RECENT = 25  # while decoding, the last 25 of the prompt tokens that a layer kept can be evicted; those before them stay


def importance(query: Tensor, key: Tensor, present: Tensor, block: int = 64) -> Tensor:
    """Attention that each key receives: the sum over queries of the mean over heads. [B, N], float32.

    query [B, H, N, Dh] and key [B, Hkv, N, Dh] after RoPE. Fused attention does not return its weights, so
    they are computed again, `block` queries at a time against the keys up to the block's end. That takes
    about as long as one of attention's two products, and memory for block x N numbers a head.
    """
    batch, heads, length, size = query.shape
    groups = heads // key.shape[1]
    query = query.unflatten(1, (-1, groups)) * size**-0.5  # [B, Hkv, G, N, Dh]
    key = key.contiguous()  # else every block's product would copy its keys
    share = (present / heads)[:, None, None, None]  # [B, 1, 1, 1, N]
    hidden, padded = torch.finfo(torch.float32).min, not present.all()
    total = query.new_zeros(batch, length, dtype=torch.float32)  # [B, N]
    for start in range(0, length, block):
        end = min(start + block, length)
        count = end - start
        # The queries of a group form one matrix, so that no key is repeated for them.
        rows = query[:, :, :, start:end].flatten(2, 3)  # [B, Hkv, G * count, Dh]
        scores = (rows @ key[:, :, :end].mT).float().unflatten(2, (groups, count))  # [B, Hkv, G, count, end]
        later = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
        scores[..., start:].masked_fill_(later, hidden)  # a query sees every key before its own block
        if padded:
            scores.masked_fill_(~present[:, None, None, None, :end], hidden)
        received = share[..., start:end] @ scores.softmax(-1)  # [B, Hkv, G, 1, end]
        total[:, :end] += received.sum(dim=(1, 2, 3))
    return total.masked_fill(~present, 0.0)


def priority(scores: Tensor) -> Tensor:
    """P(0), P(1) .. P(N) of every layer: scores [L, N] -> [L, N + 1], float64, rising from 0 to 1.

    A layer whose scores are all zero counts as one whose scores are all equal.
    """
    scores = scores.double().sort(descending=True).values  # [L, N]
    scores = torch.where(scores.sum(-1, keepdim=True) > 0, scores, 1.0)
    held = torch.nn.functional.pad(scores.cumsum(-1), (1, 0))  # [L, N + 1]
    return held / held[:, -1:]


def search(curve: Tensor, total: int, protected: int) -> tuple[float, Tensor]:
    """The largest threshold p whose sizes sum to at most `total`, and the sizes [L], which sum to it exactly.

    curve [L, N + 1] is what `priority` returns. A layer's size is its shortest prefix that holds a share p,
    and the `protected` tokens on top, which stay whatever their importance: o(p) = min(N, k(p) + protected)
    with k(p) = min{k : P(k) >= p}. `total` is at least L * protected and at most L * N.
    """
    length = curve.shape[1] - 1

    def sizes(threshold: float) -> Tensor:
        shortest = (curve < threshold).sum(-1)  # [L]: P(0) .. P(k - 1) are below the threshold, and they are k
        return (shortest + protected).clamp(max=length)

    candidates = curve.unique().tolist()  # a size changes only where p passes one of these; sorted, from 0 to 1
    low, high = 0, len(candidates)  # candidates[low] fits: p = 0 takes the protected tokens alone; `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        if int(sizes(candidates[middle]).sum()) <= total:
            low = middle
        else:
            high = middle
    threshold = candidates[low]
    # What is left goes to the layers that a larger p would let grow: first those whose prefix holds least, of these the
    # one whose next prefix holds least. It is little: one layer grows at a time unless shares are equal.
    counts, shares = sizes(threshold).tolist(), curve.tolist()
    while sum(counts) < total:
        growing = [(*shares[layer][k - protected :][:2], k, layer) for layer, k in enumerate(counts) if k < length]
        counts[min(growing)[-1]] += 1
    return threshold, torch.tensor(counts, device=curve.device)


def retain(scores: Tensor, counts: Tensor, present: Tensor, start: int = 1) -> Tensor:
    """Which tokens a layer keeps: bool [B, N], counts [B] of them in each row, from scores [B, N].

    The first `start` tokens and the last one stay, then the most important; ties go to the earlier token.
    """
    order = present.long().cumsum(1)  # 1 for a prompt's first token
    protected = present & ((order <= start) | (order == order[:, -1:]))
    scores = scores.masked_fill(protected, torch.inf).masked_fill(~present, -torch.inf)
    ranked = scores.argsort(descending=True, stable=True)
    chosen = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return torch.zeros_like(present).scatter(1, ranked, chosen)


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
        """The text that `load` reads from a file."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """From a file of `to_json`'s text, or a published plan: a list with the share that each layer forgets."""
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


class Compressor:
    """What a KV cache asks of a compression method. These answers keep every token; a method overrides some.

    For each layer of a prompt: `score`, and `planned`. After the last layer, or at once for a layer whose size is
    planned: `allocate`, `retain`, `merge`. For each new token: `capacity` and `victim`, and in every layer `observe`.
    """

    budget = 1.0  # the share of the prompt's cache to keep
    start = 1  # first tokens that are never dropped

    def score(self, query: Tensor, key: Tensor, present: Tensor) -> Tensor:
        """How much each key matters: query [B, H, N, Dh], key [B, Hkv, N, Dh] -> [B, N]."""
        return torch.zeros_like(present, dtype=torch.float32)

    def planned(self, layer: int, layers: int, prompt_lengths: Tensor) -> Tensor | None:
        """Tokens [B] that one of `layers` layers keeps if that is known before all are scored, else None."""
        return None

    def allocate(self, scores: Tensor, present: Tensor) -> Tensor:
        """Tokens that each layer of each sample keeps: scores [L, B, N] -> [L, B]."""
        return present.sum(-1).repeat(len(scores), 1)

    def retain(self, scores: Tensor, counts: Tensor, present: Tensor) -> Tensor:
        """Which tokens one layer keeps: scores [B, N], counts [B] -> bool [B, N]."""
        return retain(scores, counts, present, self.start)

    def merge(self, key: Tensor, value: Tensor, keep: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value [B, Hkv, N, Dh] as they shall be cached where keep [B, N]: dropped ones may leave a trace."""
        return key, value

    def capacity(self, kept: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
        """Tokens that layers may hold after `lengths` [B] in all that kept `kept` of `prompt_lengths` [B]: [L, B]."""
        return kept + lengths - prompt_lengths

    def victim(self, position: Tensor, kept: Tensor) -> Tensor:
        """The slot that a full layer gives up, from position [L, B, S], -1 in free slots: [L, B]."""
        return torch.zeros_like(kept)

    def observe(self, layer: int, query: Tensor, key: Tensor, position: Tensor) -> None:
        """Sees a new token's query [B, H, 1, Dh], the keys [B, Hkv, S, Dh] it reads and their position [B, S]."""


class PrefixKV(Compressor):
    """The method; `budget` is the share of the prompt's cache to keep.

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
        return importance(query, key, present)

    def planned(self, layer: int, layers: int, prompt_lengths: Tensor) -> Tensor | None:
        if self.plan is None:
            return None
        if len(self.plan.ratios) != layers:
            raise ValueError(f"The plan is for {len(self.plan.ratios)} layers; the model has {layers}.")
        share = prompt_lengths * self.plan.ratios[layer]
        return share.round().long().clamp(min=self.start + 1).minimum(prompt_lengths)

    def allocate(self, scores: Tensor, present: Tensor) -> Tensor:
        """A sample's counts sum to round(budget * L * N), N its own length, or to its protected tokens if more."""
        if len(broken := (~scores.isfinite()).nonzero()):
            raise ValueError(
                f"The importance of layer {int(broken[0, 0])} holds NaN or infinity; expected finite numbers. "
                "Check the weights and the dtype of the model."
            )
        counts = []
        for sample, mask in zip(scores.unbind(1), present):
            own = sample[:, mask]  # without the padding
            layers, length = own.shape
            protected = min(length, self.start + 1)
            total = max(round(self.budget * layers * length), layers * protected)
            counts.append(search(priority(own), total, protected)[1])
        return torch.stack(counts, dim=1)

    def capacity(self, kept: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
        if self.decode == "keep":
            return super().capacity(kept, prompt_lengths, lengths)
        # The ratio of kept to prompt tokens, rounded up. Taken from the share that was dropped, in float64, as the
        # published code does: where lengths * kept / prompt is whole, the rounding error decides about one token.
        return (lengths * (1 - (prompt_lengths - kept).double() / prompt_lengths)).ceil().long()

    def victim(self, position: Tensor, kept: Tensor) -> Tensor:
        """A layer's first `kept` - 25 tokens are pinned; the rest form a queue, and the oldest of them goes."""
        pinned = torch.where(kept > RECENT, kept - RECENT, kept // 2)
        slots = torch.arange(position.shape[-1], device=position.device)
        queued = (slots >= pinned[..., None]) & (position >= 0)
        return position.masked_fill(~queued, torch.iinfo(position.dtype).max).argmin(-1)
