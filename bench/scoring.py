"""What choosing costs a prompt: prefill with a method, beside the full cache's, in turns: `python -m bench.scoring`.

All methods run in one process, in an order drawn for every round, so that a slow minute of the machine slows all
of them. The ratio is the median over rounds of a method's time divided by the full cache's in the same round.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from minillava.command import end_quietly, run_command  # isort: skip

if __name__ == "__main__":
    end_quietly()

import torch

from bench.speed import PRESETS, check_device, device_name, make_inputs, synchronize, write_checkpoint
from minillava import TINY
from minillava.checks import require
from minillava.compressors import METHODS
from weights import load_model


def table(seconds: dict[str, list[float]]) -> str:
    """Markdown of the seconds of every round; "full" is what the others are divided by."""
    lines = ["| | prefill s (median) | divided by the full cache's (middle half) |", "|---|---|---|"]
    for name, each in seconds.items():
        ratios = sorted(mine / full for mine, full in zip(each, seconds["full"]))
        low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        lines.append(
            f"| {name} | {statistics.median(each):.4f} | {statistics.median(ratios):.3f} ({low:.2f}–{high:.2f}) |"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.scoring", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="tiny", choices=PRESETS, help="shapes, as in bench.speed (default: tiny)")
    parser.add_argument("--batch", type=int, help="prompts at once")
    parser.add_argument("--methods", nargs="+", default=["cover", "prefixkv"], choices=METHODS, metavar="NAME",
                        help=", ".join(METHODS))  # fmt: skip
    parser.add_argument("--budget", type=float, default=0.2, help="share of the cache to keep (default: 0.2)")
    parser.add_argument("--rounds", type=int, default=100, help="(default: 100)")
    return parser.parse_args(arguments)


def measure(args: argparse.Namespace) -> None:
    """Prints the table; raises LlavaError for what cannot be run."""
    preset = PRESETS[args.preset]
    if args.batch is not None:
        preset = replace(preset, batch=args.batch)
    check_device(preset, args.preset)
    require(args.rounds > 0 and preset.batch > 0, "--rounds and --batch are 0 or less; expected 1 or more.")
    with tempfile.TemporaryDirectory() as scratch:
        dtype = getattr(torch, preset.dtype)
        if preset.model is not None:
            write_checkpoint(preset.model, Path(scratch), dtype)
        model = load_model(TINY if preset.model is None else Path(scratch), preset.device, dtype, fast=True)
        inputs = make_inputs(model.config, preset)
        names = ["full", *dict.fromkeys(args.methods)]
        seconds: dict[str, list[float]] = {name: [] for name in names}
        order = random.Random(0)
        for number in range(args.rounds + 1):
            # Drawn, since what ran just before leaves its traces in the processor's cache and the heap.
            for name in order.sample(names, len(names)):
                compressor = None if name == "full" else METHODS[name](args.budget)
                synchronize(preset.device)
                start = time.perf_counter()
                model.read(**inputs, cache=model.new_cache(preset.new, compressor))
                synchronize(preset.device)
                if number > 0:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
    text = table(seconds)
    print(f"Batch {preset.batch}, {preset.prompt} prompt tokens, {preset.dtype} on {device_name(preset.device)}, "
          f"budget {args.budget:.0%}, {args.rounds} rounds.\n\n{text}")  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Exit codes as in `run_command`."""
    args = parse(arguments)
    return run_command("bench.scoring", lambda: measure(args))


if __name__ == "__main__":
    sys.exit(main())
