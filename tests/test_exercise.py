"""The coursework: right bodies get their points, wrong ones and cheats do not; what is handed out, in, and graded."""

from __future__ import annotations

import importlib
import json
import operator
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from hypothesis import settings

from coursework import exercise, run_tests
from coursework.bodies import outline, put, refusal, take
from coursework.exercise import grade_one, main, pack, reference, remove, restore
from coursework.table import EXERCISES, FAULTY, Exercise
from minillava import explore


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A clone of the project as it stands here, without the largest files, which take long to zip."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone of the repository")
    root = tmp_path_factory.mktemp("clone") / "clone"
    exercise.write({name: content for name, content in reference(ROOT).items() if len(content) < 10**5}, root)
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return root


@pytest.fixture(scope="module")
def files(repository):
    return reference(repository)


@pytest.fixture(scope="module")
def handout(repository, tmp_path_factory):
    (repository / "notes.md").write_text("untracked: my solutions")
    out = tmp_path_factory.mktemp("handout") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explore, "main", lambda arguments: Path(arguments[0]).write_text("a page") and 0)
        main(["handout", str(out)], repository)
    return out


def student(folder, handout, **bodies):
    """A folder with the files to hand in, of which some bodies were written."""
    sources = {file: (handout / file).read_text() for file in exercise.HANDED_IN}
    for name, body in bodies.items():
        one = EXERCISES[name]
        sources[one.file] = put(sources[one.file], one.function, body)
    exercise.write({file: source.encode() for file, source in sources.items()}, folder)
    return folder


@pytest.fixture
def graded(files, handout, tmp_path):
    """The grade of a body."""
    return lambda name, body: grade_one(name, student(tmp_path, handout, **{name: body}), files)


def original(files, name):
    return take(files[EXERCISES[name].file].decode(), EXERCISES[name].function)


