"""How far the rules of the published code move its comparison of methods: `python -m bench.published`.

The code that was published with Elastic Cache and PrefixKV departs from the methods in two rules. One counts the
position of a new token by what the first layer still holds. The other takes the entries of an argsort for ranks. Here
each method runs with each rule as published and as correct, at equal budgets: perplexity of the reference answer, one
token at a time through the compressed cache. What the authors ran for their tables is not known.

It measures the embedded checkpoint on scenes of its own and, with the extra `[real]`, a pretrained decoder on prose.
Results go to `--out`: a folder of `results-0.jsonl` for each model, from which a second run goes on, `table.md`, and
`published.png` where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from minillava.command import end_quietly, run_command  # isort: skip

if __name__ == "__main__":
    end_quietly()

import torch
from torch import Tensor
from tqdm import tqdm

from bench import real
from bench.quality import (
    Collector,
    Record,
    digits,
    encode,
    fill,
    fingerprint,
    interval,
    keep_apart,
    likelihood,
    log_perplexity,
    perplexity,
    read_results,
    scenes,
)
from minillava import TINY
from minillava.compressors import H2O, Cover, Elastic, Local
from minillava.fast import FastKVCache, FastLlava
from minillava.model import Compressor, KVCache, Llava
from minillava.terminal import parse_budget
from prefixkv import PrefixKV
from weights import find, load, write_file

BUDGETS = (0.1, 0.2, 0.5)
BATCH = 4  # samples that are read together
ANSWER = 48  # tokens of a passage that are asked for, after 768 of prompt
MISSING = f"bench.published: the pretrained decoder is left out; to measure it, too: {real.INSTALL}"


# ---------------------------------------------------------------- the rules as published


class ShortPositions(FastKVCache):
    """A new token's position is the number of tokens that the first layer holds, whatever the others hold.

    `LlamaModel.forward` in transformers 4.31.0, where it is called with past_key_values and without position_ids, as by
    eval_ppl.py of both repositories and `forward` in llava/model/language_model/llava_llama.py. Keys keep the positions
    at which they were rotated.
    """

    def advance(self, count: int) -> Tensor:
        """As `KVCache.advance`, but for the positions that it returns."""
        positions = self.held[0][:, None] + torch.arange(count, device=self.held.device)
        super().advance(count)
        return positions


class ShortLlava(FastLlava):
    """A model whose caches have `ShortPositions`."""

    def new_cache(self, room: int = 128, compressor: Compressor | None = None) -> KVCache:
        return ShortPositions(self.config.text, room, compressor)


def with_short_positions(model: Llava) -> Llava:
    """A second model with the same weights, which counts positions as `ShortPositions` does."""
    twin = copy.copy(model)
    twin.__class__ = ShortLlava
    return twin


def entries_as_ranks(scores: Tensor, counts: Tensor, present: Tensor, num_sinks: int) -> Tensor:
    """Which tokens a layer keeps: as `prefixkv.retain`, bool [B, N], but with an argsort's entries taken for ranks.

    Between the first `num_sinks` tokens and the last one, which stay, place i is kept if the i-th smallest score stands
    among the last places, as many as there is room for. That says little about the score of place i.
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
    """Elastic with the selection of `ElasticCache.__call__` in ElasticCache's kv_cache.py (start_size 1)."""

    def choose(self, layer: int, scores: Tensor, counts: Tensor) -> Tensor:
        """As `PrefixKV.choose`, bool [B, N]."""
        return entries_as_ranks(scores, counts, self.present, self.num_sinks)


class PublishedH2O(H2O):
    """H2O with the selection of `H2OCache.__call__` in ElasticCache's kv_cache.py.

    Scores are a mean over all layers, so that all keep the same tokens. Neither the first token nor the recent half is
    protected when the prompt is cut, only the last token. Eviction of single tokens afterwards is left as it is in H2O.
    """

    def allocate(self, scores: Tensor) -> Tensor:
        """As `PrefixKV.allocate`, [L, B]."""
        self.mean = scores.mean(0)  # [B, N]
        return super().allocate(self.mean.expand_as(scores))

    def choose(self, layer: int, scores: Tensor, counts: Tensor) -> Tensor:
        """As `PrefixKV.choose`, bool [B, N]."""
        return entries_as_ranks(self.mean, counts, self.present, 0)


