"""`tour.py` runs, its cells are short and assert something, a wrong formula makes it fail; `tour.ipynb` is the same."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, ends_with_this_process

NOTEBOOK = json.loads((ROOT / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in NOTEBOOK if cell["cell_type"] == "code"]
WRONG = {
    "query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)": "query @ key.mT).softmax(-1)",
    "torch.sigmoid(1.702 * inner)": "torch.sigmoid(inner)",
    "future = torch.ones(length, length).triu(1)": "future = torch.ones(length, length).triu(2)",
    "key.repeat_interleave(shared, 1).mT": "key.repeat(1, shared, 1, 1).mT",
    "by_hand = weights.mean(1).sum(1)": "by_hand = weights.sum(1).sum(1)",
    "(curve < p).sum(-1) + protected": "(curve < p).sum(-1) + 1 + protected",
    "order[0] = order[-1] = torch.inf": "order[0] = torch.inf",
}


def test_the_notebook_has_the_tours_cells():
    found = []
    tour = (ROOT / "tour.py").read_text(encoding="utf-8")
    for kind, source in re.findall(r"(?ms)^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", tour):
        text = source.strip()
        found.append(("markdown", re.sub("(?m)^# ?", "", text)) if kind else ("code", text))
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in NOTEBOOK] == found


def test_a_cell_is_short_and_asserts_what_it_teaches():
    for cell in CODE:
        assert len(cell.splitlines()) < 25
        assert re.search(r"^( {4})?assert ", cell, re.MULTILINE) or "def show" in cell


def test_the_notebook_prints_what_it_shows_and_a_wrong_formula_makes_its_cell_fail(monkeypatch):
    outputs = [output for cell in NOTEBOOK for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 8
    assert all(output["output_type"] in ("stream", "display_data") for output in outputs)
    printed = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))  # pictures are drawn in a notebook
    shown, names, left = io.StringIO(), {}, dict(WRONG)
    with torch.enable_grad():  # which the tour switches off, and this puts back
        for cell in CODE:
            for right in [formula for formula in left if formula in cell]:
                with pytest.raises(AssertionError), contextlib.redirect_stdout(io.StringIO()):
                    exec(cell.replace(right, left.pop(right)), {**names})
            with contextlib.redirect_stdout(shown):
                exec(cell, names)
    assert not left

    def shape(text: str) -> str:  # another processor may round otherwise
        return re.sub(r"[\d.]+|#+", "0", text)

    assert shape(shown.getvalue()) == shape(printed)


@pytest.mark.parametrize("command", ["tour.py", "demo.py --max-new-tokens 1", "-m weights inspect minillava/tiny"])
def test_without_numpy_a_command_runs_to_its_end_and_nothing_is_said_about_it(tmp_path, command):
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError('No module named numpy')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, env=environment, cwd=ROOT,
                          preexec_fn=ends_with_this_process)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
