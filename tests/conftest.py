"""What all tests share: paths, options, and the checkpoints that most of them use.

With `pytest -n`, the process that hands out the tests imports this file but runs none. So torch, transformers and
`weights` are imported where they are used.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from minillava import TINY

ROOT = Path(__file__).resolve().parent.parent
# Beside the clone on the authors' machine; without them, the tests that need them are skipped.
GOLDEN = ROOT.parent / "shared" / "golden"
PLANS = ROOT.parent / "shared" / "paper" / "published_plans"

gc.set_threshold(100_000)  # looking for cycles after every 700 objects takes 4 % of the time
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# torch reads these once, when it is imported; so do the programs that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:  # one of the processes of `pytest -n`
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
else:
    os.environ.setdefault("OMP_NUM_THREADS", str(min(2, CORES)))
if "torch" in sys.modules:  # a plugin was faster
    sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def ends_with_this_process():
    """For `preexec_fn` of a process that a test starts: on Linux, the process goes with the tests, even if killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def pytest_addoption(parser):
    parser.addoption("--sweep", action="store_true", help="the same tests with more examples, tokens and seconds")


def pytest_configure(config):
    """Without --sweep, tests take fewer examples, tokens and pictures."""
    examples = 100 if config.getoption("--sweep") else 15
    settings.register_profile("project", deadline=None, derandomize=True, max_examples=examples)
    settings.load_profile(config.getoption("--hypothesis-profile", None) or "project")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Processes of `pytest -n auto`: one a core, but no more than four, since each takes up to 2 GB."""
    return min(4, CORES)


@pytest.fixture(scope="session")
def sweep(request) -> bool:
    """Whether tests may take long."""
    return request.config.getoption("--sweep")


@pytest.fixture(scope="session")
def new_tokens(sweep) -> int:
    """How many tokens are generated and compared."""
    return 64 if sweep else 16


@pytest.fixture(scope="session")
def tiny():
    """The embedded checkpoint, fast: (model, processor)."""
    import weights

    return weights.load(TINY, fast=True)


@pytest.fixture(scope="session")
def tiny_reference():
    """The embedded checkpoint as transformers loads it, in float32."""
    import torch
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A random checkpoint with grouped-query attention: (folder, transformers' model, our fast one, processor)."""
    from checkpoints import reference, write

    import weights

    model = reference(kv_heads=2)
    folder = write(model, tmp_path_factory.mktemp("small"))
    return folder, model, *weights.load(folder, fast=True)
