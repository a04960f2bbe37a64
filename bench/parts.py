"""A compression method taken apart: score x sizes x eviction, every combination: `python -m bench.parts`.

A method scores the keys of a prompt, sizes the layers, and evicts while decoding. Each prompt is read once. Then every
combination of the three parts keeps its own tokens of it, and decodes: perplexity of the reference answer, and ROUGE-L
of the greedy answer against the full cache's, both as in `bench.quality`. Scenes have two splits: choose on `reading`,
report on `testing` (`--split testing --chosen FOLDER` shows the ten that were best in FOLDER). `--real` takes a
pretrained text decoder and passages of English in place of scenes, and measures perplexity alone.

Results go to `--out`: `results.jsonl`, from which a second run goes on, `table.md` and `parts.png`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from minillava.command import end_quietly, run_command  # isort: skip

if __name__ == "__main__":
    end_quietly()

import torch
from torch import Tensor
from tqdm import tqdm

from bench import quality, real
from bench.quality import Collector, Record, digits, interval, log_perplexity, perplexity
from bench.variants import WithoutSquares, WithoutWeights
from minillava import TINY
from minillava.checks import LlavaError, require
from minillava.compressors import H2O, TGVKV, PyramidKV, Random, SnapKV, Uniform, VLCache
from minillava.model import Compressor, CosSin, KeepAll, KVCache, Llava, apply_rope
from minillava.terminal import parse_budget
from prefixkv import PrefixKV, importance, retain
from weights import find, load, write_file

SCORES = {
    "sum": "attention of all queries, summed (PrefixKV)",
    "mean": "its mean over the queries that see a key",
    "window": "attention of the last 32 queries",
    "pooled": "the same, max-pooled (SnapKV)",
    "words": "attention of words behind the image (VL-Cache)",
    "weighted": "the same, weighty words first (TGV-KV)",
    "expected": "expected attention x norm of the value",
    "value": "sum x norm of the value",
    "distance": "distance of the key from the mean key",
    "random": "drawn at random",
    "even": "evenly spaced",
}
SIZES = {
    "same": "all layers the same",
    "prefixkv": "one threshold (PrefixKV)",
    "mass": "greatest kept mass",
    "pyramidkv": "falling in equal steps (PyramidKV)",
    "vlcache": "by density of attention (VL-Cache)",
}
EVICTIONS = {
    "none": "none (holds more bytes)",
    "queue": "oldest of the queue (PrefixKV)",
    "h2o": "least attention, newest half spared (H2O)",
    "least": "least attention from words, newest 8 spared",
    "oldest": "oldest new token",
}
PARTS = {"score": SCORES, "sizes": SIZES, "eviction": EVICTIONS}


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L F, 0 for an answer without words."""
    from rouge import Rouge

    if not text.strip(" .") or not reference.strip(" ."):
        return float(text == reference)
    return float(Rouge(metrics=["rouge-l"]).get_scores(text, reference)[0]["rouge-l"]["f"])


class Run(NamedTuple):
    """One combination at one budget."""

    budget: float
    score: str
    sizes: str
    eviction: str


FULL = Run(1.0, "full", "", "")
ANSWER = 48  # tokens at the end of a passage whose perplexity is measured


# ---------------------------------------------------------------- a prompt, read once


class Prompt(Collector):
    """What every combination starts from: the layers of a batch of prompts, and the scores of their keys."""

    logits: Tensor  # [B, V], for the first new token
    scores: dict[str, Tensor]  # [L, B, N] for each of SCORES
    density: list[Tensor]  # VL-Cache's: [B] for each layer


