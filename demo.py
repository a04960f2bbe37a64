"""Describes an image with a LLaVA checkpoint, full cache beside compressed ones: `python demo.py`."""

from __future__ import annotations

import argparse
import difflib
import io
import json
import random
import sys
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from minillava import TINY  # isort: skip  before torch, of whose import it silences a warning
from minillava.command import end_quietly, run_command  # isort: skip

if __name__ == "__main__":
    end_quietly()

import torch
from PIL import Image
from torch import Tensor

from minillava import terminal
from minillava.checks import LlavaError
from minillava.compressors import METHODS
from minillava.files import write_file
from minillava.model import KVCache, Llava
from minillava.processor import Processor
from minillava.quantised import BITS, new_cache
from minillava.scenes import describe, make_scene
from prefixkv import PrefixKV
from weights import read_plan

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


def answer(
    model: Llava,
    processor: Processor,
    inputs: dict[str, Tensor],
    method: str,
    compressor: PrefixKV | None,
    bits: int | None,
    args: argparse.Namespace,
) -> Run:
    """Answers one prompt; compressor None is the full cache. Prints title and text, unless --json asks for neither."""
    cache, start = new_cache(model, args.max_new_tokens, compressor, bits), time.perf_counter()
    logits = terminal.read(model, inputs, cache)
    prefilled = time.perf_counter()
    if not args.json:
        name = "PrefixKV" if method == "prefixkv" else method
        title = "full cache" if compressor is None else f"{name}, {100 * compressor.budget:g}% of the cache"
        print(title + (f" in {bits} bits" if bits else ""))
    ids, ended = terminal.write(processor, model.decode(logits, cache, **args.sampling), show=not args.json)
    if not args.json:
        print()
    size = logits.element_size() if bits else cache.key[0].element_size()  # of a number in the full cache
    token_bytes = sum(2 * key.shape[1] * key.shape[3] * size for key in cache.key)
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


def table(runs: list[Run]) -> str:
    """The closing table, at most 80 columns wide; the bars of a deep model stand under it."""
    rows = [["", "kept", "per layer", "KV held", "allocated", "tokens/s", "same words"]]
    for run in runs:
        name = "full cache" if run.method == "full" else f"{run.method} {100 * run.budget:.3g}%"
        name += f", {run.kv_bits} bits" if run.kv_bits else ""
        kept, total = sum(run.kept_per_layer), run.prompt_tokens * len(run.kept_per_layer)
        shares = terminal.bars([kept / run.prompt_tokens for kept in run.kept_per_layer])  # first layer on the left
        held, allocated = terminal.human(run.kv_bytes), terminal.human(run.kv_bytes_allocated)
        # Words in common with the full cache's text, in order.
        same = difflib.SequenceMatcher(None, runs[0].text.split(), run.text.split(), autojunk=False).ratio()
        speed = f"{run.tokens_per_second:.0f}"
        rows.append([name, f"{kept} of {total}", shares, held, allocated, speed, f"{same:.0%}"])

    def lines() -> list[str]:
        widths = [max(map(len, column)) for column in zip(*rows)]
        return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]

    if max(map(len, lines())) <= terminal.WIDTH:
        return "\n".join(lines())
    under = ["", "per layer, first layer on the left:", *[f"{row[0]}\n  {row.pop(2)}" for row in rows][1:]]
    return "\n".join([*lines(), *under])


def compressors(args: argparse.Namespace) -> list[tuple[str, PrefixKV | None]]:
    """What to run beside the full cache: the plan, or every method at every budget; or all tokens in few bits."""
    if args.kv_bits and not (args.plan or args.method or args.budget):
        return [("full", None)]
    if args.plan:
        return [("prefixkv", PrefixKV(plan=read_plan(args.plan)))]
    pairs = [(name, budget) for name in args.method or ["prefixkv"] for budget in args.budget or [0.5, 0.2]]
    if not args.method and not args.budget:
        pairs.append(("cover", 0.2))
    return [(name, METHODS[name](budget)) for name, budget in pairs]


def ask(talk: terminal.Conversation, question: str, args: argparse.Namespace) -> bool:
    """Shows the answer to a question, and a line about its cost. False if the model has no positions left."""
    start, before = time.perf_counter(), talk.cache
    with terminal.interrupts() as stop:
        try:
            found = talk.read(question, stop)
        except (LlavaError, KeyboardInterrupt) as error:
            print(str(error) or "The question is dropped.", file=sys.stderr)
            return True
        if found is None:
            return False
        (logits, cache), first = found, time.perf_counter() - start
        if before not in (None, cache):
            print(terminal.dim("  The prompt has other tokens than those read before; all of it was read again."))
        ids, _ = terminal.write(talk.processor, talk.model.decode(logits, cache, **args.sampling), stop=stop)
    talk.answered(ids)
    held, text = int(cache.held.sum()), cache.held.numel() * int(cache.lengths[0])
    print(terminal.dim(f"  {held:,} of {text:,} tokens held; first word after {first:.2g} s"))
    return True


