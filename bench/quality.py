"""What is lost with each method and budget, asked in three ways: `python -m bench.quality`.

    known     the method sees the question before it cuts the cache
    second    it cut the cache for another question; this one comes as a further turn
    first     it cuts the cache of the picture before any question

Three measures: short questions answered exactly; objects of a description named truly (size, colour, shape and place);
perplexity of the true description, token after token through the compressed cache. With no arguments: the embedded
checkpoint on scenes that training never saw. `--data FILE` asks questions of your own, which have a perplexity only;
`--data prose` and `--data facts` take a pretrained decoder of text.
Methods are combined as bench/variants.py says: `--methods full cover random+words/least full@2`.

Results go to `--out`: `results*.jsonl` (a line for every answer, from which a second run goes on), `settings.json`,
`table.md`, and `quality.png` where matplotlib is installed. Many processes:
`torchrun --nproc-per-node 2 -m bench.quality`.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench import real
from bench.common import table
from bench.samples import WIDTHS, Sample, read_samples, scenes
from bench.variants import KVzip, empty_cache, make, parsed, twice
from minillava import TINY
from minillava.checks import LlavaError, require
from minillava.command import run_command
from minillava.compressors import METHODS as COMPRESSORS
from minillava.compressors import Recorder
from minillava.files import write_json
from minillava.model import KeepAll, KVCache, Llava
from minillava.quantised import QuantisedKVCache
from minillava.scenes import COLOURS, SHAPES, SIZES, SMALLEST, named
from minillava.terminal import parse_budget
from prefixkv import Plan, PrefixKV, priority
from weights import estimate_plan, find, load, read_plan, write_file, write_plan

# By default. `matching` is left out, since fitting takes most of an hour, and `mixkv`, which scores much like `snapkv`.
METHODS = ("full", *(name for name in COMPRESSORS if name not in ("mixkv", "matching")), "plan")
PROTOCOLS = ("known", "second", "first")
BUDGETS = (0.05, 0.1, 0.2, 0.5)
# Each measure is a ratio of two fields of records, both summed over samples; without the second, over their number.
MEASURES = {  # title, kind of the samples that have it, fields
    "questions": ("Short questions answered exactly, in per cent", "question", "right", ""),
    "objects": ("Objects of a description named truly, in per cent", "description", "found", "true"),
    "perplexity": ("Perplexity of the true description", "description", "nll", "tokens"),
}
Samples = Sequence[Sample | real.Text]
Batch = tuple[list[int], dict[str, Tensor], Tensor]  # which samples; inputs up to the cut; turns after it, [B, M]
SHORT = 24  # tokens that the answer to a short question has at most
Record = dict[str, Any]


class Run(NamedTuple):
    """What is measured on all samples of a kind: a method and budget in a protocol."""

    kind: str  # question or description
    protocol: str
    method: str
    budget: float


# ---------------------------------------------------------------- measuring


def batches(processor: Any, samples: Samples, protocol: str, size: int) -> Iterator[Batch]:
    """All samples, up to `size` at a time, whose turns after the cut are equally long."""
    prompts = [sample.split(processor, protocol) for sample in samples]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, (inputs, cut) in enumerate(prompts):
        by_length[inputs["input_ids"].shape[1] - cut].append(index)
    for _, members in sorted(by_length.items()):
        for chosen in (members[start : start + size] for start in range(0, len(members), size)):
            rows = [prompts[index] for index in chosen]
            longest = max(cut for _, cut in rows)
            ids = torch.cat([F.pad(own["input_ids"], (longest - cut, 0)) for own, cut in rows])
            mask = torch.arange(longest) >= longest - torch.tensor([[cut] for _, cut in rows])
            before = {"input_ids": ids[:, :longest], "attention_mask": mask.long()}
            for name in rows[0][0].keys() - before.keys():  # pictures
                before[name] = torch.cat([own[name] for own, _ in rows])
            yield chosen, before, ids[:, longest:]


def together(model: Llava, processor: Any, samples: Samples) -> dict[str, Tensor]:
    """The model's inputs for the prompts of a few samples."""
    ((_, inputs, _),) = batches(processor, samples, "known", len(samples))
    return {name: tensor.to(model.lm_head.weight.device) for name, tensor in inputs.items()}


