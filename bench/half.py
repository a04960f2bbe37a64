"""How far logits in 16 bits lie from those in float32, ours and those of transformers: `python -m bench.half`.

All three read the same 16-bit weights and the same prompt; the exact logits are those of our model in float32. Weights
are random, in the shapes of a preset of `bench.speed`.

    python -m bench.half --prose    # ours in bfloat16 and in 8 bits, with the weights of SmolLM2-135M, on plain English
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
import torch.nn.functional as F
from torch import Tensor

from bench import real
from bench.common import table
from bench.speed import PRESETS, Preset, make_inputs, write_checkpoint
from minillava.fast import optimize
from minillava.model import Llava
from minillava.quantised import to_int8
from weights import load_model

DTYPES = ("float16", "bfloat16")
PROMPT, STEPS, BATCH = 640, 64, 4  # tokens of a passage that are read at once, and one by one; passages at a time


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


@torch.inference_mode()
def step_logits(model: Llava, ids: Tensor) -> Tensor:
    """Logits of the last STEPS tokens of passages [B, N], each read by itself after the others: [B, STEPS, V]."""
    cache = model.new_cache(STEPS)
    found = [model.read(ids[:, :-STEPS], cache), *(model.read(ids[:, [at]], cache) for at in range(-STEPS, -1))]
    return torch.stack(found, dim=1).float()


def prose(count: int) -> list[list[str]]:
    """Rows of a table: perplexity of `count` passages, and how the likeliest tokens and logits differ."""
    path = real.find()
    exact, tokenizer = real.load(path)
    passages = torch.tensor(real.passages(tokenizer, count, "testing", PROMPT + STEPS))
    batches = passages.split(BATCH)
    right = [step_logits(exact, ids) for ids in batches]
    rows = []
    for name, change in (("float32", None), ("bfloat16", Llava.bfloat16), ("int8", to_int8)):
        model = real.load(path)[0]
        model = optimize(change(model) if change else model)
        logits = [step_logits(model, ids) for ids in batches]
        losses = [F.cross_entropy(one.flatten(0, 1), ids[:, -STEPS:].flatten(), reduction="none")
                  for one, ids in zip(logits, batches)]  # fmt: skip
        same = torch.cat([(one.argmax(-1) == other.argmax(-1)).flatten() for one, other in zip(logits, right)])
        most = max(float((one - other).abs().max()) for one, other in zip(logits, right))
        perplexity = float(torch.cat(losses).double().mean().exp())
        rows.append([name, f"{perplexity:.3f}", f"{same.double().mean():.1%}", f"{most:.3f}"])
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Prints a table in Markdown; exit code 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.half", description=(__doc__ or "").split("\n")[0])
    shapes = [name for name, preset in PRESETS.items() if preset.model is not None]
    parser.add_argument("--preset", default="laptop-1b", choices=shapes, help="shapes and lengths (default: laptop-1b)")
    parser.add_argument("--prose", action="store_true", help="measure the pretrained decoder on plain English instead")
    parser.add_argument("--passages", type=int, default=40, help=f"of {PROMPT} + {STEPS} tokens (default: 40)")
    args = parser.parse_args(arguments)
    if args.prose:
        columns = ["weights", "perplexity", "same likeliest token", "largest difference of a logit"]
        print(table(columns, prose(args.passages)))
        return 0
    rows = []
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as scratch:
            for name, (mean, most, same) in distances(PRESETS[args.preset], dtype, Path(scratch)).items():
                rows.append([dtype, name, f"{mean:.2e}", f"{most:.2e}", f"{same:.1%}"])
    print(table(["dtype", "", "root mean square", "largest", "same argmax"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("bench.half", main))
