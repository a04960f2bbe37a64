"""Renders a checkpoint's chat template in a separate process: a template is a program, and may not come to an end.

Jinja's immutable sandbox, as in `transformers`, keeps the template from Python's internals. It limits neither time nor
memory, and no clock in this process could: a single operation such as `7 ** (10 ** 9)` runs for hours in C before
Python looks at a clock again. So `render` starts this file as a script, which imports Jinja, but neither torch nor the
model. It ends the script after some seconds; the script limits its own memory (where the system can) and its text.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from typing import Any

SECONDS, CHARACTERS, MEMORY = 5, 1_000_000, 2**30


def render(template: str, values: dict[str, Any]) -> str:
    """The text that a template makes of JSON values. Raises ValueError with the reason, the end of a sentence."""
    versions = [found.version for found in metadata.distributions(name="jinja2")]
    if not versions or [int(part) for part in re.findall(r"\d+", versions[0])] < [3, 1, 6]:
        raise ValueError("it needs Jinja, 3.1.6 or later (older ones have holes): pip install 'jinja2>=3.1.6'")
    command, sent = [sys.executable, __file__], json.dumps([template, values]).encode()
    try:
        done = subprocess.run(command, input=sent, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"it did not end within {SECONDS} seconds") from None
    except OSError as error:
        raise ValueError(f"it could not be started ({error})") from None
    if done.returncode != 0:
        raise ValueError((done.stderr.decode(errors="replace").splitlines() or ["it took too much memory"])[-1])
    return str(json.loads(done.stdout))


def run(template: str, values: dict[str, Any]) -> str:
    """What the script does: renders as transformers does, up to so many characters."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks an answer for training; here its body is rendered as it stands."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja wants it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Names(Namespace):
        """Jinja's `namespace`, without names that begin with an underscore, such as `__class__`."""

        def __init__(*arguments: Any, **names: Any) -> None:  # no name is taken, so that a template may use `self`
            Namespace.__init__(arguments[0])
            for name, value in dict(*arguments[1:], **names).items():
                arguments[0][name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise ValueError(f"it sets {name!r}, which begins with an underscore")
            super().__setitem__(name, value)

    class Dict:
        """`dict` without the class's own attributes."""

        __call__: Any = staticmethod(dict)
        fromkeys = dict.fromkeys

    def refuse(message: str) -> None:
        raise ValueError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        """Jinja's own escapes what HTML would read."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    jinja = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    jinja.filters["tojson"] = tojson
    jinja.globals.update(raise_exception=refuse, strftime_now=datetime.now().strftime, namespace=Names, dict=Dict())
    text = ""
    for piece in jinja.from_string(template).generate(**values):
        text += piece
        if len(text) > CHARACTERS:
            raise ValueError(f"it wrote more than {CHARACTERS:,} characters")
    return text


if __name__ == "__main__":
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on Windows; elsewhere only the clock ends it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        json.dump(run(*json.load(sys.stdin)), sys.stdout)
    except MemoryError:
        sys.exit("it took too much memory")
    except Exception as error:  # a template may raise whatever Python can
        sys.exit(" ".join(str(error)[:200].split()) or type(error).__name__)
