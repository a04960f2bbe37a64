"""What every command does around its work, so that it ends with an exit code, and for an error with one sentence."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable


def end_quietly() -> None:
    """Called before slow imports: until `run_command` takes over, Ctrl-C ends the process without a traceback.

    Unless Ctrl-C is ignored, as in a job in the background, or handled by somebody else.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_command(name: str, work: Callable[[], int | None]) -> int:
    """The exit code of a command: what `work` returns, or one of these.

    2     input that cannot be used, or output that cannot be written; one sentence on stderr
    130   Ctrl-C
    141   the reader of the output has gone, as `head` goes
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in ("stdin", "stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the shell, as in `>&-`
            setattr(sys, stream, open(os.devnull, "r" if stream == "stdin" else "w"))  # noqa: SIM115 (until the end)
    try:
        code = work() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        discard_output()
        return 141
    except OSError as error:
        if error.filename:
            sentence = f"{error.filename} cannot be used ({error.strerror})"
        else:  # files and pictures raise errors of their own, so this is the output
            discard_output()
            sentence = f"the output cannot be written ({error.strerror or error})"
    except ValueError as error:  # a LlavaError, or prefixkv.py's, which knows no LlavaError
        sentence = str(error)
    print(f"{name}: error: {printable(sentence)}", file=sys.stderr)
    return 2


def printable(text: str) -> str:
    """The text with escapes for what a terminal would obey: names in damaged files hold such characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def discard_output() -> None:
    """What was not written yet goes nowhere. Python would try once more at its end, and fail with a traceback."""
    if sys.__stdout__ is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
