"""How commands end: exit codes, and never a traceback."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from minillava.checks import LlavaError
from minillava.command import run_command

LONG = "[print('x' * 100) for _ in range(10**5)]"
ECHO = "print('x', sys.stdin.read(1))"
FULL = "begun\nit: error: the output cannot be written (No space left on device)\n"
RUN = "sys.exit(run_command('it', lambda: {}))"


def started(code: str, redirect: str = "") -> subprocess.Popen[str]:
    """A command in a process of its own, which says "begun" on stderr first."""
    code = f"import sys; from minillava.command import *; sys.stderr and print('begun', file=sys.stderr); {code}"
    return subprocess.Popen(
        ["bash", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, code],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores Ctrl-C
    )


@pytest.mark.parametrize("error, code, sentence", [
    (None, 0, ""), (7, 7, ""), (LlavaError("No."), 2, "it: error: No.\n"), (KeyboardInterrupt(), 130, ""),
    (ValueError("a \x1b[31mred\nname"), 2, "it: error: a \\x1b[31mred\\nname\n"),
    (ValueError("blåbær 漢字 😀"), 2, "it: error: blåbær 漢字 😀\n"),
    (PermissionError(13, "Permission denied", "a/b"), 2, "it: error: a/b cannot be used (Permission denied)\n"),
])  # fmt: skip
def test_a_command_ends_with_a_code_and_a_sentence_at_most(capsys, error, code, sentence):
    def work():
        if isinstance(error, BaseException):
            raise error
        return error

    assert run_command("it", work) == code
    assert capsys.readouterr().err == sentence


@pytest.mark.parametrize("body, redirect, ends", [
    ("print('x')", "> /dev/full", (2, "", FULL)), (LONG, "> /dev/full", (2, "", FULL)),
    (ECHO, ">&-", (0, "", "begun\n")), (ECHO, "2>&-", (0, "x \n", "")), (ECHO, "<&-", (0, "x \n", "begun\n")),
    (ECHO, ">&- 2>&- <&-", (0, "", "")),
])  # fmt: skip
def test_a_full_disk_is_told_and_streams_that_the_shell_has_closed_are_no_error(body, redirect, ends):
    if "/dev/full" in redirect and not Path("/dev/full").exists():
        pytest.skip("needs Linux' /dev/full")
    process = started(RUN.format(body), redirect)
    out, err = process.communicate()
    assert (process.returncode, out, err) == ends


def test_a_reader_that_leaves_ends_the_command_quietly():
    process = started(RUN.format(LONG))
    assert process.stdout.read(100) == "x" * 100
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (141, "begun\n")


@pytest.mark.parametrize("code, ends", [
    ("end_quietly(); {}", -signal.SIGINT), (RUN, 130), (f"end_quietly(); {RUN}", 130),
])  # fmt: skip
def test_ctrl_c_ends_a_command_without_a_traceback(code, ends):
    process = started(code.format("(print('ready', flush=True), sys.stdin.read())"))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert (process.wait(), process.stderr.read()) == (ends, "begun\n")


PROGRAMS = [
    path
    for folder in ("", "minillava", "bench", "train", "coursework")
    for path in sorted((ROOT / folder).glob("*.py"))
    if '__name__ == "__main__"' in path.read_text() and path.name != "template.py"
]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_every_command_ends_as_run_command_says(path):
    source = path.read_text()
    assert len(PROGRAMS) > 12 and source.count("run_command(") == 1
    assert not re.search(r"raise SystemExit|os\._exit|error: .*file=sys\.stderr", source)
