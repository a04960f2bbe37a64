"""Finds the body of a function in a source file, puts another one there, and says what a body may not do."""

from __future__ import annotations

import ast
import re
import textwrap
from functools import lru_cache

# What reading a student's file may raise: it is too deep, holds NUL, lacks the function, or is no Python.
UNUSABLE = (OSError, SyntaxError, ValueError, LookupError, RecursionError, MemoryError)

MODULES = ("torch", "math", "bisect", "heapq", "itertools", "collections", "prefixkv", "minillava.model",
           "minillava.compressors")  # fmt: skip
# What reaches files, processes, or code that was not written here: as a name, and as an attribute of anything.
BUILTINS = """
eval exec compile open input breakpoint getattr setattr delattr vars globals locals exit quit type super copy
"""
REACHING = """
os sys io builtins importlib subprocess signal atexit gc inspect ctypes shutil pathlib types warnings copyreg pickle
weakref threading pytest hypothesis tests conftest coursework unittest open load save hub utils serialization package
jit distributed multiprocessing library ops classes overrides testing from_file fx export onnx profiler storage
untyped_storage numpy tofile fromfile dump dumps
"""
BARRED_NAMES, BARRED = {*BUILTINS.split()}, {*REACHING.split()}
FRAMES = ("_", "f_", "gi_", "cr_", "ag_", "tb_", "co_", "register_")  # beginnings of attributes that lead elsewhere


def find(tree: ast.AST, function: str) -> ast.FunctionDef:
    """A function of a module, or with its class, as `A.f`. Raises LookupError if there is none."""
    for name in function.split("."):
        found = [node for node in ast.iter_child_nodes(tree) if getattr(node, "name", None) == name]
        if not found:
            raise LookupError("there is no such function")
        tree = found[-1]  # as Python has it: the last definition counts
    if not isinstance(tree, ast.FunctionDef):
        raise LookupError("it is not a function")
    return tree


@lru_cache(maxsize=99)
def span(source: str, function: str) -> tuple[int, int, int]:
    """First and last character of a function's body, after its docstring; and by how much it is indented."""
    node = find(ast.parse(source), function)
    lines = source.split("\n")  # as Python counts them; `splitlines` also splits at a form feed
    if ast.get_docstring(node) is not None:
        first = node.body[0].end_lineno or 0
    else:  # comments above the first statement belong to the body
        first = node.body[0].lineno - 1
        while lines[first - 1].lstrip().startswith("#"):
            first -= 1
    start = sum(len(line) + 1 for line in lines[:first])
    return start, start + sum(len(line) + 1 for line in lines[first : node.end_lineno]), node.col_offset + 4


def take(source: str, function: str) -> str:
    """The body's text, even where the rest of the file is no Python."""
    try:
        start, end, _ = span(source, function)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        source = alone(source, function)
        start, end, _ = span(source, function)
    return source[start:end]


def alone(source: str, function: str) -> str:
    """A function, with a line for its class, without the rest: up to the next line that is indented no more."""
    *owner, name = function.split(".")
    margin, place, header = "    " * len(owner), 0, ""
    if owner:
        found = re.search(rf"^class {owner[0]}\b", source, flags=re.MULTILINE)
        place, header = (found.start() if found else len(source)), f"class {owner[0]}:\n"
    first = re.compile(rf"^{margin}def {name}\(.*$", flags=re.MULTILINE).search(source, place)
    if first is None:
        raise LookupError("there is no such function")
    after = re.compile(rf"^(?!{margin}[ \t])[ \t]*\S", flags=re.MULTILINE).search(source, first.end())
    return header + source[first.start() : after.start() if after else len(source)]


def put(source: str, function: str, text: str) -> str:
    """The source with another body. Raises SyntaxError if it would change more than this body."""
    start, end, indent = span(source, function)
    margin = " " * indent
    code = re.search(r"^[ \t]*(?=[^\s#])", text, flags=re.MULTILINE)
    if code is None or code[0] != margin:
        text = textwrap.indent(textwrap.dedent(text), margin)
    changed = source[:start] + text.rstrip("\n") + "\n" + source[end:]
    if outline(changed, function)[0] != outline(source, function)[0]:
        raise SyntaxError("the body does not end where the function does")
    return changed


@lru_cache(maxsize=99)
def outline(source: str, function: str) -> tuple[str, str]:
    """Two parts of a source file as syntax, without comments and form: all but the body, and the body."""
    tree = ast.parse(source)
    node = find(tree, function)
    documented = ast.get_docstring(node) is not None
    body, node.body = node.body[documented:], node.body[:documented]
    return ast.dump(tree), ast.dump(ast.Module(body, []))


def refusal(source: str, function: str) -> str:
    """Why a body is not run, or "". One look at its syntax: it stops the usual tricks, not a determined attack."""
    for node in (inner for statement in find(ast.parse(source), function).body for inner in ast.walk(statement)):
        if isinstance(node, ast.Import):
            wrong = [alias.name for alias in node.names if alias.name not in (*MODULES, "torch.nn.functional")]
        elif isinstance(node, ast.ImportFrom):
            known = node.level == 0 and node.module in (*MODULES, "torch.nn", "collections.abc")
            wrong = [alias.name for alias in node.names if alias.name in BARRED or alias.name.startswith("_")]
            wrong = wrong if known else [node.module or "."]
        elif isinstance(node, ast.Attribute):
            changes = isinstance(node.ctx, (ast.Store, ast.Del))
            own = isinstance(node.value, ast.Name) and node.value.id == "self"
            if changes and not own:
                return f"line {node.lineno}: it changes {ast.unparse(node)}, which is not its own"
            wrong = [node.attr] if node.attr in BARRED or node.attr.startswith(FRAMES) else []
        elif isinstance(node, ast.Name):
            barred = node.id in BARRED_NAMES or node.id.startswith("__")
            wrong = [node.id] if barred or (node.id == "self" and not isinstance(node.ctx, ast.Load)) else []
        else:
            wrong = ["class"] if isinstance(node, ast.ClassDef) else []
            wrong += ["global"] if isinstance(node, ast.Global) else []
            names = [getattr(node, field, None) for field in ("name", "asname", "arg", "rest")]
            wrong += ["self as a new name"] if "self" in names else []
        if wrong:
            return f"line {getattr(node, 'lineno', 0)}: it uses {wrong[0]}, which a body may not"
    return ""
