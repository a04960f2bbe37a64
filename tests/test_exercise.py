"""The coursework: right bodies get their points, wrong ones and cheats do not; what is handed out, in, and graded."""

from __future__ import annotations

import csv
import functools
import importlib
import io
import json
import shutil
import subprocess
import zipfile
from types import SimpleNamespace

import pytest
from conftest import ROOT
from hypothesis import settings

from coursework import exercise, graded
from coursework.bodies import outline, put, refusal, take
from coursework.exercise import grade_one, main, pack, reference, remove, restore
from coursework.table import EXERCISES, FAULTY

ALL = [*EXERCISES]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A clone of the project as it stands here."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone of the repository")
    root = tmp_path_factory.mktemp("clone") / "clone"
    exercise.write(reference(ROOT), root)
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
        patch.setattr(exercise, "explore", lambda page, scene, root: page.write_text(f"scene {scene}"))
        main(["handout", str(out)], repository)
    return out


def original(files, name):
    return take(files[EXERCISES[name].file].decode(), EXERCISES[name].function)


@functools.cache
def away(file, content):
    """A file without its bodies."""
    source = content.decode()
    for name, one in EXERCISES.items():
        source = put(source, one.function, one.hole(name)) if one.file == file else source
    return source


def student(folder, files, **bodies):
    """A folder with the files to hand in, of which some bodies were written."""
    sources = {file: away(file, files[file]) for file in exercise.HANDED_IN}
    for name, body in bodies.items():
        one = EXERCISES[name]
        sources[one.file] = put(sources[one.file], one.function, body)
    exercise.write({file: source.encode() for file, source in sources.items()}, folder)
    return folder


def in_this_process(one, files):
    """Instead of a process for every body, which would load torch again: the same tests of the same body."""
    module = importlib.import_module(one.file.removesuffix(".py").replace("/", "."))
    scope = dict(vars(module))
    exec(compile(files[one.file], one.file, "exec"), scope)
    live, changed = module, SimpleNamespace(**scope)
    for part in one.function.split("."):
        live, changed = getattr(live, part), getattr(changed, part)
    before, profile = live.__code__, settings.default
    live.__code__ = changed.__code__
    try:
        return graded.run(*one.task())
    finally:
        live.__code__ = before
        settings.register_profile("project", profile)
        settings.load_profile("project")


LOOP = """threshold, high = 0.0, 1.0
    while high - threshold > 1e-9:
        p = (threshold + high) / 2
        threshold, high = (p, high) if sizes(p).sum() <= total else (threshold, p)"""
AGAIN = """prompts = [processor(processor.chat([(question, None)], 1), [image]) for question in questions]
return [processor.decode(model.generate(**prompt, compressor=compressor).token_ids[0]).strip() for prompt in prompts]
"""
# A body, or what is replaced in the right one; and its points.
BODIES = {
    "rope, neighbours": (
        "rope", ("x.chunk(2, dim=-1)", "x[..., ::2], x[..., 1::2]"), 0),
    "rope, to the other side": ("rope", ("[-second, first]", "[second, -first]"), 5),
    "attention, no mask": ("attention", ("if mask is None:", "if mask is None or True:"), 6),
    "attention, heads in another order": (
        "attention", ("repeat_interleave(groups, dim=1)", "repeat(1, groups, 1, 1)"), 0),
    "patches, always a class token": (
        "patches", ("if self.class_embedding is not None:", "if True:"), 6.67),
    "patches, the last layer": ("patches", ("+ 1 + layer", "+ layer + 2"), 0),
    "patches, columns first": ("patches", ("patches.flatten(2)", "patches.mT.flatten(2)"), 0),
    "scoring, a constant": ("scoring", "return query.new_ones(*query.shape[:3], key.shape[2]).softmax(-1)\n", 0),
    "scoring, no mask": ("scoring", ("if mask is not None:", "if False:"), 0),
    "scoring, the mask over the first keys": (
        "scoring", ("scores[..., key.shape[2] - mask.shape[-1] :]", "scores[..., : mask.shape[-1]]"), 0),
    "scoring, scaled last": ("scoring", (" * query.shape[3] ** -0.5", ""), 0),
    "published, as given": ("published", FAULTY.replace("ranks", "places"), 0),
    "published, a constant": ("published", "return scores > 2\n", 0),
    "published, one fault mended": ("published", FAULTY.replace(".half()", ""), 5),
    "published, the other fault": (
        "published", FAULTY.replace("ranks =", "scores = scores.clone()\nscores[:, :start] = torch.inf\nranks ="), 5),
    "eviction, rows mixed": (
        "eviction", ("pinned = ", "kept = kept * 0 + int(kept.flatten()[0])\n        pinned = "), 6.67),
    "eviction, transposed": ("eviction", ("argmin(-1)", "argmin(-1).mT"), 6.67),
    "eviction, the newest": ("eviction", ("argmin", "argmax"), 0),
    "importance, all weights at once": (
        "importance", ("total = torch", "block = length\n    total = torch"), 6.67),
    "importance, padding asks": (
        "importance", ("present.float() / heads", "torch.ones_like(present).float() / heads"), 0),
    "cache, grows on": ("cache", ("torch.minimum(self.held + 1, capacity)", "self.held + 1"), 3.33),
    "cache, all free slots": ("cache", ("victim)", "self.held)"), 0),
    "search, README's loop": (
        "search", ("threshold = candidates[bisect_right(candidates, total, key=lambda p: int(sizes(p).sum())) - 1]",
                   LOOP), 10),
    "search, all layers alike": ("search", "return 0.0, torch.full((len(curve),), total // len(curve))\n", 0),
    "search, left over for the smallest": ("search", ("key=share", "key=lambda layer: counts[layer]"), 4),
    "search, nothing handed out": ("search", ("range(total - sum(counts))", "range(0)"), 2),
    "allocator, equal shares": ("allocator", ("ratios.double()", "torch.ones_like(ratios).double()"), 0),
    "allocator, no bounds": ("allocator", ("protected, length)", "0, total)"), 5),
    "second, no fork": ("second", ("cache.fork()", "cache"), 0),
    "second, everything again": ("second", AGAIN, 0),
    **{f"{name}, nothing": (name, "return None\n", 0) for name in ALL},
}  # fmt: skip


