"""Prefill, decode and memory, beside transformers and beside what moving the bytes must take: `python -m bench.speed`.

Every contender runs in a separate process on the same weights; the processes take turns, round after round, and the
medians are reported. A decode step reads all weights and all kept keys and values once, so it cannot take less than
t_min = (weights + KV) / memory bandwidth. Other questions: `--growth`, how time and memory grow with length and batch;
`--scoring`, what choosing costs a prompt.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench import common
from minillava import TINY
from minillava.checks import require
from minillava.command import run_command
from minillava.compressors import METHODS
from minillava.config import LlavaConfig, TextConfig, VisionConfig
from minillava.convert import config_dict, hub_name
from minillava.fast import compile_steps
from minillava.files import write_json
from minillava.model import Llava
from prefixkv import Plan, PrefixKV
from weights import empty_model, load_model, read_config

CONTENDERS = (
    "transformers DynamicCache",
    "transformers StaticCache",
    "full",
    *(f"PrefixKV {budget:.0%}" for budget in (0.2, 0.4, 0.6, 0.8)),
    "plan 20%",
    "transformers StaticCache compiled",
    "full compiled",
    "PrefixKV 20% compiled",
)
OTHERS = tuple(f"{name} 20%" for name in METHODS if name != "prefixkv")
INT8 = ("full int8", "PrefixKV 20% int8")  # weights in 8 bits, beside those in the preset's dtype
PARTS = tuple(f"full without {name}" for name in ("FastLinear", "FastAttention", "FastTopLayer", "FastLlava", "all"))
BLOCK = 1 << 28  # numbers of 1 GB, to measure the memory with


@dataclass(frozen=True)
class Preset:
    """Shapes to measure; `model` None is the embedded checkpoint."""

    model: LlavaConfig | None
    batch: int
    prompt: int  # tokens, image included
    new: int
    device: str = "cpu"
    dtype: str = "float32"
    image: bool = True
    cut: int = 0  # transformers makes only so many new tokens (0: all)
    picture: tuple[int, int] = (0, 0)  # LLaVA-NeXT: height and width

    @property
    def stored(self) -> torch.dtype:
        """The dtype of the checkpoint's weights, and of transformers: what is rounded to 8 bits has 16."""
        return torch.bfloat16 if self.dtype == "int8" else getattr(torch, self.dtype)


def llava(
    width: int, inner: int, layers: int, heads: int, vocab: int, vision: VisionConfig, kv_heads: int | None = None
) -> LlavaConfig:
    """A LLaVA of these shapes; the image token is the last of the vocabulary."""
    text = TextConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads or heads, max_position_embeddings=32768,
    )  # fmt: skip
    return LlavaConfig(vision=vision, text=text, image_token_id=vocab - 1, pad_token_id=0)


CLIP_L = VisionConfig(1024, 4096, 24, 16, image_size=336, patch_size=14)
SMALL = llava(512, 1376, 8, 8, 1024, VisionConfig(256, 1024, 6, 4, image_size=336, patch_size=14))
LLAVA_7B = llava(4096, 11008, 32, 32, 32064, CLIP_L)
# 672 x 1008 pixels fit the last of these grids exactly; LLaVA-NeXT's own five would make 2,160 tokens of them.
GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008), (672, 1008))
NEXT = replace(SMALL, image_grid_pinpoints=GRIDS)
TINYLLAMA = llava(2048, 5632, 22, 32, 32064, CLIP_L, kv_heads=4)
LLAVA_13B = llava(5120, 13824, 40, 40, 32064, CLIP_L)
PRESETS = {  # those called paper have the batches and lengths of the published efficiency table
    "cpu": Preset(SMALL, 8, 1024, 64),
    "cpu-long": Preset(SMALL, 8, 1024, 512),
    "tiny": Preset(None, 1, 592, 128),
    "next": Preset(NEXT, 1, 4128, 64, picture=(672, 1008)),
    "laptop-1b": Preset(TINYLLAMA, 1, 600, 32, dtype="bfloat16"),  # TinyLlama's decoder
    "laptop-7b": Preset(LLAVA_7B, 1, 600, 32, dtype="bfloat16", cut=4),
    "paper-7b-1024": Preset(LLAVA_7B, 16, 1024, 512, "cuda", "bfloat16"),
    "paper-7b-624": Preset(LLAVA_7B, 48, 624, 256, "cuda", "bfloat16"),
    "paper-13b-1024": Preset(LLAVA_13B, 8, 1024, 512, "cuda", "bfloat16"),
    "paper-13b-624": Preset(LLAVA_13B, 16, 624, 256, "cuda", "bfloat16"),
}


