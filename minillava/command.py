"""What every command does around its work, so that it ends with a sentence and an exit code, whatever happens."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable


def end_quietly() -> None:
    """Called before slow imports: until `run_command` takes over, Ctrl-C ends the process without a traceback."""
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
        if not error.filename:
            discard_output()
        where = f"{error.filename} cannot be used" if error.filename else "the output cannot be written"
        sentence = f"{where} ({error.strerror})"
    except ValueError as error:  # LlavaError, or PrefixKV's refusal of importance that is not finite
        sentence = str(error)
    print(f"{name}: error: {printable(sentence)}", file=sys.stderr)
    return 2


def printable(text: str) -> str:
    """The text with escapes for what a terminal would obey: names in damaged files hold such characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def discard_output() -> None:
    """What was not written yet goes nowhere. Python would try once more at its end, and fail with a traceback."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.__stdout__):
        if stream is not None:
            os.dup2(nowhere, stream.fileno())
