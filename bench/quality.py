"""Perplexity and ROUGE-L by method and budget: `python -m bench.quality`.

Perplexity is that of the reference answer, one token at a time through the compressed cache, over all tokens of all
samples. ROUGE-L is the F of the greedy answer against the full cache's greedy answer, averaged over samples. Both are
the published evaluation's, but for its rules of positions and selection, which `bench.published` measures. With no
arguments: the embedded checkpoint on scenes that training never saw.

Results go to `--out`: `results*.jsonl` (a line for every sample, method and budget, from which a second run goes on),
`table.md`, and pictures where matplotlib is installed. Many processes: `torchrun --nproc-per-node 2 -m bench.quality`.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minillava.command import end_quietly, run_command  # isort: skip

if __name__ == "__main__":
    end_quietly()

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import demo
from bench.variants import VARIANTS
from minillava import TINY
from minillava.checks import LlavaError
from minillava.compressors import METHODS as COMPRESSORS
from minillava.compressors import Random, Recorder
from minillava.model import KeepAll, KVCache, Llava
from minillava.processor import Processor, llava_prompt, open_image
from prefixkv import Plan, PrefixKV, priority
from train.scenes import DESCRIBE, describe, draw, make_scene
from weights import estimate_plan, find, load, read_plan, write_file, write_json, write_plan

METHODS = ("full", *COMPRESSORS, "plan")
BUDGETS = (0.1, 0.2, 0.3, 0.5, 0.7)
# Vicuna's instruction, which the published evaluation of LLaVA-1.5 puts before "USER:". For data files, not for scenes.
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
Record = dict[str, Any]


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Sample:
    """A question with one `<image>`, its reference answer, how to get the picture, and the text before "USER:"."""

    question: str
    answer: str
    image: Callable[[], Image.Image]
    system: str = ""  # empty, or with a space at its end

    def prompt(self, processor: Processor) -> str:
        """The published evaluation's: `system`, then the question in LLaVA-1.5's form, `<image>` where it stands.

        If the checkpoint's template writes anything but LLaVA-1.5's form, the prompt is the template's: no `system`,
        and the image before the question. Raises LlavaError for a template that fails.
        """
        turns = [(self.question.replace("<image>", "").strip(), None)]
        own = processor.chat(turns, 1)
        if own != llava_prompt(turns, 1):
            return own
        return f"{self.system}USER: {self.question} ASSISTANT:"


def scenes(count: int, seed: int, split: str = "quality") -> list[Sample]:
    """Scenes to be described in detail; training's seeds begin with a number, so it has seen none of them."""
    samples = []
    for index in range(count):
        rng = random.Random(f"{split} {seed} {index}")
        scene = make_scene(rng)
        question = f"<image>\n{rng.choice(DESCRIBE)}"
        samples.append(Sample(question, describe(scene), lambda scene=scene: draw(scene)[0]))  # type: ignore[misc]
    return samples


