"""`tour.py` runs, its cells are short and assert something, a wrong formula makes it fail; `tour.ipynb` is the same.

numpy is no dependency: without it, torch must not warn.
"""

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

TOUR = (ROOT / "tour.py").read_text(encoding="utf-8")
NOTEBOOK = json.loads((ROOT / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in NOTEBOOK if cell["cell_type"] == "code"]
LOOPS = {"i", "layer", "step"}  # names that several cells may bind
WRONG = {
    "q @ k.mT / q.shape[-1] ** 0.5": "q @ k.mT",
    "torch.sigmoid(1.702 * inner)": "torch.sigmoid(inner)",
    "future = torch.ones(length, length).triu(1)": "future = torch.ones(length, length).triu(2)",
    "key.repeat_interleave(shared, 1).mT": "key.repeat(1, shared, 1, 1).mT",
    "while len(answer) < 96": "while len(answer) < 2",
    "received = weights.mean(1).sum(1)": "received = weights.sum(1).sum(1)",
    "(curve < p).sum(-1) + protected": "(curve < p).sum(-1) + 1 + protected",
    "order[0] = order[-1] = torch.inf": "order[0] = torch.inf",
    "- QUEUED": "- QUEUED - 10",
    "GOLDEN + i / layers": "GOLDEN",
    "1.3 + math.log(6), 0.2": "1.3 + 6, 0.2",
    "torch.arange(1, length + 1).double() * GOLDEN": "torch.arange(1, length + 1).double() * 0.3",
    "/ 3).half()": "/ 4).half()",
    "reply_ids[:-1]]": "reply_ids]",
}


def short(source):
    """The tour, or a cell, with answers of four tokens."""
    return re.sub(r"\b96\b", "4", source)


def test_the_notebook_has_the_tours_cells():
    found = []
    for kind, source in re.findall(r"(?ms)^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", TOUR):
        text = source.strip()
        found.append(("markdown", re.sub("(?m)^# ?", "", text)) if kind else ("code", text))
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in NOTEBOOK] == found


def test_a_cell_is_short_and_asserts_what_it_teaches():
    for cell in CODE:
        assert len(cell.splitlines()) < 25
        assert re.search(r"^( {4})?assert ", cell, re.MULTILINE) or "def show" in cell


def test_the_notebook_prints_what_it_shows_in_any_order_and_a_wrong_formula_makes_its_cell_fail(monkeypatch):
    outputs = [cell["outputs"] for cell in NOTEBOOK if cell["cell_type"] == "code"]
    kinds = ["image/png" in output.get("data", {}) or output["name"] for cell in outputs for output in cell]
    assert kinds.count(True) == 10 and set(kinds) == {True, "stdout"}
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))  # pictures are drawn in a notebook
    names, left = {}, dict(WRONG)

    def run(cell: str, scope: dict) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(cell, scope)
        return re.sub(r"[\d.]+|#+", "0", printed.getvalue())  # another processor may round otherwise

    with torch.enable_grad():  # which the tour switches off, and this puts back
        printed, bound = [], []
        for cell in CODE:
            for right in [formula for formula in left if formula in cell]:
                with pytest.raises(AssertionError):
                    run(short(cell.replace(right, left.pop(right))), {**names, "plt": None})
            before = {**names}
            printed.append(run(cell, names))
            bound += [name for name in names.keys() - LOOPS if names[name] is not before.get(name)]
        assert not left and len(bound) == len(set(bound))  # no name gets a second meaning
        shown = ["".join("".join(output.get("text", "")) for output in cell) for cell in outputs]
        assert printed == [re.sub(r"[\d.]+|#+", "0", text) for text in shown]
        names["plt"] = None
        for cell, before in zip(CODE[:1:-1], printed[:1:-1]):
            assert run(short(cell), names) == before or short(cell) != cell


PROGRAMS = """import runpy, sys, demo, weights
assert demo.main(["--max-new-tokens", "1"]) == weights.main(["inspect", "minillava/tiny"]) == 0
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_without_numpy_programs_run_to_their_end_and_nothing_is_said_about_it(tmp_path):
    assert CODE[0].startswith("from minillava import")  # which silences torch: in the process below, demo.py did
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError('No module named numpy')")
    (tmp_path / "tour.py").write_text(short(TOUR), encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", PROGRAMS, tmp_path / "tour.py"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=ROOT,
                          preexec_fn=ends_with_this_process)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("bytes of keys and values") == 1
