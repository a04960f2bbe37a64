"""Takes functions' bodies away for coursework/README.md, puts them back, and grades what students hand in.

    python -m coursework.exercise list
    python -m coursework.exercise remove NAME     the body becomes `raise NotImplementedError`
    python -m coursework.exercise check NAME      runs the exercise's tests
    python -m coursework.exercise restore NAME    the body is what it was

What was removed waits in `.exercises/`; a solution that stands there at `restore` is kept beside it. For instructors:

    python -m coursework.exercise handout OUT     a copy of the repository without the bodies, in a new folder
    python -m coursework.exercise solutions OUT   the functions with their bodies, one file each
    python -m coursework.exercise grade FOLDER    points for the copy of the repository that a student hands in
    python -m coursework.exercise grade FOLDER --json    the same as the results file of Gradescope's autograder

`grade` takes the body of each exercise out of the student's files, puts it into a copy of this repository, and runs the
exercise's tests there. So one wrong body costs no points elsewhere, and a changed test changes nothing. The bodies run
with your rights: grade in a container.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

from minillava.command import run_command

ROOT = Path(__file__).resolve().parent.parent
POINTS = 10.0  # of an exercise; its tests have equal parts
PATIENCE = 600  # seconds that an exercise's tests may take


@dataclass(frozen=True)
class Exercise:
    """A function, and the tests that fail without its body and must pass with a new one."""

    file: str
    function: str  # with its class
    tests: tuple[str, ...]
    given: str = ""  # a body with faults that takes the place of the right one; by default there is none

    @property
    def hole(self) -> str:
        """What stands in place of the body."""
        name = next(name for name, exercise in EXERCISES.items() if exercise is self)
        text = self.given or f'raise NotImplementedError("exercise: {name}")\n'
        return textwrap.indent(text, "        " if "." in self.function else "    ")


PUBLISHED = """\
order = scores.argsort(descending=True)  # [L, N]
kept = order < counts[:, None]
kept[:, :start] = True
position = int(counts[0])
return kept, position
"""

EXERCISES = {
    "patches": Exercise(
        "minillava/model.py", "VisionTower.forward",
        ("tests/test_parity.py::test_every_layout_gives_the_reference_logits_and_tokens",),
    ),
    "rope": Exercise(
        "minillava/model.py", "apply_rope",
        ("tests/test_parity.py::test_every_option_of_the_config_is_honoured",),
    ),
    "attention": Exercise(
        "minillava/model.py", "manual_attention",
        ("tests/test_attention.py::test_a_whole_prompts_fused_attention_is_the_definition",
         "tests/test_attention.py::test_a_single_token_sees_every_key",
         "tests/test_attention.py::test_each_group_of_query_heads_reads_its_own_key_head"),
    ),
    "cache": Exercise(
        "minillava/model.py", "KVCache.take_slot",
        ("tests/test_cache.py::TestTheCacheInPlaceIsOneThatCutsAndConcatenates",),
    ),
    "scoring": Exercise(
        "prefixkv.py", "attention_weights",
        ("tests/test_compressors.py::test_attention_of_the_last_queries_is_that_of_the_definition",
         "tests/test_compressors.py::test_attention_of_the_last_queries_does_not_see_padding",
         "tests/test_compressors.py::test_attention_of_the_last_queries_takes_no_room_for_the_others"),
    ),
    "importance": Exercise(
        "prefixkv.py", "importance",
        ("tests/test_prefixkv.py::test_block_wise_importance_is_the_naive_one_for_every_block_size",
         "tests/test_prefixkv.py::test_importance_is_accumulated_in_float32_whatever_the_dtype"),
    ),
    "search": Exercise(
        "prefixkv.py", "search",
        ("tests/test_prefixkv.py::test_the_total_kept_is_the_budget_exactly",
         "tests/test_prefixkv.py::test_no_other_allocation_has_a_larger_smallest_prefix",
         "tests/test_prefixkv.py::test_the_threshold_is_the_largest_that_fits"),
    ),
    "eviction": Exercise(
        "prefixkv.py", "PrefixKV.victim",
        ("tests/test_prefixkv.py::test_eviction_is_a_queue_behind_pinned_tokens",
         "tests/test_prefixkv.py::test_the_oldest_token_behind_the_pinned_ones_goes_first"),
    ),
    "published": Exercise(
        "coursework/published.py", "compress",
        ("tests/test_exercise.py::test_the_most_important_tokens_stay_in_every_layer",
         "tests/test_exercise.py::test_the_next_token_stands_behind_the_whole_prompt"),
        PUBLISHED,
    ),
    "allocator": Exercise(
        "minillava/compressors.py", "divide",
        ("tests/test_compressors.py::test_the_total_kept_is_prefixkvs_budget_exactly",
         "tests/test_compressors.py::test_uniform_layers_differ_by_one_token_at_most_and_choose_as_prefixkv_does"),
    ),
}  # fmt: skip


def body(source: str, function: str) -> tuple[int, int]:
    """Where a function's body stands in the source, behind its docstring: first and last character."""
    node: ast.AST = ast.parse(source)
    for name in function.split("."):
        node = next(n for n in ast.iter_child_nodes(node) if getattr(n, "name", None) == name)
    assert isinstance(node, ast.FunctionDef)
    lines = source.splitlines(keepends=True)
    # Comments above the first statement belong to the body.
    if ast.get_docstring(node) is not None:
        first = node.body[0].end_lineno
    else:
        first = node.body[0].lineno - 1
        while lines[first - 1].lstrip().startswith("#"):
            first -= 1
    return sum(map(len, lines[:first])), sum(map(len, lines[: node.end_lineno]))


