"""A checkpoint of your own, in one file to send: `python -m bench.report MODEL [--images FOLDER] [--out report.md]`.

Is it right (beside transformers, in a separate process, which gives its memory back), what does it answer in three
turns, how fast is it, and how large? MODEL is a folder or a Hub id. The file is written when all of it is done.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

import torch
from PIL import Image

from bench import common
from minillava import terminal
from minillava.checks import require
from minillava.command import printable, run_command
from minillava.compressors import METHODS
from minillava.model import KVCache, Llava
from minillava.processor import Processor, open_image, read_json
from weights import choose_dtype, find, find_device, load_processor, memory_needed, write_file

CACHES = ("full", "prefixkv", "cover")  # the last two keep 20 %
QUESTIONS = ("Describe the image in detail.", "How many objects are there?", "What is in the centre?")
ANSWER, PICTURES = 64, 3  # tokens of an answer at most, and pictures
COLUMNS = ["cache", "question", "answer", "tokens read", "first word after", "a token", "a layer holds", "bytes"]
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
ROOT = Path(__file__).resolve().parent.parent
Rows = list[list[object]]


def table(columns: list[str], rows: Rows) -> str:
    """Markdown; no character of a cell is a mark, whatever a model has answered."""
    marks = str.maketrans({c: f"\\{c}" for c in "\\`*_[]<&|"})
    cells = [[printable(" ".join(str(cell).split())).translate(marks) for cell in row] for row in rows]
    return common.table(columns, cells)


def machine() -> Rows:
    """The machine and the versions."""

    def tell(command: str) -> str:
        return subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()

    found = {package.name: package.version for package in distributions()}
    versions = [f"{name} {found.get(name, 'not installed')}" for name in ("torch", "transformers", "minillava")]
    name = tell("grep -m 1 'model name' /proc/cpuinfo").partition(":")[2].strip() or platform.processor()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return [
        ["processor", f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"],
        ["memory", terminal.human(memory) if memory else "not known"],
        ["system", platform.platform()],
        ["versions", f"Python {platform.python_version()}, {', '.join(versions)}"],
        ["commit", tell("git describe --always --dirty") or "not known"],
    ]


def compared(folder: Path, picture: Path, dtype: str, device: str) -> str:
    """Markdown: the table of `minillava.verify`, or why there is none."""
    if dtype == "int8":
        return "Not compared: transformers does not read weights in 8 bits."
    options = ["--model", folder.resolve(), "--image", picture.resolve(), "--dtype", dtype, "--device", device]
    command = [sys.executable, "-m", "minillava.verify", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if not done.stdout:
        said = done.stderr.strip().splitlines() or ["Was there too little memory?"]
        return f"Not compared: {printable(said[-1])} (exit code {done.returncode})"
    stages, _, sentence = done.stdout.strip().rpartition("\n")
    return f"{sentence}\n\n```\n{stages.strip()}\n```"


def talk(model: Llava, processor: Processor, image: Image.Image, method: str, questions: Sequence[str]) -> Rows:
    """Questions that follow one another on one cache: what is answered, the times that it took, and what is held."""

    def new_cache(room: int) -> KVCache:
        return model.new_cache(room, METHODS[method](0.2) if method in METHODS else None)

    conversation, rows = terminal.Conversation(model, processor, [image], new_cache, ANSWER), Rows()
    for question in questions:
        times = [time.perf_counter()]
        found = conversation.read(question)
        if found is None:  # the model's positions are full
            break
        logits, cache = found
        answer = []
        for token in model.decode(logits, cache):
            answer.append(int(token))
            times.append(time.perf_counter())
        conversation.answered(answer)
        first, *steps = [after - before for before, after in itertools.pairwise(times)]
        step = f"{1000 * statistics.median(steps):.3g} ms" if steps else ""
        rows.append([method, *conversation.turns[-1], conversation.num_read, f"{first:.3g} s", step,
                     f"{int(cache.held.sum()) / cache.held.numel():.0f} of {int(cache.lengths[0])} tokens",
                     terminal.human(cache.held_bytes)])  # fmt: skip
    return rows


def report(args: argparse.Namespace, scratch: Path) -> str:
    """All of it, in Markdown. Raises LlavaError for a checkpoint or pictures that cannot be used."""
    paths = [scratch / "scene 7.png"]
    if args.images is None:
        terminal.pictures(None, 7)[1][0].save(paths[0])
    else:
        require(os.path.isdir(args.images), f"There is no folder {args.images:.200}; expected one with pictures.")
        paths = sorted(p for p in Path(args.images).iterdir() if p.suffix.lower() in SUFFIXES)[:PICTURES]
        require(paths, f"{args.images:.200} holds no pictures; expected files that end in {', '.join(SUFFIXES)}.")
    images = [open_image(path) for path in paths]
    folder, device = find(args.model), find_device(args.device)
    load_processor(folder)  # a checkpoint without one is refused now, not after the comparison
    needed, own = memory_needed(folder, args.dtype or "default")
    free = terminal.free_memory() if device.type == "cpu" else None  # None: not known
    if args.dtype is None and free is not None and needed + terminal.ROOM <= free:
        args.dtype = terminal.dtype_name(choose_dtype("default", own))
    args.dtype = args.dtype or terminal.fitting_dtype(folder, free or 10**15)[0]
    print(f"Beside transformers, in {args.dtype} ...", file=sys.stderr, flush=True)
    stages = compared(folder, paths[0], args.dtype, args.device)
    model, processor = terminal.load_shown(args)
    text, parameters = model.config.text, list(model.parameters())
    about: Rows = [
        ["checkpoint", folder.resolve().name if os.path.isdir(args.model) else f"{args.model}, {folder.name}"],
        [
            "kind",
            f"{read_json(folder / 'config.json').get('model_type')}: {model.config.vision.model_type}, "
            f"{text.model_type}, {text.num_hidden_layers} layers of width {text.hidden_size}",
        ],
        ["parameters", f"{sum(p.numel() for p in parameters):,}"],
        ["weights", f"{args.dtype}, {terminal.human(sum(p.nbytes for p in parameters))}; the file has {own}"],
        ["device", torch.cuda.get_device_name(device) if device.type == "cuda" else device],
    ]
    model.generate(torch.tensor([[1, 2, 3]], device=device), max_new_tokens=4)  # warms up
    parts = ["# A report of minillava", table(["what", "found"], about + machine()), "## Beside transformers", stages]
    for number, (path, image) in enumerate(zip(paths, images)):
        rows = Rows()
        for method in CACHES:
            print(f"{path.name}, {method} ...", file=sys.stderr, flush=True)
            rows += talk(model, processor, image, method, QUESTIONS[: 1 if number else None])
        parts += [f"## {printable(path.name)}", table(COLUMNS, rows)]
    most = terminal.human(common.peak()) if common.peak() else "not known"
    if device.type == "cuda":
        most += f", on the GPU {terminal.human(common.peak('cuda'))}"
    return "\n\n".join([*parts, f"Memory of the process at its peak, weights included: {most}."]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Exit codes as in `run_command`."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="folder of a checkpoint, or Hub id")
    parser.add_argument("--images", metavar="FOLDER", help="pictures to describe, the first few (default: a scene)")
    parser.add_argument("--out", type=terminal.output_file, default="report.md", metavar="FILE")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, mps")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16", "int8"],
        help="of the weights (default: float32 where it fits into memory, else what does)",
    )
    args = parser.parse_args(arguments)

    def work() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            write_file(args.out, report(args, Path(scratch)).encode())
        print(f"{args.out} is written.")

    return run_command("bench.report", work)


if __name__ == "__main__":
    sys.exit(main())
