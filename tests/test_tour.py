"""`tour.py` runs, its cells are short and assert something, a wrong formula makes it fail; `tour.ipynb` is the same."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, ends_with_this_process

TOUR = (ROOT / "tour.py").read_text(encoding="utf-8")


def cells(text: str) -> list[tuple[str, str]]:
    """Kind and source of every cell of a file in the percent format."""
    found = []
    for kind, source in re.findall(r"(?ms)^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", text):
        lines = source.strip().splitlines()
        found.append(
            ("markdown" if kind else "code", "\n".join(re.sub("^# ?", "", line) if kind else line for line in lines))
        )
    return found


CODE = [source for kind, source in cells(TOUR) if kind == "code"]


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a copy of the tour that finds the checkpoint where it is; returns what it prints."""

    def tour(text):
        path = tmp_path / "tour.py"
        path.write_text(text.replace("Path(__file__).resolve().parent", f"Path({str(ROOT)!r})"), encoding="utf-8")
        with torch.enable_grad():  # which the tour switches off, and this puts back
            runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return tour


def test_the_tour_runs_to_its_end(run):
    assert "full cache, " in run(TOUR)


@pytest.mark.parametrize("cell", CODE, ids=range(len(CODE)))
def test_a_cell_is_short_and_asserts_what_it_teaches(cell):
    assert len(cell.splitlines()) < 25
    assert re.search(r"^( {4})?assert ", cell, re.MULTILINE) or "def show" in cell


def test_the_notebook_has_the_tours_cells():
    notebook = json.loads((ROOT / "tour.ipynb").read_text(encoding="utf-8"))
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert found == cells(TOUR)


def test_the_notebook_runs_with_its_pictures_and_prints_what_it_shows(run, monkeypatch):
    notebook = json.loads((ROOT / "tour.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 8
    assert all(output["output_type"] in ("stream", "display_data") for output in outputs)
    printed = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    shown = run("\n".join("".join(cell["source"]) for cell in code))

    def shape(text: str) -> str:  # another processor may round otherwise
        return re.sub(r"[\d.]+|#+", "0", text)

    assert shape(shown) == shape(printed)


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
def test_a_wrong_formula_makes_the_tour_fail(run, right, wrong):
    assert TOUR.count(right) == 1
    with pytest.raises(AssertionError):
        run(TOUR.replace(right, wrong))


@pytest.mark.parametrize("command", ["tour.py", "demo.py --max-new-tokens 1", "-m weights inspect minillava/tiny"])
def test_without_numpy_nothing_is_said_about_it(tmp_path, command):
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError('No module named numpy')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, env=environment, cwd=ROOT,
                          preexec_fn=ends_with_this_process)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