def chat(model: Llava, processor: Processor, images: list[Image.Image], args: argparse.Namespace) -> None:
    """Several turns in the terminal."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as in arguments; the processor refuses what is no UTF-8
    compressed = args.method or args.budget or args.plan

    def fresh(room: int) -> KVCache:
        return new_cache(model, room, compressors(args)[0][1] if compressed else None, args.kv_bits)

    talk = terminal.Conversation(model, processor, images, fresh, args.max_new_tokens)
    print("Ask about the image; an empty line ends the conversation, Ctrl-C an answer.")
    try:
        while question := input("you: ").strip():
            if not ask(talk, question, args):
                limit = model.config.text.max_position_embeddings
                print(f"The conversation has filled the model's {limit} positions; start another one.")
                return
    except EOFError:
        print()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="demo.py",
        description="Describes images with a LLaVA checkpoint, full cache beside compressed ones.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    asked = parser.add_argument_group("picture and question")
    terminal.add_picture_options(asked, several=True)
    asked.add_argument(
        "--chat",
        action="store_true",
        help="several turns in the terminal, with the full cache, or one --method (or prefixkv) and --budget (or 50%%)",
    )
    terminal.add_model_options(parser.add_argument_group("model"))
    cache = parser.add_argument_group("cache")
    cache.add_argument("--budget", action="append", type=terminal.parse_budget, metavar="SHARE",
                       help="share of the cache to keep, like 20%%; repeatable (default: 50%%, 20%%)")  # fmt: skip
    cache.add_argument(
        "--method",
        action="append",
        choices=METHODS,
        metavar="NAME",
        help="what compresses it; repeatable (default: prefixkv, and without --budget cover at 20%%): "
        + ", ".join(METHODS),
    )
    cache.add_argument("--kv-bits", type=int, choices=BITS, metavar="N",
                       help="store keys and values in N bits: 2, 3, 4 or 8; by itself or with a method")  # fmt: skip
    cache.add_argument("--plan", metavar="FILE", help="keep what a plan says instead of a budget")
    cache.add_argument(
        "--compile",
        action="store_true",
        help="compile what reads a token: it takes minutes, which are announced first; then each token takes less time",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=terminal.whole_number(1), default=128, metavar="N",
                          help="longest answer, in tokens (default: 128)")  # fmt: skip
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    sampling.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest that sum to this")
    sampling.add_argument("--top-k", type=int, default=0, help="draw from so many of the likeliest (0: all)")
    sampling.add_argument("--seed", type=terminal.whole_number(0), help="make a sampled answer repeatable")
    args = parser.parse_args(arguments)
    if not args.temperature >= 0 or args.top_k < 0 or not 0 < args.top_p <= 1:
        parser.error("sampling needs --temperature 0 or more, --top-k 0 or more, and --top-p above 0 and at most 1")
    if len(args.scene or []) > 1 and (args.chat or args.json):
        parser.error("several scenes are described in the terminal only; give one --scene with this option")
    if args.save_scene and len(args.scene or []) != 1:
        parser.error("--save-scene writes one scene; give one --scene")
    if args.plan and (args.budget or args.method):
        parser.error("--plan takes the place of --method and --budget; give one of them")
    if args.chat and (args.json or args.prompt):
        parser.error("--chat reads questions from the terminal and writes answers only; leave out --json and --prompt")
    if args.chat and max(len(args.budget or []), len(args.method or [])) > 1:
        parser.error("--chat has one cache; give one --budget and one --method at most")
    args.sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    return args


def work(args: argparse.Namespace) -> None:
    """Loads, answers, and shows; raises LlavaError for input that cannot be used."""
    compressed = compressors(args)
    questions = [terminal.pictures(args.image, scene) for scene in args.scene or [None]]
    if args.save_scene:
        (name,), (picture,) = questions[0]
        write_file(args.save_scene, terminal.png(picture))
        if not args.json:  # to compare answers with
            print(f"{name}, as it is\n{terminal.wrapped(describe(make_scene(random.Random(args.scene[0]))))}\n")
    model, processor = terminal.load_shown(args)
    if args.compile:
        terminal.compile_shown(model)
    if args.plan and compressed[0][1]:  # refused before anything is answered, if it is for another model
        nothing = torch.zeros(1, 0, dtype=torch.bool)
        compressed[0][1].begin(nothing, nothing, model.config.text.num_hidden_layers)
    if args.kv_bits:
        new_cache(model, 0, None, args.kv_bits)  # refused, if its heads do not fall into groups
    embedded, examples = Path(args.model).resolve() == TINY.resolve(), TINY.resolve() / "examples"
    if embedded and not args.json and any(Path(path).resolve().parent != examples for path in args.image or []):
        print(textwrap.fill(SHAPES_ALONE, terminal.WIDTH - 1), end="\n\n")
    if args.chat:
        return chat(model, processor, questions[0][1], args)
    for number, (names, images) in enumerate(questions):
        if len(questions) > 1:
            print(f"{'' if number == 0 else chr(10)}== {names[0]} ==\n")
        prompt = terminal.prompt_of(processor, args.prompt, len(images))
        inputs = terminal.encode(model, processor, prompt, images)
        ways = [("full", None, None), *((method, compressor, args.kv_bits) for method, compressor in compressed)]
        runs = [answer(model, processor, inputs, *way, args) for way in ways]
        found = {"model": args.model, "images": names, "prompt": prompt, "runs": [asdict(run) for run in runs]}
        print(json.dumps(found) if args.json else table(runs))


def main(arguments: list[str] | None = None) -> int:
    """Exit codes as in `run_command`."""
    args = parse(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a narrow terminal shows ? rather than failing
    return run_command("demo.py", lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