class Collector(KeepAll):
    """Keeps every token, and notes what each layer of the prompt hands to the cache."""

    def begin(self, present: Tensor, image: Tensor, layers: int) -> None:
        super().begin(present, image, layers)
        self.image = image  # [B, N]
        # Of each layer, its query [B, H, N, Dh], key and value [B, Hkv, N, Dh].
        self.layers: list[tuple[Tensor, Tensor, Tensor]] = []

    def score(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.layers.append((query, key, value))
        return super().score(layer, query, key, value)


@torch.inference_mode()
def fill(prompt: Collector, cache: KVCache) -> KVCache:
    """The cache as `model.read` would leave it, without running the model on the prompt once more."""
    cache.begin(prompt.present, prompt.image)
    for number, layer in enumerate(prompt.layers):
        cache.update(number, *layer)
    return cache


def likelihood(model: Llava, logits: Tensor, cache: KVCache, answers: list[list[int]]) -> list[float]:
    """Negative log-likelihood of each answer [B], token after token through the cache; logits [B, V] of the first.

    Its end is not asked for. Shorter answers are filled up with tokens that do not count.
    """
    longest, device = max(map(len, answers)), logits.device
    ids = torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers], device=device)
    lengths = torch.tensor([len(answer) for answer in answers], device=device)
    total = torch.zeros(len(answers), dtype=torch.float64, device=device)
    for step in range(longest):
        surprise = -logits.double().log_softmax(-1).gather(1, ids[:, step : step + 1])[:, 0]
        total += surprise * (step < lengths)
        if step + 1 < longest:
            logits = model.read(ids[:, step : step + 1], cache)
    return total.tolist()


@torch.inference_mode()
def measure(
    model: Llava,
    processor: Any,
    protocol: str,
    batch: Batch,
    samples: Samples,
    runs: list[tuple[str, float]],
    plans: dict[float, Plan],
    args: argparse.Namespace,
) -> Iterator[list[Record]]:
    """Records of a batch of samples, one list for every run; batches are fixed, so that their arithmetic is."""
    indices, inputs, turn = batch
    inputs = {name: tensor.to(args.device) for name, tensor in inputs.items()}
    turn, chosen = turn.to(args.device), [samples[index] for index in indices]
    long = chosen[0].kind == "description"
    answers = [sample.answer_ids(processor) for sample in chosen]
    further = turn.shape[1] + max(map(len, answers))
    most = SHORT if not long else 1 if args.data == "prose" else args.max_new_tokens  # prose is not written
    prompt, scores = Collector(), None
    logits = model.read(**inputs, cache=model.new_cache(0, prompt))
    lengths = prompt.present.sum(-1).tolist()
    for method, budget in runs:
        try:
            seeds = [args.seed + index for index in indices]
            compressor = (
                PrefixKV(plan=plans[budget])
                if parsed(method)["base"] == "plan"
                else make(method, budget, seeds, further, min(lengths))
            )
        except LlavaError as error:  # nothing is left for the prompt
            print(f"{error} This run is left out.", file=sys.stderr)
            continue
        if isinstance(compressor, KVzip):
            scores = twice(model, inputs) if scores is None else scores
            compressor.scores = scores
        cache = fill(prompt, empty_cache(method, model, max(further, turn.shape[1] + most), compressor))
        kept = cache.kept.T.tolist()
        after = model.read(turn, cache) if turn.shape[1] else logits
        losses = likelihood(model, after, cache.fork(), answers) if long else [0.0] * len(answers)
        tokens = list(itertools.islice(model.decode(after, cache), most))
        texts = [text.strip() for text in processor.decode(torch.stack(tokens, dim=1))]
        share = round(bytes_held(cache), 5)
        yield [
            {"sample": index, "protocol": protocol, "kind": "description" if long else "question", "method": method,
             "budget": budget, "nll": loss, "tokens": len(answer), **sample.marks(text), "kept": counts,
             "prompt": length, "share": share, "text": text}
            for index, loss, answer, sample, text, counts, length in zip(
                indices, losses, answers, chosen, texts, kept, lengths)
        ]  # fmt: skip