def read_samples(path: Path, images: Path, count: int) -> tuple[list[Sample], list[str]]:
    """The first `count` entries of a file in a published format, and a sentence for each that cannot be used.

    LLaVA-Description: `conversations` (its first two turns) and `image`. MM-Vet: `question`, `answer`, and `image` or
    `imagename`. A list, or an object whose values are the entries.
    """
    if not os.path.isfile(path):
        raise LlavaError(f"There is no file {path}; expected a JSON file of questions.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LlavaError(f"{path} cannot be read ({error.strerror}); expected a JSON file of questions.") from None
    except (ValueError, RecursionError) as error:
        raise LlavaError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(raw, (list, dict)) or not raw:
        raise LlavaError(f"{path} holds no entries; expected a list of questions with their images and answers.")
    entries = list(raw.items()) if isinstance(raw, dict) else list(enumerate(raw))
    samples, bad = [], []
    for name, entry in entries[:count]:
        try:
            if "conversations" in entry:
                question, answer = (turn["value"] for turn in entry["conversations"][:2])
            else:
                question, answer = f"{entry['question']}\n<image>", entry["answer"]
            picture = images / (entry["image"] if "image" in entry else entry["imagename"])
            if not isinstance(answer, str) or not answer.strip():
                raise LlavaError("the answer is empty")
            if question.count("<image>") != 1:
                raise LlavaError(f"the question has {question.count('<image>')} <image>, expected one")
            open_image(picture)
        except LlavaError as error:
            bad.append(f"{path}, entry {name}: {error}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            bad.append(f"{path}, entry {name}: not in a published format ({type(error).__name__}: {error})")
        else:
            samples.append(Sample(question, answer, lambda at=picture: open_image(at), f"{SYSTEM} "))  # type: ignore[misc]
    return samples, bad


# ---------------------------------------------------------------- measuring


def encode(model: Llava, processor: Processor, samples: list[Sample]) -> dict[str, Tensor]:
    """The model's inputs for a batch of samples."""
    inputs = processor([sample.prompt(processor) for sample in samples], [sample.image() for sample in samples])
    return {name: tensor.to(model.lm_head.weight.device) for name, tensor in inputs.items()}


class Collector(KeepAll):
    """Keeps every token, and notes what each layer of the prompt hands to the cache."""

    def begin(self, present: Tensor, image: Tensor, layers: int) -> None:
        super().begin(present, image, layers)
        self.image = image  # [B, N]
        self.layers: list[tuple[Tensor, Tensor, Tensor]] = []  # of each: its query, key and value [B, Hkv, N, Dh]

    def score(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.layers.append((query, key, value))
        return super().score(layer, query, key, value)


@torch.inference_mode()
def fill(model: Llava, prompt: Collector, room: int, compressor: PrefixKV | None) -> KVCache:
    """The cache that `model.read` would leave, without running the model on the prompt once more."""
    cache = model.new_cache(room, compressor)
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


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L F, 0 for an answer without words."""
    from rouge import Rouge

    if not text.strip(" .") or not reference.strip(" ."):
        return float(text == reference)
    return float(Rouge(metrics=["rouge-l"]).get_scores(text, reference)[0]["rouge-l"]["f"])


def compressor_for(method: str, budget: float, seeds: list[int], plans: dict[float, Plan]) -> PrefixKV | None:
    """The compressor that a row and column of the table stand for; `seeds` of the prompts of a batch."""
    if method == "full":
        return None
    if method == "random":
        return Random(budget, seeds)
    if method == "plan":
        return PrefixKV(plan=plans[budget])
    return (COMPRESSORS | VARIANTS)[method](budget)


def runs_of(methods: Iterable[str], budgets: Iterable[float]) -> list[tuple[str, float]]:
    """Every (method, budget) to measure; the full cache has one budget, and comes first."""
    pairs = [(method, budget) for method in methods if method != "full" for budget in budgets]
    return [("full", 1.0), *pairs]


def measure(
    model: Llava,
    processor: Processor,
    batch: list[int],
    samples: list[Sample],
    runs: list[tuple[str, float]],
    plans: dict[float, Plan],
    args: argparse.Namespace,
    advance: Callable[[], object],
) -> Iterable[list[Record]]:
    """Records of a batch of samples, one list for every run; batches are fixed, so that their arithmetic is."""
    chosen = [samples[index] for index in batch]
    inputs = encode(model, processor, chosen)
    answers = [processor.tokenizer.model.encode(sample.answer) for sample in chosen]
    references: list[str] = []
    prompt = Collector()
    logits = model.read(**inputs, cache=model.new_cache(0, prompt))
    for method, budget in runs:
        compressor = compressor_for(method, budget, [args.seed + index for index in batch], plans)
        cache = fill(model, prompt, max(args.max_new_tokens, *map(len, answers)), compressor)
        twin = cache.fork()  # one reads the answer, the other writes its own
        losses, kept = likelihood(model, logits, cache, answers), cache.kept.T.tolist()
        tokens = list(itertools.islice(model.decode(logits, twin), args.max_new_tokens))
        texts = [text.strip() for text in processor.decode(torch.stack(tokens, dim=1))]
        references = references or texts  # of the full cache, which comes first
        yield [
            {"sample": index, "method": method, "budget": budget, "nll": loss, "tokens": len(answer),
             "rouge": rouge_l(text, reference), "kept": counts, "prompt": length, "text": text}
            for index, loss, answer, text, reference, counts, length in zip(
                batch, losses, answers, texts, references, kept, inputs["attention_mask"].sum(-1).tolist())
        ]  # fmt: skip
        advance()


# ---------------------------------------------------------------- plans and layers


def curves(recorder: Recorder, points: int = 101) -> Tensor:
    """Mean Lorenz curves [L, points]: the share of importance in the most important share 0 .. 1 of the keys."""
    at = torch.linspace(0, 1, points, dtype=torch.float64)
    total = torch.zeros(len(recorder.scores), points, dtype=torch.float64)
    for sample, mask in zip(recorder.scores.cpu().unbind(1), recorder.present.cpu()):
        prefix = priority(sample[:, mask])  # [L, N + 1]
        where = at * (prefix.shape[1] - 1)
        low = where.floor().long().clamp(max=prefix.shape[1] - 2)
        total += prefix[:, low] + (where - low) * (prefix[:, low + 1] - prefix[:, low])
    return total / recorder.scores.shape[1]


def gini(curve: Tensor) -> Tensor:
    """Gini coefficients [L] of Lorenz curves [L, points] of the largest first: 0 for equal, near 1 for one alone."""
    return 2 * torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1)) - 1


def estimate(
    model: Llava, processor: Processor, samples: list[Sample], budgets: Iterable[float], name: str, batch_size: int
) -> tuple[dict[float, Plan], dict[float, Tensor]]:
    """A plan for every budget, and the shares [samples, L] that it is the mean of."""
    kept: dict[float, list[Tensor]] = {budget: [] for budget in budgets}
    prompts = []
    for start in range(0, len(samples), batch_size):
        inputs = encode(model, processor, samples[start : start + batch_size])
        prompts.append(inputs["attention_mask"].sum(-1).cpu())
        recorder = Recorder()
        model.read(**inputs, cache=model.new_cache(1, recorder))
        for budget, rows in kept.items():
            method = PrefixKV(budget)
            method.begin(recorder.present, recorder.present, len(recorder.scores))
            rows.append(method.allocate(recorder.scores).T.cpu())
    prompt = torch.cat(prompts)
    counts = {budget: torch.cat(rows) for budget, rows in kept.items()}
    plans = {budget: estimate_plan(budget, count, prompt, name) for budget, count in counts.items()}
    return plans, {budget: count / prompt[:, None] for budget, count in counts.items()}


def agreement(shares: dict[float, Tensor]) -> str:
    """A table of how far the plans of single samples, and of two halves of them, are apart."""
    lines = ["| budget | spread between samples | largest in a layer | halves differ by at most |", "|---|---|---|---|"]
    for budget, share in shares.items():
        deviation = share.std(0) if len(share) > 1 else torch.zeros(share.shape[1])
        half = len(share) // 2
        apart = f"{float((share[:half].mean(0) - share[half:].mean(0)).abs().max()):.4f}" if half else "one sample"
        lines.append(f"| {budget:.0%} | {float(deviation.mean()):.4f} | {float(deviation.max()):.4f} | {apart} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- tables


def perplexity(records: list[Record]) -> float:
    return math.exp(min(700.0, sum(r["nll"] for r in records) / sum(r["tokens"] for r in records)))


def digits(value: float) -> str:
    """A perplexity with three digits, so that 1.00 is not read as exact."""
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def interval(values: Tensor, statistic: Callable[[Tensor], Tensor], resamples: int = 2000) -> tuple[float, float]:
    """Bootstrap interval of 95 % of a statistic over samples: values [samples, ...], statistic([resamples, ...])."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(values), (resamples, len(values)), generator=generator)
    low, high = statistic(values[chosen]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def log_perplexity(values: Tensor) -> Tensor:
    """Log-perplexities [resamples] of [resamples, samples, (nll, tokens)]."""
    return values[..., 0].sum(-1) / values[..., 1].sum(-1)


def tables(records: list[Record]) -> str:
    """Markdown: both metrics by method and budget with their intervals, and PrefixKV against each, sample by sample."""
    by_run: dict[tuple[str, float], list[Record]] = {}
    for record in sorted(records, key=lambda record: record["sample"]):
        by_run.setdefault((record["method"], record["budget"]), []).append(record)
    methods = [name for name in (*METHODS, *VARIANTS) if any(method == name for method, _ in by_run)]
    budgets = sorted({budget for method, budget in by_run if method != "full"})
    losses = {run: torch.tensor([(r["nll"], r["tokens"]) for r in rows], dtype=torch.float64)
              for run, rows in by_run.items()}  # fmt: skip
    rouges = {run: torch.tensor([r["rouge"] for r in rows], dtype=torch.float64) for run, rows in by_run.items()}
    full = by_run["full", 1.0]

    def grid(title: str, cell: Callable[[tuple[str, float]], str], rows: list[str]) -> list[str]:
        lines = [f"**{title}**", "", "| | " + " | ".join(f"{budget:.0%}" for budget in budgets) + " |"]
        lines.append("|---" * (len(budgets) + 1) + "|")
        for method in rows:
            cells = [cell((method, b)) if (method, b) in by_run else "" for b in budgets]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        return [*lines, ""]

    def perplexity_cell(run: tuple[str, float]) -> str:
        low, high = (math.exp(min(700.0, end)) for end in interval(losses[run], log_perplexity))
        return f"{digits(perplexity(by_run[run]))} ({digits(low)}–{digits(high)})"

    def rouge_cell(run: tuple[str, float]) -> str:
        low, high = interval(rouges[run], lambda values: values.mean(-1))
        return f"{float(rouges[run].mean()):.3f} ({low:.3f}–{high:.3f})"

    def difference_cell(method: str, run: tuple[str, float]) -> str:
        ours = (method, run[1])
        pair = torch.cat([losses[ours], losses[run]], -1)
        worse = interval(pair, lambda v: log_perplexity(v[..., 2:]) - log_perplexity(v[..., :2]))
        better = interval(rouges[ours] - rouges[run], lambda values: values.mean(-1))
        marks = ["+" if low > 0 else "−" if high < 0 else "=" for low, high in (worse, better)]
        return " ".join(marks)

    compared = [method for method in methods if method != "full"]
    lines = [f"{len(full)} samples. Full cache: perplexity {perplexity(full):.4f}.", ""]
    lines += grid("Perplexity of the reference answer (lower is better; 95 % interval)", perplexity_cell, compared)
    lines += grid("ROUGE-L F against the full cache's answer (higher is better; 95 % interval)", rouge_cell, compared)
    for ours in ("prefixkv", "cover"):
        if ours in methods:
            title = (
                f"{ours} against each on the same samples, perplexity then ROUGE-L: + better, − worse, = neither (95 %)"
            )
            lines += grid(title, partial(difference_cell, ours), [method for method in compared if method != ours])
    return "\n".join(lines)


def layer_table(curve: Tensor, records: list[Record]) -> str:
    """Markdown: how concentrated each layer's importance is, and what PrefixKV kept of it."""
    kept: dict[float, list[Tensor]] = {}
    for record in records:
        if record["method"] == "prefixkv":
            kept.setdefault(record["budget"], []).append(torch.tensor(record["kept"]) / record["prompt"])
    shares = {budget: torch.stack(rows).mean(0) for budget, rows in sorted(kept.items())}
    lines = ["**Layers: Gini coefficient of importance, and share that PrefixKV keeps by budget**", ""]
    lines += ["| layer | Gini | " + " | ".join(f"{budget:.0%}" for budget in shares) + " |"]
    lines += ["|---" * (len(shares) + 2) + "|"]
    for layer, value in enumerate(gini(curve).tolist()):
        lines.append(
            f"| {layer} | {value:.3f} | " + " | ".join(f"{float(s[layer]):.3f}" for s in shares.values()) + " |"
        )
    return "\n".join([*lines, ""])


def plot(records: list[Record], curve: Tensor, folder: Path) -> None:
    """`quality.png` and `layers.png`, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there are no pictures: pip install -e '.[bench]'", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_run: dict[tuple[str, float], list[Record]] = {}
    for record in records:
        by_run.setdefault((record["method"], record["budget"]), []).append(record)
    budgets = sorted({budget for method, budget in by_run if method != "full"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    hues = iter(plt.get_cmap("tab20").colors)  # type: ignore[attr-defined]
    for method in [name for name in (*METHODS, *VARIANTS) if budgets and (name, budgets[0]) in by_run]:
        style = {"linewidth": 2.4, "zorder": 3} if method in ("prefixkv", "cover") else {"linewidth": 1.2}
        style["color"] = next(hues)
        rows = [by_run[method, budget] for budget in budgets]
        left.plot(budgets, [perplexity(part) for part in rows], marker="o", markersize=3, label=method, **style)
        means = [sum(r["rouge"] for r in part) / len(part) for part in rows]
        right.plot(budgets, means, marker="o", markersize=3, label=method, **style)
    left.axhline(perplexity(by_run["full", 1.0]), color="grey", linestyle=":", label="full cache")
    left.set(yscale="log", xlabel="budget", ylabel="perplexity of the reference answer")
    right.set(xlabel="budget", ylabel="ROUGE-L F against the full cache's answer")
    figure.legend(*right.get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.savefig(folder / "quality.png", dpi=110)
    plt.close(figure)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colours = plt.get_cmap("viridis")(torch.linspace(0, 0.9, len(curve)).tolist())
    for layer, (line, colour) in enumerate(zip(curve.tolist(), colours)):
        left.plot([index / (len(line) - 1) for index in range(len(line))], line, color=colour, label=f"layer {layer}")
    left.set(xlabel="share of the keys, most important first", ylabel="share of the importance")
    left.legend(fontsize=7)
    for (method, budget), part in sorted(by_run.items()):
        if method == "prefixkv":
            kept = torch.stack([torch.tensor(r["kept"]) / r["prompt"] for r in part]).mean(0).tolist()
            right.plot(range(len(kept)), kept, marker="o", markersize=3, label=f"{budget:.0%}")
    right.set(xlabel="layer", ylabel="share of the prompt kept by PrefixKV")
    right.legend(fontsize=7, title="budget")
    figure.savefig(folder / "layers.png", dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------- files and processes


def read_results(folder: Path) -> list[Record]:
    """All records in `results*.jsonl`; a last line cut off by a stop is dropped, with a warning."""
    records = []
    for path in sorted(folder.glob("results*.jsonl")):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        whole = []
        for number, line in enumerate(lines, start=1):
            try:
                if line:
                    whole.append(json.loads(line))
            except ValueError:
                if any(lines[number:]):
                    raise LlavaError(f"{path}, line {number}, is damaged; delete the line, or the file.") from None
                print(f"{path}: the last line is damaged and is measured again.", file=sys.stderr)
                write_file(path, "".join(f"{kept}\n" for kept in lines[: number - 1]).encode())
        records += whole
    return records


def fingerprint(folder: Path) -> str:
    """A short name for the weights: a hash of the sizes and first megabyte of the files."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")]):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(1 << 20))
    return digest.hexdigest()[:16]


