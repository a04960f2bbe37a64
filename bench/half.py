"""How far logits in 16 bits lie from those in float32, ours and those of transformers: `python -m bench.half`.

All three read the same 16-bit weights and the same prompt; the exact logits are those of our model in float32. Weights
are random, in the shapes of a preset of `bench.speed`.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from minillava.command import end_quietly, run_command  # isort: skip

if __name__ == "__main__":
    end_quietly()

import torch
from torch import Tensor

from bench.speed import PRESETS, Preset, make_inputs, write_checkpoint
from weights import load_model

DTYPES = ("float16", "bfloat16")


def apart(logits: Tensor, exact: Tensor) -> tuple[float, float, float]:
    """Root mean square and largest difference, in standard deviations of the exact logits; share of equal argmaxes."""
    difference = (logits.double() - exact.double()) / exact.double().std()
    same = (logits.argmax(-1) == exact.argmax(-1)).double().mean()
    return float(difference.pow(2).mean().sqrt()), float(difference.abs().max()), float(same)


@torch.inference_mode()
def distances(preset: Preset, dtype: str, folder: Path) -> dict[str, tuple[float, float, float]]:
    """What `apart` says of ours and of transformers' logits."""
    from transformers import LlavaForConditionalGeneration

    config, preset = preset.model, replace(preset, dtype=dtype, device="cpu")
    assert config is not None
    write_checkpoint(config, folder, getattr(torch, dtype))
    inputs = make_inputs(config, preset)
    exact = load_model(folder, dtype=torch.float32, fast=True)(**inputs)
    gc.collect()
    found = {"minillava": apart(load_model(folder, dtype=None, fast=True)(**inputs), exact)}
    gc.collect()
    theirs: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    return found | {"transformers": apart(theirs(**inputs).logits, exact)}


def main(arguments: list[str] | None = None) -> int:
    """Prints a table in Markdown; exit code 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.half", description=(__doc__ or "").split("\n")[0])
    shapes = [name for name, preset in PRESETS.items() if preset.model is not None]
    parser.add_argument("--preset", default="laptop-1b", choices=shapes, help="shapes and lengths (default: laptop-1b)")
    args = parser.parse_args(arguments)
    print("| dtype | | root mean square | largest | same argmax |\n|---|---|---|---|---|")
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as scratch:
            for name, (mean, most, same) in distances(PRESETS[args.preset], dtype, Path(scratch)).items():
                print(f"| {dtype} | {name} | {mean:.2e} | {most:.2e} | {same:.1%} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("bench.half", main))