def bytes_held(cache: KVCache) -> float:
    """What the cache takes at the end, as a share of all tokens in 16 bits. A number in full counts as 16 bits."""
    notes = getattr(cache.compressor, "notes_bytes", 0)
    in_full = cache.newest_bytes if isinstance(cache, QuantisedKVCache) else cache.held_bytes - notes
    held = cache.held_bytes - in_full + 2 * in_full / cache.key[0].dtype.itemsize
    config = cache.config
    return held / (int(cache.lengths.sum()) * config.num_hidden_layers * config.kv_heads * config.head_size * 4)


# ---------------------------------------------------------------- plans and layers


def curves(recorder: Recorder, points: int = 101) -> Tensor:
    """Mean Lorenz curves [L, points]: the share of importance in the most important share 0 .. 1 of the keys."""
    prompts = zip(recorder.scores.cpu().unbind(1), recorder.present.cpu())
    each = [priority(scores[:, tokens])[None] for scores, tokens in prompts]  # [1, L, N + 1]
    return torch.cat([F.interpolate(one, points, mode="linear", align_corners=True) for one in each]).mean(0)


def gini(curve: Tensor) -> Tensor:
    """Gini coefficients [L] of curves of `priority` [L, points]: 0 for equal, near 1 if one has all."""
    return 2 * torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1)) - 1


def estimate(
    model: Llava, processor: Any, samples: Samples, args: argparse.Namespace
) -> tuple[dict[float, Plan], dict[float, Tensor]]:
    """A plan for every budget, and the shares [samples, L] that it is the mean of."""
    kept: dict[float, list[Tensor]] = {budget: [] for budget in args.budgets}
    prompts = []
    for start in range(0, len(samples), args.batch_size):
        recorder = Recorder()
        inputs = together(model, processor, samples[start : start + args.batch_size])
        model.read(**inputs, cache=model.new_cache(1, recorder))
        prompts.append(recorder.present.sum(-1).cpu())
        for budget, rows in kept.items():
            method = PrefixKV(budget)
            method.begin(recorder.present, recorder.present, len(recorder.scores))
            rows.append(method.allocate(recorder.scores).T.cpu())
    prompt = torch.cat(prompts)
    counts = {budget: torch.cat(rows) for budget, rows in kept.items()}
    plans = {budget: estimate_plan(budget, count, prompt, str(args.model)) for budget, count in counts.items()}
    return plans, {budget: count / prompt[:, None] for budget, count in counts.items()}


def agreement(shares: dict[float, Tensor]) -> str:
    """A table of how far the plans of single samples, and of two halves of them, are apart."""
    rows = []
    for budget, share in shares.items():
        deviation, half = share.std(0, correction=min(1, len(share) - 1)), len(share) // 2
        apart = f"{float((share[:half].mean(0) - share[half:].mean(0)).abs().max()):.4f}" if half else "one sample"
        rows.append([f"{budget:.0%}", f"{float(deviation.mean()):.4f}", f"{float(deviation.max()):.4f}", apart])
    return table(["budget", "spread between samples", "largest in a layer", "halves differ by at most"], rows)


# ---------------------------------------------------------------- tables


def grouped(records: list[Record]) -> dict[Run, list[Record]]:
    """The records of each run, by sample."""
    by_run: dict[Run, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record["sample"]):
        by_run[Run(*(record[name] for name in Run._fields))].append(record)
    return dict(by_run)


def values_of(by_run: dict[Run, list[Record]], measure: str, *run: Any) -> Tensor:
    """A measure's (numerator, denominator) of each sample of a protocol, method and budget: [samples, 2], float64."""
    _, kind, top, bottom = MEASURES[measure]
    rows = [(row[top], row[bottom] if bottom else 1) for row in by_run.get(Run(kind, *run), []) if top in row]
    return torch.tensor(rows, dtype=torch.float64).view(-1, 2)


def share_of(rows: list[Record]) -> float:
    """The mean share of bytes held; 0 of no records."""
    return sum(row["share"] for row in rows) / max(1, len(rows))


def statistic(measure: str, values: Tensor) -> Tensor:
    """The measure of values [.., samples, 2] -> [..]: per cent, or a perplexity."""
    ratio = values[..., 0].sum(-1) / values[..., 1].sum(-1)
    return ratio.clamp(max=700).exp() if measure == "perplexity" else 100 * ratio