class Result(NamedTuple):
    """What one process measured."""

    prefill_seconds: float
    step_milliseconds: float  # median of the decode steps
    tokens_per_second: float  # new tokens of the whole batch, prefill not counted
    total_seconds: float
    kv_bytes: int  # keys and values held after the last step
    weight_bytes: int  # read in every decode step: decoder and output layer
    peak_bytes: int  # of the process or device, beyond what was there before the prefill
    whole_bytes: int  # at the peak, what was there before included


def write_checkpoint(config: LlavaConfig, folder: Path, dtype: torch.dtype) -> None:
    """Random weights of these shapes in the Hub layout, so that transformers and we load the same.

    Each tensor has a file, so that only one is in memory. A million random numbers serve for all, each tensor from a
    place of its own: to draw billions would take long.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    noise = torch.randn(1_048_573)  # a prime, so that no two rows are alike
    files = {}
    for name, parameter in empty_model(config).named_parameters():
        shape, count = parameter.shape, parameter.numel()
        if len(shape) > 1:
            some = (noise * parameter[0].numel() ** -0.5).to(dtype).roll(int(torch.randint(len(noise), ())))
            weight = some.repeat(math.ceil(count / len(some)))[:count].reshape(shape).clone()
        else:
            weight = torch.full(shape, float("norm" in name and name.endswith("weight")), dtype=dtype)
        files[hub_name(name)] = f"{name}.safetensors"
        save_file({hub_name(name): weight}, folder / f"{name}.safetensors", metadata={"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    write_json(folder / "config.json", config_dict(config, str(dtype).removeprefix("torch.")))


def make_inputs(config: LlavaConfig, preset: Preset) -> dict[str, Tensor]:
    """One image and random words after it for every sample, or only words."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, config.image_token_id - 1, (preset.batch, preset.prompt), generator=generator)
    inputs = {"input_ids": words.to(preset.device), "attention_mask": torch.ones_like(words).to(preset.device)}
    if preset.image:
        side, tokens, tiles = config.vision.image_size, config.num_image_tokens, 1
        if config.image_grid_pinpoints:
            tiling = config.tiling(preset.picture)
            tokens, tiles = tiling.tokens, tiling.tiles
            inputs["image_sizes"] = torch.tensor([preset.picture] * preset.batch, device=preset.device)
        inputs["input_ids"][:, 1 : 1 + tokens] = config.image_token_id
        pixels = torch.randn(preset.batch * tiles, 3, side, side, generator=generator)
        inputs["pixel_values"] = pixels.to(preset.device, preset.stored)
    return inputs