def swap(path: Path, function: str, text: str) -> str:
    """Writes another body into a file; returns the one that was there."""
    source = path.read_text(encoding="utf-8")
    start, end = body(source, function)
    path.write_text(source[:start] + text + source[end:], encoding="utf-8")
    return source[start:end]


def remove(name: str, root: Path = ROOT) -> None:
    """Takes the body away; refuses if it is away already."""
    exercise, saved = EXERCISES[name], root / ".exercises" / name
    path = root / exercise.file
    source = path.read_text(encoding="utf-8")
    start, end = body(source, exercise.function)
    if saved.exists() or source[start:end] == exercise.hole:
        raise ValueError(f"The body of {exercise.function} is away already.")
    saved.parent.mkdir(exist_ok=True)
    saved.write_text(swap(path, exercise.function, exercise.hole), encoding="utf-8")


def restore(name: str, root: Path = ROOT) -> None:
    """Puts the body back; what stood in its place goes to `.exercises/NAME.solution` if it was a solution."""
    exercise, saved = EXERCISES[name], root / ".exercises" / name
    if not saved.exists():
        raise ValueError(f"The body of {exercise.function} is not away.")
    path = root / exercise.file
    source = path.read_text(encoding="utf-8")
    try:
        start, end = body(source, exercise.function)
    except (SyntaxError, StopIteration) as error:
        reason = f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else "there is none"
        raise ValueError(
            f"{exercise.function} cannot be found in {exercise.file} ({reason}). Mend that, then restore again. "
            f"The original body is in {saved.relative_to(root)}."
        ) from None
    if source[start:end] != exercise.hole:
        saved.with_suffix(".solution").write_text(source[start:end], encoding="utf-8")
    path.write_text(source[:start] + saved.read_text(encoding="utf-8") + source[end:], encoding="utf-8")
    saved.unlink()
    if not any(saved.parent.iterdir()):
        saved.parent.rmdir()


def check(name: str, root: Path = ROOT) -> int:
    """Runs the exercise's tests; pytest's exit code."""
    return subprocess.run([sys.executable, "-m", "pytest", *EXERCISES[name].tests], cwd=root).returncode


def files(root: Path) -> list[Path]:
    """The repository's own files, relative to its root; refuses a folder that is no clone."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if listed.returncode or not (root / ".git").exists():
        raise ValueError(f"{root} is no clone of the repository; handout and grade need one, and git.")
    return [Path(name) for name in listed.stdout.split("\0") if name and (root / name).is_file()]


def copy(root: Path, out: Path) -> None:
    """Copies the repository's own files."""
    for name in files(root):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, out / name)


def complete(root: Path) -> None:
    """Refuses a repository in which a body is away."""
    for name, exercise in EXERCISES.items():
        source = (root / exercise.file).read_text(encoding="utf-8")
        start, end = body(source, exercise.function)
        if (root / ".exercises" / name).exists() or source[start:end] == exercise.hole:
            raise ValueError(f"The body of {exercise.function} is away; restore it first: restore {name}.")


def new_folder(path: str) -> Path:
    """A folder that is not there yet, so that nothing is written over."""
    out = Path(path)
    if out.exists() or not out.resolve().parent.is_dir():
        raise ValueError(f"{path} cannot be made; expected a new folder in one that exists.")
    return out


def handout(out: Path, root: Path = ROOT) -> None:
    """Writes a copy of the repository without its history and without any of the bodies."""
    complete(root)
    copy(root, out)
    for exercise in EXERCISES.values():
        swap(out / exercise.file, exercise.function, exercise.hole)


