"""What the programs in this folder share: a new process for each measurement, the memory at its peak, and tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch

from minillava.checks import LlavaError
from minillava.command import end_quietly

T = TypeVar("T")


def in_a_process(work: Callable[..., T], *arguments: object) -> T:
    """What `work` returns in a new process. Raises LlavaError if it fails there, or dies."""
    with ProcessPoolExecutor(1, get_context("spawn"), end_quietly) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool:
            raise LlavaError(f"The process for {arguments[0]} died; is there enough memory?") from None
        except (ImportError, RuntimeError) as error:
            raise LlavaError(f"{arguments[0]} cannot be measured here: {error}") from None


def peak(device: str = "cpu") -> int:
    """Bytes at the peak so far: of this process, or allocated on a GPU; 0 where that is not known, as on Windows."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    # `resource` would count what the parent held when it began this process.
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    head = f"| {' | '.join(columns)} |".replace("|  |", "| |")
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in rows]
    return "\n".join([head, "|---" * len(columns) + "|", *lines])