def interval(values: Tensor, statistic: Callable[[Tensor], Tensor], resamples: int = 2000) -> tuple[float, float]:
    """Bootstrap interval of 95 % of a statistic over samples: values [samples, ...], statistic([resamples, ...])."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(values), (resamples, len(values)), generator=generator)
    low, high = statistic(values[chosen]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def cell(measure: str, values: Tensor, against: Tensor | None = None) -> str:
    """A measure with its interval, and whether it is better than another one's, in pairs; empty without values."""

    def number(value: float) -> str:
        """A perplexity has three digits, so that 1.00 is not read as exact."""
        places = 0 if measure != "perplexity" else 2 if value < 9.995 else 1 if value < 99.95 else 0
        return f"{value:.{places}f}"

    if not len(values):
        return ""
    low, high = interval(values, partial(statistic, measure))
    text = f"{number(float(statistic(measure, values)))} ({number(low)}–{number(high)})"
    if against is None or len(against) != len(values):
        return text
    sign = -1 if measure == "perplexity" else 1
    both = torch.cat([values, against], -1)
    low, high = interval(both, lambda v: sign * (statistic(measure, v[..., :2]) - statistic(measure, v[..., 2:])))
    return f"{text} {'+' if low > 0 else '−' if high < 0 else '='}"


def order_of(method: str) -> tuple[int, str]:
    """Where a method stands in tables: as in METHODS, its variants after it."""
    base = parsed(method)["base"]
    return (METHODS.index(base) if base in METHODS else len(METHODS), method)


def blind(samples: Samples, measure: str, seed: int) -> dict[str, Tensor]:
    """What an answer is worth that was given without a look at the picture, as `values_of`."""
    if measure == "perplexity" or not samples or samples[0].scene is None:
        return {}
    floors: dict[str, list[tuple[int, int]]] = defaultdict(list)
    if measure == "questions":
        told: dict[str, Counter[str]] = defaultdict(Counter)
        for asked in scenes(1600, seed, "blind", short=True):
            told[asked.kind][asked.answer] += 1
        for sample in samples:
            right = told[sample.kind].most_common(1)[0][0] == sample.answer
            floors["*the commonest answer of its kind*"].append((right, 1))
    else:
        rng = random.Random(seed)
        colours, sizes = list(COLOURS), list(SIZES)
        for sample, other in zip(samples, [*samples[1:], samples[0]]):
            true = set(named(sample.answer))
            guess = {(rng.choice(sizes), rng.choice(colours), rng.choice(SHAPES), t[3]) for t in sorted(true)}
            floors["*another scene's description*"].append((len(true & set(named(other.answer))), len(true)))
            floors["*right places, guessed*"].append((len(true & guess), len(true)))
    return {name: torch.tensor(rows, dtype=torch.float64) for name, rows in floors.items()}


def tables(records: list[Record], samples: dict[str, Samples], seed: int) -> str:
    """Markdown: a table for each measure and protocol, by method and budget, and one by bytes for each protocol."""
    by_run = grouped(records)
    cut = [run for run in by_run if not run.method.startswith("full")]
    methods, budgets = sorted({run[2] for run in cut}, key=order_of), sorted({run[3] for run in cut})
    lines = [
        "In brackets 95 % by bootstrap over samples; + better, − worse, = neither than random at the budget, in pairs.",
        "",
    ]
    for measure, (title, kind, *_) in MEASURES.items():
        floors = blind(samples[kind], measure, seed)
        for protocol in PROTOCOLS:
            full = values_of(by_run, measure, protocol, "full", 1.0)
            if not len(full):
                continue
            lines += [f"**{title}; protocol {protocol}, {len(full)} samples. Full cache: {cell(measure, full)}**", ""]
            rows = [[name, *[cell(measure, floor)] * len(budgets)] for name, floor in floors.items()]
            for method in methods:
                rows.append([method])
                for budget in budgets:
                    own, other = (values_of(by_run, measure, protocol, name, budget) for name in (method, "random"))
                    rows[-1].append(cell(measure, own, None if method == "random" else other))
            lines += [table(["", *(f"{budget:.0%}" for budget in budgets)], rows), ""]
    for protocol in PROTOCOLS:
        asked = dict.fromkeys(run[2:] for run in by_run if run.protocol == protocol)  # methods and budgets
        means = {run: share_of(by_run.get(Run("description", protocol, *run), [])) for run in asked}
        rows = [
            [
                method,
                f"{budget:.0%}",
                f"{100 * mean:.1f} %" if mean else "",
                *(cell(measure, values_of(by_run, measure, protocol, method, budget)) for measure in MEASURES),
            ]
            for (method, budget), mean in sorted(means.items(), key=lambda item: item[1])
        ]
        if rows:
            lines += [f"**By bytes held at the end; protocol {protocol}**", ""]
            lines += [table(["", "budget", "bytes", *MEASURES], rows), ""]
    return "\n".join(lines + sizes_table(by_run))