def expected_attention(
    query: Tensor, key: Tensor, value: Tensor, present: Tensor, rope: CosSin, coming: CosSin
) -> Tensor:
    """Attention that coming queries may pay, times the norm of the value, a mean over heads: [B, N], float32.

    kvpress, ExpectedAttentionPress: softmax over j of k_j · mean / sqrt(Dh) + k_j · covariance · k_j / (2 Dh). Mean and
    covariance are those of the prompt's queries: turned back from their own positions, whose cos and sin are `rope`
    [B, 1, N, Dh], then on by `coming`, the mean cos and sin of positions to come [B, 1, 1, Dh]. kvpress leaves out the
    first four tokens, which it always keeps; here they take part.
    """
    query = apply_rope(apply_rope(query.float(), rope[0], -rope[1]), *coming)  # [B, H, N, Dh]
    share = (present / present.sum(-1, keepdim=True))[:, None, :, None]  # [B, 1, N, 1]
    mean = (query * share).sum(2, keepdim=True)  # [B, H, 1, Dh]
    centred = query - mean
    covariance = centred.mT @ (centred * share)  # [B, H, Dh, Dh]
    groups, size = query.shape[1] // key.shape[1], key.shape[3]
    key = key.float().repeat_interleave(groups, 1)  # [B, H, N, Dh]
    scores = (key * mean).sum(-1) / size**0.5 + (key @ covariance * key).sum(-1) / (2 * size)  # [B, H, N]
    weights = scores.masked_fill(~present[:, None], -torch.inf).softmax(-1)
    return (weights * value.float().norm(dim=-1).repeat_interleave(groups, 1)).mean(1)


