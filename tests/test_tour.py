"""`tour.py` runs, its cells are short and each asserts something, and a wrong formula makes it fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

TOUR = (ROOT / "tour.py").read_text(encoding="utf-8")
CELLS = re.split(r"(?m)^# %% ", TOUR)[1:]


def run(folder, text):
    """Runs a copy of the tour that finds the code and the checkpoint where they are."""
    path = folder / "tour.py"
    path.write_text(text.replace("Path(__file__).resolve().parent", f"Path({str(ROOT)!r})"), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=environment, cwd=folder)


def test_the_tour_runs_to_its_end(tmp_path):
    done = run(tmp_path, TOUR)
    assert done.returncode == 0, done.stderr
    assert "full cache, " in done.stdout.splitlines()[-2]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.split(".")[0])
def test_a_cell_is_short_and_asserts_what_it_teaches(cell):
    assert len(cell.strip().splitlines()) < 25
    assert re.search(r"^( {4})?assert ", cell, re.MULTILINE)


WRONG = {
    "query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)": "query @ key.mT).softmax(-1)",
    "torch.sigmoid(1.702 * inner)": "torch.sigmoid(inner)",
    "future = torch.ones(length, length).triu(1)": "future = torch.ones(length, length).triu(2)",
    "key.repeat_interleave(shared, 1).mT": "key.repeat(1, shared, 1, 1).mT",
    "by_hand = weights.mean(1).sum(1)": "by_hand = weights.sum(1).sum(1)",
    "(curve < p).sum(-1) + protected": "(curve < p).sum(-1) + 1 + protected",
    "order[0] = order[-1] = torch.inf": "order[0] = torch.inf",
}


@pytest.mark.parametrize("right, wrong", WRONG.items(), ids=range(len(WRONG)))
def test_a_wrong_formula_makes_the_tour_fail(tmp_path, right, wrong):
    assert TOUR.count(right) == 1
    done = run(tmp_path, TOUR.replace(right, wrong))
    assert "AssertionError" in done.stderr


@pytest.mark.parametrize("command", ["tour.py", "demo.py --max-new-tokens 1", "-m weights inspect minillava/tiny"])
def test_without_numpy_nothing_is_said_about_it(tmp_path, command):
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError('No module named numpy')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