@pytest.mark.parametrize("name, body, points", BODIES.values(), ids=BODIES)
def test_a_wrong_body_loses_the_points_of_what_it_does_wrong(files, tmp_path, monkeypatch, name, body, points):
    monkeypatch.setattr(exercise, "run", in_this_process)
    monkeypatch.chdir(ROOT)
    right = take(files[EXERCISES[name].file].decode(), EXERCISES[name].function)
    assert isinstance(body, str) or body[0] in right
    text = body if isinstance(body, str) else right.replace(*body)
    found = grade_one(name, student(tmp_path, files, **{name: text}), files)
    assert found.points == points, found.said
    assert ("failed first: " in found.said) == (points < 10)


# ---------------------------------------------------------------- cheats and broken files

CHEATS = {
    "import os\nos._exit(0)": "uses os",
    "import atexit\natexit.register(print)": "uses atexit",
    "from hypothesis import settings": "uses hypothesis",
    "from tests.conftest import ROOT": "uses tests.conftest",
    "import torch\ntorch.os.write(1, b'10 passed')": "uses os",
    "torch.utils.data.os.system('true')": "uses os",
    "torch.load('/work/solution.pt')": "uses load",
    "open('tests/conftest.py', 'w').write('')": "uses open",
    "__import__('os').system('true')": "uses __import__",
    "__builtins__['open']('x')": "uses __builtins__",
    "getattr(torch, 'o' + 's').write(1, b'passed')": "uses getattr",
    "eval('1')": "uses eval",
    "(lambda: 0).__globals__": "uses __globals__",
    "(x for x in []).gi_frame.f_back.f_globals": "uses f_globals",
    "torch.testing.assert_close = print": "changes torch.testing.assert_close",
    "self = torch\nself.equal = print": "uses self",
    "class Equal:\n    pass": "uses class",
    "from coursework.second import answers": "uses coursework.second",
    "global importance": "uses global",
}


@pytest.mark.parametrize("body", CHEATS)
def test_a_body_that_reaches_out_is_refused_unrun(files, tmp_path, monkeypatch, body):
    monkeypatch.setattr(exercise, "run", None)
    found = grade_one("search", student(tmp_path, files, search=body + "\nreturn 0.0, curve\n"), files)
    assert found.points == 0 and "refused: line " in found.said and CHEATS[body] in found.said


def test_the_right_bodies_are_not_refused(files):
    assert not any(refusal(files[one.file].decode(), one.function) for one in EXERCISES.values())