SELECTIONS: dict[str, dict[str, type[PrefixKV]]] = {
    "prefixkv": {"correct": PrefixKV},  # its own file selects correctly
    "local": {"correct": Local},  # selects by position alone
    "h2o": {"correct": H2O, "as published": PublishedH2O},
    "elastic": {"correct": Elastic, "as published": PublishedElastic},
    "cover": {"correct": Cover},  # ours; nothing of it is published
}
TITLES = {"prefixkv": "PrefixKV", "local": "local", "h2o": "H2O", "elastic": "Elastic Cache", "cover": "cover"}


# ---------------------------------------------------------------- measuring


class Run(NamedTuple):
    """A row and a column of the table."""

    method: str
    positions: str  # "true" or "as published"
    selection: str  # "correct" or "as published"
    budget: float


FULL = Run("full", "true", "correct", 1.0)  # drops nothing, so both rules leave it as it is


def rows() -> list[Run]:
    """The rows of the table, as runs without a budget."""
    return [
        Run(method, positions, selection, 0.0)
        for method, selections in SELECTIONS.items()
        for selection in selections
        for positions in ("true", "as published")
    ]


@dataclass(frozen=True)
class Material:
    """A model, and what it is to read: `batch` gives the inputs and the answers [B] of some samples."""

    name: str
    model: Llava
    samples: int
    batch: Callable[[list[int]], tuple[dict[str, Tensor], list[list[int]]]]
    settings: dict[str, str]


def embedded(count: int) -> Material:
    """The embedded checkpoint, and scenes that neither training nor another measurement uses."""
    model, processor = load(TINY, fast=True)
    samples = scenes(count, 0, "published")

    def batch(chosen: list[int]) -> tuple[dict[str, Tensor], list[list[int]]]:
        some = [samples[index] for index in chosen]
        return encode(model, processor, some), [processor.tokenizer.model.encode(sample.answer) for sample in some]

    return Material("embedded", model, count, batch, {"weights": fingerprint(find(TINY)), "text": "scenes"})


def pretrained(path: Path, count: int) -> Material:
    """The decoder of a GGUF file, and passages of prose, of which the last tokens are asked for."""
    model, tokenizer = real.load(path)
    texts = real.passages(tokenizer, count, "testing", 768 + ANSWER)

    def batch(chosen: list[int]) -> tuple[dict[str, Tensor], list[list[int]]]:
        some = [texts[index] for index in chosen]
        return {"input_ids": torch.tensor([ids[:-ANSWER] for ids in some])}, [ids[-ANSWER:] for ids in some]

    text = hashlib.sha256(real.prose("testing").encode()).hexdigest()[:16]
    return Material("pretrained", model, count, batch, {"weights": fingerprint(path.parent), "text": text})


def measure(
    model: Llava, inputs: dict[str, Tensor], answers: list[list[int]], runs: list[Run]
) -> Iterator[list[float]]:
    """Negative log-likelihoods of the answers [B] for every run. The prompts are read once."""
    prompt, twin = Collector(), with_short_positions(model)
    logits = model.read(**inputs, cache=model.new_cache(0, prompt))
    for run in runs:
        compressor = None if run == FULL else SELECTIONS[run.method][run.selection](run.budget)
        reader = model if run.positions == "true" else twin
        yield likelihood(reader, logits, fill(reader, prompt, max(map(len, answers)), compressor), answers)


def complete(material: Material, runs: list[Run], folder: Path) -> list[Record]:
    """All records of a model: those in its folder, and the missing ones, which are written there one by one."""
    keep_apart(folder, material.settings)

    def key(record: Record) -> tuple[int, Run]:
        return record["sample"], Run(*(record[name] for name in Run._fields))

    done = {key(record): record for record in read_results(folder)}
    batches = [range(at, min(at + BATCH, material.samples)) for at in range(0, material.samples, BATCH)]
    todo = [(list(batch), [run for run in runs if any((index, run) not in done for index in batch)])
            for batch in batches]  # fmt: skip
    left = sum(len(missing) for _, missing in todo)
    with (
        (folder / "results-0.jsonl").open("a", encoding="utf-8") as file,
        tqdm(total=left, disable=not left, desc=material.name, unit="run", ncols=79) as bar,
    ):
        for batch, missing in todo:
            if not missing:
                continue
            inputs, answers = material.batch(batch)
            for run, losses in zip(missing, measure(material.model, inputs, answers, missing)):
                for index, loss, answer in zip(batch, losses, answers):
                    record = {"sample": index, **run._asdict(), "nll": loss, "tokens": len(answer)}
                    if done.setdefault((index, run), record) is record:
                        file.write(json.dumps(record) + "\n")
                        file.flush()
                bar.update()
    return [done[index, run] for run in runs for index in range(material.samples)]


