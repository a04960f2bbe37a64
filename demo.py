"""Describes an image with a LLaVA checkpoint, full cache beside compressed ones: `python demo.py`."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import os
import random
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from minillava import TINY  # isort: skip  before torch, of whose import it silences a warning
from minillava.command import end_quietly, run_command  # isort: skip

if __name__ == "__main__":
    end_quietly()

import torch
from PIL import Image
from torch import Tensor

from minillava import explore
from minillava.checks import LlavaError
from minillava.compressors import METHODS
from minillava.model import KVCache, Llava
from minillava.processor import Processor, open_image
from minillava.quantised import BITS, new_cache
from prefixkv import PrefixKV
from train.scenes import draw, make_scene
from weights import (
    choose_dtype,
    estimate_plan,
    find,
    find_device,
    load,
    memory_needed,
    read_plan,
    write_file,
    write_plan,
)

WIDTH = 80
PLOTS = (".png", ".pdf", ".svg")
ROOM = 10**9  # bytes of memory beside the weights: for the prompt, the cache and the program
SLOW = 1.0  # seconds after which progress is shown
BARS = " ▁▂▃▄▅▆▇█"
EXAMPLES = """examples:
  python demo.py --scene 7 --scene 8
  python demo.py --method h2o --method cover --budget 10%
  python demo.py --model llava-hf/llava-1.5-7b-hf --dtype auto --image photo.jpg
"""
SHAPES_ALONE = (
    "The embedded model knows scenes of coloured shapes and nothing else. For photographs take "
    "--model llava-hf/llava-1.5-7b-hf (14 GB)."
)


@dataclass
class Run:
    """One answer and what it cost; the fields of `--json`."""

    method: str  # "full", or one of METHODS
    budget: float
    text: str
    token_ids: list[int]
    prompt_tokens: int
    kv_bits: int | None  # of each number in the cache; None for the model's own
    kept_per_layer: list[int]  # after prefill
    kv_bytes: int  # held at the end
    kv_bytes_allocated: int  # of all slots: what the longest answer that was allowed would have taken
    kv_bytes_full: int  # what the full cache would hold at the end
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float


class Typewriter:
    """Prints text word by word as it grows, wrapped to the terminal's usual width."""

    def __init__(self, indent: str = "  "):
        self.indent, self.column, self.shown = indent, 0, ""

    def update(self, text: str, final: bool = False) -> None:
        """Shows what `text` has beyond the last call; a word waits until it is whole. Control characters show as �."""
        whole = len(text) if final else max(text.rfind(" "), text.rfind("\n")) + 1
        for line in text[len(self.shown) : whole].splitlines(keepends=True):
            for word in line.split():
                word = "".join(c if c.isprintable() else "\ufffd" for c in word)
                if self.column + 1 + len(word) > WIDTH - 1 or self.column == 0:
                    sys.stdout.write(("\n" if self.column else "") + self.indent + word)
                    self.column = len(self.indent) + len(word)
                else:
                    sys.stdout.write(" " + word)
                    self.column += 1 + len(word)
            if line.endswith("\n"):
                sys.stdout.write("\n")
                self.column = 0
        self.shown = text[:whole] if whole > len(self.shown) else self.shown
        sys.stdout.flush()

    def end(self) -> None:
        """Ends the line that was begun."""
        sys.stdout.write("\n" if self.column else "")


class Progress:
    """A line on stderr, if that is a terminal, that says how far something slow has come. It goes away at the end."""

    def __init__(self, title: str):
        self.title, self.start, self.shown = title, time.perf_counter(), False

    def update(self, done: float, total: float, unit: str) -> None:
        """Shows the line, unless the work has just begun."""
        seconds, share = time.perf_counter() - self.start, done / total
        if sys.stderr.isatty() and seconds > SLOW:
            left = seconds * (1 - share) / share
            text = f"{self.title} [{'#' * round(20 * share):20}] {share:4.0%}, {seconds / done:.3g} s a {unit}"
            self.show(f"{text}, {left:.0f} s left")

    def show(self, line: str) -> None:
        """Writes the line over the one before."""
        width = min(WIDTH, shutil.get_terminal_size().columns) - 1
        sys.stderr.write(f"\r{line[:width]:{width}}")
        sys.stderr.flush()
        self.shown = bool(line)

    def end(self) -> None:
        """Takes the line away."""
        if self.shown:
            self.show("")
            sys.stderr.write("\r")