def test_what_the_look_does_not_find_gets_no_points_either(files, tmp_path, monkeypatch):
    """The grader with its look switched off, in real processes; and a right body, which must get all of its points."""
    body = original(files, "published")
    bodies = {
        "right": (body, "2 of 2 tests"),
        "exits": ("import os, sys\nprint('2 passed')\nos._exit(0)\n", "without a result (exit code 0)"),
        "rewrites": (f"open('tests/conftest.py', 'a').write('#')\n{body.lstrip()}", "were changed"),
        "loads": (f"assert not __import__('pathlib').Path({str(ROOT)!r}).samefile(__import__('os').path.dirname("
                  f"__import__('coursework').__path__[0]))\nimport os, sys\nassert not os.environ.get('PWD')\n"
                  f"assert {str(ROOT)!r} not in sys.path\n{body.lstrip()}", "2 of 2 tests"),
        "hangs": ("import subprocess, time\nsubprocess.Popen(['sleep', '612.5'])\ntime.sleep(600)\n", "did not end in"),
    }  # fmt: skip
    monkeypatch.setattr(exercise, "refusal", lambda source, function: "")
    for kind, (text, said) in bodies.items():
        monkeypatch.setattr(exercise, "PATIENCE", 25.0 if kind == "hangs" else 120.0)
        lines = text.splitlines()
        text = "\n".join(line.strip() for line in lines) + "\n"
        found = grade_one("published", student(tmp_path / kind, files, published=text), files)
        assert found.points == (10 if kind in ("right", "loads") else 0) and said in found.said, (kind, found.said)
    assert not subprocess.run(["pgrep", "-f", "sleep 612.5"], capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "content, reason",
    [(b"def search():\n    return " + b"-" * 10**5 + b"1\n", ""), (b"def search(a):\n    return '\0'\n", "null"),
     (b"def search(:\n", "line 1"), (b"def seek():\n    pass\n", "no such function"), (b"\xff", "utf-8"),
     (b"search = 3\n", "no such function"), (b"#" * (10**6 + 1), "1,000,001 bytes"), (None, "missing"),
     ("link", "is a link")],
)  # fmt: skip
def test_a_broken_file_costs_its_own_exercises(files, tmp_path, content, reason):
    folder, path = student(tmp_path / "a", files), tmp_path / "a" / "prefixkv.py"
    path.unlink()
    if content == "link":
        path.symlink_to(ROOT / "prefixkv.py")
    elif content is not None:
        path.write_bytes(content)
    found = grade_one("search", folder, files)
    assert found.points == 0 and "prefixkv.py: search cannot be used: " in found.said and reason in found.said
    assert grade_one("rope", folder, files).said == "not attempted"


@pytest.mark.parametrize("mark", ["\ufeff", "\f", "\r\n", "# \u2028 \x85\n"])
def test_a_body_is_found_whatever_python_takes_for_a_blank(files, mark):
    source = files["prefixkv.py"].decode()
    other = (source.replace("\n", mark) if mark == "\r\n" else mark + source).removeprefix("\ufeff")
    other = other.replace("\r\n", "\n")  # `handed_in` drops these two
    assert take(other, "search") == take(source, "search")
    assert put(other, "search", take(source, "search")) == other


def test_a_body_may_be_indented_otherwise_and_cannot_leave_its_function():
    source = "class A:\n    def f(self):\n        # why\n        return 2\n\nx = 1\n"
    assert take(source, "A.f") == "        # why\n        return 2\n"
    assert put(source, "A.f", "  if self:\n      return 3\n") == source.replace(
        "# why\n        return 2", "if self:\n            return 3"
    )
    for body in ("        return 3\nx = 2\n", "        return 3\n    g = 4\n"):
        with pytest.raises(SyntaxError):
            put(source, "A.f", body)
    assert outline(source, "A.f")[1] == outline(source.replace("# why", "#"), "A.f")[1]


# ---------------------------------------------------------------- handed out, handed in, graded


def test_a_handout_has_the_students_text_and_no_body(handout, files):
    names = {str(path.relative_to(handout)) for path in handout.rglob("*") if path.is_file()}
    assert names == {*files} - {*exercise.INSTRUCTORS} | {
        "COURSEWORK.md", "ANSWERS.md", exercise.REFERENCE, *(f"page_{scene}.html" for scene in exercise.SCENES)
    }  # fmt: skip
    text = (handout / "COURSEWORK.md").read_text()
    assert not any(word in text for word in ("remove", "restore", "instructor", "grade"))
    for name, one in EXERCISES.items():
        assert f"check {name}`" in text and f"`{one.function}`" in text and f"`{one.file}`" in text
        source = (handout / one.file).read_text()
        assert exercise.is_away(source, name) and "original" not in take(source, one.function)
    assert reference(handout) == files
    with pytest.raises(ValueError, match="This is a handout"):
        main(["remove", "rope"], handout)