def timed(device: str, work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """The seconds that `work` takes, until the device has done all of it, and what it returns."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    done = work(*arguments)
    wait()
    return time.perf_counter() - start, done


def forget_peak(device: str) -> int:
    """Begins a new peak; returns the bytes in use now. Outside Linux the CPU's peak remains that of the process."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
    return common.peak(device)


def compressor_of(contender: str, layers: int) -> PrefixKV | None:
    """What a row of the table compresses with. The plan keeps the same of every layer: its cost is what is asked."""
    if contender.startswith("full"):
        return None
    if contender.startswith("plan"):
        return PrefixKV(plan=Plan(0.2, [0.2] * layers))
    name, share = contender.split()[:2]
    return METHODS[name.lower()](float(share.rstrip("%")) / 100)


Run = tuple[Tensor, Callable[[Tensor], Tensor], Callable[[], int]]  # first logits [B, V]; those -> the next; KV bytes


def ours(model: Llava, contender: str, inputs: dict[str, Tensor], new: int) -> Run:
    """Our prefill, and what one decode step is."""
    cache = model.new_cache(new, compressor_of(contender, model.config.text.num_hidden_layers))
    first = model.read(**inputs, cache=cache)
    return first, lambda logits: model.read(logits.argmax(-1)[:, None], cache), lambda: cache.held_bytes


def theirs(model: Any, contender: str, inputs: dict[str, Tensor], new: int) -> Run:
    """The same of transformers: bare forward calls, without what `generate` does around them."""
    from transformers import DynamicCache, StaticCache

    text = model.config.text_config
    batch, prompt = inputs["input_ids"].shape
    static = "StaticCache" in contender
    cache = StaticCache(config=text, max_cache_len=prompt + new) if static else DynamicCache(config=text)
    seen = 0

    def read(input_ids: Tensor, **picture: Tensor) -> Tensor:
        nonlocal seen
        seen += input_ids.shape[1]
        mask = torch.ones(batch, seen, dtype=torch.long, device=input_ids.device)
        out = model(input_ids, **picture, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    size = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * model.dtype.itemsize
    first = read(**{name: tensor for name, tensor in inputs.items() if name != "attention_mask"})
    return first, lambda logits: read(logits.argmax(-1)[:, None]), lambda: batch * seen * size


def without(model: Llava, contender: str) -> Llava:
    """The model with the classes of `minillava.fast` that a contender does without replaced by the plain ones."""
    _, _, name = contender.partition(" without ")
    for module in model.modules() if name else []:
        if type(module).__module__ == "minillava.fast" and name in ("all", type(module).__name__):
            module.__class__ = type(module).__bases__[0]
    return model


@torch.no_grad()
def measure(contender: str, folder: str, preset: Preset) -> Result:
    """One prefill and all decode steps, after a few to warm up."""
    device, dtype = preset.device, torch.int8 if contender in INT8 else getattr(torch, preset.dtype)
    config, compiled = read_config(Path(folder)), contender.endswith("compiled")
    model: Any
    begin: Callable[[Any, str, dict[str, Tensor], int], Run]
    if contender.startswith("transformers"):
        from transformers import AutoModelForImageTextToText

        preset = replace(preset, new=min(preset.new, preset.cut or preset.new))
        reference: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=preset.stored)
        model, begin = reference.to(device).eval(), theirs
        if compiled:
            model.model.language_model.forward = torch.compile(model.model.language_model.forward, dynamic=True)
    else:
        model, begin = without(load_model(Path(folder), device, dtype, fast=True), contender), ours
        if compiled:
            compile_steps(model)
    warm = inputs = make_inputs(config, preset)
    if not compiled:  # what is compiled reads the lengths measured, so that nothing is compiled then
        slow = preset.cut or preset.picture[0]  # a picture would take long
        prompt, image = (8, False) if slow else (config.num_image_tokens + 8, preset.image)
        warm = make_inputs(config, replace(preset, batch=1, prompt=prompt, image=image))
    logits, step, _ = begin(model, contender, warm, max(preset.new, 4))
    for _ in range(3):
        logits = step(logits)
    before = forget_peak(device)
    prefill, (logits, step, held) = timed(device, begin, model, contender, inputs, preset.new)
    steps = []
    for _ in range(preset.new - 1):
        seconds, logits = timed(device, step, logits)
        steps.append(seconds)
    read = preset.stored if begin is theirs else dtype
    numbers = sum(
        parameter.numel()
        for name, parameter in empty_model(config).named_parameters()
        if parameter.dim() > 1 and name.startswith(("language_model.layers", "lm_head"))
    )
    return Result(
        prefill_seconds=prefill,
        step_milliseconds=1000 * statistics.median(steps),
        tokens_per_second=preset.batch * (preset.new - 1) / sum(steps),
        total_seconds=prefill + sum(steps),
        kv_bytes=held(),
        weight_bytes=numbers * read.itemsize,
        peak_bytes=max(1, common.peak(device) - before),  # growth takes its logarithm
        whole_bytes=common.peak(device),
    )


def bandwidth(device: str) -> float:
    """Bytes a second that all threads together read from memory: the best of several sums of BLOCK numbers."""
    block = torch.ones(BLOCK, device=device)
    return block.nbytes / min(timed(device, block.sum)[0] for _ in range(6))


def run(contender: str, folder: str, preset: Preset) -> Result:
    """What a contender takes, measured in a separate process."""
    done = common.in_a_process(measure, contender, folder, preset)
    print(
        f"{contender}, {preset.batch} x {preset.prompt} tokens: prefill {done.prefill_seconds:.2f} s, "
        f"{done.step_milliseconds:.2f} ms a step",
        file=sys.stderr,
        flush=True,
    )
    return done


def median(results: list[Result]) -> Result:
    """The median of every figure over rounds."""
    return Result(*map(statistics.median, zip(*results)))


def table(results: dict[str, Result], speed: float, preset: Preset) -> str:
    """Markdown: what each contender took, against the full cache and against t_min."""
    columns = ["", "prefill s", "ms a step", "t_min ms", "step / t_min", "tokens/s", "all s", "KV MB", "peak MB",
               "all MB", "gain", "allowed"]  # fmt: skip
    rows = []
    for name, r in results.items():
        least = 1000 * (r.weight_bytes + r.kv_bytes) / speed
        gain = allowed = ""
        full = results.get("full compiled" if name.endswith("compiled") else "full")
        if full and not name.startswith("transformers"):
            gain = f"{full.step_milliseconds / r.step_milliseconds:.2f}"
            allowed = f"{(full.weight_bytes + full.kv_bytes) / (r.weight_bytes + r.kv_bytes):.2f}"
        rows.append([
            name, f"{r.prefill_seconds:.3f}", f"{r.step_milliseconds:.2f}", f"{least:.2f}",
            f"{r.step_milliseconds / least:.2f}", f"{r.tokens_per_second:.0f}", f"{r.total_seconds:.2f}",
            f"{r.kv_bytes / 1e6:.1f}", f"{r.peak_bytes / 1e6:.0f}", f"{r.whole_bytes / 1e6:.0f}", gain, allowed,
        ])  # fmt: skip
    text = (
        f"Batch {preset.batch}, {preset.prompt} prompt + {preset.new} new tokens, {preset.dtype} on "
        f"{device_name(preset.device)}; memory read at {speed / 1e9:.1f} GB/s.\n\n" + common.table(columns, rows)
    )
    if preset.cut:
        text += f"\n\nRows of transformers end after {preset.cut} new tokens; so do their times and bytes."
    return text


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


GROWTH = {"prompt tokens": [(1, 512 * 2**step) for step in range(6)], "batch": [(2**step, 1024) for step in range(6)]}


def growth(folder: str, preset: Preset, rounds: int) -> str:
    """Markdown: time and memory of prompts without an image by length and by batch.

    The exponent of growth is 1 for linear, 2 for quadratic: from the first row to the last, and of the last doubling.
    """
    tables = []
    for name, shapes in GROWTH.items():
        found: list[tuple[float, ...]] = []
        for batch, prompt in shapes:
            preset = replace(preset, batch=batch, prompt=prompt, new=9, image=False, picture=(0, 0))
            plain, scored = (
                median([run(contender, folder, preset) for _ in range(rounds)])
                for contender in ("full", "PrefixKV 20%")
            )
            found.append((batch if name == "batch" else prompt, plain.prefill_seconds, scored.prefill_seconds,
                          plain.step_milliseconds, plain.peak_bytes / 1e6, scored.peak_bytes / 1e6))  # fmt: skip
        rows: list[list[object]] = [[size, *(f"{value:.3g}" for value in values)] for size, *values in found]
        for label, first in (("exponent", found[0]), ("exponent, last doubling", found[-2])):
            size, *slopes = [math.log(after / before) for before, after in zip(first, found[-1])]
            rows.append([label, *(f"{slope / size:.2f}" for slope in slopes)])
        columns = [name, "prefill s", "with scoring s", "ms a step", "peak MB", "with scoring MB"]
        tables.append(common.table(columns, rows))
    return "\n\n".join(tables)


def scoring(methods: list[str], folder: str, preset: Preset, rounds: int) -> dict[str, list[float]]:
    """Seconds that reading the prompt takes with the full cache, and with each method at 20 %, round after round.

    All run in this process, so that a slow minute of the machine slows all of them. Their order is drawn for every
    round, since what ran just before leaves its traces in the processor's cache and the heap.
    """
    model = load_model(Path(folder), preset.device, getattr(torch, preset.dtype), fast=True)
    inputs = make_inputs(model.config, preset)
    found: dict[str, list[float]] = {name: [] for name in ("full", *methods)}
    order = random.Random(0)
    for number in range(rounds + 1):
        for name in order.sample(list(found), len(found)):
            contender = name if name == "full" else f"{name} 20%"
            seconds, _ = timed(preset.device, ours, model, contender, inputs, preset.new)
            if number > 0:  # the first round warms up
                found[name].append(seconds)
    return found


def scoring_table(seconds: dict[str, list[float]], preset: Preset) -> str:
    """Markdown: the median, and that of the ratios to the full cache's time in the same round."""
    rows = []
    for name, each in seconds.items():
        ratios = sorted(mine / full for mine, full in zip(each, seconds["full"]))
        low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        ratio = f"{statistics.median(ratios):.3f} ({low:.2f}–{high:.2f})"
        rows.append([name, f"{statistics.median(each):.4f}", ratio])
    columns = ["", "prefill s (median)", "divided by the full cache's (middle half)"]
    return (
        f"Batch {preset.batch}, {preset.prompt} prompt tokens, {preset.dtype} on {device_name(preset.device)}, "
        f"budget 20%, {len(seconds['full'])} rounds.\n\n{common.table(columns, rows)}"
    )


def measure_all(args: argparse.Namespace) -> None:
    """Prints what was asked for; raises LlavaError for what cannot be run."""
    given = {name: getattr(args, name) for name in ("batch", "new", "device", "dtype")}
    changes = {name: value for name, value in given.items() if value is not None}
    preset = replace(PRESETS[args.preset], **changes)
    here = not preset.device.startswith("cuda") or torch.cuda.is_available()
    require(here, f"{preset.device} needs a GPU; there is none here.")
    require(
        min(args.rounds, preset.batch, preset.new - 1) > 0,
        f"Expected --rounds and --batch of 1 or more, --new of 2 or more; found {args.rounds}, {preset.batch}, "
        f"{preset.new}.",
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder, found = scratch if preset.model else str(TINY), dict[str, Any]()
        if preset.model is not None:
            write_checkpoint(preset.model, Path(folder), preset.stored)
        if args.scoring:
            found = scoring(args.scoring, folder, preset, args.rounds)
            text = scoring_table(found, preset)
        elif args.growth:
            text = growth(folder, preset, args.rounds)
        else:
            rounds: dict[str, list[Result]] = {name: [] for name in args.contenders}
            speeds = []
            for _ in range(args.rounds):
                speeds.append(common.in_a_process(bandwidth, preset.device))
                for name in args.contenders:
                    rounds[name].append(run(name, folder, preset))
            results = {name: median(each) for name, each in rounds.items()}
            text = table(results, statistics.median(speeds), preset)
            found = {name: [result._asdict() for result in each] for name, each in rounds.items()}
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "speed.md").write_text(text + "\n", encoding="utf-8")
        if found:
            write_json(args.out / "speed.json", {"preset": args.preset, "changes": changes, "rounds": found})


def main(arguments: list[str] | None = None) -> int:
    """Exit codes as in `run_command`."""
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="cpu", choices=PRESETS, help="shapes and lengths (default: cpu)")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), metavar="NAME",
                        choices=CONTENDERS + OTHERS + INT8 + PARTS,
                        help=", ".join(CONTENDERS + OTHERS + INT8 + PARTS).replace("%", "%%"))  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="times that each contender runs (default: 3)")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--new", type=int, help="new tokens")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16", "int8"])
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--parts", action="store_const", dest="contenders", const=["full", *PARTS],
                       help="measure what each class of minillava.fast gains, one left out at a time")  # fmt: skip
    other.add_argument(
        "--growth", action="store_true", help="measure growth with length and batch instead, whatever --batch and --new"
    )
    other.add_argument(
        "--scoring",
        nargs="+",
        choices=METHODS,
        metavar="NAME",
        help="measure the prefill with these methods at 20%%, beside the full cache's, instead: " + ", ".join(METHODS),
    )
    parser.add_argument("--out", type=Path, help="folder for speed.md, and for speed.json with every round")
    args = parser.parse_args(arguments)
    return run_command("bench.speed", lambda: measure_all(args))


if __name__ == "__main__":
    sys.exit(main())
