"""What all tests share: paths, options, and the checkpoints that most of them use.

With `pytest -n`, the process that hands out the tests reads this file, too. So it imports nothing that takes seconds.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import Phase, settings

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "minillava" / "tiny"
GOLDEN = ROOT.parent / "shared" / "golden"
PLANS = ROOT.parent / "shared" / "paper" / "published_plans"

# Before torch is imported. `pytest -n` has a process for each core; what the tests start has as many threads, too.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else str(min(2, os.cpu_count() or 1))


def pytest_addoption(parser):
    parser.addoption(
        "--sweep", action="store_true", help="the same tests with more of everything: examples, tokens, seconds"
    )


def pytest_configure(config):
    """Every test runs either way. Without --sweep, those that search at random search for less long.

    The profile `quick`, with `--hypothesis-profile`, is for tests that fail at once.
    """
    settings.register_profile("project", deadline=None, derandomize=True,
                              max_examples=100 if config.getoption("--sweep") else 10)  # fmt: skip
    settings.register_profile("quick", deadline=None, derandomize=True, database=None, max_examples=5,
                              phases=[Phase.explicit, Phase.generate])  # fmt: skip
    settings.load_profile(config.getoption("--hypothesis-profile", None) or "project")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Processes of `pytest -n auto`: one a core, but no more than four, since each takes up to 2 GB."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.fixture(scope="session")
def sweep(request) -> bool:
    """Whether tests may take long."""
    return request.config.getoption("--sweep")


@pytest.fixture(scope="session")
def tokens(sweep) -> int:
    """How many greedy tokens are compared."""
    return 64 if sweep else 16


@pytest.fixture(scope="session")
def tiny():
    """The embedded checkpoint: (model, processor)."""
    import weights

    return weights.load(TINY)


@pytest.fixture(scope="session")
def tiny_reference():
    """The embedded checkpoint as transformers loads it, in float32."""
    import torch
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A random checkpoint with grouped-query attention: (folder, transformers' model, our model, processor)."""
    from checkpoints import reference, write

    import weights

    model = reference(kv_heads=2)
    folder = write(model, tmp_path_factory.mktemp("small"), "disk5")
    return folder, model, *weights.load(folder)
