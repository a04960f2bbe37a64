"""COURSEWORK.md's exercises: a body taken away fails its tests, put back it is what it was to the byte."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from coursework import exercise
from coursework.exercise import EXERCISES, body, main, remove, restore

COURSEWORK = (ROOT / "COURSEWORK.md").read_text(encoding="utf-8")


@pytest.fixture
def tree(tmp_path):
    """A copy of the project's own files."""
    for name in ("minillava", "bench", "train", "coursework", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("*.md")]:
        shutil.copy(path, tmp_path)
    return tmp_path


def contents(tree):
    return {path: path.read_bytes() for path in tree.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


@pytest.mark.parametrize("name", EXERCISES)
def test_without_its_body_the_named_tests_fail_and_restored_it_is_what_it_was(tree, name):
    before = contents(tree)
    remove(name, tree)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *EXERCISES[name].tests],
        cwd=tree, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tree)},
    )  # fmt: skip
    closing = done.stdout.splitlines()[-1]
    assert done.returncode == 1 and " failed" in closing and "passed" not in closing, done.stdout[-2000:]
    assert f"exercise: {name}" in done.stdout
    shutil.rmtree(tree / ".hypothesis", ignore_errors=True)
    restore(name, tree)
    assert contents(tree) == before


@pytest.mark.parametrize("name", EXERCISES)
def test_the_coursework_names_the_function_and_its_tests(name):
    assert f"remove {name}" in COURSEWORK
    assert f"`{EXERCISES[name].function}`" in COURSEWORK
    for test in EXERCISES[name].tests:
        assert test.split("::")[1] in COURSEWORK


def test_a_docstring_stays_and_a_solution_is_kept(tree):
    path = tree / "prefixkv.py"
    original = path.read_text()
    remove("search", tree)
    hollow = path.read_text()
    assert "The largest threshold p" in hollow and "middle" not in hollow
    path.write_text(hollow.replace('raise NotImplementedError("exercise: search")', "return 0.0, curve.sum(-1)"))
    restore("search", tree)
    assert path.read_text() == original
    assert (tree / ".exercises" / "search.solution").read_text().strip() == "return 0.0, curve.sum(-1)"


@pytest.mark.parametrize(
    "broken, reason",
    [("def search(curve:\n", "line "), ("def seek(curve, total, protected):\n    pass\n", "there is none")],
)
def test_a_solution_that_cannot_be_read_is_told_and_the_original_named(tree, broken, reason):
    remove("search", tree)
    path = tree / "prefixkv.py"
    hollow = path.read_text()
    path.write_text(broken)
    with pytest.raises(SystemExit, match=rf"search cannot be found in prefixkv.py \({reason}.*.exercises.search"):
        restore("search", tree)
    path.write_text(hollow)
    restore("search", tree)
    assert "candidates" in path.read_text()


def test_what_is_away_is_not_taken_again_nor_what_is_there_put_back(tree):
    with pytest.raises(SystemExit, match="not away"):
        restore("rope", tree)
    remove("rope", tree)
    with pytest.raises(SystemExit, match="away already"):
        remove("rope", tree)


def test_a_method_is_found_in_its_class():
    source = (
        "class A:\n    def f(self):\n        return 1\n\nclass B:\n    def f(self):\n        # why\n        return 2\n"
    )
    start, end = body(source, "B.f")
    assert source[start:end] == "        # why\n        return 2\n"


@pytest.mark.parametrize("arguments", [[], ["remove"], ["remove", "nothing"], ["fix", "rope"]])
def test_wrong_arguments_end_with_2(arguments, capsys):
    assert main(arguments) == 2
    assert "exercises:" in capsys.readouterr().err


def test_the_list_names_all(capsys):
    assert main(["list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(EXERCISES) == 8
    assert exercise.ROOT == ROOT
