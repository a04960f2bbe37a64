"""Every shape comment in the source is true: the code runs under a tracer that compares them with the tensors."""

from __future__ import annotations

import ast
import functools
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

import minillava.anyres
import minillava.compressors
import minillava.fast
import minillava.model
import prefixkv
from minillava.compressors import METHODS, Cover, Recorder
from minillava.config import LlavaConfig, TextConfig, VisionConfig
from minillava.fast import FastLinear, optimize
from minillava.model import Llava, manual_attention
from prefixkv import Plan, PrefixKV

COMMENT = re.compile(r"\S\s+#\s*\[([^\]]+)\](?:: .*)?$")  # a reason may follow after a colon
SOURCES = [
    Path(module.__file__)
    for module in (minillava.model, minillava.anyres, minillava.fast, minillava.compressors, prefixkv)
]

# Sizes that no two dimensions share, so that a comment cannot be right by accident.
CONFIG = LlavaConfig(
    vision=VisionConfig(hidden_size=33, intermediate_size=17, num_hidden_layers=2, num_attention_heads=3, image_size=28,
                        patch_size=7),
    text=TextConfig(vocab_size=101, hidden_size=40, intermediate_size=23, num_hidden_layers=5, num_attention_heads=6,
                    num_key_value_heads=2, head_dim=14, max_position_embeddings=300),
    image_token_id=100,
)  # fmt: skip
KNOWN = {"H": 6, "Hkv": 2, "G": 3, "Dh": 14, "D": 40, "V": 101, "L": 5, "Dv": 33, "Hv": 3, "P": 16, "R": 28, "patch": 7}


def commented(path: Path) -> dict[int, tuple[ast.stmt, str]]:
    """Statements that end in a shape comment, by every line they span."""
    lines, found = path.read_text().splitlines(), dict[int, tuple[ast.stmt, str]]()
    for node in ast.walk(ast.parse("\n".join(lines))):
        simple = isinstance(node, ast.stmt) and not hasattr(node, "body")
        if simple and (match := COMMENT.search(lines[node.end_lineno - 1])):
            found |= dict.fromkeys(range(node.lineno, node.end_lineno + 1), (node, match[1]))
    assert len({node for node, _ in found.values()}) == sum(map(bool, map(COMMENT.search, lines))), path
    return found


def difference(shape: tuple[int, ...], comment: str, bound: dict[str, int], own: dict[str, int]) -> str:
    """What a comment says that is not so; "" if it is true.

    Names are those of KNOWN, the function's `own` integers, or take the size they meet first in a call.
    """
    parts = [part.strip() for part in comment.split(",")]
    if len(parts) != len(shape):
        return f"# [{comment}] against {tuple(shape)}"
    for part, size in zip(parts, shape):
        known = {**own, **KNOWN, **bound}
        for name in {*re.findall(r"[A-Za-z]\w*", part)} - {*known}:  # one, as N in F + N
            bound[name] = next((n for n in range(size + 1) if eval(part, {**known, name: n}) == size), -1)
        found = eval(part, {**known, **bound})
        if found != size:
            return f"# [{comment}] against {tuple(shape)}: {part} is {found}"
    return ""