def solutions(out: Path, root: Path = ROOT) -> None:
    """Writes every function, docstring and body, to a file with the exercise's name."""
    complete(root)
    out.mkdir()
    for name, exercise in EXERCISES.items():
        source = (root / exercise.file).read_text(encoding="utf-8")
        start, end = body(source, exercise.function)
        first = source.rindex(f"def {exercise.function.split('.')[-1]}(", 0, start)
        first = source.rindex("\n", 0, first) + 1
        (out / f"{name}.py").write_text(textwrap.dedent(source[first:end]), encoding="utf-8")


@dataclass
class Grade:
    """What one exercise brought."""

    name: str
    points: float
    said: str  # in a few words, or the end of what pytest printed


def grade_one(name: str, submission: Path, root: Path = ROOT) -> Grade:
    """Runs an exercise's tests in a copy of the repository that has the student's body."""
    exercise = EXERCISES[name]
    try:
        source = (submission / exercise.file).read_text(encoding="utf-8")
        start, end = body(source, exercise.function)
    except (OSError, SyntaxError, UnicodeDecodeError, StopIteration, AssertionError) as error:
        found = (
            "has no such function" if isinstance(error, (StopIteration, AssertionError)) else f"cannot be read: {error}"
        )
        return Grade(name, 0.0, f"{exercise.file}: {exercise.function} {found}")
    if source[start:end] == exercise.hole:
        return Grade(name, 0.0, "not attempted")
    passed, said = 0, []
    with tempfile.TemporaryDirectory() as scratch:
        copy(root, Path(scratch))
        swap(Path(scratch) / exercise.file, exercise.function, source[start:end])
        for test in exercise.tests:
            command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", test]
            environment = {**os.environ, "PYTHONPATH": scratch}
            try:
                done = subprocess.run(
                    command, cwd=scratch, env=environment, capture_output=True, text=True, timeout=PATIENCE
                )
            except subprocess.TimeoutExpired:
                said.append(f"{test}: did not end in {PATIENCE} s")
                continue
            lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
            passed += done.returncode == 0 and " passed" in lines[-1]  # tests that skip prove nothing
            said.append("\n".join([f"{test}: {lines[-1]}", *([] if done.returncode == 0 else lines[-25:-1])]))
    return Grade(name, POINTS * passed / len(exercise.tests), "\n".join(said))


def gradescope(grades: list[Grade]) -> str:
    """The results file that Gradescope's autograder reads, in JSON."""
    tests = [
        {"name": grade.name, "score": round(grade.points, 2), "max_score": POINTS, "output": grade.said}
        for grade in grades
    ]
    return json.dumps({"score": round(sum(grade.points for grade in grades), 2), "tests": tests}, indent=1)


def grade(submission: Path, as_json: bool, root: Path = ROOT) -> int:
    """Prints points; exit code 0, whatever they are."""
    if not submission.is_dir():
        raise ValueError(f"{submission} is no folder; expected what the student handed in.")
    complete(root)
    grades = []
    for name in EXERCISES:
        grades.append(grade_one(name, submission, root))
        if not as_json:
            print(f"{name:12} {grades[-1].points:5.2f} of {POINTS:g}  {grades[-1].said.splitlines()[0]}", flush=True)
    if as_json:
        print(gradescope(grades))
    else:
        print(f"{'all':12} {sum(g.points for g in grades):5.2f} of {POINTS * len(grades):g}")
    return 0


def main(arguments: list[str]) -> int:
    """The command line."""
    if arguments == ["--help"]:
        print(__doc__)
        return 0
    if arguments == ["list"]:
        for name, exercise in EXERCISES.items():
            print(f"{name:12} {exercise.file}: {exercise.function}")
        return 0
    if arguments[:1] == ["grade"] and (len(arguments) == 2 or (len(arguments) == 3 and arguments[2] == "--json")):
        return grade(Path(arguments[1]), "--json" in arguments)
    if len(arguments) == 2 and arguments[0] in ("handout", "solutions"):
        (handout if arguments[0] == "handout" else solutions)(new_folder(arguments[1]))
        return 0
    if len(arguments) != 2 or arguments[0] not in ("remove", "restore", "check") or arguments[1] not in EXERCISES:
        print(f"{__doc__}\nexercises: {', '.join(EXERCISES)}", file=sys.stderr)
        return 2
    action, name = arguments
    if action == "check":
        return check(name)
    (remove if action == "remove" else restore)(name)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("coursework.exercise", lambda: main(sys.argv[1:])))