@torch.inference_mode()
def read_prompt(model: Llava, inputs: dict[str, Tensor], seeds: list[int], new_tokens: int) -> Prompt:
    """Reads a batch of prompts and scores their keys in every way; `seeds` has one for each prompt's random score."""
    prompt = Prompt()
    cache = model.new_cache(new_tokens, prompt)
    prompt.logits = model.read(**inputs, cache=cache)
    present, decoder = prompt.present, model.language_model
    behind = present.long().flip(1).cumsum(1).flip(1).clamp(min=1)  # [B, N]: queries that see a key
    rope = decoder.cos_sin(cache.block.clamp(min=0))
    count = min(512, max(1, decoder.config.max_position_embeddings - present.shape[1]))
    cos, sin = decoder.cos_sin(cache.prompt_lengths[:, None] + torch.arange(count, device=present.device))
    coming = cos.float().mean(2, keepdim=True), sin.float().mean(2, keepdim=True)  # [B, 1, 1, Dh]
    density = VLCache(1.0)
    methods: dict[str, PrefixKV] = {
        "window": SnapKV(1.0, kernel=1), "pooled": SnapKV(1.0), "words": density, "weighted": TGVKV(1.0),
        "random": Random(1.0, seeds),
    }  # fmt: skip
    for method in methods.values():
        method.begin(present, prompt.image, len(prompt.layers))

    def score(layer: int, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        total = importance(query, key, present)
        middle = (key.float() * present[:, None, :, None]).sum(2, keepdim=True)  # the mean key, but for its length
        return {
            "sum": total,
            "mean": total / behind,
            **{name: method.score(layer, query, key, value) for name, method in methods.items()},
            "expected": expected_attention(query, key, value, present, rope, coming),
            "value": total * value.float().norm(dim=(1, 3)),
            "distance": (1 - torch.cosine_similarity(key.float(), middle, dim=-1)).mean(1).clamp(min=0),
            "even": present.float(),  # all alike: `choose` spaces them, once it is known how many there are
        }

    layers = [score(number, *layer) for number, layer in enumerate(prompt.layers)]
    prompt.scores = {name: torch.stack([s[name] for s in layers]).masked_fill(~present, 0.0) for name in SCORES}
    prompt.density = density.density
    return prompt


# ---------------------------------------------------------------- the parts


def greatest_mass(scores: Tensor, present: Tensor, budget: float) -> Tensor:
    """Sizes [L, B]: how many of all layers' largest scores [L, B, N] together, each layer's sum being 1, are its own.

    AdaKV's rule for heads, between layers. The first token and the last one count as largest. Of equal scores that one
    comes first before which its layer has fewer.
    """
    counts = []
    uniform = Uniform(budget)
    uniform.begin(present, present, len(scores))
    totals = uniform.allocate(scores).sum(0).tolist()
    for padded, tokens, total in zip(scores.unbind(1), present, totals):
        own = padded[:, tokens].double()  # [L, n]
        own = own / own.sum(-1, keepdim=True).clamp(min=1e-300)
        own[:, 0] = own[:, -1] = torch.inf
        ranked = own.sort(descending=True).values.T.flatten()  # every layer's largest, every layer's second, ..
        largest = ranked.argsort(descending=True, stable=True)[:total]
        counts.append((largest % len(scores)).bincount(minlength=len(scores)))
    return torch.stack(counts, dim=1)


def layer_sizes(prompt: Prompt, run: Run) -> Tensor:
    """Tokens that each layer keeps of each prompt, [L, B]: round(budget * L * n) in all, protected ones included."""
    scores = prompt.scores[run.score]
    if run.sizes == "mass":
        return greatest_mass(scores, prompt.present, run.budget)
    methods = {"same": Uniform, "prefixkv": PrefixKV, "pyramidkv": PyramidKV, "vlcache": VLCache}
    method = methods[run.sizes](run.budget)
    method.begin(prompt.present, prompt.image, len(scores))
    if isinstance(method, VLCache):
        method.density = prompt.density
    return method.allocate(scores)


def evenly(counts: Tensor, present: Tensor) -> Tensor:
    """Scores [B, N]: 1 for tokens evenly spaced between a prompt's first and last, counts [B] with these two; else 0.

    `retain` keeps the first and the last one whatever they score.
    """
    number = present.long().cumsum(1)
    room = (counts - 2).clamp(min=0)[:, None]
    between = (number[:, -1:] - 2).clamp(min=1)
    before, after = (((number - end) * room + between // 2) // between for end in (2, 1))
    return (after - before).float()


def choose(prompt: Prompt, run: Run) -> list[Tensor]:
    """Which tokens each layer keeps, bool [B, N] for each layer."""
    if run == FULL:
        return [prompt.present] * len(prompt.layers)
    present = prompt.present
    return [
        retain(evenly(counts, present) if run.score == "even" else scores, counts, present)
        for scores, counts in zip(prompt.scores[run.score], layer_sizes(prompt, run))
    ]


class Oldest(PrefixKV):
    """Drops the oldest new token; what a layer kept of the prompt stays."""

    def victim(self, position: Tensor, kept: Tensor) -> Tensor:
        new = (torch.arange(position.shape[-1], device=position.device) >= kept[..., None]) & (position >= 0)
        return position.masked_fill(~new, torch.iinfo(position.dtype).max).argmin(-1)


class Least(WithoutWeights, WithoutSquares):
    """As `cover`, drops the token with the least attention from the question and the new words; words go last."""


def evictor(prompt: Prompt, run: Run) -> Compressor:
    """Answers the cache while decoding. All but "none" hold the same bytes."""
    if run.eviction in ("none", ""):
        return KeepAll()
    methods = {"queue": PrefixKV, "h2o": H2O, "least": Least, "oldest": Oldest}
    method = methods[run.eviction](run.budget)
    method.begin(prompt.present, prompt.image, len(prompt.layers))
    if run.eviction in (
        "h2o",
        "least",
    ):  # they note the attention that the prompt's tokens have received, and add to it
        method.allocate(prompt.scores["words" if run.eviction == "least" else "sum"])
    return method


# ---------------------------------------------------------------- measuring


@torch.inference_mode()
def fill(model: Llava, prompt: Prompt, keep: list[Tensor], new_tokens: int, method: Compressor) -> KVCache:
    """A cache that holds the tokens keep [B, N] of each layer, as `read` would leave it."""
    cache = model.new_cache(new_tokens, method)
    cache.begin(prompt.present, prompt.image)
    for (_, key, value), chosen in zip(prompt.layers, keep):
        cache.store(key, value, chosen)
    return cache


Batch = tuple[dict[str, Tensor], list[list[int]]]  # a model's inputs, and the reference answers
Data = tuple[Llava, Callable[[list[int]], Batch], Callable[[Tensor], list[str]] | None]


def data_of(args: argparse.Namespace) -> Data:
    """The model, samples by their indices, and the texts of token ids (None: there are no greedy answers)."""
    if args.real:
        path = real.find()
        if path is None:
            raise LlavaError(f"The pretrained decoder is not installed: {real.INSTALL}")
        model, tokenizer = real.load(path)
        model.language_model.to(args.device)
        model.lm_head.to(args.device)
        passages = real.passages(tokenizer, args.samples, args.split, 768 + ANSWER)

        def texts(indices: list[int]) -> Batch:
            ids = torch.tensor([passages[index] for index in indices], device=args.device)
            return {"input_ids": ids[:, :-ANSWER]}, ids[:, -ANSWER:].tolist()

        return model, texts, None
    model, processor = load(args.model, device=torch.device(args.device), fast=True)
    samples = quality.scenes(args.samples, args.seed, f"parts {args.split}")

    def pictures(indices: list[int]) -> Batch:
        chosen = [samples[index] for index in indices]
        answers = [processor.tokenizer.model.encode(sample.answer) for sample in chosen]
        return quality.encode(model, processor, chosen), answers

    return model, pictures, lambda ids: [text.strip() for text in processor.decode(ids)]


def measure(data: Data, batch: list[int], runs: list[Run], args: argparse.Namespace) -> Iterator[list[Record]]:
    """Records of a batch of samples, one list for every run; the full cache, which comes first, is one of them."""
    model, read, decode = data
    inputs, answers = read(batch)
    longest = max(map(len, answers))
    prompt = read_prompt(model, inputs, [args.seed + index for index in batch], max(longest, args.max_new_tokens))
    references: list[str] = []
    for run in [FULL, *runs]:
        keep = choose(prompt, run)
        cache = fill(model, prompt, keep, longest, evictor(prompt, run))
        losses = quality.likelihood(model, prompt.logits, cache, answers)
        records: list[Record] = [
            {"sample": sample, **run._asdict(), "nll": loss, "tokens": len(answer)}
            for sample, loss, answer in zip(batch, losses, answers)
        ]
        if decode:
            cache = fill(model, prompt, keep, args.max_new_tokens, evictor(prompt, run))
            texts = decode(torch.stack(list(model.decode(prompt.logits, cache)), dim=1))
            references = references or texts
            for record, text, reference in zip(records, texts, references):
                record["rouge"] = rouge_l(text, reference)
        yield records


# ---------------------------------------------------------------- tables


def run_of(record: Record) -> Run:
    return Run(*(record[name] for name in Run._fields))


class Results:
    """Of one budget: `runs`, and for each of `metrics` values [samples, runs] and weights [samples].

    A run's metric is the sum of its values over the sum of the weights: log-perplexity, of losses and tokens; ROUGE-L,
    if there were greedy answers, of itself and ones.
    """

    def __init__(self, records: list[Record], budget: float):
        table = {(record["sample"], run_of(record)): record for record in records}
        samples = sorted({sample for sample, _ in table})
        self.samples = len(samples)
        self.runs = list(dict.fromkeys(run for _, run in table if run.budget == budget and run != FULL))

        def values(name: str, runs: list[Run]) -> Tensor:
            return torch.tensor([[table[s, run][name] for run in runs] for s in samples], dtype=torch.float64)

        tokens = values("tokens", [FULL])[:, 0]
        self.full = math.exp(values("nll", [FULL]).sum() / tokens.sum())
        self.metrics = {"log-perplexity": (values("nll", self.runs), tokens)}
        if "rouge" in records[0]:
            self.metrics["ROUGE-L"] = values("rouge", self.runs), torch.ones_like(tokens)

    def effects(self) -> Iterator[tuple[str, str, list[tuple[float, float, float]]]]:
        """Part, level, and by how much its runs' mean lies above that of all runs, with an interval, in each metric.

        All runs have the same weights, so the mean of their metrics is the metric of their mean values.
        """
        for part, levels in PARTS.items():
            for level in levels:
                has = torch.tensor([getattr(run, part) == level for run in self.runs])
                if has.any():
                    moved = [(values[:, has].mean(1) - values.mean(1), w) for values, w in self.metrics.values()]
                    yield part, level, [ratio(*pair) for pair in moved]

    def cells(self, run: Run) -> str:
        """Perplexity, and ROUGE-L if there is any, with intervals."""
        (loss, *ends), *rouge = (ratio(v[:, self.runs.index(run)], weights) for v, weights in self.metrics.values())
        low, high = (math.exp(min(700.0, end)) for end in ends)
        cells = [f"{digits(math.exp(min(700.0, loss)))} ({digits(low)}–{digits(high)})"]
        return " | ".join(cells + ["{:.3f} ({:.3f}–{:.3f})".format(*found) for found in rouge])


def ratio(values: Tensor, weights: Tensor) -> tuple[float, float, float]:
    """The sum of values [samples] over that of weights [samples], and the ends of its interval of 95 %."""
    ends = interval(torch.stack([values, weights], dim=-1), log_perplexity)
    return float(values.sum() / weights.sum()), *ends


def ranking(records: list[Record], budget: float, key: Callable[[list[Record]], float] = perplexity) -> list[Run]:
    """The runs that hold the same bytes, those with the smallest `key` of their records first."""
    rows: dict[Run, list[Record]] = {}
    for record in records:
        if record["budget"] == budget and record["eviction"] not in ("none", ""):
            rows.setdefault(run_of(record), []).append(record)
    return sorted(rows, key=lambda run: key(rows[run]))


def tables(records: list[Record], chosen: list[Record]) -> str:
    """Markdown for each budget: main effects, the ten combinations that are best in `chosen`, the published one."""
    lines = []
    for budget in budgets_of(records):
        found, places = Results(records, budget), ranking(records, budget)
        lines += [
            f"**Budget {budget:.0%}: how far a level lies from the mean of all {len(found.runs)} combinations**\n\n"
            f"{found.samples} samples; full cache: perplexity {found.full:.4f}. Lower is better for log-perplexity "
            "(0.69 is twice the perplexity), higher for ROUGE-L; intervals of 95 %.\n"
        ]
        heads = ["part", "level", "", *found.metrics]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for part, level, moved in found.effects():
            cells = [f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" for mean, low, high in moved]
            lines.append(f"| {part} | {level} | {PARTS[part][level]} | {' | '.join(cells)} |")
        heads = ["score", "sizes", "eviction", *found.metrics]
        lines += ["", f"**The ten best of {len(places)} that hold the same bytes (all but eviction none)**", ""]
        lines += [f"| {' | '.join(heads)} |".replace("log-", ""), "|---" * len(heads) + "|"]
        for run in [run for run in ranking(chosen, budget) if run in places][:10]:
            lines.append(f"| {' | '.join(run[1:])} | {found.cells(run)} |")
        published = Run(budget, "sum", "prefixkv", "queue")
        if published in places:
            lines.append(f"| **{'** | **'.join(published[1:])}** | {found.cells(published)} |")
            place = f"{places.index(published) + 1} of {len(places)} by perplexity"
            if "ROUGE-L" in found.metrics:
                by_rouge = ranking(records, budget, lambda rows: -sum(r["rouge"] for r in rows))
                place += f", {by_rouge.index(published) + 1} by ROUGE-L"
            lines += ["", f"PrefixKV as published is the last row: {place}."]
        lines.append("")
    return "\n".join(lines)


def budgets_of(records: list[Record]) -> list[float]:
    return sorted({record["budget"] for record in records if record["score"] != "full"})


def plot(records: list[Record], path: Path) -> None:
    """The main effects of every budget, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no picture: pip install -e '.[bench]'", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = {budget: Results(records, budget) for budget in budgets_of(records)}
    metrics = list(next(iter(results.values())).metrics)
    size = (5 + 4 * len(metrics), 7)
    figure, axes = plt.subplots(1, len(metrics), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, name, side in zip(axes[0], metrics, ("lower", "higher")):
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_xlabel(f"{name}, difference from the mean ({side} is better)")
        axis.grid(axis="y", alpha=0.3)
    for number, (budget, found) in enumerate(results.items()):
        effects = list(found.effects())
        height = [i + 0.8 * list(PARTS).index(part) for i, (part, _, _) in enumerate(effects)]  # a gap between parts
        for column, axis in enumerate(axes[0]):
            at = [moved[column] for _, _, moved in effects]
            ends = [[mean - low for mean, low, _ in at], [high - mean for mean, _, high in at]]
            shifted = [h + 0.2 * (number - (len(results) - 1) / 2) for h in height]
            axis.errorbar([mean for mean, _, _ in at], shifted, xerr=ends, fmt="o", markersize=4, label=f"{budget:.0%}")
        axes[0, 0].set_yticks(height, [f"{PARTS[part][level]}  [{part}]" for part, level, _ in effects], fontsize=8)
    axes[0, 0].invert_yaxis()
    axes[0, 0].legend(title="budget", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------- the command line


def evaluate(args: argparse.Namespace) -> int:
    """Runs what is missing, then writes and prints the tables."""
    chosen = quality.read_results(args.chosen) if args.chosen else []
    known = not args.chosen or {*args.budgets} <= {*budgets_of(chosen)}
    require(
        known, f"{args.chosen} lacks results of these budgets; expected the --out of a run of them on another split."
    )
    if args.chosen:
        other = json.loads((args.chosen / "settings.json").read_text(encoding="utf-8"))["split"]
        require(other != args.split, f"{args.chosen} is of the split {other}, too; give results of the other split.")
    data = data_of(args)
    names = ("model", "real", "split", "samples", "batch_size", "max_new_tokens", "device", "seed")
    settings = {name: str(getattr(args, name)) for name in names}
    quality.keep_apart(args.out, settings | {"weights": "" if args.real else quality.fingerprint(find(args.model))})
    runs = [Run(*parts) for parts in itertools.product(args.budgets, args.scores, args.sizes, args.evictions)]
    done = {(record["sample"], run_of(record)): record for record in quality.read_results(args.out)}
    batches = [list(range(args.samples))[at : at + args.batch_size] for at in range(0, args.samples, args.batch_size)]
    missing = {at: [run for run in runs if any((s, run) not in done for s in b)] for at, b in enumerate(batches)}
    with (
        (args.out / "results.jsonl").open("a", encoding="utf-8") as file,
        tqdm(total=sum(map(len, missing.values())), unit="run", ncols=79) as bar,
    ):
        for at, todo in missing.items():
            for records in measure(data, batches[at], todo, args) if todo else []:
                for record in records:
                    if (record["sample"], run_of(record)) not in done:
                        done[record["sample"], run_of(record)] = record
                        file.write(json.dumps(record) + "\n")
                file.flush()
                bar.update(records[0]["score"] != "full")
    records = [done[sample, run] for run in [FULL, *runs] for sample in range(args.samples)]
    text = tables(records, chosen or records)
    write_file(args.out / "table.md", text.encode())
    plot(records, args.out / "parts.png")
    print(text)
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.parts", description=(__doc__ or "").split("\n")[0])
    add: Any = parser.add_argument
    add("--model", default=str(TINY), help="folder of a checkpoint, or Hub id (default: the embedded)")
    add("--real", action="store_true", help="a pretrained text decoder and passages of English (extra `real`)")
    add("--split", choices=["reading", "testing"], default="reading", help="samples to choose by, or to report on")
    add("--chosen", type=Path, metavar="FOLDER", help="show the ten that are best in the results of this folder")
    for option, levels in (("--scores", SCORES), ("--sizes", SIZES), ("--evictions", EVICTIONS)):
        add(option, nargs="+", default=list(levels), choices=levels, metavar="NAME", help=", ".join(levels))
    add("--budgets", nargs="+", type=parse_budget, default=[0.2], metavar="SHARE")
    add("--samples", type=int, default=24, metavar="N")
    add("--batch-size", type=int, default=24, metavar="N")
    add("--max-new-tokens", type=int, default=160, metavar="N", help="of the greedy answer")
    add("--device", default="cpu")
    add("--seed", type=int, default=0, help="of the scenes and of the random score")
    add("--out", type=Path, help="folder for the results (default: runs/parts-SPLIT, or runs/parts-real-SPLIT)")
    args = parser.parse_args(arguments)
    args.out = args.out or Path("runs") / f"parts{'-real' * args.real}-{args.split}"
    if min(args.samples, args.batch_size, args.max_new_tokens) < 1:
        parser.error("--samples, --batch-size and --max-new-tokens must be 1 or more")
    args.budgets = sorted(set(args.budgets))
    return args


def main(arguments: list[str] | None = None) -> int:
    """Exit codes as in `run_command`."""
    return run_command("bench.parts", lambda: evaluate(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
