"""`forked.run` gives what `subprocess.run` gives, so that tests may take it instead."""

from __future__ import annotations

import os
import subprocess
import sys

import forked
import pytest

PROGRAM = """
import os, sys
print(sys.argv, os.getcwd(), os.environ.get("ANSWER"), sys.path, __name__, repr(sys.stdin.read()), sys.stdout.encoding)
print("é", file=sys.stderr)
assert not {"minillava", "weights", "prefixkv", "demo", "conftest"} & set(sys.modules)
"""


def both(arguments, **options):
    """What is left of a program run either way: exit code and what was printed."""
    real = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, **options
    )
    done = forked.run(arguments, **options)
    return [(one.returncode, one.stdout, one.stderr) for one in (done, real)]


@pytest.mark.parametrize("start", [["-c", PROGRAM], ["-m", "inner.program"], ["inner/program.py"]])
def test_a_program_finds_what_a_process_of_its_own_finds(tmp_path, start):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "program.py").write_text(PROGRAM)
    for environment in ({"PYTHONPATH": f"/nowhere:{tmp_path}", "ANSWER": "42"}, {"PYTHONIOENCODING": "utf-8"}):
        found, expected = both([*start, "-a", "b c"], cwd=tmp_path, env=environment)
        assert found == expected and found[0] == 0 and "b c" in found[1]


@pytest.mark.parametrize(
    "ending, code",
    [("pass", 0), ("sys.exit()", 0), ("sys.exit(3)", 3), ("sys.exit('sentence')", 1), ("os._exit(9)", 9),
     ("os.abort()", -6), ("import atexit; atexit.register(print, 'last')", 0)],
)  # fmt: skip
def test_a_program_ends_as_a_process_of_its_own_ends(tmp_path, ending, code):
    found, expected = both(["-c", f"import os, sys; print('here', flush=True); {ending}"], cwd=tmp_path)
    assert found == expected and found[0] == code and found[1].startswith("here")


def test_an_error_is_told_and_the_next_program_is_not_touched(tmp_path):
    broken = "import sys, torch; sys.path.append('left'); torch.left = 1; raise ValueError('below')"
    found, expected = both(["-c", broken], cwd=tmp_path)
    assert found[0] == expected[0] == 1
    assert found[2].splitlines()[-1] == expected[2].splitlines()[-1] == "ValueError: below"
    with pytest.raises(AssertionError, match="below"):
        forked.run(["-c", broken], cwd=tmp_path, check=True)
    clean = "import sys, torch; assert 'left' not in sys.path and not hasattr(torch, 'left')"
    assert forked.run(["-c", clean], cwd=tmp_path).returncode == 0


@pytest.mark.skipif(not forked.FORKS, reason="there are no forks here")
def test_libraries_are_there_already(tmp_path):
    show = "import os, sys; print('transformers' in sys.modules, os.getppid())"
    found = forked.run(["-c", show], cwd=tmp_path, env=dict(os.environ)).stdout.split()
    assert found == ["True", str(forked.server().pid)]
