"""A slice of `bench.fuzz`, and the hostile files that chance alone would not make."""

from __future__ import annotations

import random
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import fuzz
from minillava.checks import LlavaError
from minillava.processor import open_image


def test_damaged_files_end_well(sweep):
    counts, failures = fuzz.fuzz(range(10**6 if sweep else 190), seed=1, seconds=60)
    assert not failures
    assert all(counts[target, "error"] for target in fuzz.TARGETS)  # every kind of damage was met and told


def test_what_ends_badly_is_counted_and_named(monkeypatch):
    def broken(seeds):
        raise KeyError("from below")

    monkeypatch.setattr(fuzz, "use_data", broken)
    number = fuzz.TARGETS.index("data.json")
    counts, failures = fuzz.fuzz(range(number, number + 1), seed=1, seconds=60)
    assert counts == {("data.json", "failure"): 1}
    assert failures[0][0] == number and "from below" in failures[0][2]


def test_a_process_that_dies_is_counted_with_its_case(monkeypatch):
    monkeypatch.setattr(fuzz, "use_data", lambda seeds: fuzz.os._exit(9))
    number = fuzz.TARGETS.index("data.json")
    _, failures = fuzz.fuzz(range(number, number + 1), seed=1, seconds=60)
    assert failures == [[number, "data.json", "the process ended with 9"]]


@given(st.integers(0, 2**32), st.binary(max_size=200))
def test_damage_follows_from_its_seed(seed, data):
    assert fuzz.damage_bytes(random.Random(seed), data) == fuzz.damage_bytes(random.Random(seed), data)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(400_000, 250_000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1), (0, 5)])
def test_a_picture_that_claims_a_gigantic_size_is_refused(tmp_path, size):
    (tmp_path / "a.png").write_bytes(png_header(*size))
    with pytest.raises(LlavaError):
        open_image(tmp_path / "a.png")
