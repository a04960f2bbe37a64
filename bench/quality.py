"""What is lost with each method and budget, asked in three ways: `python -m bench.quality`.

    known     the method sees the question before it cuts the cache
    second    it cut the cache for another question; this one comes as a further turn
    first     it cuts the cache of the picture before any question

Three measures: short questions answered exactly; objects of a description named truly (size, colour, shape and place);
perplexity of the true description, token after token through the compressed cache. With no arguments: the embedded
checkpoint on scenes that training never saw. `--data FILE` asks questions of your own, which have a perplexity only;
`--data prose` and `--data facts` take a pretrained decoder of text.
Methods are combined as bench/variants.py says: `--methods full cover random+words/least full@2`.

Results go to `--out`: `results*.jsonl` (a line for every answer, from which a second run goes on), `table.md`, and
`quality.png` where matplotlib is installed. Many processes: `torchrun --nproc-per-node 2 -m bench.quality`.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from minillava.command import end_quietly, run_command  # isort: skip

if __name__ == "__main__":
    end_quietly()

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from bench import real
from bench.common import table
from bench.variants import KVzip, empty_cache, make, parsed, twice
from minillava import TINY
from minillava.checks import LlavaError, require
from minillava.compressors import METHODS as COMPRESSORS
from minillava.compressors import Recorder, gini
from minillava.files import write_json
from minillava.model import KeepAll, KVCache, Llava
from minillava.processor import Processor, llava_prompt, open_image
from minillava.quantised import QuantisedKVCache
from minillava.scenes import (
    COLOURS,
    DESCRIBE,
    NUMBERS,
    SHAPES,
    SIZES,
    SMALLEST,
    Question,
    Scene,
    Thing,
    describe,
    draw,
    make_scene,
    named,
    short_question,
)  # fmt: skip
from minillava.terminal import parse_budget
from prefixkv import Plan, PrefixKV, priority
from weights import estimate_plan, find, load, read_plan, write_file, write_plan

# By default. `matching` is left out, since fitting takes most of an hour, and `mixkv`, which scores much like `snapkv`.
METHODS = ("full", *(name for name in COMPRESSORS if name not in ("mixkv", "matching")), "plan")
PROTOCOLS = ("known", "second", "first")
BUDGETS = (0.05, 0.1, 0.2, 0.5)
# Vicuna's instruction, which the published evaluation of LLaVA-1.5 puts before "USER:". For data files, not for scenes.
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
Record = dict[str, Any]
Run = tuple[str, str, str, float]  # kind, protocol, method, budget


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Sample:
    """A question with one `<image>`, its reference answer, how to get the picture, and the text before "USER:"."""

    question: str
    answer: str
    image: Callable[[], Image.Image] = Image.Image  # text has none
    system: str = ""  # empty, or with a space at its end
    kind: str = "description"  # or that of a short question
    earlier: tuple[str, str] | None = None  # another question about the picture, and its answer
    scene: Scene | None = None
    text: real.Text | None = None  # instead of a picture and prompts: token ids

    def can_be(self, protocol: str) -> bool:
        """Whether it can be asked in this way."""
        if protocol == "second":
            return bool(self.text.earlier if self.text else self.earlier)
        return protocol == "known" or self.text is None or bool(self.text.question)

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


def scenes(
    count: int, seed: int, split: str = "quality", short: bool = False, smallest: float = SIZES["small"][0]
) -> list[Sample]:
    """Scenes to be described, or asked about; training's seeds begin with a number, so it has seen none of them."""
    samples = []
    for index in range(count):
        rng = random.Random(f"{split} {seed} {index}")
        scene = make_scene(rng, smallest=smallest)
        if short:
            asked, earlier = short_question(rng, scene), short_question(rng, scene)
            while earlier.kind == asked.kind:
                earlier = short_question(rng, scene)
        else:  # one earlier wording for all, so that the turns of a batch are equally long
            asked = Question("description", DESCRIBE[0], describe(scene), ())
            earlier = Question("count", "How many objects are there?", f"{NUMBERS[len(scene.things)]}.", ())
        picture = lambda scene=scene: draw(scene)[0]  # noqa: E731
        samples.append(Sample(f"<image>\n{asked.text}", asked.answer, picture, kind=asked.kind, scene=scene,
                              earlier=(earlier.text, earlier.answer)))  # fmt: skip
    return samples