class Tracer:
    """Follows the functions of some source files and checks every commented statement it sees executed."""

    def __init__(self, paths):
        self.statements = {str(path): commented(path) for path in paths}
        self.seen: set[tuple[str, int]] = set()
        self.wrong: list[str] = []

    @functools.cache  # noqa: B019 (a tracer stays as long as its test)
    def comments(self, code):
        """The commented statements of a function, by line. Those around a comprehension are not its own."""
        statements = {} if code.co_name.startswith("<") else self.statements.get(code.co_filename, {})
        return {line: statements[line] for _, _, line in code.co_lines() if line in statements}

    def __call__(self, frame, event, _):
        statements, pending, bound = self.comments(frame.f_code), None, {}

        def local(frame, event, value):
            nonlocal pending
            if pending and (event == "return" or statements.get(frame.f_lineno, (None,))[0] is not pending[0]):
                self.verify(frame, *pending, value if event == "return" else None, bound)
                pending = None
            if event == "line":
                pending = statements.get(frame.f_lineno)
            return local

        return local if statements and event == "call" else None

    def verify(self, frame, node, comment, value, bound):
        if not isinstance(node, ast.Return):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            value = eval(ast.unparse(target), frame.f_globals, frame.f_locals)
        self.seen.add((frame.f_code.co_filename, node.lineno))
        own = {name: number for name, number in frame.f_locals.items() if type(number) is int}
        if wrong := difference(getattr(value, "shape", ()), comment, bound, own):  # no comment is true of None
            self.wrong.append(f"{Path(frame.f_code.co_filename).name}:{node.lineno}: {wrong}")


def traced(paths, run) -> Tracer:
    """What is seen of these sources while `run` runs."""
    tracer, before = Tracer(paths), sys.gettrace()
    sys.settrace(tracer)
    try:
        run()
    finally:
        sys.settrace(before)
    return tracer


def exercise() -> None:
    """Has the model, plain and fast, read and write: without a method, with a plan, and with each of METHODS."""
    torch.manual_seed(0)
    model = Llava(CONFIG).eval()
    image = torch.full((16,), 100)
    rows = [
        torch.cat([torch.arange(9), image, torch.arange(4)]),
        torch.cat([image, torch.arange(2), image]),
        torch.arange(17),
        torch.arange(11),
    ]
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(longest - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    pixels = torch.randn(3, 3, 28, 28)
    manual_attention(torch.randn(2, 6, 5, 14), torch.randn(2, 2, 5, 14), torch.randn(2, 2, 5, 14), None)
    model(ids, pixels, mask)
    for others in ([Cover], METHODS.values()):  # plain and fast
        for compressor in (None, Recorder(), PrefixKV(plan=Plan(0.3, [0.3] * 5)), *(method(0.4) for method in others)):
            cache = model.new_cache(2, compressor)
            list(model.decode(model.read(ids, cache, pixels, mask), cache, eos_token_id=()))
            cache.reserve(9)
            model.read(ids[:, :9] % 100, cache)
        model.generate(ids[:1, -4:], max_new_tokens=2, temperature=1.0, top_k=5, top_p=0.5, seed=1)
        optimize(model)
    model.bfloat16().generate(ids, pixels, mask, max_new_tokens=2, eos_token_id=())
    model = Llava(replace(CONFIG, image_grid_pinpoints=((28, 56), (56, 28), (56, 56))))
    for size in ([20, 50], [61, 40]):
        tiling = model.config.tiling(size)
        ids = torch.tensor([[5, *[100] * tiling.tokens, 7]])
        model(ids, torch.randn(tiling.tiles, 3, 28, 28), image_sizes=torch.tensor([size]))
    for batch in (1, 9):
        FastLinear(300, 512)(torch.randn(batch, 1, 300))  # wide enough to be shared out between threads


def test_every_shape_comment_is_true_and_is_reached():
    tracer = traced(SOURCES, exercise)
    assert not tracer.wrong, "\n".join(tracer.wrong)
    every = {(name, node.lineno) for name, found in tracer.statements.items() for node, _ in found.values()}
    assert every - tracer.seen == set()
    assert len(every) > 40


def lying(x):
    x = x + 1  # [B, N, D]: only this is true
    turned = x.mT  # [B, N, D]
    turned[0] = x[0].mT  # [B, N, D]
    return x  # [B, H, D]


def test_a_shape_comment_that_lies_is_caught():
    tracer = traced([Path(__file__)], lambda: lying(torch.zeros(2, 3, 40)))
    said = [wrong.rpartition(": ")[2] for wrong in tracer.wrong]
    assert said == ["N is 3", "# [B, N, D] against (40, 3)", "H is 6"] and len(tracer.seen) == 4
