"""Why a method keeps or loses an answer: PrefixKV with one part changed at a time: `python -m bench.why`.

Perplexity of the reference answer on scenes of their own (not training's, nor those of `bench.quality`), and where in
the prompt the kept keys stand.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
from torch import Tensor

from bench.quality import encode, likelihood, perplexity, scenes
from minillava import TINY
from minillava.compressors import Uniform
from prefixkv import PrefixKV, importance
from weights import load


class PerQuery(PrefixKV):
    """The mean over the queries that see a key, not the sum: early keys gain nothing by being seen often."""

    def score(self, query: Tensor, key: Tensor, present: Tensor) -> Tensor:
        """[B, N]."""
        behind = present.long().flip(1).cumsum(1).flip(1)  # queries that see a key, itself included
        return importance(query, key, present) / behind.clamp(min=1)


class LastQueries(PrefixKV):
    """Importance from the last 8 queries alone, which are words of the question: what SnapKV scores with, unpooled."""

    window = 8

    def score(self, query: Tensor, key: Tensor, present: Tensor) -> Tensor:
        """[B, N]; one window of queries is one block of `importance`, less all blocks before."""
        split = query.shape[2] - self.window
        before = importance(query[:, :, :split], key[:, :, :split], present[:, :split])
        return importance(query, key, present) - torch.nn.functional.pad(before, (0, self.window))


class Images(PrefixKV):
    """All words of the prompt protected: they are few, and every answer reads them."""

    words: Tensor  # [B, N], True for words

    def score(self, query: Tensor, key: Tensor, present: Tensor) -> Tensor:
        """[B, N]."""
        return importance(query, key, present) + self.words * present.shape[1]


class LastUniform(LastQueries, Uniform):
    """Both: the last queries' importance, and every layer the same size."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.why", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.5])
    args = parser.parse_args(arguments)
    model, processor = load(args.model)
    samples = scenes(args.samples, 0, "why")
    inputs = encode(model, processor, samples)
    answers = [processor.tokenizer.model.encode(sample.answer) for sample in samples]
    image = inputs["input_ids"] == model.config.image_token_id
    rows: list[tuple[str, type[PrefixKV], str]] = [
        ("PrefixKV", PrefixKV, "ratio"),
        ("no eviction while decoding", PrefixKV, "keep"),
        ("every layer the same size", Uniform, "ratio"),
        ("words of the prompt protected", Images, "ratio"),
        ("mean over queries in place of sum", PerQuery, "ratio"),
        ("the last 8 queries alone", LastQueries, "ratio"),
        ("the last 8 queries, same size", LastUniform, "ratio"),
        ("the last 8 queries, no eviction", LastQueries, "keep"),
    ]
    print(f"{args.samples} scenes; perplexity by budget; mean place of kept patches at the smallest, 0 first, 1 last\n")
    print("| | " + " | ".join(f"{budget:.0%}" for budget in args.budgets) + " | place |")
    print("|---" * (len(args.budgets) + 2) + "|")
    for name, method, decode in rows:
        cells, place = [], math.nan
        for budget in args.budgets:
            compressor = method(budget, decode=decode)
            if isinstance(compressor, Images):
                compressor.words = ~image & inputs["attention_mask"].bool()
            logits, cache = model.prefill(**inputs, max_new_tokens=max(map(len, answers)), compressor=compressor)
            losses = likelihood(model, logits, cache, answers)
            records = [{"nll": loss, "tokens": len(answer)} for loss, answer in zip(losses, answers)]
            cells.append(f"{perplexity(records):.3g}")
            if budget == args.budgets[0]:
                _, cache = model.prefill(**inputs, max_new_tokens=1, compressor=compressor)
                held = cache.position
                first = int(image[0].long().argmax() - (1 - inputs["attention_mask"][0]).sum())
                patches = model.config.num_image_tokens
                inside = (held >= first) & (held < first + patches)
                place = float(((held - first).double() / (patches - 1))[inside].mean())
        print(f"| {name} | " + " | ".join(cells) + f" | {place:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