def sizes_table(by_run: dict[Run, list[Record]]) -> list[str]:
    """Markdown lines: objects named truly by their width, for scenes that have the smaller ones."""
    rows = []
    described = [run for run in by_run if run.kind == "description"]
    for run in sorted(described, key=lambda run: (run.protocol, run.budget, order_of(run.method))):
        found, true = (
            [sum(row.get(f"{name} {width}", 0) for row in by_run[run]) for width in WIDTHS]
            for name in ("found", "true")
        )
        if not true[0]:
            return []
        cells = [f"{100 * right / all_:.0f} ({right} of {all_})" if all_ else "" for right, all_ in zip(found, true)]
        rows.append([run.protocol, f"{run.budget:.0%}", run.method, *cells])
    title = "**Objects named truly by their width in patches, in per cent**"
    return [title, "", table(["protocol", "budget", "", *WIDTHS], rows), ""]


def layer_table(curve: Tensor, records: list[Record]) -> str:
    """Markdown: how concentrated each layer's importance is, and what PrefixKV kept of it, by budget."""
    columns, values = ["Gini"], [gini(curve)]
    for run, rows in sorted(grouped(records).items()):
        if run[:3] == ("description", "known", "prefixkv"):
            columns.append(f"{run.budget:.0%}")
            values.append(torch.stack([torch.tensor(row["kept"]) / row["prompt"] for row in rows]).mean(0))
    title = "**Layers: Gini coefficient of importance, and share that PrefixKV keeps by budget**"
    cells = [
        [layer, *(f"{value:.3f}" for value in row)] for layer, row in enumerate(zip(*(v.tolist() for v in values)))
    ]
    return "\n".join([title, "", table(["layer", *columns], cells), ""])


