"""The coursework's exercises: bodies of functions that students write, and their grading.

    python -m coursework.exercise list
    python -m coursework.exercise check [NAME]    points for your body, and the first test that failed; no NAME: all
    python -m coursework.exercise submit OUT.zip  the files to hand in, as one
In a clone:
    python -m coursework.exercise remove NAME     the body is taken away, for you to write it
    python -m coursework.exercise restore NAME    the body is what it was; yours is kept in .exercises/

For instructors, in a clone in which no body is away:
    python -m coursework.exercise handout OUT     a copy of the repository without the bodies, in a new folder
    python -m coursework.exercise solutions OUT   the functions with their bodies, one file each
    python -m coursework.exercise grade FOLDER..  points for what students handed in: folders, or zips of `submit`;
                                                  --out OUT: points.csv, and a results.json for each student
    python -m coursework.exercise autograder OUT  the zip that Gradescope takes

`check` and `grade` take a body out of its file, put it into a complete copy of the repository, and run the exercise's
tests there. So an exercise stands alone, and changed tests and other functions count for nothing. The bodies run with
your rights: grade in a container, as coursework/README.md says.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import io
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coursework.bodies import UNUSABLE, find, outline, put, refusal, take
from coursework.table import EXERCISES, Exercise
from minillava.command import printable, run_command

ROOT = Path(__file__).resolve().parent.parent
POINTS = 10.0  # of an exercise; its tests have equal parts
PATIENCE = 120.0  # seconds that an exercise's tests may take
LARGEST = 10**6  # bytes of a file that is handed in
REFERENCE = "coursework/reference.bin"  # in a handout: the complete repository
SAVED = ".exercises/reference.bin"  # the same in a clone, while a body is away
BAD_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)  # RuntimeError: it is encrypted
STUDENTS = "coursework/COURSEWORK.md"
# Not in a handout. The tests of this file show wrong bodies, and so what is wrong with them.
INSTRUCTORS = ("coursework/README.md", "coursework/RUBRIC.md", STUDENTS, "tests/test_exercise.py")
SCENES = (7, 8, 9)  # of the explorer's pages in a handout

HANDED_IN = list(dict.fromkeys(exercise.file for exercise in EXERCISES.values()))
Files = Mapping[str, bytes]  # a repository: names and contents


def emptied(source: str, name: str) -> str:
    """A file as it is handed out, without an exercise's body."""
    exercise = EXERCISES[name]
    return put(source, exercise.function, exercise.given or f'raise NotImplementedError("exercise: {name}")\n')


def is_away(source: str, name: str) -> bool:
    """Whether what stands in a file is what was handed out, comments and form aside."""
    function = EXERCISES[name].function
    return outline(source, function) == outline(emptied(source, name), function)