def never() -> bool:
    """For what cannot be stopped."""
    return False


def read(model: Llava, block: dict[str, Tensor], cache: KVCache, stop: Callable[[], bool] = never) -> Tensor:
    """`Llava.read` with a line of progress. Raises KeyboardInterrupt, between two layers, if `stop` says so."""
    layers, progress = model.language_model.layers, Progress("reading the prompt")

    def done(number: int) -> None:
        progress.update(number, len(layers), "layer")
        if stop():
            raise KeyboardInterrupt

    hooks = [
        layer.register_forward_hook(lambda *_, number=number: done(number))
        for number, layer in enumerate(layers, start=1)
    ]
    try:
        logits = model.read(**block, cache=cache)
    finally:
        progress.end()
        for hook in hooks:
            hook.remove()
    if logits.is_cuda:
        torch.cuda.synchronize()
    return logits


def write(
    model: Llava,
    processor: Processor,
    logits: Tensor,
    cache: KVCache,
    args: argparse.Namespace,
    show: bool = True,
    stop: Callable[[], bool] = never,
) -> tuple[list[int], float]:
    """Decodes and shows an answer, until `stop` says so: its token ids, and when the last one was there."""
    typewriter, ids, ended = Typewriter(), [], time.perf_counter()
    for token in model.decode(
        logits, cache, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed
    ):
        ids.append(int(token))
        ended = time.perf_counter()
        if show:
            typewriter.update(processor.decode(ids).lstrip())
        if stop():
            break
    if show:
        typewriter.update(processor.decode(ids).strip(), final=True)
        typewriter.end()
    return ids, ended


def answer(
    model: Llava,
    processor: Processor,
    prompt: str,
    images: list[Image.Image],
    method: str,
    compressor: PrefixKV | None,
    args: argparse.Namespace,
    title: str | None = "",
    bits: int | None = None,
) -> Run:
    """Answers one prompt; compressor None is the full cache. Prints title and text unless the title is None."""
    device = model.lm_head.weight.device
    inputs = {name: tensor.to(device) for name, tensor in processor(prompt, images).items()}
    cache, start = new_cache(model, args.max_new_tokens, compressor, bits), time.perf_counter()
    logits = read(model, inputs, cache)
    prefilled = time.perf_counter()
    if title:
        print(title)
    ids, ended = write(model, processor, logits, cache, args, title is not None)
    token_bytes = sum(2 * key.shape[1] * key.shape[3] * logits.element_size() for key in cache.key)
    return Run(
        method=method,
        budget=1.0 if compressor is None else compressor.budget,
        text=processor.decode(ids).strip(),
        token_ids=ids,
        prompt_tokens=int(cache.prompt_lengths[0]),
        kv_bits=bits,
        kept_per_layer=cache.kept[:, 0].tolist(),
        kv_bytes=cache.held_bytes,
        kv_bytes_allocated=cache.allocated_bytes,
        kv_bytes_full=int(cache.lengths[0]) * token_bytes,
        prefill_seconds=prefilled - start,
        decode_seconds=ended - prefilled,
        tokens_per_second=(len(ids) - 1) / max(ended - prefilled, 1e-9),  # the first comes with the prefill
    )


def bars(run: Run) -> str:
    """The share of the prompt that each layer kept, one character a layer, first layer on the left."""
    shares = [kept / run.prompt_tokens for kept in run.kept_per_layer]
    text = "".join(BARS[max(1, round(8 * share))] for share in shares)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:  # a terminal without block characters gets tenths
        text = "".join(str(min(9, int(10 * share))) for share in shares)
    return text


def agreement(run: Run, full: Run) -> float:
    """Share of words in common with the full cache's text, in order."""
    return difflib.SequenceMatcher(None, full.text.split(), run.text.split(), autojunk=False).ratio()


