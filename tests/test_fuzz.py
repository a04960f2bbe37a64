"""A slice of `bench.fuzz`: damaged files end well, and what ends badly is found."""

from __future__ import annotations

import os
import random

from bench import fuzz
from minillava.checks import LlavaError


def test_damaged_files_end_well(sweep):
    """Each kind of file once, or seven times."""
    ends = fuzz.fuzz(range(len(fuzz.TARGETS) * (7 if sweep else 1)), seed=1)
    assert not ends["failed"] and min(ends["ran"], ends["were refused"]) > 3


def test_what_ends_badly_is_counted_and_named_and_a_case_can_be_run_again(monkeypatch, capfd, tmp_path):
    def make_seeds(folder):
        (folder / "hub").mkdir(parents=True)
        for name in fuzz.TARGETS[:5]:
            (folder / name).write_text('{"a": 1}')

    def use(rng, folder, name):
        with (tmp_path / "drawn").open("a") as drawn:
            drawn.write(f"{rng.random()}\n")
        if name == fuzz.TARGETS[0]:
            raise KeyError("from below")
        if name == fuzz.TARGETS[1]:
            os._exit(9)
        if name == fuzz.TARGETS[2]:
            raise LlavaError("two\nlines")
        (folder / ("new" if name == fuzz.TARGETS[3] else "half")).mkdir()
        return 0

    monkeypatch.setattr(fuzz, "make_seeds", make_seeds)
    monkeypatch.setattr(fuzz, "use", use)
    assert fuzz.fuzz(range(5), seed=1) == {"failed": 4, "ran": 1}
    shown = capfd.readouterr().err
    assert "from below" in shown and "case 1, hub/model.safetensors.index.json: its process ended with 9" in shown
    assert fuzz.fuzz([3], seed=1) == fuzz.fuzz([3], seed=2) == {"ran": 1}
    *drawn, other = (tmp_path / "drawn").read_text().split()
    assert drawn[5] == drawn[3] != other and len({*drawn}) == 5


def test_damage_follows_from_its_number(tmp_path):
    for number in range(20):
        for path in (tmp_path / "a.json", tmp_path / "b.json"):
            path.write_text('{"a": [1, {"b": 2}], "c": "d"}')
            fuzz.damage(random.Random(number), number, path)
        assert path.read_bytes() == (tmp_path / "a.json").read_bytes()