def reference(root: Path = ROOT) -> dict[str, bytes]:
    """The complete repository: from its zip where bodies are away, else a clone's tracked files."""
    for path in (root / REFERENCE, root / SAVED):
        if path.exists():
            with zipfile.ZipFile(path) as archive:
                return {name: archive.read(name) for name in archive.namelist()}
    command = ["git", "ls-files", "-z", "--cached"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if listed.returncode or not (root / ".git").exists():
        raise ValueError(f"{root} is neither a clone of the repository nor a handout; one of them is needed.")
    names = [name for name in listed.stdout.split("\0") if (root / name).is_file()]
    files = {name: (root / name).read_bytes() for name in names}
    away = [exercise.function for name, exercise in EXERCISES.items() if is_away(files[exercise.file].decode(), name)]
    if away:
        raise ValueError(f"The body of {away[0]} is away; get it back from git first.")
    return files


def pack(files: Files) -> bytes:
    """Files as a zip."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (0o755 if content.startswith(b"#!") else 0o644) << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def write(files: Files, out: Path) -> None:
    """Writes files into a folder."""
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)


def new(path: str) -> Path:
    """A file or folder that is not there yet, so that nothing is written over."""
    out = Path(path)
    if out.exists() or not out.resolve().parent.is_dir():
        raise ValueError(f"{path} cannot be made; expected a new name in a folder that exists.")
    return out


# ---------------------------------------------------------------- one's own clone


def remove(name: str, root: Path = ROOT) -> None:
    """Takes the body away; refuses if it is away already."""
    exercise, saved = EXERCISES[name], root / SAVED
    path = root / exercise.file
    source = path.read_text(encoding="utf-8")
    if is_away(source, name):
        raise ValueError(f"The body of {exercise.function} is away already.")
    if not saved.exists():
        write({SAVED: pack(reference(root))}, root)
    saved.with_name(f"{name}.away").touch()
    path.write_text(emptied(source, name), encoding="utf-8")


def restore(name: str, root: Path = ROOT) -> None:
    """Puts the body back; what stood in its place goes to `.exercises/NAME.solution` if it was a solution."""
    exercise, saved = EXERCISES[name], root / SAVED
    if not saved.exists():
        raise ValueError("No body is away here.")
    path, body = root / exercise.file, take(reference(root)[exercise.file].decode(), exercise.function)
    source = path.read_text(encoding="utf-8")
    try:
        own = take(source, exercise.function)
        if not is_away(source, name) and own != body:
            saved.with_name(f"{name}.solution").write_text(own, encoding="utf-8")
        path.write_text(put(source, exercise.function, body), encoding="utf-8")
    except UNUSABLE as error:
        reason = f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else f"{error}"
        raise ValueError(
            f"{exercise.function} cannot be found in {exercise.file} ({reason}). Mend that, then restore again."
        ) from None
    saved.with_name(f"{name}.away").unlink(missing_ok=True)
    if not any(saved.parent.glob("*.away")):
        saved.unlink()


# ---------------------------------------------------------------- points


@dataclass
class Grade:
    """What one exercise brought."""

    points: float
    said: str  # one line, and what the first test that failed printed
    body: str = ""  # its syntax; "" if there is none that counts


def handed_in(submission: Path, file: str) -> str:
    """The text of a file in a folder or a zip, under its name or, at the top, the last part of it."""
    folder: Path | zipfile.Path = submission if submission.is_dir() else zipfile.Path(submission)
    for name in (file, file.rsplit("/", 1)[-1]):
        path = folder / name
        parts = (path, *path.parents) if isinstance(path, Path) else ()
        if any(part.is_symlink() for part in parts if submission in part.parents):
            raise ValueError(f"{name} is a link")
        if path.is_file():
            with path.open("rb") as opened:
                content = opened.read(LARGEST + 1)  # of a zip, however much it would unpack to
            if len(content) > LARGEST:
                raise ValueError(f"{name} has {len(content):,} bytes or more; expected {LARGEST:,} at most")
            return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    raise LookupError("the file is missing")


def look(name: str, submission: Path, files: Files) -> tuple[str, str]:
    """An exercise's file with the body that was handed in, "" if there is none, and why it brings no points, or ""."""
    file, function = EXERCISES[name].file, EXERCISES[name].function
    try:
        changed = put(files[file].decode(), function, take(handed_in(submission, file), function))
        if is_away(changed, name):
            return "", "not attempted"
        refused = refusal(changed, function)
        return changed, refused and f"refused: {refused}"
    except (*UNUSABLE, *BAD_ZIP) as error:
        reason = f"{error}" or type(error).__name__
        return "", f"{file}: {function} cannot be used: {reason}"


def run(exercise: Exercise, files: Files) -> dict[str, Any]:
    """Runs an exercise's tests in a copy of the files; what `run_tests.run` returns, or what went wrong as `said`."""
    with tempfile.TemporaryDirectory() as scratch:
        tree, result, errors = Path(scratch, "tree"), Path(scratch, secrets.token_hex(16)), Path(scratch, "errors")
        write(files, tree)
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
        environment = kept | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HOME": scratch,
                              "TMPDIR": scratch, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1",
                              "HYPOTHESIS_STORAGE_DIRECTORY": str(Path(scratch, "examples"))}  # fmt: skip
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-c", "from coursework.run_tests import main; main()"], cwd=tree, env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=stderr, text=True, start_new_session=True,
            )  # fmt: skip
        said = ""
        try:
            task = {"tests": exercise.tests, "result": str(result)}
            process.communicate(json.dumps(task), timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            said = f"the tests did not end in {PATIENCE:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
            process.wait()
        left = {path.relative_to(tree).as_posix(): path.read_bytes() for path in tree.rglob("*") if path.is_file()}
        if not said and left != files:
            said = "the tests, or the code that they run, were changed"
        elif not said and not result.exists():
            last = "\n".join(errors.read_text(errors="replace").splitlines()[-3:])
            said = f"the tests ended without a result (exit code {process.returncode})\n{last}".rstrip()
        failed: dict[str, Any] = {"passed": [], "first": "", "said": said}
        return failed if said else dict(json.loads(result.read_text(encoding="utf-8")))


def grade_one(name: str, submission: Path, files: Files) -> Grade:
    """Points for a body that was handed in."""
    exercise = EXERCISES[name]
    changed, fault = look(name, submission, files)
    body = outline(changed, exercise.function)[1] if changed else ""
    if fault:
        return Grade(0.0, fault, body)
    found = run(exercise, {**files, exercise.file: changed.encode()})
    passed, paid = found["passed"], exercise.tests[exercise.unpaid :]
    number, many = len({*paid} & {*passed}) if exercise.tests[0] in passed else 0, len(paid)
    said = "\n".join(printable(line) for line in found["said"].splitlines())
    if found["first"]:
        first = found["first"].split("::")[-1].removeprefix("test_").replace("_", " ")
        said = f"failed first: {first}\n{textwrap.indent(said, '    ')}"
    return Grade(round(POINTS * number / many, 2), f"{number} of {many} tests; {said}".rstrip("; "), body)


def total(grades: Mapping[str, Grade]) -> float:
    """The points of several exercises."""
    return round(sum(grade.points for grade in grades.values()), 2)


def grade_all(names: Sequence[str], submission: Path, files: Files) -> dict[str, Grade]:
    """Prints the points for bodies that were handed in, one by one, and what went wrong; returns them."""
    grades: dict[str, Grade] = {}
    for name in names:
        grades[name] = grade_one(name, submission, files)
        print(f"{name:12} {grades[name].points:5.2f} of {POINTS:g}  {grades[name].said}", flush=True)
    print(f"{'all':12} {total(grades):5.2f} of {POINTS * len(names):g}", flush=True)
    return grades


def grade(submissions: Sequence[Path], names: Sequence[str], out: Path | None, files: Files) -> None:
    """Prints every student's points, and who handed in the same body; writes them to `out`."""
    for path in submissions:
        if not path.is_dir() and not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is neither a folder nor a zip; expected what a student handed in.")
    students = [path.resolve().stem if path.is_file() else path.resolve().name for path in submissions]
    if len({*students}) < len(students):
        students = [str(path).strip("/").replace("/", "_") for path in submissions]
    table: dict[str, dict[str, Grade]] = {}
    if out is not None:
        out.mkdir()
    for student, path in zip(students, submissions):
        print(f"# {student}")
        grades = table[student] = grade_all(names, path, files)
        if out is not None:
            tests = [dict(name=n, score=one.points, max_score=POINTS, output=one.said) for n, one in grades.items()]
            results = {"score": total(grades), "tests": tests}  # as Gradescope's autograder reads it
            write({f"{student}/results.json": json.dumps(results, indent=1).encode()}, out)
    for name in names:
        for body in dict.fromkeys(grades[name].body for grades in table.values()):
            same = [student for student, grades in table.items() if grades[name].body == body]
            if body and len(same) > 1:
                print(f"the same {name}: {', '.join(same)}")
    if out is not None:
        rows = [[student, *(one.points for one in grades.values()), total(grades)] for student, grades in table.items()]
        with (out / "points.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["student", *names, "all"], *rows])


# ---------------------------------------------------------------- what is handed out and handed in


def handout(out: Path, files: Files) -> None:
    """Writes a copy of the repository without its history and without any of the bodies."""
    from minillava import explore  # slow, as it loads torch

    given = {name: content for name, content in files.items() if name not in INSTRUCTORS}
    for name, exercise in EXERCISES.items():
        given[exercise.file] = emptied(given[exercise.file].decode(), name).encode()
    answers = "\n".join(f"## {number}. {name}\n" for number, name in enumerate(EXERCISES, start=1))
    given["ANSWERS.md"] = f"# Answers\n\nName:\n\n{answers}".encode()
    write(given | {REFERENCE: pack(files), "COURSEWORK.md": files[STUDENTS]}, out)
    if any(explore.main([str(out / f"page_{scene}.html"), "--scene", str(scene)]) for scene in SCENES):
        raise ValueError("The explorer's pages could not be written; all else is there.")


def submit(out: Path, root: Path = ROOT) -> None:
    """Zips the files to hand in, after a look at the bodies in them; runs no test."""
    files = reference(root)
    for name in EXERCISES:
        print(f"{name:12} {look(name, root, files)[1] or 'in it'}")
    names = [name for name in (*HANDED_IN, "ANSWERS.md") if (root / name).is_file()]
    out.write_bytes(pack({name: (root / name).read_bytes() for name in names}))
    print(f"{out}: {', '.join(names)}")


def solutions(out: Path, files: Files) -> None:
    """Writes every function, docstring and body, to a file with the exercise's name."""
    for name, exercise in EXERCISES.items():
        source = files[exercise.file].decode()
        text = ast.get_source_segment(source, find(ast.parse(source), exercise.function), padded=True) or ""
        write({f"{name}.py": (textwrap.dedent(text) + "\n").encode()}, out)


SETUP = """\
#!/usr/bin/env bash
# Gradescope runs this once, when it builds the image.
set -euo pipefail
apt-get update
apt-get install -y --no-install-recommends python3 python3-venv
python3 -m venv /autograder/venv
/autograder/venv/bin/pip install -c /autograder/source/repository/constraints.txt \\
  torch safetensors sentencepiece pillow huggingface-hub pytest hypothesis
"""
RUN = """\
#!/usr/bin/env bash
# Gradescope runs this for every submission.
cd /autograder/source/repository
/autograder/venv/bin/python -m coursework.exercise grade /autograder/submission --out /autograder/graded{only}
cp /autograder/graded/submission/results.json /autograder/results/results.json
"""


def autograder(out: Path, names: Sequence[str], files: Files) -> None:
    """Writes the zip that Gradescope takes: the repository without its history, and the two scripts it asks for."""
    only = "" if len(names) == len(EXERCISES) else "".join(f" --only {name}" for name in names)
    inside = {f"repository/{name}": content for name, content in {**files, REFERENCE: pack(files)}.items()}
    scripts = {"setup.sh": SETUP.encode(), "run_autograder": RUN.format(only=only).encode()}
    out.write_bytes(pack({**scripts, **inside}))


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m coursework.exercise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = ("list", "check", "remove", "restore", "submit", "handout", "solutions", "autograder", "grade")
    parser.add_argument("action", choices=actions, metavar="ACTION")
    parser.add_argument("names", nargs="*", metavar="NAME", help="an exercise, or OUT, or FOLDER, as above")
    parser.add_argument("--only", action="append", choices=EXERCISES, metavar="NAME",
                        help="grade, autograder: this exercise only; repeatable")  # fmt: skip
    parser.add_argument("--out", help="grade: a new folder for points.csv and STUDENT/results.json")
    args = parser.parse_args(arguments)
    action, names, only = args.action, args.names, args.only or list(EXERCISES)
    least, most = {"list": (0, 0), "check": (0, 1), "grade": (1, len(names))}.get(action, (1, 1))
    if not least <= len(names) <= most:
        parser.error(f"{action} does not take {len(names)} names")
    if args.only and action not in ("grade", "autograder"):
        parser.error("--only is for grade and autograder")
    if args.out and action != "grade":
        parser.error("--out is for grade")
    if action in ("check", "remove", "restore") and {*names} - {*EXERCISES}:
        parser.error(f"there is no exercise {names[0]}; exercises: {', '.join(EXERCISES)}")
    if action in ("remove", "restore") and (root / REFERENCE).exists():
        raise ValueError("This is a handout: its bodies are away for you to write. `check` says how far you are.")
    if action in ("handout", "solutions", "autograder", "grade") and (root / SAVED).exists():
        raise ValueError("A body is away; restore it first: `restore NAME`.")
    work: dict[str, Callable[[], object]] = {
        "list": lambda: print(
            "\n".join(f"{n:12} {e.minutes:3} min  {e.file}: {e.function}" for n, e in EXERCISES.items())
        ),
        "check": lambda: grade_all(names or list(EXERCISES), root, reference(root)),
        "remove": lambda: remove(names[0], root),
        "restore": lambda: restore(names[0], root),
        "submit": lambda: submit(new(names[0]), root),
        "handout": lambda: handout(new(names[0]), reference(root)),
        "solutions": lambda: solutions(new(names[0]), reference(root)),
        "autograder": lambda: autograder(new(names[0]), only, reference(root)),
        "grade": lambda: grade([*map(Path, names)], only, args.out and new(args.out), reference(root)),
    }
    try:
        work[action]()
    except (SyntaxError, LookupError) as error:
        raise ValueError(f"A file that an exercise is in cannot be read ({error}); mend that first.") from None
    return 0


if __name__ == "__main__":
    sys.exit(run_command("coursework.exercise", main))