# ---------------------------------------------------------------- table and picture

Results = dict[Run, list[Record]]


def table(title: str, found: Results, budgets: list[float]) -> str:
    """Markdown: perplexity with its interval of 95 %, a row for each method and its rules."""

    def cell(run: Run) -> str:
        losses = torch.tensor([(r["nll"], r["tokens"]) for r in found[run]], dtype=torch.float64)
        low, high = (math.exp(min(700.0, end)) for end in interval(losses, log_perplexity))
        return f"{digits(perplexity(found[run]))} ({digits(low)}–{digits(high)})"

    lines = [f"**{title}: {len(found[FULL])} samples, full cache {cell(FULL)}**", ""]
    lines += ["| | positions | selection | " + " | ".join(f"{budget:.0%}" for budget in budgets) + " |"]
    lines += ["|---" * (len(budgets) + 3) + "|"]
    for row in rows():
        cells = [TITLES[row.method], row.positions, row.selection, *(cell(row._replace(budget=b)) for b in budgets)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def plot(found: dict[str, Results], budgets: list[float], path: Path) -> None:
    """A panel for each model, if matplotlib is installed: the faults beside the correct rules."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no picture: pip install -e '.[bench]'", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    places = [(budget, method) for budget in budgets for method in SELECTIONS]
    height = 2 + 0.3 * len(places)
    figure, axes = plt.subplots(1, len(found), figsize=(5.5 * len(found), height), layout="constrained", squeeze=False)
    for axis, (title, results) in zip(axes[0], found.items()):
        for y, (budget, method) in enumerate(places):
            for selection in SELECTIONS[method]:
                colour, shift = ("C0", -0.15) if selection == "correct" else ("C3", 0.15)
                at = y + shift * (len(SELECTIONS[method]) > 1)
                true, short = (
                    perplexity(results[Run(method, positions, selection, budget)])
                    for positions in ("true", "as published")
                )
                axis.plot([true, short], [at, at], color=colour, linewidth=1)
                first = y == list(SELECTIONS).index("h2o")  # has all four, for the legend
                axis.plot(true, at, "o", color=colour, label=f"selection {selection}, true positions" * first)
                label = f"selection {selection}, positions as published" * first
                axis.plot(short, at, "o", color=colour, markerfacecolor="white", label=label)
        axis.axvline(perplexity(results[FULL]), color="grey", linestyle=":", label="full cache")
        axis.set(xscale="log", title=title, xlabel="perplexity, lower is better", ylim=(len(places) - 0.5, -0.5))
        axis.set_yticks(range(len(places)), [f"{TITLES[method]}  {budget:.0%}" for budget, method in places])
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        for y in range(len(SELECTIONS), len(places), len(SELECTIONS)):
            axis.axhline(y - 0.5, color="lightgrey", linewidth=0.8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1 if len(found) == 1 else 3, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------- command


def evaluate(args: argparse.Namespace) -> int:
    """Runs what is missing, and writes the tables and the picture."""
    budgets = args.budgets
    runs = [FULL, *(row._replace(budget=budget) for row in rows() for budget in budgets)]
    materials = {"Embedded checkpoint, scenes": embedded(args.scenes)}
    if path := real.find():
        materials["SmolLM2-135M-Instruct, prose"] = pretrained(path, args.passages)
    else:
        print(MISSING, file=sys.stderr)
    found: dict[str, Results] = {}
    for title, material in materials.items():
        found[title] = {}
        for record in complete(material, runs, args.out / material.name):
            found[title].setdefault(Run(*(record[name] for name in Run._fields)), []).append(record)
    text = "\n".join(table(title, results, budgets) for title, results in found.items())
    write_file(args.out / "table.md", text.encode())
    plot(found, budgets, args.out / "published.png")
    print(text)
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.published", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--budgets", nargs="+", type=parse_budget, default=list(BUDGETS), metavar="SHARE")
    parser.add_argument("--scenes", type=int, default=24, metavar="N", help="for the embedded checkpoint")
    parser.add_argument("--passages", type=int, default=24, metavar="N", help="of prose, for the pretrained decoder")
    parser.add_argument("--out", type=Path, default=Path("runs/published"), help="folder for the results")
    args = parser.parse_args(arguments)
    if min(args.scenes, args.passages) < 1:
        parser.error("--scenes and --passages must be 1 or more")
    args.budgets = sorted(set(args.budgets))
    return args


def main(arguments: list[str] | None = None) -> int:
    """Exit codes as in `run_command`."""
    return run_command("bench.published", lambda: evaluate(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
