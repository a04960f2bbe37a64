"""Loads a checkpoint of exactly LLaVA-1.5-7B's shapes, and says what that takes: `python -m bench.full_size FOLDER`.

The checkpoint is made first if the folder has none: random weights in bfloat16, 14.1 GB. They are mapped, so that pages
are read when they are used; with `--read` they are copied into memory at once. The peak is that of anonymous memory
(RssAnon: what a process holds, without pages that are backed by the files), sampled every 10 ms by a thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path

from minillava.command import end_quietly, run_command  # isort: skip

if __name__ == "__main__":
    end_quietly()

import torch

from bench.speed import LLAVA_7B, write_checkpoint
from weights import load_model


def anonymous() -> int:
    """Bytes of anonymous memory that this process holds now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.full_size", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if not (args.folder / "config.json").exists():
        write_checkpoint(LLAVA_7B, args.folder, torch.bfloat16)
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
    model = load_model(args.folder, dtype=None, fast=True)
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
    sys.exit(run_command("bench.full_size", main))
