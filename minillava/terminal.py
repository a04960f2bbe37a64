"""What commands that ask a model about a picture share: options, the model while it loads, text while it grows."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shlex
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minillava import TINY
from minillava.checks import LlavaError, require
from minillava.files import free_memory
from minillava.model import KVCache, Llava
from minillava.processor import Processor, open_image
from minillava.scenes import DESCRIBE, draw, make_scene

WIDTH = 80
BARS = " ▁▂▃▄▅▆▇█"
SLOW = 1.0  # seconds after which progress is shown
COMPILE_SECONDS = 12  # for each layer of a model, on two threads
ROOM = 10**9  # bytes of memory beside the weights: for the prompt, the cache and the program

# ---------------------------------------------------------------- options


def parse_budget(text: str) -> float:
    """A budget as 0.2 or 20%."""
    with contextlib.suppress(ValueError):
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        if 0 < value <= 1:
            return value
    raise argparse.ArgumentTypeError(f"{text!r:.200} is not a budget; expected a number above 0 and at most 1, or 20%")


def whole_number(low: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number from `low` on."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if low <= int(text) < 2**63:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r:.200} is not a whole number from {low} to {2**63 - 1}")

    return parse


def output_file(text: str) -> str:
    """The name of a file to write, refused before the model has worked in vain."""
    if os.path.isdir(text) or not os.path.isdir(os.path.dirname(text) or "."):
        raise argparse.ArgumentTypeError(
            f"{text:.200} cannot be written; expected the name of a file in a folder that exists"
        )
    return text


def add_picture_options(parser: argparse._ActionsContainer, several: bool = False) -> None:
    """--image, --scene and --prompt. With `several`, --scene may be repeated: each scene is a question of its own."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--image",
        action="append",
        metavar="FILE",
        help="picture; repeat for several in one question (default: an example scene)",
    )
    either.add_argument(
        "--scene",
        action="append" if several else "store",
        type=whole_number(0),
        metavar="N",
        help="draw scene N of coloured shapes" + ("; repeat for several, one after the other" if several else ""),
    )
    if several:
        parser.add_argument(
            "--save-scene", type=output_file, metavar="FILE", help="write the drawn scene as PNG, and say what is in it"
        )
    parser.add_argument("--prompt", metavar="TEXT", help="question about the pictures (default: describe in detail)")


def add_model_options(parser: argparse._ActionsContainer) -> None:
    """--model, --device and --dtype."""
    parser.add_argument(
        "--model", default=str(TINY), help="folder of a checkpoint, or Hub id (default: the embedded one)"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, mps")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16", "int8"],
        help="of the weights; auto: as the checkpoint has them, and on a CPU 16 or 8 bits if memory is "
        "short (default: float32, and for a checkpoint in 8 bits int8)",
    )


def pictures(paths: list[str] | None, scene: int | None) -> tuple[list[str], list[Image.Image]]:
    """Names and pictures of one question: a scene, or files, by default an example scene."""
    if scene is not None:
        return [f"scene {scene}"], [draw(make_scene(random.Random(scene)), oversample=4)[0]]
    paths = paths or [str(TINY / "examples" / "scene_1.png")]
    return paths, [open_image(path) for path in paths]


def png(picture: Image.Image) -> bytes:
    """The picture as a file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def prompt_of(processor: Processor, question: str | None, images: int) -> str:
    """The prompt for a question in the checkpoint's own form; a text that has <image> is a prompt already."""
    question = question or DESCRIBE[0]
    return question if "<image>" in question else processor.chat([(question, None)], images)


# ---------------------------------------------------------------- the model


def progress_bar(title: str, unit: str, total: int | None = None) -> tqdm:
    """How far something slow is, on stderr if that is a terminal; it comes after a second, and goes at the end."""
    columns = min(WIDTH, shutil.get_terminal_size().columns) - 1
    return tqdm(
        desc=title, total=total, unit=unit, unit_scale=unit == "B", delay=SLOW, ncols=columns, leave=False, disable=None
    )