def plot(records: list[Record], path: Path) -> None:
    """The measures by bytes held, a column for each protocol, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no picture: pip install -e '.[bench]'", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_run = grouped(records)
    protocols = [protocol for protocol in PROTOCOLS if any(run.protocol == protocol for run in by_run)]
    measures = [name for name in MEASURES if any(len(values_of(by_run, name, *run[1:])) for run in by_run)]
    figure, axes = plt.subplots(len(measures), len(protocols), layout="constrained", squeeze=False,
                                figsize=(1 + 3.6 * len(protocols), 0.6 + 2.7 * len(measures)))  # fmt: skip
    methods = sorted({run.method for run in by_run}, key=order_of)
    hues = dict(zip(methods, itertools.cycle(plt.get_cmap("tab20").colors)))  # type: ignore[attr-defined]
    for (row, measure), (column, protocol) in itertools.product(enumerate(measures), enumerate(protocols)):
        axis = axes[row][column]
        for method in methods:
            runs = sorted(run for run in by_run if run[:3] == (MEASURES[measure][1], protocol, method))
            at = [share_of(by_run[run]) for run in runs]
            found = [float(statistic(measure, values_of(by_run, measure, *run[1:]))) for run in runs]
            thick = method in ("prefixkv", "cover") or method.startswith("full")
            axis.plot(
                at, found, marker="o", markersize=3, label=method, color=hues[method], linewidth=2.4 if thick else 1.1
            )
        axis.set(
            xscale="log",
            yscale="log" if measure == "perplexity" else "linear",
            title=f"{protocol}: {measure}",
            xlabel="bytes held at the end, of all in 16 bits",
        )
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------- files and processes


def read_results(folder: Path) -> list[Record]:
    """All records in `results*.jsonl`; a last line cut off by a stop is dropped, with a warning."""
    records = []
    for path in sorted(folder.glob("results*.jsonl")):
        whole, _, cut_off = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
        if cut_off:
            print(f"{path}: the last line is damaged and is measured again.", file=sys.stderr)
            write_file(path, f"{whole}\n".encode() if whole else b"")
        for number, line in enumerate(whole.split("\n") if whole else [], start=1):
            try:
                records.append(json.loads(line))
            except ValueError:
                raise LlavaError(f"{path}, line {number}, is damaged; delete the line, or the file.") from None
    return records


def settle(args: argparse.Namespace, weights: Path) -> None:
    """Notes what the results in `--out` are of; raises LlavaError if there are results of other settings."""
    digest = hashlib.sha256()  # of the sizes and first megabyte of the files
    for path in sorted([*weights.glob("*.safetensors"), *weights.glob("*.gguf")]):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(1 << 20))
    free = ("methods", "protocols", "budgets", "out", "estimate_plan")  # what a second run may change
    settings = {name: str(value) for name, value in vars(args).items() if name not in free}
    settings["weights"] = digest.hexdigest()[:16]
    path = args.out / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{name} {before.get(name)} → {value}" for name, value in settings.items() if before.get(name) != value
        ]
        require(
            not changed,
            f"{args.out} holds results of other settings ({', '.join(changed)}); choose another --out or delete it.",
        )
    args.out.mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("RANK", 0)) == 0:
        write_json(path, settings)


def key_of(record: Record) -> tuple[str, str, int, str, float]:
    """What a record is of; no two records of a folder have the same."""
    return tuple(record[name] for name in ("kind", "protocol", "sample", "method", "budget"))


def gather(value: Any) -> list[Any]:
    """`value` of every process, in their order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def prepare(args: argparse.Namespace) -> tuple[Path, Llava, Any, dict[str, Samples], list[str]]:
    """Where the weights lie, the model, its processor, samples by kind, and a sentence for each that cannot be used."""
    if args.data in ("prose", "facts"):
        path = real.find()
        model, tokenizer = real.load(path, args.dtype)
        model.language_model.to(args.device), model.lm_head.to(args.device)
        prose = real.continued(tokenizer, args.samples) if args.data == "prose" else []
        facts = real.facts(tokenizer, args.questions, args.seed) if args.data == "facts" else []
        decoder = SimpleNamespace(decode=lambda ids: tokenizer.decode_batch(ids.tolist()))
        return path.parent, model, decoder, {"question": facts, "description": prose}, []
    asked: list[Sample] = []
    bad: list[str] = []
    if args.data == "scenes":
        smallest = SMALLEST if args.smaller else SIZES["small"][0]
        asked = scenes(args.questions, args.seed, "asked", True, smallest)
        described = scenes(args.samples, args.seed, smallest=smallest)
    else:
        described, bad = read_samples(Path(args.data), args.images, args.samples)
    for sentence in bad if int(os.environ.get("RANK", 0)) == 0 else []:
        print(sentence, file=sys.stderr)
    require(described, f"{args.data} has no entry that can be used.")
    model, processor = load(args.model, device=args.device, dtype=args.dtype, fast=True)
    described[0].prompt(processor)  # a template that fails does so before anything is written
    return find(args.model), model, processor, {"question": asked, "description": described}, bad


