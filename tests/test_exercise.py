"""The coursework's exercises: a body taken away fails its tests, put back it is what it was to the byte; grades."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, ends_with_this_process
from hypothesis import given, settings
from hypothesis import strategies as st

from coursework import exercise
from coursework.exercise import EXERCISES, body, grade_one, gradescope, handout, main, remove, restore, solutions, swap
from coursework.published import compress

COURSEWORK = (ROOT / "coursework" / "README.md").read_text(encoding="utf-8")


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


@contextlib.contextmanager
def taken_from(tree, name):
    """Inside, an exercise's function has the code that it has in a copy of the project."""
    one = EXERCISES[name]
    module = importlib.import_module(one.file.removesuffix(".py").replace("/", "."))
    scope = dict(vars(module))
    exec(compile((tree / one.file).read_text(), str(tree / one.file), "exec"), scope)
    live, copied = module, SimpleNamespace(**scope)
    for part in one.function.split("."):
        live, copied = getattr(live, part), getattr(copied, part)
    before, live.__code__ = live.__code__, copied.__code__
    try:
        yield
    finally:
        live.__code__ = before


def run_tests(*tests):
    """pytest within pytest, for tests that pass or fail after few examples: exit code and what it prints."""
    before = settings.default
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = pytest.main(["--tb=line", "-p", "no:cacheprovider", "--hypothesis-profile", "quick", *tests])
    finally:
        settings.register_profile("project", before)
        settings.load_profile("project")
    return SimpleNamespace(returncode=int(code), stdout=out.getvalue(), stderr="")


@pytest.mark.parametrize("name", EXERCISES)
def test_without_its_body_the_named_tests_fail_and_restored_it_is_what_it_was(tree, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = contents(tree)
    remove(name, tree)
    with taken_from(tree, name):
        done = run_tests(*EXERCISES[name].tests)
    closing = done.stdout.splitlines()[-1]
    assert done.returncode == 1 and " failed" in closing and "passed" not in closing, done.stdout[-2000:]
    assert f"exercise: {name}" in done.stdout or EXERCISES[name].given
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
    assert "The largest threshold p" in hollow and "bisect_right(" not in hollow
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
    with pytest.raises(ValueError, match=rf"search cannot be found in prefixkv.py \({reason}.*.exercises.search"):
        restore("search", tree)
    path.write_text(hollow)
    restore("search", tree)
    assert "candidates" in path.read_text()


def test_what_is_away_is_not_taken_again_nor_what_is_there_put_back(tree):
    with pytest.raises(ValueError, match="not away"):
        restore("rope", tree)
    remove("rope", tree)
    with pytest.raises(ValueError, match="away already"):
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
    assert len(capsys.readouterr().out.splitlines()) == len(EXERCISES) == 10
    assert exercise.ROOT == ROOT


# ---------------------------------------------------------------- the exercise `published`


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(2, 30), st.data())
def test_the_most_important_tokens_stay_in_every_layer(seed, layers, length, data):
    scores = torch.rand(layers, length, generator=torch.Generator().manual_seed(seed))
    start = data.draw(st.integers(0, length))
    counts = torch.tensor([data.draw(st.integers(start, length)) for _ in range(layers)])
    kept, _ = compress(scores, counts, start)
    assert kept.sum(1).tolist() == counts.tolist() and kept[:, :start].all()
    for layer in range(layers):
        rest = scores[layer, start:].tolist()
        best = sorted(range(len(rest)), key=lambda i: -rest[i])[: int(counts[layer]) - start]
        assert kept[layer, start:].nonzero()[:, 0].tolist() == sorted(best)


@given(st.integers(1, 4), st.integers(1, 30), st.data())
def test_the_next_token_stands_behind_the_whole_prompt(layers, length, data):
    counts = torch.tensor([data.draw(st.integers(1, length)) for _ in range(layers)])
    assert compress(torch.rand(layers, length), counts)[1] == length


# ---------------------------------------------------------------- for instructors


@pytest.fixture(scope="module")
def handed_out(tmp_path_factory):
    """What a student gets. The repository's own copy has no history here, so one is made."""
    root = tmp_path_factory.mktemp("repository")
    for name in exercise.files(ROOT) if (ROOT / ".git").exists() else []:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    if not (root / "prefixkv.py").exists():
        pytest.skip("this is no clone of the repository")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    out = tmp_path_factory.mktemp("handout") / "out"
    handout(out, root)
    return root, out