def human(count: int) -> str:
    """A number of bytes in a few characters."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def table(runs: list[Run]) -> str:
    """The closing table, at most 80 columns wide; the bars of a deep model stand under it."""
    names = ["full cache" if run.method == "full" else f"{run.method} {100 * run.budget:.3g}%" for run in runs]
    names = [name + (f", {run.kv_bits} bits" if run.kv_bits else "") for name, run in zip(names, runs)]
    rows = [["", "kept", "per layer", "KV held", "allocated", "tokens/s", "same words"]]
    for name, run in zip(names, runs):
        kept, total = sum(run.kept_per_layer), run.prompt_tokens * len(run.kept_per_layer)
        rows.append([name, f"{kept} of {total}", bars(run), human(run.kv_bytes), human(run.kv_bytes_allocated),
                     f"{run.tokens_per_second:.0f}", f"{agreement(run, runs[0]):.0%}"])  # fmt: skip

    def lines() -> list[str]:
        widths = [max(map(len, column)) for column in zip(*rows)]
        return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]

    if max(map(len, lines())) <= WIDTH:
        return "\n".join(lines())
    under = ["", "per layer, first layer on the left:", *[f"{row[0]}\n  {row.pop(2)}" for row in rows][1:]]
    return "\n".join([*lines(), *under])


def compressors(args: argparse.Namespace) -> list[tuple[str, PrefixKV | None]]:
    """What to run beside the full cache, with its method: the plan, or every method at every budget."""
    if args.kv_bits and not (args.plan or args.method or args.budget):
        return [("full", None)]
    if args.plan:
        return [("prefixkv", PrefixKV(plan=read_plan(args.plan)))]
    pairs = [(name, budget) for name in args.method or ["prefixkv"] for budget in args.budget or [0.5, 0.2]]
    if not args.method and not args.budget:
        pairs.append(("cover", 0.2))
    return [(name, METHODS[name](budget)) for name, budget in pairs]


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted, not raised: yields a function that says whether it was pressed. A second one is raised."""
    pressed: list[int] = []

    def note(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


class Chat:
    """A conversation about some pictures, on a cache that goes on: a turn reads only what is new."""

    def __init__(self, model: Llava, processor: Processor, images: list[Image.Image], args: argparse.Namespace):
        self.model, self.processor, self.images, self.args = model, processor, images, args
        self.turns: list[tuple[str, str | None]] = []
        self.cache: KVCache | None = None
        self.known: list[int] = []  # the token ids that the cache has read

    def prepare(self) -> tuple[dict[str, Tensor], KVCache] | None:
        """What is to be read for the last question, and a cache with room for it and its answer.

        None if the model has no positions left. Raises LlavaError for a question that cannot be used.
        """
        inputs = self.processor(self.processor.chat(self.turns, len(self.images)), self.images)
        ids, known = inputs["input_ids"][0].tolist(), len(self.known)
        left = self.model.config.text.max_position_embeddings - len(ids)
        if left < 1 and len(self.turns) > 1:
            return None
        room = max(0, min(self.args.max_new_tokens, left))
        if self.cache is not None and ids[:known] == self.known:
            inputs = {"input_ids": inputs["input_ids"][:, known:]}
            self.cache.reserve(max(0, len(ids) - known + room - self.cache.room))
        else:
            if self.cache is not None:
                print(dim("  The template has changed what was read before; the conversation is read again."))
            compressed = self.args.method or self.args.budget or self.args.plan
            compressor = compressors(self.args)[0][1] if compressed else None
            self.cache = new_cache(self.model, room, compressor, self.args.kv_bits)
        self.known = ids
        return {name: tensor.to(self.model.lm_head.weight.device) for name, tensor in inputs.items()}, self.cache

    def ask(self, question: str) -> bool:
        """Shows the answer to a question, and a line about its cost. False if the model has no positions left."""
        start = time.perf_counter()
        self.turns.append((question, None))
        try:
            prepared = self.prepare()
        except LlavaError as error:
            self.turns.pop()
            print(error, file=sys.stderr)
            return True
        if prepared is None:
            return False
        block, cache = prepared
        with interrupts() as stop:
            try:
                logits = read(self.model, block, cache, stop)
            except (LlavaError, KeyboardInterrupt) as error:  # a cache that has read half of a block is of no use
                self.turns.pop()
                self.cache = None
                print(str(error) or "The question is dropped.", file=sys.stderr)
                return True
            first = time.perf_counter() - start
            ids, _ = write(self.model, self.processor, logits, cache, self.args, stop=stop)
        self.known += ids[:-1]  # the last one is not read yet
        self.turns[-1] = (question, self.processor.decode(ids).strip())
        held, text = int(cache.held.sum()), cache.held.numel() * int(cache.lengths[0])
        print(dim(f"  {held:,} of {text:,} tokens held; first word after {first:.2g} s"))
        return True


def dim(line: str) -> str:
    """A line in a weaker colour, on a terminal."""
    return f"\x1b[2m{line}\x1b[0m" if sys.stdout.isatty() else line


def chat(model: Llava, processor: Processor, images: list[Image.Image], args: argparse.Namespace) -> None:
    """Several turns in the terminal."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as in arguments; the processor refuses what is no UTF-8
    conversation = Chat(model, processor, images, args)
    print("Ask about the image; an empty line ends the conversation, Ctrl-C an answer.")
    while True:
        try:
            question = input("you: ").strip()
        except EOFError:
            print()
            return
        if not question:
            return
        if not conversation.ask(question):
            limit = model.config.text.max_position_embeddings
            print(f"The conversation has filled the model's {limit} positions; start another one.")
            return


def share(text: str) -> float:
    """A budget from the command line."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        return PrefixKV(value).budget  # raises for what is not one
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a budget; expected a number above 0 and at most 1, or 20%"
        ) from None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="demo.py", description="Describes images with a LLaVA checkpoint, full cache beside compressed ones.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    ask = parser.add_argument_group("picture and question")
    ask.add_argument("--image", action="append", metavar="FILE",
                     help="picture; repeat for several in one question (default: an example scene)")  # fmt: skip
    ask.add_argument("--scene", action="append", type=int, metavar="N",
                     help="draw scene N of coloured shapes; repeat for several, one after the other")  # fmt: skip
    ask.add_argument("--prompt", metavar="TEXT", help="question about the pictures (default: describe in detail)")
    ask.add_argument("--chat", action="store_true", help="several turns in the terminal, with the full cache, or "
                     "with one --method and --budget")  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", default=str(TINY), help="folder of a checkpoint, or Hub id (default: the embedded one)"
    )
    model.add_argument("--device", default="cpu", help="cpu (default), cuda, mps")
    model.add_argument("--dtype", choices=["auto", "float32", "float16", "bfloat16", "int8"],
                       help="of the weights; auto: as the checkpoint has them, and on a CPU 16 or 8 bits if memory is "
                       "short (default: float32, and for a checkpoint in 8 bits int8)")  # fmt: skip
    cache = parser.add_argument_group("cache")
    cache.add_argument("--budget", action="append", type=share, metavar="SHARE",
                       help="share of the cache to keep, like 20%%; repeatable (default: 50%%, 20%%)")  # fmt: skip
    cache.add_argument(
        "--method", action="append", choices=METHODS, metavar="NAME",
        help="what compresses it; repeatable (default: prefixkv, and without --budget cover at 20%%): "
        + ", ".join(METHODS),
    )  # fmt: skip
    cache.add_argument("--kv-bits", type=int, choices=BITS, metavar="N",
                       help="store keys and values in N bits: 2, 3, 4 or 8; alone or with a method")  # fmt: skip
    cache.add_argument("--plan", metavar="FILE", help="keep what a plan says instead of a budget")  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    output.add_argument("--explore", metavar="FILE", help="write a page (HTML) that shows what each layer keeps")
    output.add_argument("--plot", metavar="FILE", help="write a picture of what layers keep (needs matplotlib)")
    output.add_argument("--save-plan", metavar="FILE", help="write the shares kept at the first budget as a plan")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="longest answer, in tokens (default: 128)"
    )
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    sampling.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest that sum to this")
    sampling.add_argument("--top-k", type=int, default=0, help="draw from so many of the likeliest (0: all)")
    sampling.add_argument("--seed", type=int, help="make a sampled answer repeatable")
    args = parser.parse_args(arguments)
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens is {args.max_new_tokens}; expected 1 or more")
    if not args.temperature >= 0 or args.top_k < 0 or not 0 < args.top_p <= 1:
        parser.error("sampling needs --temperature 0 or more, --top-k 0 or more, and --top-p above 0 and at most 1")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        parser.error(f"--seed is {args.seed}; expected a number from 0 to {2**63 - 1}")
    for number in args.scene or []:
        if not 0 <= number < 2**63:
            parser.error(f"--scene is {number}; expected a number from 0 to {2**63 - 1}")
    if args.scene and args.image:
        parser.error("--scene and --image both name the picture; give one of them")
    if len(args.scene or []) > 1 and (args.chat or args.json or args.explore or args.plot or args.save_plan):
        parser.error("several scenes are described in the terminal only; give one --scene with this option")
    if args.plan and (args.budget or args.method or args.save_plan):
        parser.error("--plan takes the place of --method, --budget and --save-plan; give one of them")
    if (args.explore or args.plot) and (args.plan or args.method or args.chat or args.kv_bits):
        parser.error("--explore and --plot show what PrefixKV's budgets keep; leave out --plan, --method, --kv-bits "
                     "and --chat")  # fmt: skip
    if args.save_plan and args.kv_bits:
        parser.error("--save-plan writes what a method keeps; leave out --kv-bits")
    for option in ("--json", "--prompt", "--save-plan"):
        if args.chat and vars(args)[option[2:].replace("-", "_")]:
            parser.error(f"--chat reads questions from the terminal and writes answers only; leave out {option}")
    if args.chat and max(len(args.budget or []), len(args.method or [])) > 1:
        parser.error("--chat has one cache; give one --budget and one --method at most")
    for path in filter(None, (args.explore, args.plot, args.save_plan)):  # before the model has worked in vain
        if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or "."):
            parser.error(f"{path:.200} cannot be written; expected the name of a file in a folder that exists")
    if args.plot and Path(args.plot).suffix not in PLOTS:
        parser.error(f"--plot is {args.plot:.200}; expected a name that ends in {', '.join(PLOTS)}")
    if args.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install -c constraints.txt -e '.[bench]'")
    return args


