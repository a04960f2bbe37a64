"""What the README tells people to type is what CI runs, with --sweep, and its example in Python works."""

from __future__ import annotations

import contextlib
import re
import runpy
import signal
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixkv import priority, search

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_exactly_two_set_up_commands():
    (block,) = blocks("sh")
    commands = block.splitlines()
    assert [command.split("&& ")[-1].strip() for command in commands] == ["python demo.py", "pytest -n auto"]
    assert all(command.startswith("pip install -c constraints.txt -e ") for command in commands)
    ci = (ROOT / ".ci" / "run").read_text()
    assert r"test_command=$(grep -m 1 '&& pytest -n auto$' README.md)" in ci
    assert ci.endswith('eval "$test_command --sweep"\n')


def test_the_python_examples_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    scope: dict[str, Any] = {}
    for example in blocks("python")[1:]:
        exec(compile(example, "README.md", "exec"), scope)
    assert capsys.readouterr().out.splitlines()[-1] == "yes."


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 40), st.floats(0.05, 1.0))
def test_the_algorithm_it_shows_keeps_what_prefixkv_does(seed, layers, length, budget):
    algorithm = blocks("python")[0]
    assert len(algorithm.splitlines()) <= 12
    scope: dict[str, Any] = {}
    exec(compile(algorithm, "README.md", "exec"), scope)
    scores = torch.rand(layers, length, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    attention = scores.tril() / scores.tril().sum(-1, keepdim=True)
    total = max(layers, int(budget * layers * length))
    found = scope["prefixkv"](attention, total / (layers * length))
    received = attention.sum(1)
    _, sizes = search(priority(received), total, 0)
    for keys, size, row in zip(found, sizes.tolist(), received):
        assert keys.tolist() == row.argsort(descending=True)[:size].tolist()


def test_the_reading_order_names_every_file_and_gives_the_length_of_some():
    counted = re.findall(r"`([\w/.]+\.py)` \((\d+) lines", README)
    assert len(counted) >= 7
    for name, lines in counted:
        path = ROOT / name if (ROOT / name).exists() else ROOT / "minillava" / name
        assert len(path.read_text(encoding="utf-8").splitlines()) == int(lines), name
    for path in [*ROOT.glob("*.py"), *(ROOT / "minillava").glob("[!_]*.py")]:
        assert re.search(rf"`(minillava/)?{path.name}`|python {path.name}", README), path


def commands() -> dict[str, set[str]]:
    """Programs that the documents tell people to run, and the options that they are given there."""
    found: dict[str, set[str]] = {}
    folders = ("", "coursework", "minillava/tiny", "bench/results")
    for path in [ROOT / "CONTRIBUTING.md", *(ROOT / folder / "README.md" for folder in folders)]:
        text = path.read_text(encoding="utf-8")
        for program, rest in re.findall(r"\bpython (-m [\w.]+|\w+\.py)([^`\n]*)", text):
            found.setdefault(program.removesuffix("."), set()).update(re.findall(r"--[a-z][\w-]*", rest))
    assert not found.pop("tour.py", None)  # it would run to its end, and test_tour.py has it do so
    return found


@pytest.mark.parametrize("program, options", commands().items())
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # run once more, as a command
def test_every_command_it_names_exists_with_the_options_it_gives(program, options, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    *module, name = program.split()
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    before = signal.getsignal(signal.SIGINT)
    with torch.enable_grad(), contextlib.suppress(SystemExit):
        if module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    signal.signal(signal.SIGINT, before)
    shown = capsys.readouterr().out
    missing = {option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", shown)}
    assert shown and not missing