def settle(args: argparse.Namespace) -> None:
    """Notes what the results in `--out` are of, or refuses to mix two kinds of results."""
    names = ("model", "data", "images", "samples", "batch_size", "max_new_tokens", "dtype", "device", "seed", "plans")
    settings = {name: str(getattr(args, name)) for name in names} | {"weights": fingerprint(find(args.model))}
    keep_apart(args.out, settings)


def keep_apart(folder: Path, settings: dict[str, str]) -> None:
    """Writes the settings of a folder's results beside them; raises LlavaError if they are of other settings."""
    path = folder / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{name} {before.get(name)} → {value}" for name, value in settings.items() if before.get(name) != value
        ]
        if changed:
            raise LlavaError(
                f"{folder} holds results of other settings ({', '.join(changed)}); choose another --out or delete it."
            )
    folder.mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("RANK", 0)) == 0:
        write_json(path, settings)


def gather(value: Any) -> list[Any]:
    """`value` of every process, in their order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def evaluate(args: argparse.Namespace) -> int:
    """Runs what is missing and writes the tables; returns the exit code."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    bad: list[str] = []
    if args.data == "scenes":
        samples = scenes(args.samples, args.seed)
    else:
        samples, bad = read_samples(Path(args.data), args.images, args.samples)
    for sentence in bad if rank == 0 else []:
        print(sentence, file=sys.stderr)
    if not samples:
        raise LlavaError(f"{args.data} has no entry that can be used.")
    model, processor = load(args.model, device=device, dtype=getattr(torch, args.dtype), fast=True)
    samples[0].prompt(processor)  # a template that fails does so before anything is written
    if args.estimate_plan:
        plans, shares = estimate(model, processor, samples, args.budgets, str(args.model), args.batch_size)
        args.estimate_plan.mkdir(parents=True, exist_ok=True)
        for budget, plan in plans.items():
            write_plan(args.estimate_plan / f"{budget:g}.json", plan)
        print(f"Plans of {len(samples)} samples in {args.estimate_plan}. How far the samples agree, in shares kept:\n")
        print(agreement(shares))
        return 1 if bad else 0
    plans = {}
    if args.plans:
        plans = {budget: read_plan(args.plans / f"{budget:g}.json") for budget in args.budgets}
    # Scenes make plans of their own. Other data have none; by default, the method is then left out.
    methods = [method for method in args.methods if method != "plan" or plans or args.data == "scenes"]
    if methods != args.methods and args.methods != list(METHODS):
        raise LlavaError("The method plan needs --plans FOLDER with this --data; --estimate-plan FOLDER writes them.")
    settle(args)
    if "plan" in methods and not plans:
        calibration = scenes(10, args.seed, "calibration")
        plans, _ = estimate(model, processor, calibration, args.budgets, str(args.model), args.batch_size)
    runs = runs_of(methods, args.budgets)
    parts = gather(read_results(args.out) if rank == 0 or not dist.is_initialized() else [])
    done = {(r["sample"], r["method"], r["budget"]): r for part in parts for r in part}
    batches = [list(range(start, min(start + args.batch_size, len(samples))))
               for start in range(0, len(samples), args.batch_size)]  # fmt: skip
    mine = []
    for batch in batches[rank::world]:
        missing = [run for run in runs if any((index, *run) not in done for index in batch)]
        if missing:  # the full cache's answers are what the others are compared with
            mine.append((batch, missing if missing[0][0] == "full" else [("full", 1.0), *missing]))
    made: list[Record] = []
    path = args.out / f"results-{rank}.jsonl"
    with (
        path.open("a", encoding="utf-8") as file,
        tqdm(total=sum(len(todo) for _, todo in mine), disable=rank > 0 or not mine, unit="run", ncols=79) as bar,
    ):
        for batch, todo in mine:
            for records in measure(model, processor, batch, samples, todo, plans, args, bar.update):
                new = [r for r in records if (r["sample"], r["method"], r["budget"]) not in done]
                for record in new:  # one write a line, so that a stop cuts off one line at most
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                made += new
    wanted = {(index, *run) for batch in batches for index in batch for run in runs}
    everything = {(r["sample"], r["method"], r["budget"]): r for part in gather(made) for r in part} | done
    records = [everything[key] for key in sorted(wanted)]
    if rank == 0:
        recorder = Recorder()
        inputs = encode(model, processor, samples[: args.batch_size])
        model.read(**inputs, cache=model.new_cache(1, recorder))
        curve = curves(recorder)
        text = tables(records) + "\n" + layer_table(curve, records)
        write_file(args.out / "table.md", text.encode())
        plot(records, curve, args.out)
        print(text)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 1 if bad else 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality", description="Perplexity and ROUGE-L by method and budget."
    )
    parser.add_argument("--model", default=str(TINY), help="folder of a checkpoint, or Hub id (default: the embedded)")
    parser.add_argument("--data", default="scenes", help="JSON in a published format (default: scenes made on the fly)")
    parser.add_argument("--images", type=Path, default=Path("."), help="folder that the JSON's images are named from")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=(*METHODS, *VARIANTS),
                        metavar="METHOD", help=f"{', '.join(METHODS)} (default); {', '.join(VARIANTS)}")  # fmt: skip
    parser.add_argument("--budgets", nargs="+", type=demo.share, default=list(BUDGETS), metavar="SHARE")
    parser.add_argument("--samples", type=int, default=100, metavar="N")
    parser.add_argument("--batch-size", type=int, default=50, metavar="N")
    parser.add_argument("--max-new-tokens", type=int, default=160, metavar="N")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and of the random method")
    parser.add_argument("--plans", type=Path, help="folder of plans for the method plan (scenes make their own)")
    parser.add_argument("--estimate-plan", type=Path, metavar="OUT", help="write a plan for each budget to this folder")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder for the results")
    args = parser.parse_args(arguments)
    if min(args.samples, args.batch_size, args.max_new_tokens) < 1:
        parser.error("--samples, --batch-size and --max-new-tokens must be 1 or more")
    args.budgets = sorted(set(args.budgets))
    return args


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 when entries could not be used; others as in `run_command`."""
    return run_command("bench.quality", lambda: evaluate(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