def human(count: int) -> str:
    """A number of bytes in a few characters."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= 0.9995 * size:  # what three digits would round to the next unit
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def dtype_name(dtype: torch.dtype) -> str:
    """As `--dtype` has it."""
    return str(dtype).removeprefix("torch.")


def fitting_dtype(folder: Path, free: int) -> tuple[str, str]:
    """The first of the checkpoint's own dtype, 16 bits and 8 that leaves room in the free memory; and why, in a line.

    If none does, it is the checkpoint's own: from 2 GB on those weights are mapped, and need not fit (`weights.load`).
    """
    from weights import memory_needed

    own = dtype_name(memory_needed(folder, None)[1])
    names = [own] if own == "int8" else dict.fromkeys([own, "bfloat16", "int8"])
    needed = {name: memory_needed(folder, name)[0] for name in names}
    fitting = next((name for name, size in needed.items() if size + ROOM <= free), None)
    sizes = ", ".join(f"{name} takes {human(size)}" for name, size in needed.items())
    line = f"Weights in {fitting or own}: {sizes}; {human(free)} are free, {human(ROOM)} needed for the rest."
    return fitting or own, line if fitting else f"{line} From 2 GB on, they are read from the file as they are used."


def load_shown(args: argparse.Namespace) -> tuple[Llava, Processor]:
    """Loads what `add_model_options` say, with a bar; raises LlavaError if the weights do not fit into memory so."""
    from weights import choose_dtype, find, find_device, load, memory_needed  # which imports this folder's files

    device, dtype = find_device(args.device), None if args.dtype == "auto" else args.dtype or "default"
    folder, on_cpu = find(args.model), device.type == "cpu"
    free = free_memory() if on_cpu else None
    if free is not None and dtype is None:
        dtype, line = fitting_dtype(folder, free)
        print(line, file=sys.stderr)
    elif free is not None:
        needed, own = memory_needed(folder, dtype)
        chosen = choose_dtype(dtype, own)
        if needed > free and chosen != own:  # weights in the checkpoint's own dtype need not fit: see `load`
            sizes = f"{args.model} in {dtype_name(chosen)} needs {human(needed)}, {human(free)} are free"
            auto = "16 bits or 8 if they fit, and else weights that are read from the file as they are used"
            raise LlavaError(f"{sizes}; try --dtype auto, which takes {auto}.")
    with progress_bar("loading", "B") as bar:

        def progress(done: int, size: int) -> None:
            bar.total = size
            bar.update(done - bar.n)

        return load(folder, device, dtype, fast=on_cpu, progress=progress)


def compile_shown(model: Llava) -> None:
    """Lets compiled code read single tokens; says first what that costs. Raises LlavaError without a C++ compiler."""
    from minillava.fast import compile_steps

    compiler, *_ = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    require(
        model.lm_head.weight.is_cuda or shutil.which(compiler),
        f"--compile needs a C++ compiler, and there is no {compiler}; leave the option out.",
    )
    layers = len(model.language_model.layers)
    print(
        f"--compile: the first answer comes about {max(1, round(layers * COMPILE_SECONDS / 60))} min later, with the "
        "full cache and again with a compressed one. Not compiled: h2o, matching, cover and --kv-bits.",
        file=sys.stderr,
    )
    compile_steps(model)


def encode(model: Llava, processor: Processor, prompt: str, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """The model's inputs, on its device."""
    device = model.lm_head.weight.device
    return {name: tensor.to(device) for name, tensor in processor(prompt, images).items()}


def read(model: Llava, block: dict[str, Tensor], cache: KVCache, stop: Callable[[], bool] = lambda: False) -> Tensor:
    """`Llava.read` with a bar. Raises KeyboardInterrupt, between two layers, if `stop` says so."""
    layers = model.language_model.layers
    with progress_bar("reading the prompt", "layer", len(layers)) as bar, contextlib.ExitStack() as stack:

        def done(*_: object) -> None:
            bar.update()
            if stop():
                raise KeyboardInterrupt

        for layer in layers:
            stack.enter_context(layer.register_forward_hook(done))
        logits = model.read(**block, cache=cache)
    if logits.is_cuda:
        torch.cuda.synchronize()
    return logits


