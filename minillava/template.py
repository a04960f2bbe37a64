"""Renders a checkpoint's chat template, in a process of its own: a template is a program, and may not come to an end.

The template runs in Jinja's immutable sandbox, as in `transformers`: it cannot change what it is given, nor reach
Python's internals. A clock ends it after some seconds, a limit on memory (where the system has one) when it grows, and
a limit on length when it writes too much. This file is both sides: `render` starts it as a script, which imports
Jinja, but neither torch nor the model.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

SECONDS, CHARACTERS, MEMORY = 5, 1_000_000, 2**30


class TemplateError(ValueError):
    """What went wrong, as the end of a sentence."""


def render(template: str, values: dict[str, Any]) -> str:
    """The text that a template makes of JSON values; raises TemplateError if it fails, or exceeds a limit."""
    sent = json.dumps([template, values])
    try:
        done = subprocess.run(
            [sys.executable, __file__], input=sent, capture_output=True, encoding="utf-8", errors="replace",
            timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TemplateError(f"it did not end within {SECONDS} seconds") from None
    except (OSError, ValueError) as error:
        raise TemplateError(f"it could not be started ({error})") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it took too much memory"])[-1]
        raise TemplateError(f"{last:.200}")
    text: str = json.loads(done.stdout)
    return text


def main() -> int:
    """Reads [template, values] as JSON, writes the text as JSON; the reason on stderr and 1 where there is none."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, OSError, ValueError):  # not on Windows; elsewhere the clock alone ends what grows
        pass
    try:
        from importlib.metadata import version

        from jinja2 import TemplateError as JinjaError
        from jinja2 import nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
        from jinja2.utils import Namespace
    except ImportError:
        print("Jinja is not installed: pip install 'jinja2>=3.1.6'", file=sys.stderr)
        return 1
    if tuple(map(int, re.findall(r"\d+", version("jinja2"))[:3])) < (3, 1, 6):
        print(f"Jinja {version('jinja2')} has holes in its sandbox: pip install 'jinja2>=3.1.6'", file=sys.stderr)
        return 1

    class Generation(Extension):
        """`{% generation %}` marks an answer for training; here its body is rendered as it stands."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja wants it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Names(Namespace):
        """Jinja's `namespace`, without names that begin with an underscore, such as `__class__`."""

        def __init__(*arguments: Any, **names: Any) -> None:  # no name is taken, so that a template may use `self`
            Namespace.__init__(arguments[0])
            for name, value in dict(*arguments[1:], **names).items():
                arguments[0][name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"it sets {name!r}, which begins with an underscore")
            super().__setitem__(name, value)

    class Dict:
        """`dict` without the class's own attributes."""

        def __call__(self, *arguments: Any, **names: Any) -> dict[Any, Any]:
            return dict(*arguments, **names)

        def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
            return dict.fromkeys(*arguments)

    def refuse(message: str) -> None:
        raise JinjaError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        """Jinja's own escapes what HTML would read."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(pattern: str) -> str:
        from datetime import datetime

        return datetime.now().strftime(pattern)

    template, values = json.load(sys.stdin)
    try:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = tojson
        environment.globals.update(raise_exception=refuse, strftime_now=strftime_now, namespace=Names, dict=Dict())
        pieces, length = [], 0
        for piece in environment.from_string(template).generate(**values):
            pieces.append(piece)
            length += len(piece)
            if length > CHARACTERS:
                raise JinjaError(f"it wrote more than {CHARACTERS:,} characters")
    except MemoryError:
        print("it took too much memory", file=sys.stderr)
        return 1
    except Exception as error:  # a template may raise whatever Python can
        print(" ".join(str(error)[:1000].split()) or type(error).__name__, file=sys.stderr)
        return 1
    json.dump("".join(pieces), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
