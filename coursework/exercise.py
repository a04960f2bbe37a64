"""Takes a function's body away and puts it back, for COURSEWORK.md: `python -m coursework.exercise remove search`.

    python -m coursework.exercise list
    python -m coursework.exercise remove NAME     the body becomes `raise NotImplementedError`
    python -m coursework.exercise check NAME      runs the exercise's tests
    python -m coursework.exercise restore NAME    the body is what it was

What was removed waits in `.exercises/`; a solution that stands there at `restore` is kept beside it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Exercise:
    """A function, and the tests that fail without its body and must pass with a new one."""

    file: str
    function: str  # with its class
    tests: tuple[str, ...]


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
        "minillava/model.py", "KVCache.advance",
        ("tests/test_cache.py::TestTheCacheInPlaceIsOneThatCutsAndConcatenates",),
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
    "allocator": Exercise(
        "minillava/compressors.py", "Uniform.allocate",
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


def remove(name: str, root: Path = ROOT) -> None:
    """Takes the body away; refuses if it is away already."""
    exercise, saved = EXERCISES[name], root / ".exercises" / name
    if saved.exists():
        raise SystemExit(f"The body of {exercise.function} is away already; restore it first.")
    path = root / exercise.file
    source = path.read_text(encoding="utf-8")
    start, end = body(source, exercise.function)
    saved.parent.mkdir(exist_ok=True)
    saved.write_text(source[start:end], encoding="utf-8")
    indent = "        " if "." in exercise.function else "    "
    hole = f'{indent}raise NotImplementedError("exercise: {name}")\n'
    path.write_text(source[:start] + hole + source[end:], encoding="utf-8")


def restore(name: str, root: Path = ROOT) -> None:
    """Puts the body back; what stood in its place goes to `.exercises/NAME.solution` if it was a solution."""
    exercise, saved = EXERCISES[name], root / ".exercises" / name
    if not saved.exists():
        raise SystemExit(f"The body of {exercise.function} is not away.")
    path = root / exercise.file
    source = path.read_text(encoding="utf-8")
    try:
        start, end = body(source, exercise.function)
    except (SyntaxError, StopIteration) as error:
        reason = f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else "there is none"
        raise SystemExit(
            f"{exercise.function} cannot be found in {exercise.file} ({reason}). Mend that, then restore again. "
            f"The original body is in {saved.relative_to(root)}."
        ) from None
    if "NotImplementedError" not in source[start:end]:
        saved.with_suffix(".solution").write_text(source[start:end], encoding="utf-8")
    path.write_text(source[:start] + saved.read_text(encoding="utf-8") + source[end:], encoding="utf-8")
    saved.unlink()
    if not any(saved.parent.iterdir()):
        saved.parent.rmdir()


def check(name: str, root: Path = ROOT) -> int:
    """Runs the exercise's tests; pytest's exit code."""
    return subprocess.run([sys.executable, "-m", "pytest", *EXERCISES[name].tests], cwd=root).returncode


def main(arguments: list[str]) -> int:
    """The command line."""
    if arguments == ["list"]:
        for name, exercise in EXERCISES.items():
            print(f"{name:12} {exercise.file}: {exercise.function}")
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
    sys.exit(main(sys.argv[1:]))