@dataclass
class Conversation:
    """Questions about some pictures, one after the other on one cache: a turn reads only what is new."""

    model: Llava
    processor: Processor
    images: Sequence[Image.Image]
    new_cache: Callable[[int], KVCache]  # makes one with so much room
    max_new_tokens: int
    turns: list[tuple[str, str | None]] = field(default_factory=list)
    cache: KVCache | None = None
    known: list[int] = field(default_factory=list)  # the token ids that the cache has read
    num_read: int = 0  # tokens that the last turn has read

    def read(self, question: str, stop: Callable[[], bool] = lambda: False) -> tuple[Tensor, KVCache] | None:
        """Logits [1, V] and a cache for `Llava.decode`; then tell `answered`. None if the model has no positions left.

        Raises LlavaError for a question that cannot be used, and KeyboardInterrupt as `read` above: it is dropped then.
        """
        turns = [*self.turns, (question, None)]
        inputs = encode(self.model, self.processor, self.processor.chat(turns, len(self.images)), self.images)
        ids, known = inputs["input_ids"][0].tolist(), len(self.known)
        left = self.model.config.text.max_position_embeddings - len(ids)
        if left == 0 or (left < 0 and self.turns):  # a first prompt that is too long is refused when it is read
            return None
        room, cache = max(0, min(self.max_new_tokens, left)), self.cache
        if cache is not None and ids[:known] == self.known:
            inputs = {"input_ids": inputs["input_ids"][:, known:]}
            cache.reserve(max(0, len(ids) - known + room - cache.room))
        else:  # the first turn, or one after which the prompt has other tokens than those that were read
            cache = self.new_cache(room)
        self.cache = None  # one that has read half of a block is of no use
        logits = read(self.model, inputs, cache, stop)
        self.turns, self.cache, self.known, self.num_read = turns, cache, ids, inputs["input_ids"].shape[1]
        return logits, cache

    def answered(self, ids: list[int]) -> None:
        """Notes the answer to the question that was read last."""
        self.known = self.known + ids[:-1]  # the last one is not read yet
        self.turns[-1] = (self.turns[-1][0], self.processor.decode(ids).strip())


# ---------------------------------------------------------------- text


def wrapped(text: str) -> str:
    """Text in lines of less than 80 characters. What would move the cursor shows as �.

    The lines of a text's first words are the beginning of those of the whole text.
    """
    lines = []
    for line in text.split("\n"):
        words = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(line.split()))
        lines.append(textwrap.fill(words, WIDTH - 1, initial_indent="  ", subsequent_indent="  ",
                                   break_long_words=False, break_on_hyphens=False))  # fmt: skip
    return "\n".join(lines)


def write(
    processor: Processor, tokens: Iterable[Tensor], show: bool = True, stop: Callable[[], bool] = lambda: False
) -> tuple[list[int], float]:
    """Shows an answer word by word while it is made, until `stop` says so: its ids, and when the last one was there."""
    ids: list[int] = []
    shown, ended = "", time.perf_counter()
    for token in tokens:
        ids.append(int(token))
        ended = time.perf_counter()
        if show:
            text = processor.decode(ids).lstrip()
            lines = wrapped(text[: max(text.rfind(" "), text.rfind("\n")) + 1])  # a word waits until it is whole
            print(lines[len(shown) :], end="", flush=True)
            shown = max(shown, lines, key=len)
        if stop():
            break
    if show:
        lines = wrapped(processor.decode(ids).strip())
        last = max(shown, lines, key=len)[-1:]
        print(lines[len(shown) :], end="" if last in ("", "\n") else "\n", flush=True)
    return ids, ended


def bars(shares: list[float]) -> str:
    """Shares from 0 to 1, one character each."""
    with contextlib.suppress(UnicodeEncodeError):
        text = "".join(BARS[max(1, round(8 * share))] for share in shares)
        text.encode(sys.stdout.encoding or "ascii")
        return text
    return "".join(str(min(9, int(10 * share))) for share in shares)  # tenths, on a terminal without block characters


def dim(line: str) -> str:
    """A line in a weaker colour, on a terminal."""
    return f"\x1b[2m{line}\x1b[0m" if sys.stdout.isatty() else line


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