def read_samples(path: Path, images: Path, count: int) -> tuple[list[Sample], list[str]]:
    """The first `count` entries of a file in a published format, and a sentence for each that cannot be used.

    LLaVA-Description: `conversations` (two turns, or four: then the second question is asked) and `image`. MM-Vet:
    `question`, `answer`, and `image` or `imagename`. A list, or an object whose values are the entries.
    """
    require(os.path.isfile(path), f"There is no file {path}; expected a JSON file of questions.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LlavaError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(raw, (list, dict)) or not raw:
        raise LlavaError(f"{path} holds no entries; expected a list of questions with their images and answers.")
    entries = list(raw.items()) if isinstance(raw, dict) else list(enumerate(raw))
    samples, bad = [], []
    for name, entry in entries[:count]:
        try:
            if "conversations" in entry:
                question, answer, *more = (turn["value"] for turn in entry["conversations"][:4])
            else:
                more = []
                question, answer = f"{entry['question']}\n<image>", entry["answer"]
            picture = images / (entry["image"] if "image" in entry else entry["imagename"])
            if not isinstance(answer, str) or not answer.strip():
                raise LlavaError("the answer is empty")
            if question.count("<image>") != 1:
                raise LlavaError(f"the question has {question.count('<image>')} <image>, expected one")
            open_image(picture)
            earlier = None
            if len(more) == 2:  # the second turn is asked; the first one is the earlier question
                (question, answer), earlier = more, (question.replace("<image>", "").strip(), answer)
                question = f"<image>\n{question}"
        except LlavaError as error:
            bad.append(f"{path}, entry {name}: {error}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            bad.append(f"{path}, entry {name}: not in a published format ({type(error).__name__}: {error})")
        else:
            samples.append(Sample(question, answer, partial(open_image, picture), f"{SYSTEM} ", earlier=earlier))
    return samples, bad


# ---------------------------------------------------------------- measuring


def split(processor: Processor, sample: Sample, protocol: str) -> tuple[dict[str, Tensor], list[int], int]:
    """The model's inputs for a whole prompt, its ids, and after how many of them the cache is cut."""
    if sample.text is not None:
        ids, cut = sample.text.prompt(protocol)
        return {"input_ids": torch.tensor([ids])}, ids, cut
    images, question = [sample.image()], sample.question.replace("<image>", "").strip()
    if protocol != "second":
        inputs = processor(sample.prompt(processor), images)
        ids = inputs["input_ids"][0].tolist()
        return inputs, ids, len(ids) - (ids[::-1].index(processor.config.image_token_id) if protocol == "first" else 0)
    assert sample.earlier is not None
    first, both = [(sample.earlier[0], None)], [sample.earlier, (question, None)]
    system = sample.system if processor.chat(first, 1) == llava_prompt(first, 1) else ""
    inputs = processor(system + processor.chat(both, 1), images)
    ids = inputs["input_ids"][0].tolist()
    before = processor(system + processor.chat(first, 1), images)["input_ids"][0].tolist()
    same = ids[: len(before)] == before
    require(same, "The checkpoint's template rewrites history; leave out the protocol 'second'.")
    return inputs, ids, len(before)


def batches(
    processor: Processor, samples: list[Sample], protocol: str, size: int
) -> list[tuple[list[int], dict[str, Tensor], Tensor]]:
    """Batches: indices of samples, the inputs that are read before the cut, and the turns after it, [B, M].

    The turns of a batch must be equally long, so samples are grouped by that.
    """
    prompts = [split(processor, sample, protocol) for sample in samples]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, (_, ids, cut) in enumerate(prompts):
        by_length[len(ids) - cut].append(index)
    made = []
    for _, members in sorted(by_length.items()):
        for chosen in (members[start : start + size] for start in range(0, len(members), size)):
            rows = [prompts[index] for index in chosen]
            longest = max(cut for _, _, cut in rows)
            inputs = {
                "input_ids": torch.tensor([[0] * (longest - cut) + ids[:cut] for _, ids, cut in rows]),
                "attention_mask": torch.tensor([[0] * (longest - cut) + [1] * cut for _, _, cut in rows]),
            }
            for name in rows[0][0].keys() - inputs.keys():
                inputs[name] = torch.cat([own[name] for own, _, _ in rows])
            made.append((chosen, inputs, torch.tensor([ids[cut:] for _, ids, cut in rows], dtype=torch.long)))
    return made


def ids_of(processor: Processor, sample: Sample) -> list[int]:
    """Token ids of the true answer, without the beginning-of-text token."""
    if sample.text is not None:
        return sample.text.answer
    return processor.tokenizer.encode(sample.answer)[len(processor.tokenizer.encode("")) :]


def together(model: Llava, processor: Processor, samples: list[Sample]) -> dict[str, Tensor]:
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


def runs_of(methods: Iterable[str], budgets: Iterable[float]) -> list[tuple[str, float]]:
    """Every (method, budget) to measure; what keeps every token has one budget, and the full cache comes first."""
    rest = [name for name in methods if name != "full"]
    return [("full", 1.0), *((name, 1.0) for name in rest if name.startswith("full")),
            *((name, budget) for name in rest if not name.startswith("full") for budget in budgets)]  # fmt: skip


WIDTHS = ("2.0 to 2.4", "2.5 to 2.9", "3.0 to 3.6", "5.5 to 7.0")  # of the objects, in patches of the embedded model


def wide(thing: Thing) -> str:
    """Which of WIDTHS an object has. The corners of some shapes reach a tenth or a fifth further."""
    patches = 48 * thing.radius  # twice the radius; the picture is 24 patches wide
    return WIDTHS[sum(patches >= edge for edge in (2.45, 2.97, 4))]


def marks(sample: Sample, text: str) -> dict[str, int]:
    """What is right in an answer: of a description the objects, of a short answer all of it."""
    if sample.text is not None and sample.answer:  # the decoder of prose goes on after its answer
        return {"right": int(text[: len(sample.answer)] == sample.answer)}
    if sample.scene is None:
        return {}
    if sample.kind != "description":
        return {"right": int(text == sample.answer)}
    true, told = set(named(sample.answer)), named(text)
    found = Counter(found=len(true & set(told)), true=len(true), told=len(told))
    for thing in sample.scene.things:
        found[f"found {wide(thing)}"] += int((thing.size, thing.colour, thing.shape, thing.place) in told)
        found[f"true {wide(thing)}"] += 1
    return found


@torch.inference_mode()
def measure(
    model: Llava,
    processor: Processor,
    protocol: str,
    batch: tuple[list[int], dict[str, Tensor], Tensor],
    samples: list[Sample],
    runs: list[tuple[str, float]],
    plans: dict[float, Plan],
    args: argparse.Namespace,
) -> Iterable[list[Record]]:
    """Records of a batch of samples, one list for every run; batches are fixed, so that their arithmetic is."""
    indices, inputs, turn = batch
    inputs = {name: tensor.to(args.device) for name, tensor in inputs.items()}
    turn, chosen = turn.to(args.device), [samples[index] for index in indices]
    long = chosen[0].kind == "description"
    answers = [ids_of(processor, sample) for sample in chosen]
    further = turn.shape[1] + max(map(len, answers))
    most = 24 if not long else args.max_new_tokens if chosen[0].text is None else 1  # prose is not written
    prompt, scores = Collector(), None
    logits = model.read(**inputs, cache=model.new_cache(0, prompt))
    lengths = prompt.present.sum(-1).tolist()
    for method, budget in runs:
        try:
            seeds = [args.seed + index for index in indices]
            compressor = (PrefixKV(plan=plans[budget]) if parsed(method)["base"] == "plan" else
                          make(method, budget, seeds, further, min(lengths)))  # fmt: skip
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
        share = round(bytes_held(cache, model), 5)
        yield [
            {"sample": index, "protocol": protocol, "kind": "description" if long else "question", "method": method,
             "budget": budget, "nll": loss, "tokens": len(answer), **marks(sample, text), "kept": counts,
             "prompt": length, "share": share, "text": text}
            for index, loss, answer, sample, text, counts, length in zip(
                indices, losses, answers, chosen, texts, kept, lengths)
        ]  # fmt: skip


def bytes_held(cache: KVCache, model: Llava) -> float:
    """What the cache takes at the end, as a share of all tokens in 16 bits. A number in full counts as 16 bits."""
    config, full = model.config.text, model.lm_head.weight.element_size() / 2
    notes = getattr(cache.compressor, "notes_bytes", 0)
    in_full = cache.newest_bytes if isinstance(cache, QuantisedKVCache) else cache.held_bytes - notes
    held = cache.held_bytes - in_full + in_full / full
    return held / (int(cache.lengths.sum()) * config.num_hidden_layers * config.kv_heads * config.head_size * 4)


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


def estimate(
    model: Llava, processor: Processor, samples: list[Sample], budgets: Iterable[float], name: str, batch_size: int
) -> tuple[dict[float, Plan], dict[float, Tensor]]:
    """A plan for every budget, and the shares [samples, L] that it is the mean of."""
    kept: dict[float, list[Tensor]] = {budget: [] for budget in budgets}
    prompts = []
    for start in range(0, len(samples), batch_size):
        inputs = together(model, processor, samples[start : start + batch_size])
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
    rows = []
    for budget, share in shares.items():
        deviation = share.std(0) if len(share) > 1 else torch.zeros(share.shape[1])
        half = len(share) // 2
        apart = f"{float((share[:half].mean(0) - share[half:].mean(0)).abs().max()):.4f}" if half else "one sample"
        rows.append([f"{budget:.0%}", f"{float(deviation.mean()):.4f}", f"{float(deviation.max()):.4f}", apart])
    return table(["budget", "spread between samples", "largest in a layer", "halves differ by at most"], rows)


# ---------------------------------------------------------------- tables


def digits(value: float) -> str:
    """A perplexity with three digits, so that 1.00 is not read as exact."""
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def interval(values: Tensor, statistic: Callable[[Tensor], Tensor], resamples: int = 2000) -> tuple[float, float]:
    """Bootstrap interval of 95 % of a statistic over samples: values [samples, ...], statistic([resamples, ...])."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(values), (resamples, len(values)), generator=generator)
    low, high = statistic(values[chosen]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


class Measure(NamedTuple):
    """What is told of answers: a ratio of two fields of their records, each summed over samples."""

    title: str
    kind: str  # of the samples that have it
    top: str
    bottom: str | None  # None: the number of samples


MEASURES = {
    "questions": Measure("Short questions answered exactly, in per cent", "question", "right", None),
    "objects": Measure("Objects of a description named truly, in per cent", "description", "found", "true"),
    "perplexity": Measure("Perplexity of the true description", "description", "nll", "tokens"),
}


def grouped(records: list[Record]) -> dict[Run, list[Record]]:
    """The records of each run, by sample."""
    by_run: dict[Run, list[Record]] = {}
    for record in sorted(records, key=lambda record: record["sample"]):
        by_run.setdefault((record["kind"], record["protocol"], record["method"], record["budget"]), []).append(record)
    return by_run


def values_of(rows: list[Record], measure: str) -> Tensor:
    """What a measure is made of, (numerator, denominator) of each sample: [samples, 2], float64."""
    _, _, top, bottom = MEASURES[measure]
    return torch.tensor([(row[top], row[bottom] if bottom else 1) for row in rows], dtype=torch.float64)


def statistic(measure: str, values: Tensor) -> Tensor:
    """The measure of values [.., samples, 2] -> [..]: per cent, or a perplexity."""
    ratio = values[..., 0].sum(-1) / values[..., 1].sum(-1)
    return ratio.clamp(max=700).exp() if measure == "perplexity" else 100 * ratio


def order_of(method: str) -> tuple[int, str]:
    """Where a method stands in tables: as in METHODS, its variants after it."""
    base = parsed(method)["base"]
    return (METHODS.index(base) if base in METHODS else len(METHODS), method)


def blind(samples: list[Sample], measure: str, seed: int) -> dict[str, Tensor]:
    """What an answer is worth that was given without a look at the picture, as `values_of`."""
    rng = random.Random(seed)
    if measure == "perplexity" or any(sample.scene is None for sample in samples):
        return {}
    if measure == "questions":
        told: dict[str, Counter[str]] = defaultdict(Counter)
        for other in scenes(1600, seed, "blind", short=True):
            told[other.kind][other.answer] += 1
        right = [float(told[s.kind].most_common(1)[0][0] == s.answer) for s in samples]
        return {"*the commonest answer of its kind*": torch.tensor([(r, 1) for r in right], dtype=torch.float64)}
    floors: dict[str, list[tuple[float, float]]] = {"*another scene's description*": [], "*right places, guessed*": []}
    for sample, other in zip(samples, [*samples[1:], samples[0]]):
        true = set(named(sample.answer))
        guess = {(rng.choice(list(SIZES)), rng.choice(list(COLOURS)), rng.choice(SHAPES), t[3]) for t in sorted(true)}
        for row, told_things in zip(floors.values(), (set(named(other.answer)), guess)):
            row.append((len(true & told_things), len(true)))
    return {name: torch.tensor(rows, dtype=torch.float64) for name, rows in floors.items()}


def sizes_table(by_run: dict[Run, list[Record]]) -> list[str]:
    """Markdown lines: objects named truly by their width, for scenes that have the smaller ones."""
    rows = []
    described = [run for run in by_run if run[0] == "description"]
    for run in sorted(described, key=lambda run: (run[1], run[3], order_of(run[2]))):
        true, found = ([sum(row.get(f"{name} {width}", 0) for row in by_run[run]) for width in WIDTHS]
                       for name in ("true", "found"))  # fmt: skip
        if not true[0]:
            return []
        cells = [f"{100 * right / all_:.0f} ({right} of {all_})" if all_ else "" for right, all_ in zip(found, true)]
        rows.append([run[1], f"{run[3]:.0%}", run[2], *cells])
    title = "**Objects named truly by their width in patches, in per cent**"
    return [title, "", table(["protocol", "budget", "", *WIDTHS], rows), ""]


def tables(records: list[Record], samples: dict[str, list[Sample]], seed: int) -> str:
    """Markdown: a table for each measure and protocol, by method and budget, and one by bytes for each protocol."""
    by_run = grouped(records)
    methods = sorted({method for *_, method, _ in by_run if not method.startswith("full")}, key=order_of)
    budgets = sorted({budget for *_, method, budget in by_run if not method.startswith("full")})
    lines: list[str] = []

    def cell(measure: str, values: Tensor, against: Tensor | None = None) -> str:
        number = digits if measure == "perplexity" else lambda value: f"{value:.0f}"
        low, high = interval(values, partial(statistic, measure))
        text = f"{number(float(statistic(measure, values)))} ({number(low)}–{number(high)})"
        if against is None or len(against) != len(values):
            return text
        sign = -1 if measure == "perplexity" else 1
        both = torch.cat([values, against], -1)
        low, high = interval(both, lambda v: sign * (statistic(measure, v[..., :2]) - statistic(measure, v[..., 2:])))
        return f"{text} {'+' if low > 0 else '−' if high < 0 else '='}"

    for measure, (title, kind, top, _) in MEASURES.items():
        asked = [protocol for protocol in PROTOCOLS if top in by_run.get((kind, protocol, "full", 1.0), [{}])[0]]
        for protocol in asked:
            full = values_of(by_run[kind, protocol, "full", 1.0], measure)
            lines += [f"**{title}; protocol {protocol}, {len(full)} samples. Full cache: {cell(measure, full)}**", ""]
            lines += ["| | " + " | ".join(f"{budget:.0%}" for budget in budgets) + " |",
                      "|---" * (len(budgets) + 1) + "|"]  # fmt: skip
            for name, floor in blind(samples[kind], measure, seed).items():
                lines.append(f"| {name} | " + " | ".join([cell(measure, floor)] * len(budgets)) + " |")
            for method in methods:
                cells = []
                for budget in budgets:
                    own, random_ = (by_run.get((kind, protocol, name, budget)) for name in (method, "random"))
                    against = values_of(random_, measure) if random_ and method != "random" else None
                    cells.append(cell(measure, values_of(own, measure), against) if own else "")
                lines.append(f"| {method} | " + " | ".join(cells) + " |")
            lines.append("")
    for protocol in [p for p in PROTOCOLS if any(run[1] == p for run in by_run)]:
        rows = []
        shares = {run[2:]: [row["share"] for row in by_run.get(("description", *run[1:]), [])]
                  for run in by_run if run[1] == protocol}  # fmt: skip
        for (method, budget), share in sorted(shares.items(), key=lambda item: sum(item[1]) / max(1, len(item[1]))):
            cells = []
            for measure, (_, kind, top, _) in MEASURES.items():
                own = by_run.get((kind, protocol, method, budget), [])
                cells.append(cell(measure, values_of(own, measure)) if own and top in own[0] else "")
            mean = f"{100 * sum(share) / len(share):.1f} %" if share else ""
            rows.append([method, f"{budget:.0%}", mean, *cells])
        lines += [f"**By bytes held at the end; protocol {protocol}**", "",
                  table(["", "budget", "bytes", *MEASURES], rows), ""]  # fmt: skip
    lines += sizes_table(by_run)
    note = "In brackets 95 % by bootstrap over samples; "
    note += "+ better, − worse, = neither than random at the budget, in pairs."
    return "\n".join([note, "", *lines])


def layer_table(curve: Tensor, records: list[Record]) -> str:
    """Markdown: how concentrated each layer's importance is, and what PrefixKV kept of it, by budget."""
    shares = {
        budget: torch.stack([torch.tensor(row["kept"]) / row["prompt"] for row in rows]).mean(0).tolist()
        for (*run, budget), rows in sorted(grouped(records).items())
        if run == ["description", "known", "prefixkv"]
    }
    lines = ["**Layers: Gini coefficient of importance, and share that PrefixKV keeps by budget**", ""]
    lines += ["| layer | Gini | " + " | ".join(f"{budget:.0%}" for budget in shares) + " |"]
    lines += ["|---" * (len(shares) + 2) + "|"]
    for layer, value in enumerate(gini(curve).tolist()):
        lines.append(f"| {layer} | {value:.3f} | " + " | ".join(f"{s[layer]:.3f}" for s in shares.values()) + " |")
    return "\n".join([*lines, ""])


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
    protocols = [protocol for protocol in PROTOCOLS if any(run[1] == protocol for run in by_run)]
    measures = [name for name, measure in MEASURES.items()
                if any(run[0] == measure.kind and measure.top in rows[0] for run, rows in by_run.items())]  # fmt: skip
    figure, axes = plt.subplots(len(measures), len(protocols), layout="constrained", squeeze=False,
                                figsize=(1 + 3.6 * len(protocols), 0.6 + 2.7 * len(measures)))  # fmt: skip
    methods = sorted({method for _, _, method, _ in by_run}, key=order_of)
    hues = dict(zip(methods, itertools.cycle(plt.get_cmap("tab20").colors)))  # type: ignore[attr-defined]
    for (row, measure), (column, protocol) in itertools.product(enumerate(measures), enumerate(protocols)):
        axis = axes[row][column]
        for method in methods:
            runs = sorted(run for run in by_run if run[:3] == (MEASURES[measure].kind, protocol, method))
            at = [sum(record["share"] for record in by_run[run]) / len(by_run[run]) for run in runs]
            found = [float(statistic(measure, values_of(by_run[run], measure))) for run in runs]
            thick = method in ("prefixkv", "cover") or method.startswith("full")
            axis.plot(at, found, marker="o", markersize=3, label=method, color=hues[method],
                      linewidth=2.4 if thick else 1.1)  # fmt: skip
        axis.set(xscale="log", yscale="log" if measure == "perplexity" else "linear",
                 title=f"{protocol}: {measure}", xlabel="bytes held at the end, of all in 16 bits")  # fmt: skip
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=110)
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


def settle(args: argparse.Namespace, weights: Path) -> None:
    """Notes what the results in `--out` are of; raises LlavaError if there are results of other settings."""
    names = ("model", "data", "images", "smaller", "samples", "questions", "batch_size", "max_new_tokens", "dtype",
             "device", "seed", "plans")  # fmt: skip
    settings = {name: str(getattr(args, name)) for name in names} | {"weights": fingerprint(weights)}
    path = args.out / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{name} {before.get(name)} → {value}" for name, value in settings.items()
                   if before.get(name) != value]  # fmt: skip
        require(not changed, f"{args.out} holds results of other settings ({', '.join(changed)}); choose another --out "
                "or delete it.")  # fmt: skip
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