def free_memory() -> int | None:
    """Bytes that a program may take without the system swapping; None where Linux' /proc is not there."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def dtype_name(dtype: torch.dtype) -> str:
    """As `--dtype` has it."""
    return str(dtype).removeprefix("torch.")


def fitting_dtype(folder: Path, free: int) -> tuple[str, str]:
    """The first of the checkpoint's own dtype, 16 bits and 8 that leaves room in the free memory; and why, in a line.

    If none does, it is the checkpoint's own: those weights are mapped, and need not fit (see `weights.load`).
    """
    own = dtype_name(memory_needed(folder, None)[1])
    names = [own] if own == "int8" else dict.fromkeys([own, "bfloat16", "int8"])
    needed = {name: memory_needed(folder, name)[0] for name in names}
    fitting = next((name for name, size in needed.items() if size + ROOM <= free), None)
    sizes = ", ".join(f"{name} takes {human(size)}" for name, size in needed.items())
    line = f"Weights in {fitting or own}: {sizes}; {human(free)} are free, {human(ROOM)} of them for the rest."
    return fitting or own, line if fitting else f"{line} They are read from the file as they are used."


def load_shown(args: argparse.Namespace, device: torch.device) -> tuple[Llava, Processor]:
    """Loads, with a line of progress; raises LlavaError if the weights do not fit into memory in this dtype."""
    folder, dtype = find(args.model), None if args.dtype == "auto" else args.dtype or "default"
    free = free_memory() if device.type == "cpu" else None
    if free is not None and dtype is None:
        dtype, line = fitting_dtype(folder, free)
        print(line, file=sys.stderr)
    elif free is not None:
        needed, own = memory_needed(folder, dtype)
        chosen = choose_dtype(dtype, own)
        if needed > free and chosen != own:  # weights in the checkpoint's own dtype need not fit: see `load`
            raise LlavaError(
                f"{args.model} in {dtype_name(chosen)} needs {human(needed)}, {human(free)} are free; try --dtype auto, "
                "which takes 16 bits or 8 if they fit, and else reads weights from the file as they are used."
            )
    progress = Progress("loading")
    try:
        return load(
            folder, device, dtype, fast=device.type == "cpu",
            progress=lambda done, size: progress.update(done / 1e9, size / 1e9, "GB"),
        )  # fmt: skip
    finally:
        progress.end()


def pictures(args: argparse.Namespace) -> list[tuple[list[str], list[Image.Image]]]:
    """Names and pictures of each question: every scene has its own, all images share one."""
    if args.scene:
        drawn = [draw(make_scene(random.Random(number)), oversample=4)[0] for number in args.scene]
        return [([f"scene {number}"], [image]) for number, image in zip(args.scene, drawn)]
    paths = args.image or [str(TINY / "examples" / "scene_1.png")]
    return [(paths, [open_image(path) for path in paths])]


def describe(args: argparse.Namespace) -> None:
    """Loads, answers, and shows; raises LlavaError for input that cannot be used."""
    device = find_device(args.device)
    compressed = compressors(args)
    questions = pictures(args)
    model, processor = load_shown(args, device)
    if args.plan and compressed[0][1]:  # refused before anything is answered, if it is for another model
        nothing = torch.zeros(1, 0, dtype=torch.bool)
        compressed[0][1].begin(nothing, nothing, model.config.text.num_hidden_layers)
    if args.kv_bits:
        new_cache(model, 0, None, args.kv_bits)  # refused, if its heads do not fall into groups
    embedded, examples = Path(args.model).resolve() == TINY.resolve(), TINY.resolve() / "examples"
    if embedded and not args.json and any(Path(path).resolve().parent != examples for path in args.image or []):
        print(textwrap.fill(SHAPES_ALONE, WIDTH - 1), end="\n\n")
    if args.chat:
        return chat(model, processor, questions[0][1], args)
    for number, (names, images) in enumerate(questions):
        if len(questions) > 1:
            print(f"{'' if number == 0 else chr(10)}== {names[0]} ==\n")
        answers(model, processor, names, images, compressed, args)


def answers(
    model: Llava,
    processor: Processor,
    names: list[str],
    images: list[Image.Image],
    compressed: list[tuple[str, PrefixKV | None]],
    args: argparse.Namespace,
) -> None:
    """Answers one question with the full cache and every compressed one, and writes what was asked for."""
    question = args.prompt or "Describe the image in detail."
    prompt = question if "<image>" in question else processor.chat([(question, None)], len(images))
    runs: list[Run] = []
    for number, (method, compressor) in enumerate([("full", None), *compressed]):
        bits, name = args.kv_bits if number else None, "PrefixKV" if method == "prefixkv" else method
        title = "full cache" if compressor is None else f"{name}, {100 * compressor.budget:g}% of the cache"
        title += f" in {bits} bits" if bits else ""
        shown = None if args.json else title
        runs.append(answer(model, processor, prompt, images, method, compressor, args, shown, bits))
        if not args.json:
            print()
    if not args.json:
        print(table(runs))
    if args.save_plan:
        run = runs[1]
        kept, prompt_tokens = torch.tensor([run.kept_per_layer]), torch.tensor([run.prompt_tokens])
        write_plan(args.save_plan, estimate_plan(run.budget, kept, prompt_tokens, args.model))
    if args.explore or args.plot:
        budgets = [run.budget for run in runs if run.method == "prefixkv"]
        data = explore.collect(model, processor, prompt, images, budgets, args.max_new_tokens, args.model)
        if args.explore:
            write_file(args.explore, explore.page(data).encode())
        if args.plot:
            write_file(args.plot, explore.plot(data, Path(args.plot).suffix))
    if args.json:
        print(json.dumps({"model": args.model, "images": names, "prompt": prompt, "runs": [asdict(r) for r in runs]}))


def main(arguments: list[str] | None = None) -> int:
    """Exit codes as in `run_command`."""
    args = parse(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a narrow terminal shows ? rather than failing
    return run_command("demo.py", lambda: describe(args))


if __name__ == "__main__":
    sys.exit(main())
