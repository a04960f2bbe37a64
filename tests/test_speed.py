"""`bench.speed`: it runs, its table follows from what was measured, and it says what it cannot do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from bench import common, speed
from bench.speed import PRESETS, Preset, Result, main, median, table
from minillava.checks import LlavaError

SHAPES = speed.llava(64, 96, 2, 4, 320, speed.VisionConfig(48, 80, 3, 4, image_size=28, patch_size=7), kv_heads=2)


def result(step, kv, prefill=1.0):
    return Result(prefill, step, 1000 / step, prefill + step * 63 / 1000, kv, 1_000_000, 1, 1)


def rows_of(text):
    """The cells of the tables in a text, heads included."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


def test_work_is_done_in_a_new_process_and_one_that_dies_is_an_error():
    assert common.in_a_process(os.getpid) != os.getpid()
    with pytest.raises(LlavaError, match="died; is there"):
        common.in_a_process(signal.raise_signal, signal.SIGKILL)


def test_ctrl_c_while_a_program_imports_ends_it_quietly(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "bench.speed"],
        cwd=ROOT,
        capture_output=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


def test_a_small_run_of_every_kind_of_contender(tmp_path, capsys, monkeypatch, tiny):
    monkeypatch.setattr(common, "in_a_process", lambda work, *arguments: work(*arguments))
    monkeypatch.setattr(speed, "BLOCK", 1000)
    names = ["transformers DynamicCache", "transformers StaticCache", "full", "PrefixKV 20%", "plan 20%", "full int8"]
    ask = ["--preset", "tiny", "--new", "4", "--rounds", "1", "--out", str(tmp_path), "--contenders", *names]
    assert main(ask) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "speed.md").read_text() == shown
    assert [row[0] for row in rows_of(shown)] == ["", *names] and len({len(row) for row in rows_of(shown)}) == 1
    rounds = json.loads((tmp_path / "speed.json").read_text())["rounds"]
    kept = {name: rounds[name][0]["kv_bytes"] for name in names}
    assert kept["transformers DynamicCache"] == kept["full"] == 595 * 8 * 2 * 2 * 32 * 4  # tokens, layers, K V, heads
    assert kept["PrefixKV 20%"] == pytest.approx(0.2 * kept["full"], rel=0.05)
    matrices = [p for layer in tiny[0].language_model.layers for p in layer.parameters() if p.dim() > 1]
    read = sum(p.numel() for p in (*matrices, tiny[0].lm_head.weight))
    assert [rounds[name][0]["weight_bytes"] for name in names] == [4 * read] * 5 + [read]


def test_growth_has_the_exponents_of_what_was_measured(monkeypatch, tmp_path, capsys):
    def run(name, folder, preset):
        size = preset.batch * preset.prompt
        return result(size + 1024, 0, size if name == "full" else size**2)

    monkeypatch.setattr(speed, "run", run)
    assert main(["--preset", "tiny", "--growth", "--out", str(tmp_path)]) == 0
    rows = [row[1:4] for row in rows_of(capsys.readouterr().out) if row[0].startswith("exponent")]
    steps = ["0.70", "0.92", "0.81", "0.96"]  # of prompts: log(17408 / 1536) / log(32), log(17408 / 9216) / log(2)
    assert rows == [["1.00", "2.00", step] for step in steps]
    assert os.listdir(tmp_path) == ["speed.md"]  # there are no rounds for a speed.json


def test_the_table_has_gain_and_limit_of_what_was_measured():
    """What is compiled gains over what is compiled."""
    measured = {
        "full": result(40.0, 3_000_000),
        "PrefixKV 20%": result(20.0, 600_000),
        "full compiled": result(30.0, 3_000_000),
        "PrefixKV 20% compiled": result(20.0, 600_000),
    }
    rows = rows_of(table(measured, 1e8, PRESETS["cpu"]))[1:]
    assert rows[0][3:5] == ["40.00", "1.00"]  # 4 MB at 100 MB/s take 40 ms
    assert [row[10] for row in rows] == ["1.00", "2.00", "1.00", "1.50"]
    assert rows[1][11] == "2.50"  # (1 + 3) / (1 + 0.6)


def test_medians_are_taken_figure_by_figure():
    found = median([result(step, kv) for step, kv in ((3.0, 10), (1.0, 30), (2.0, 20))])
    assert (found.step_milliseconds, found.tokens_per_second, found.kv_bytes) == (2.0, 500.0, 20)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--rounds", "0"], "found 0, 1, 128"),
        (["--batch", "0"], "found 3, 0, 128"),
        (["--new", "1"], "found 3, 1, 1"),
        (["--device", "cuda"], "needs a GPU"),
    ],
)
def test_what_cannot_be_measured_is_said(options, sentence, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--preset", "tiny", *options]) == 2
    assert sentence in capsys.readouterr().err


def test_the_papers_presets_have_the_shapes_of_llava():
    for name, parameters in (("paper-7b-1024", 7.06e9), ("paper-13b-624", 13.35e9)):
        model = speed.empty_model(PRESETS[name].model)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("grids", [(), ((28, 56), (56, 28))])
def test_a_random_checkpoint_is_the_same_to_transformers(tmp_path, grids):
    from transformers import AutoModelForImageTextToText

    config = replace(SHAPES, image_grid_pinpoints=grids)
    speed.write_checkpoint(config, tmp_path, torch.bfloat16)
    inputs = speed.make_inputs(config, Preset(config, 2, 80, 2, picture=(28, 56)))
    model = speed.load_model(tmp_path, dtype=None)
    assert model.lm_head.weight.dtype == torch.bfloat16
    with torch.no_grad():
        theirs = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)(**inputs).logits
        ours = model.float()(**inputs)
    assert float((ours - theirs).abs().max()) < 1e-5 and 0.2 < float(ours.std()) < 5


def test_a_row_names_its_method_and_budget():
    for name in (*speed.OTHERS, "PrefixKV 20%", "PrefixKV 20% compiled"):
        method = speed.compressor_of(name, 8)
        assert type(method) is speed.METHODS[name.split()[0].lower()] and method.budget == 0.2
    assert speed.compressor_of("full without all", 8) is None
    assert speed.compressor_of("plan 20%", 3).plan.ratios == [0.2] * 3


def test_scoring_divides_by_the_full_cache_of_the_same_round(capsys, tmp_path):
    seconds = {"full": [8.0, 1.0, 4.0, 2.0], "cover": [80.0, 1.5, 4.0, 2.0], "prefixkv": [16.0, 2.0, 8.0, 4.0]}
    assert rows_of(speed.scoring_table(seconds, PRESETS["tiny"]))[1:] == [
        ["full", "3.0000", "1.000 (1.00–1.00)"],
        ["cover", "3.0000", "1.250 (1.00–10.00)"],
        ["prefixkv", "6.0000", "2.000 (2.00–2.00)"],
    ]
    assert main(["--preset", "tiny", "--rounds", "1", "--scoring", "cover", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "592 prompt tokens" in out and [row[0] for row in rows_of(out)] == ["", "full", "cover"]
    rounds = json.loads((tmp_path / "speed.json").read_text())["rounds"]
    assert {name: len(each) for name, each in rounds.items()} == {"full": 1, "cover": 1}