def test_a_handout_has_no_body_and_nowhere_to_look_it_up(handed_out):
    root, out = handed_out
    assert not (out / ".git").exists() and not (out / ".exercises").exists()
    for name, one in EXERCISES.items():
        source = (out / one.file).read_text()
        start, end = body(source, one.function)
        assert source[start:end] == one.hole
        lines = (root / one.file).read_text().splitlines()
        first = next(line for line in lines if f"def {one.function.split('.')[-1]}(" in line)
        assert first in source  # signature and docstring stay
        with pytest.raises(ValueError, match="away already"):
            remove(name, out)


def test_solutions_are_the_functions_with_their_bodies(handed_out, tmp_path):
    root, _ = handed_out
    solutions(tmp_path / "solutions", root)
    assert sorted(path.stem for path in (tmp_path / "solutions").iterdir()) == sorted(EXERCISES)
    for name, one in EXERCISES.items():
        text = (tmp_path / "solutions" / f"{name}.py").read_text()
        assert text.startswith(f"def {one.function.split('.')[-1]}(") and "NotImplementedError" not in text


def in_this_process(command, cwd, timeout, **options):
    """In place of `subprocess.run`: the same tests of the same body."""
    assert command[:3] == [sys.executable, "-m", "pytest"] and timeout == exercise.PATIENCE
    name = next(name for name, one in EXERCISES.items() if command[-1] in one.tests)
    with taken_from(Path(cwd), name):
        return run_tests(command[-1])


def test_a_body_is_graded_in_a_process_of_its_own(handed_out, tmp_path, monkeypatch):
    root, out = handed_out
    monkeypatch.setattr(exercise.subprocess, "run", partial(subprocess.run, preexec_fn=ends_with_this_process))
    submission = shutil.copytree(out, tmp_path / "submission")
    swap(submission / "minillava" / "model.py", "KVCache.take_slot", "        raise ValueError('not yet')\n")
    found = grade_one("cache", submission, root)
    assert found.points == 0 and "1 failed" in found.said and "not yet" in found.said


def test_a_right_body_gets_all_points_and_a_wrong_one_those_of_the_tests_it_passes(handed_out, tmp_path, monkeypatch):
    root, out = handed_out
    listed = exercise.files(root)
    monkeypatch.setattr(exercise, "files", lambda root: listed)
    monkeypatch.setattr(exercise.subprocess, "run", in_this_process)
    monkeypatch.chdir(ROOT)
    submission = shutil.copytree(out, tmp_path / "submission")
    original = (root / "prefixkv.py").read_text()
    start, end = body(original, "PrefixKV.victim")
    right = original[start:end]
    path = submission / "prefixkv.py"
    swap(path, "PrefixKV.victim", right)
    assert grade_one("eviction", submission, root).points == 10
    swap(path, "PrefixKV.victim", right.replace("argmin", "argmax"))
    wrong = grade_one("eviction", submission, root)
    assert wrong.points == 0 and "failed" in wrong.said
    published = submission / "coursework" / "published.py"
    half = EXERCISES["published"].hole.replace("int(counts[0])", "scores.shape[1]")  # one fault of two
    swap(published, "compress", half)
    assert grade_one("published", submission, root).points == 5
    assert grade_one("search", submission, root).said == "not attempted"
    path.write_text("def search(:\n")
    assert "prefixkv.py: search cannot be read" in grade_one("search", submission, root).said
    path.write_text("def seek():\n    pass\n")
    assert "has no such function" in grade_one("search", submission, root).said
    (submission / "prefixkv.py").unlink()
    assert grade_one("search", submission, root).points == 0


def test_the_results_file_has_the_fields_that_gradescope_reads(handed_out):
    root, out = handed_out
    results = json.loads(gradescope([grade_one(name, out, root) for name in EXERCISES]))
    assert results["score"] == 0 and len(results["tests"]) == 10
    assert results["tests"][0] == {"name": "patches", "score": 0.0, "max_score": 10.0, "output": "not attempted"}


def test_nothing_is_written_over_and_a_repository_with_a_hole_is_refused(handed_out, tmp_path):
    _, out = handed_out
    (tmp_path / "old").mkdir()
    for action in ("handout", "solutions"):
        with pytest.raises(ValueError, match="expected a new folder"):
            main([action, str(tmp_path / "old")])
    with pytest.raises(ValueError, match="no folder"):
        main(["grade", str(tmp_path / "none")])
    with pytest.raises(ValueError, match="is away; restore it first"):
        handout(tmp_path / "new", out)
    assert not (tmp_path / "new").exists()