def evaluate(args: argparse.Namespace) -> int:
    """Runs what is missing and writes the tables; returns the exit code."""
    require(min(args.samples, args.questions, args.batch_size, args.max_new_tokens) > 0,
            "--samples, --questions, --batch-size and --max-new-tokens must be 1 or more.")  # fmt: skip
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    bad: list[str] = []
    samples: dict[str, list[Sample]] = {"question": [], "description": []}
    processor: Any
    if args.data in ("prose", "facts"):
        place = real.find()
        weights = place.parent
        model, tokenizer = real.load(place)
        model.language_model.to(device), model.lm_head.to(device)
        processor = SimpleNamespace(decode=lambda ids: tokenizer.decode_batch(ids.tolist()))
        if args.data == "prose":
            samples["description"] = [Sample("", "", text=text) for text in real.continued(tokenizer, args.samples)]
        else:
            samples["question"] = [Sample("", answer, kind="question", text=text)
                                   for text, answer in real.facts(tokenizer, args.questions, args.seed)]  # fmt: skip
    elif args.data == "scenes":
        smallest = SMALLEST if args.smaller else SIZES["small"][0]
        samples = {"question": scenes(args.questions, args.seed, "asked", True, smallest),
                   "description": scenes(args.samples, args.seed, smallest=smallest)}  # fmt: skip
    else:
        samples["description"], bad = read_samples(Path(args.data), args.images, args.samples)
    some = samples["description"] or samples["question"]
    for sentence in bad if rank == 0 else []:
        print(sentence, file=sys.stderr)
    require(some, f"{args.data} has no entry that can be used.")
    if some[0].text is None:
        weights = find(args.model)
        model, processor = load(args.model, device=device, dtype=getattr(torch, args.dtype), fast=True)
        some[0].prompt(processor)  # a template that fails does so before anything is written
    if args.estimate_plan:
        plans, shares = estimate(model, processor, some, args.budgets, str(args.model), args.batch_size)
        args.estimate_plan.mkdir(parents=True, exist_ok=True)
        for budget, plan in plans.items():
            write_plan(args.estimate_plan / f"{budget:g}.json", plan)
        print(f"Plans of {len(some)} samples in {args.estimate_plan}. How far the samples agree, in shares kept:\n")
        print(agreement(shares))
        return 1 if bad else 0
    plans = {}
    if args.plans:
        plans = {budget: read_plan(args.plans / f"{budget:g}.json") for budget in args.budgets}
    # Scenes make plans of their own. Other data have none; by default, the method is then left out.
    methods = [name for name in args.methods if parsed(name)["base"] != "plan" or plans or args.data == "scenes"]
    require(methods == args.methods or args.methods == list(METHODS),
            "The method plan needs --plans FOLDER with this --data; --estimate-plan FOLDER writes them.")  # fmt: skip
    protocols = [protocol for protocol in args.protocols if all(sample.can_be(protocol) for sample in some)]
    left = ", ".join(protocol for protocol in args.protocols if protocol not in protocols)
    require(not left or args.protocols == list(PROTOCOLS),
            f"The data have no questions for the protocol {left}; leave it out.")  # fmt: skip
    settle(args, weights)
    if any(parsed(method)["base"] == "plan" for method in methods) and not plans:
        calibration = scenes(10, args.seed, "calibration")
        plans, _ = estimate(model, processor, calibration, args.budgets, str(args.model), args.batch_size)
    runs = runs_of(methods, args.budgets)
    done = {key_of(r): r for part in gather(read_results(args.out) if rank == 0 else []) for r in part}
    work = [(kind, protocol, batch) for protocol in protocols for kind in samples
            for batch in batches(processor, samples[kind], protocol, args.batch_size)]  # fmt: skip
    mine = work[rank::world]
    made: list[Record] = []
    with (
        (args.out / f"results-{rank}.jsonl").open("a", encoding="utf-8") as file,
        tqdm(total=len(mine) * len(runs), disable=rank > 0, unit="run", ncols=79) as bar,
    ):
        for kind, protocol, batch in mine:
            todo = [run for run in runs if any((kind, protocol, index, *run) not in done for index in batch[0])]
            bar.update(len(runs) - len(todo))
            for records in measure(model, processor, protocol, batch, samples[kind], todo, plans, args) if todo else ():
                for record in records:
                    if key_of(record) not in done:  # one write a line, so that a stop cuts off one line at most
                        file.write(json.dumps(record) + "\n")
                        file.flush()
                        made.append(record)
                bar.update()
    done |= {key_of(r): r for part in gather(made) for r in part}
    records = [r for key, r in sorted(done.items()) if key[3:] in set(runs) and key[1] in protocols]
    if rank == 0:
        recorder = Recorder()
        inputs = together(model, processor, some[: args.batch_size])
        model.read(**inputs, cache=model.new_cache(1, recorder))
        text = tables(records, samples, args.seed) + "\n" + layer_table(curves(recorder), records)
        write_file(args.out / "table.md", text.encode())
        plot(records, args.out / "quality.png")
        print(text)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 1 if bad else 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality", description="What is lost with each method and budget, asked in three ways."
    )
    parser.add_argument("--model", default=str(TINY), help="folder of a checkpoint, or Hub id (default: the embedded)")
    parser.add_argument("--data", default="scenes",
                        help="JSON in a published format; `prose` or `facts` for a pretrained decoder of text, "
                        "bench/real.py (default: scenes made on the fly)")  # fmt: skip
    parser.add_argument("--smaller", action="store_true", help="scenes with smaller objects, down to 2 x 2 patches")
    parser.add_argument("--images", type=Path, default=Path("."), help="folder that the JSON's images are named from")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD",
                        help=f"{', '.join(METHODS)} (default); or as bench/variants.py says")  # fmt: skip
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=PROTOCOLS, metavar="NAME",
                        help=f"{', '.join(PROTOCOLS)} (default: all)")  # fmt: skip
    parser.add_argument("--budgets", nargs="+", type=parse_budget, default=list(BUDGETS), metavar="SHARE")
    parser.add_argument("--samples", type=int, default=100, metavar="N", help="descriptions (default: 100)")
    parser.add_argument("--questions", type=int, default=200, metavar="N", help="short questions (default: 200)")
    parser.add_argument("--batch-size", type=int, default=50, metavar="N")
    parser.add_argument("--max-new-tokens", type=int, default=160, metavar="N", help="of a description (default: 160)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
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