def in_this_process(one, files):
    """Runs the grader's tests here, with the code of one function replaced: a process would load torch again."""
    module = importlib.import_module(one.file.removesuffix(".py").replace("/", "."))
    scope, profile = {**vars(module)}, settings.default
    exec(compile(files[one.file], one.file, "exec"), scope)
    live, changed = map(operator.attrgetter(one.function), (module, SimpleNamespace(**scope)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "__code__", changed.__code__)
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # `run` sets it; here it is restored
        patch.chdir(ROOT)
        for name in [name for name in sys.modules if name.startswith(("test_", "conftest"))]:
            patch.delitem(sys.modules, name)  # tests remember the profile of hypothesis with which they were imported
        found = run_tests.run(one.tests)
    settings.register_profile("project", profile)
    settings.load_profile("project")
    return found


LOOP = """threshold, high = 0.0, 1.0
    while high - threshold > 1e-9:
        p = (threshold + high) / 2
        threshold, high = (p, high) if sizes(p).sum() <= total else (threshold, p)"""
# An exercise; a whole body, or what is replaced in the right one; its points. Tests share ten points equally; if the
# first fails, there are none. A bisection is right, too. FAULTY itself would count as not attempted.
BODIES = {
    "rope of neighbours": ("rope", ("x.chunk(2, dim=-1)", "x[..., ::2], x[..., 1::2]"), 0),
    "attention without its mask": ("attention", ("if mask is None:", "if True:"), 6),
    "patches with a class token always": ("patches", ("if self.class_embedding is not None:", "if True:"), 6.67),
    "scoring without its mask": ("scoring", ("if mask is not None:", "if False:"), 0),
    "published as given": ("published", FAULTY.replace("ranks", "places"), 0),
    "published, one fault mended": ("published", FAULTY.replace(".half()", ""), 5),
    "eviction transposed": ("eviction", ("argmin(-1)", "argmin(-1).mT"), 6.67),
    "importance of all weights at once": ("importance", ("total = torch", "block = length\n    total = torch"), 6.67),
    "cache that grows on": ("cache", ("torch.minimum(self.held + 1, capacity)", "self.held + 1"), 3.33),
    "search, README's loop": (
        "search",
        ("threshold = candidates[bisect_right(candidates, total, key=lambda p: int(sizes(p).sum())) - 1]", LOOP),
        10,
    ),
    "search with leftovers for the smallest": ("search", ("key=share", "key=lambda layer: counts[layer]"), 8),
    "allocator of equal shares": ("allocator", ("ratios.double()", "torch.ones_like(ratios).double()"), 0),
    "second without a fork": ("second", ("cache.fork()", "cache"), 5),
}


@pytest.mark.parametrize("name, body, points", BODIES.values(), ids=BODIES)
def test_a_body_gets_the_points_of_the_tests_that_it_passes(files, graded, monkeypatch, name, body, points):
    monkeypatch.setattr(exercise, "run", in_this_process)
    if isinstance(body, tuple):
        assert body[0] in original(files, name)
        body = original(files, name).replace(*body)
    found = graded(name, body)
    assert found.points == points, found.said
    assert ("failed first: " in found.said) == (points < 10)


CHEATS = {
    "import os\nos._exit(0)": "uses os",
    "import atexit\natexit.register(print)": "uses atexit",
    "from hypothesis import settings": "uses hypothesis",
    "torch.os.write(1, b'10 passed')": "uses os",
    "torch.load('/work/solution.pt')": "uses load",
    "open('tests/conftest.py', 'w').write('')": "uses open",
    "__import__('os').system('true')": "uses __import__",
    "getattr(torch, 'o' + 's').write(1, b'passed')": "uses getattr",
    "(lambda: 0).__globals__": "uses __globals__",
    "(x for x in []).gi_frame.f_back.f_globals": "uses f_globals",
    "torch.testing.assert_close = print": "changes torch.testing.assert_close",
    "self = torch\nself.equal = print": "uses self",
    "class Equal:\n    pass": "uses class",
    "from coursework.second import answers": "uses coursework.second",
}


@pytest.mark.parametrize("body", CHEATS)
def test_a_body_that_reaches_out_is_refused_unrun(graded, monkeypatch, body):
    monkeypatch.setattr(exercise, "run", None)
    found = graded("search", body + "\nreturn 0.0, curve\n")
    assert found.points == 0 and "refused: line " in found.said and CHEATS[body] in found.said


def test_a_right_body_is_graded_in_a_process_that_sees_no_way_to_this_clone(files, graded, monkeypatch):
    monkeypatch.setattr(exercise, "refusal", lambda source, function: "")
    blind = f"import os, sys\nassert 'PWD' not in os.environ and not [p for p in sys.path if {str(ROOT)!r} in p]\n"
    found = graded("published", blind + textwrap.dedent(original(files, "published")))
    assert (found.points, found.said) == (10, "2 of 2 tests")


HANGS = "import subprocess, time\nsubprocess.Popen(['sleep', '612.5'])\ntime.sleep(600)"


@pytest.mark.parametrize("body, said", [
    ("pass", ""), ("import os\nos.write(1, b'1 passed')\nos._exit(0)", "without a result (exit code 0)"),
    ("open('tests/conftest.py', 'a').write('#')", "were changed"), (HANGS, "did not end in 10 s"),
])  # fmt: skip
def test_what_the_look_does_not_find_gets_no_points_either(files, monkeypatch, body, said):
    """In real processes, with a test that whatever comes back passes, and that does not load torch."""
    small = {name: files[name] for name in ("coursework/__init__.py", "coursework/run_tests.py")}
    small |= {"tests/conftest.py": b"", "tests/test_body.py": b"import body\ndef test_it():\n    body.f()\n"}
    small["body.py"] = f"def f():\n{textwrap.indent(body, '    ')}\n".encode()
    monkeypatch.setattr(exercise, "PATIENCE", 10.0)
    one = Exercise("body.py", "f", minutes=1, names=("body::test_it",))
    found = exercise.run(one, small)
    assert found["passed"] == ([] if said else one.tests) and said in found["said"], found
    assert not subprocess.run(["pgrep", "-f", "sleep 612.5"], capture_output=True).stdout


@pytest.mark.parametrize(
    "content, reason",
    [(b"def search():\n    return " + b"-" * 10**5 + b"1\n", ""), (b"def search(a):\n    return '\0'\n", "null"),
     (b"def search(:\n", "line 1"), (b"def seek():\n    pass\n", "no such function"), (b"\xff", "utf-8"),
     (b"search = 3\n", "no such function"), (b"#" * (10**6 + 1), "1,000,001 bytes"), (None, "missing"),
     ("link", "is a link")],
)  # fmt: skip
def test_a_broken_file_costs_its_own_exercises(files, handout, tmp_path, content, reason):
    folder, path = student(tmp_path / "a", handout), tmp_path / "a" / "prefixkv.py"
    path.unlink()
    if content == "link":
        path.symlink_to(ROOT / "prefixkv.py")
    elif content is not None:
        path.write_bytes(content)
    found = grade_one("search", folder, files)
    assert found.points == 0 and "prefixkv.py: search cannot be used: " in found.said and reason in found.said
    assert grade_one("rope", folder, files).said == "not attempted"


@pytest.mark.parametrize("before, after", [
    ("\ufeff", ""), ("\f", ""), ("# \f \u2028 \x85\n", ""), ("(\n", "\nfor (\n"), ("\0\n", "\n"),
])  # fmt: skip
def test_a_body_is_found_whatever_python_takes_for_a_blank_and_with_a_fault_elsewhere(files, tmp_path, before, after):
    for one in EXERCISES.values():
        source = files[one.file].decode()
        exercise.write({one.file: (before + source + after).replace("\n", "\r\n").encode()}, tmp_path)
        other = exercise.handed_in(tmp_path, one.file)
        assert put(source, one.function, take(other, one.function)) == source
        assert after or put(other, one.function, take(source, one.function)) == other


def test_a_body_may_be_indented_otherwise_and_cannot_leave_its_function():
    source = "class A:\n    def f(self):\n        # why\n        return 2\n\nx = 1\n"
    assert take(source, "A.f") == "        # why\n        return 2\n"
    assert put(source, "A.f", "  if 1:\n      return 3\n") == source.replace("# why", "if 1:").replace(
        "return 2", "    return 3"
    )
    for body in ("        return 3\nx = 2\n", "        return 3\n    g = 4\n"):
        with pytest.raises(SyntaxError):
            put(source, "A.f", body)
    assert outline(source, "A.f")[1] == outline(source.replace("# why", "#"), "A.f")[1]


def test_a_handout_has_the_students_text_and_no_body(handout, files, capsys):
    names = {str(path.relative_to(handout)) for path in handout.rglob("*") if path.is_file()}
    added = {"COURSEWORK.md", "ANSWERS.md", exercise.REFERENCE, "page_7.html", "page_8.html", "page_9.html"}
    assert names == {*files} - {*exercise.INSTRUCTORS} | added  # nothing untracked
    text = (handout / "COURSEWORK.md").read_text()
    assert not any(word in text for word in ("remove", "restore", "instructor", "grade"))
    for name, one in EXERCISES.items():
        assert f"check {name}`, {one.minutes} minutes" in text and f"`{one.function}` in `{one.file}`" in text
        assert exercise.is_away((handout / one.file).read_text(), name)
        assert not refusal(files[one.file].decode(), one.function)  # the right body
        for file, test in (node.split("::") for node in one.tests):
            assert test in (ROOT / file).read_text()
    assert reference(handout) == files
    main(["check"], handout)
    assert capsys.readouterr().out.count("not attempted") == len(EXERCISES)
    with pytest.raises(ValueError, match="This is a handout"):
        main(["remove", "rope"], handout)


def test_a_class_is_graded_into_a_table_and_equal_bodies_are_told(handout, files, tmp_path, monkeypatch, capsys):
    def run(one, files):
        return {"passed": one.tests[b"x = x\n" in files[one.file] :], "first": "", "said": ""}  # not the definition

    monkeypatch.setattr(exercise, "run", run)
    monkeypatch.chdir(tmp_path)
    for name, mark in (("ann", ""), ("eve", "    # mine\n"), ("dan", "    x = x\n")):
        student(tmp_path / name, handout, rope=mark + original(files, "rope"))
    main(["submit", "cas.zip"], shutil.copytree(handout, tmp_path / "bob"))
    assert capsys.readouterr().out.count("not attempted") == len(EXERCISES)
    assert {*zipfile.ZipFile("cas.zip").namelist()} == {*exercise.HANDED_IN, "ANSWERS.md"}
    exercise.write({exercise.REFERENCE: pack(files)}, tmp_path / "clone")  # as in Gradescope's zip, without git
    only = ["--only", "rope", "--only", "cache", "--out", "out"]
    main(["grade", "ann", "eve", "dan", "cas.zip", *only], tmp_path / "clone")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the same")]
    assert told == ["the same rope: ann, eve"]  # not cache, which nobody attempted
    rows = (tmp_path / "out" / "points.csv").read_text().splitlines()
    points = [f"{name},10.0,0.0,10.0" for name in ("ann", "eve")] + [f"{name},0.0,0.0,0.0" for name in ("dan", "cas")]
    assert rows == ["student,rope,cache,all", *points]
    results = json.loads((tmp_path / "out" / "ann" / "results.json").read_text())
    expected = {"name": "cache", "score": 0.0, "max_score": 10.0, "output": "not attempted"}
    assert results["score"] == 10 and results["tests"][1] == expected
    main(["grade", "ann", str(tmp_path / "ann"), "--only", "rope"], tmp_path / "clone")  # two of one name
    assert f"the same rope: ann, {str(tmp_path)[1:].replace('/', '_')}_ann\n" in capsys.readouterr().out


def test_gradescopes_zip_holds_a_repository_that_grades_without_git(repository, files, tmp_path):
    main(["autograder", str(tmp_path / "a.zip"), "--only", "rope"], repository)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        names = archive.namelist()
        assert {"setup.sh", "run_autograder"} < {*names} and not any(".git/" in name for name in names)
        assert b"--only rope" in archive.read("run_autograder")
        assert archive.getinfo("run_autograder").external_attr >> 16 & 0o111  # it can be run
        exercise.write({exercise.REFERENCE: archive.read(f"repository/{exercise.REFERENCE}")}, tmp_path)
    assert reference(tmp_path) == files


def test_a_body_that_was_taken_away_comes_back_to_the_byte(repository, files, tmp_path):
    root = shutil.copytree(repository, tmp_path / "clone")
    remove("search", root), remove("rope", root)
    with pytest.raises(ValueError, match="away already"):
        remove("rope", root)
    for action in ("handout", "solutions", "autograder", "grade"):
        with pytest.raises(ValueError, match="restore it first"):
            main([action, str(tmp_path)], root)
    path = root / "prefixkv.py"
    own = path.read_text().replace('raise NotImplementedError("exercise: search")', "return 0.0, curve")
    path.write_text("def search(\n")
    with pytest.raises(ValueError, match=r"search cannot be found in prefixkv.py \(line 1"):
        restore("search", root)
    path.write_text(own)
    restore("search", root), restore("rope", root)
    assert (root / ".exercises" / "search.solution").read_text().strip() == "return 0.0, curve"
    assert reference(root) == files
    with pytest.raises(ValueError, match="No body is away"):
        restore("rope", root)


def test_solutions_are_functions_and_nothing_is_written_over(repository, tmp_path):
    main(["solutions", str(tmp_path / "s")], repository)
    assert sorted(path.stem for path in (tmp_path / "s").iterdir()) == sorted(EXERCISES)
    assert (tmp_path / "s" / "eviction.py").read_text().startswith("def victim(")
    for action, name, sentence in (("handout", "s", "a new name"), ("grade", "none", "neither a folder nor a zip")):
        with pytest.raises(ValueError, match=sentence):
            main([action, str(tmp_path / name)], repository)


@pytest.mark.parametrize("arguments", [[], ["remove"], ["remove", "nothing"], ["fix", "rope"], ["list", "rope"]])
def test_wrong_arguments_end_with_2(arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
