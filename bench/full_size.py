"""Loads a checkpoint of exactly LLaVA-1.5-7B's shapes, and says what that takes: `python -m bench.full_size FOLDER`.

The checkpoint is made first if the folder has none: random weights in bfloat16, three shards, 13.5 GB. The peak is that
of anonymous memory (RssAnon: what a process really holds, without pages that are backed by the files), sampled every
10 ms by a thread.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.speed import LLAVA_7B
from weights import config_dict, empty_model, hub_name, load_model, write_json

SHARDS = 3


def make(folder: Path) -> None:
    """Writes the checkpoint, one shard in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = [(hub_name(name), p.shape) for name, p in empty_model(LLAVA_7B).named_parameters()]
    total, done = sum(math.prod(shape) for _, shape in parameters), 0
    parts: list[list[tuple[str, torch.Size]]] = [[] for _ in range(SHARDS)]
    for name, shape in parameters:
        parts[min(SHARDS - 1, done * SHARDS // total)].append((name, shape))
        done += math.prod(shape)
    index = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        state = {}
        for name, shape in part:
            noise = torch.randn(1 << 20).mul_(shape[-1] ** -0.5).bfloat16()  # repeated: 7 billion draws would take long
            state[name] = noise.repeat(math.ceil(math.prod(shape) / len(noise)))[: math.prod(shape)].view(shape).clone()
            index[name] = file
        save_file(state, folder / file, metadata={"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {"weight_map": index})
    write_json(folder / "config.json", config_dict(LLAVA_7B, "bfloat16"))


def anonymous() -> int:
    """Bytes of anonymous memory that this process holds now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.full_size", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if not (args.folder / "config.json").exists():
        make(args.folder)
    size = sum(path.stat().st_size for path in args.folder.glob("*.safetensors"))
    before, peak, loading = anonymous(), 0, True

    def watch() -> None:
        nonlocal peak
        while loading:
            peak = max(peak, anonymous())
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    model = load_model(args.folder, dtype=None)
    seconds = time.perf_counter() - start
    loading = False
    thread.join()
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": size,
        "seconds": round(seconds, 1),
        "gigabytes_a_second": round(size / seconds / 1e9, 2),
        "peak_over_size": round((peak - before) / size, 4),
    }
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