def test_every_test_that_is_graded_exists_and_is_named_once():
    for one in EXERCISES.values():
        nodes, _ = one.task()
        assert len(set(one.tests)) == len(one.tests) > 1
        for file, name in (node.split("::") for node in nodes):
            assert f"{name}(" in (text := (ROOT / file).read_text()) or f"{name} =" in text


def test_a_class_is_graded_into_a_table_and_equal_bodies_are_told(handout, files, tmp_path, monkeypatch, capsys):
    found = {"passed": EXERCISES["rope"].task()[0], "first": "", "said": ""}
    monkeypatch.setattr(exercise, "run", lambda one, files: found)
    same = original(files, "rope")
    student(tmp_path / "ann", files, rope=same), student(tmp_path / "eve", files, rope=f"    # mine\n{same}")
    shutil.copytree(handout, tmp_path / "bob")
    monkeypatch.chdir(tmp_path)
    main(["submit", "cas.zip"], tmp_path / "bob")
    assert {*zipfile.ZipFile("cas.zip").namelist()} == {*exercise.HANDED_IN, "ANSWERS.md"}
    root = tmp_path / "clone"
    exercise.write({**files, exercise.REFERENCE: pack(files)}, root)
    (root / "coursework" / "README.md").unlink()  # the reference counts
    main(["grade", "ann", "eve", "cas.zip", "--only", "rope", "--only", "cache", "--out", "out"], root)
    assert "the same rope: ann, eve" in capsys.readouterr().out
    assert [*csv.reader((tmp_path / "out" / "points.csv").read_text().splitlines())] == [
        ["student", "rope", "cache", "all"], ["ann", "10.0", "0.0", "10.0"], ["eve", "10.0", "0.0", "10.0"],
        ["cas", "0.0", "0.0", "0.0"],
    ]  # fmt: skip
    results = json.loads((tmp_path / "out" / "ann" / "results.json").read_text())
    assert results["score"] == 10 and results["tests"][1] == {
        "name": "cache", "score": 0.0, "max_score": 10.0, "output": "not attempted"
    }  # fmt: skip


def test_gradescopes_zip_holds_a_repository_that_grades_without_git(repository, files, tmp_path):
    main(["autograder", str(tmp_path / "a.zip"), "--only", "rope"], repository)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert {"setup.sh", "run_autograder"} < {*archive.namelist()} and not any(
            ".git/" in n for n in archive.namelist()
        )
        assert archive.read("run_autograder").decode().count("--only rope") == 1
        inner = zipfile.ZipFile(io.BytesIO(archive.read(f"repository/{exercise.REFERENCE}")))
        assert {name: inner.read(name) for name in inner.namelist()} == files


def test_a_body_that_was_taken_away_comes_back_to_the_byte(repository, files, tmp_path):
    root = shutil.copytree(repository, tmp_path / "clone")
    for name in ("search", "rope"):
        remove(name, root)
        with pytest.raises(ValueError, match="away already"):
            remove(name, root)
    path = root / "prefixkv.py"
    path.write_text(path.read_text().replace('raise NotImplementedError("exercise: search")', "return 0.0, curve"))
    with pytest.raises(ValueError, match="restore it first"):
        main(["solutions", str(tmp_path / "s")], root)
    own = path.read_text()
    path.write_text("def search(\n")
    with pytest.raises(ValueError, match=r"search cannot be found in prefixkv.py \(line 1"):
        restore("search", root)
    path.write_text(own)
    restore("search", root)
    restore("rope", root)
    assert (root / ".exercises" / "search.solution").read_text().strip() == "return 0.0, curve"
    assert reference(root) == files
    with pytest.raises(ValueError, match="No body is away"):
        restore("rope", root)
    main(["solutions", str(tmp_path / "s")], root)
    assert sorted(path.stem for path in (tmp_path / "s").iterdir()) == sorted(EXERCISES)
    assert (tmp_path / "s" / "eviction.py").read_text().startswith("def victim(")
    with pytest.raises(ValueError, match="expected a new name"):
        main(["handout", str(tmp_path / "s")], root)
    with pytest.raises(ValueError, match="neither a folder nor a zip"):
        main(["grade", str(tmp_path / "none")], root)


@pytest.mark.parametrize("arguments", [[], ["remove"], ["remove", "nothing"], ["fix", "rope"], ["list", "rope"]])
def test_wrong_arguments_end_with_2(arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