def evaluate(args: argparse.Namespace) -> int:
    """Runs what is missing and writes the tables; returns the exit code."""
    require(
        min(args.samples, args.questions, args.batch_size, args.max_new_tokens) > 0,
        "--samples, --questions, --batch-size and --max-new-tokens must be 1 or more.",
    )
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo")  # only records are exchanged
    weights, model, processor, samples, bad = prepare(args)
    some = samples["description"] or samples["question"]
    if args.estimate_plan:
        plans, shares = estimate(model, processor, some, args)
        args.estimate_plan.mkdir(parents=True, exist_ok=True)
        for budget, plan in plans.items():
            write_plan(args.estimate_plan / f"{budget:g}.json", plan)
        print(f"Plans of {len(some)} samples in {args.estimate_plan}. How far the samples agree, in shares kept:\n")
        print(agreement(shares))
        return 1 if bad else 0
    plans = {budget: read_plan(args.plans / f"{budget:g}.json") for budget in args.budgets if args.plans}
    # Scenes make plans of their own. Other data have none; by default, the method is then left out.
    methods = [name for name in args.methods if parsed(name)["base"] != "plan" or plans or args.data == "scenes"]
    require(
        methods == args.methods or args.methods == list(METHODS),
        "The method plan needs --plans FOLDER with this --data; --estimate-plan FOLDER writes them.",
    )
    protocols = [protocol for protocol in args.protocols if all(sample.can_be(protocol) for sample in some)]
    left = ", ".join(protocol for protocol in args.protocols if protocol not in protocols)
    require(
        not left or args.protocols == list(PROTOCOLS),
        f"The data have no questions for the protocol {left}; leave it out.",
    )
    settle(args, weights)
    if any(parsed(method)["base"] == "plan" for method in methods) and not plans:
        plans, _ = estimate(model, processor, scenes(10, args.seed, "calibration"), args)
    runs = [
        (method, budget)
        for method in dict.fromkeys(["full", *methods])
        for budget in ([1.0] if method.startswith("full") else args.budgets)
    ]
    done = {key_of(r): r for part in gather(read_results(args.out) if rank == 0 else []) for r in part}
    work = [
        (kind, protocol, batch)
        for protocol in protocols
        for kind in samples
        for batch in batches(processor, samples[kind], protocol, args.batch_size)
    ][rank::world]
    with (  # one write a line, so that a stop cuts off one line at most
        (args.out / f"results-{rank}.jsonl").open("a", buffering=1, encoding="utf-8") as file,
        tqdm(total=len(work) * len(runs), disable=rank > 0, unit="run", ncols=79) as bar,
    ):
        for kind, protocol, batch in work:
            todo = [run for run in runs if any((kind, protocol, index, *run) not in done for index in batch[0])]
            bar.update(len(runs) - len(todo))
            for records in measure(model, processor, protocol, batch, samples[kind], todo, plans, args) if todo else ():
                for record in records:
                    if key_of(record) not in done:
                        file.write(json.dumps(record) + "\n")
                        done[key_of(record)] = record
                bar.update()
    done = {key: record for part in gather(done) for key, record in part.items()}
    if rank == 0:
        records = [r for key, r in sorted(done.items()) if key[3:] in runs and key[1] in protocols]
        recorder = Recorder()
        model.read(**together(model, processor, some[: args.batch_size]), cache=model.new_cache(1, recorder))
        text = tables(records, samples, args.seed) + "\n" + layer_table(curves(recorder), records)
        write_file(args.out / "table.md", text.encode())
        plot(records, args.out / "quality.png")
        print(text)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 1 if bad else 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality", description="What is lost with each method and budget, asked in three ways."
    )
    parser.add_argument("--model", default=str(TINY), help="folder of a checkpoint, or Hub id (default: the embedded)")
    parser.add_argument("--data", default="scenes", help="JSON in a published format, prose or facts (default: scenes)")
    parser.add_argument("--smaller", action="store_true", help="scenes with smaller objects, down to 2 x 2 patches")
    parser.add_argument("--images", type=Path, default=Path("."), help="folder that the JSON's images are named from")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD",
                        help=f"{', '.join(METHODS)} (default); or as bench/variants.py says")  # fmt: skip
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=PROTOCOLS, help="default: all")
    parser.add_argument("--budgets", nargs="+", type=parse_budget, default=list(BUDGETS), metavar="SHARE")
    parser.add_argument("--samples", type=int, default=100, metavar="N", help="descriptions (default: 100)")
    parser.add_argument("--questions", type=int, default=200, metavar="N", help="short questions (default: 200)")
    parser.add_argument("--batch-size", type=int, default=50, metavar="N")
    parser.add_argument("--max-new-tokens", type=int, default=160, metavar="N", help="of a description (default: 160)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16", "int8"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and of the random method")
    parser.add_argument("--plans", type=Path, help="folder of plans for the method plan (scenes make their own)")
    parser.add_argument("--estimate-plan", type=Path, metavar="OUT", help="write a plan for each budget to this folder")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder for the results")
    args = parser.parse_args(arguments)
    args.budgets = sorted(set(args.budgets))
    return args


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 when entries could not be used; others as in `run_command`."""
    return run_command("bench.quality", lambda: evaluate(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
