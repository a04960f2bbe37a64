"""`bench.speed`: it runs, its table follows from what was measured, and it says what it cannot do."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
import torch

from bench import common, speed
from bench.speed import PRESETS, Result, main, median, table
from minillava.checks import LlavaError

SHAPES = speed.llava(64, 96, 2, 4, 320, speed.VisionConfig(48, 80, 3, 4, image_size=28, patch_size=7), kv_heads=2)


def result(contender, step, kv, weights=1_000_000, prefill=1.0):
    return Result(contender, prefill, step, 1000 / step, prefill + step * 63 / 1000, kv, weights, 1, 1)


def rows_of(text):
    """The cells of the tables in a text, heads included."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


def test_work_is_done_in_a_new_process_and_one_that_dies_is_an_error():
    assert common.in_a_process(os.getpid) != os.getpid()
    with pytest.raises(LlavaError, match="died; is there"):
        common.in_a_process(signal.raise_signal, signal.SIGKILL)


def test_a_small_run_of_every_kind_of_contender(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "in_a_process", lambda work, *arguments: work(*arguments))
    names = ["transformers DynamicCache", "transformers StaticCache", "full", "PrefixKV 20%", "plan 20%"]
    ask = ["--preset", "tiny", "--new", "4", "--rounds", "1", "--out", str(tmp_path), "--contenders", *names]
    assert main(ask) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "speed.md").read_text() == shown
    assert [row[0] for row in rows_of(shown)] == ["", *names] and len({len(row) for row in rows_of(shown)}) == 1
    rounds = json.loads((tmp_path / "speed.json").read_text())["rounds"]
    kept = {name: rounds[name][0]["kv_bytes"] for name in names}
    assert kept["transformers DynamicCache"] == kept["full"] == 595 * 8 * 2 * 2 * 32 * 4  # tokens, layers, K V, heads
    assert kept["PrefixKV 20%"] == pytest.approx(0.2 * kept["full"], rel=0.05)
    weights = rounds["full"][0]["weight_bytes"]
    assert weights == rounds["transformers DynamicCache"][0]["weight_bytes"]


def test_growth_has_the_exponents_of_what_was_measured(monkeypatch):
    def run(name, folder, preset):
        size = preset.batch * preset.prompt
        return result(name, size**0.5, 0, prefill=size if name == "full" else size**2)

    monkeypatch.setattr(speed, "run", run)
    rows = [row[1:4] for row in rows_of(speed.growth("folder", PRESETS["cpu"], 1)) if row[0].startswith("exponent")]
    assert rows == [["1.00", "2.00", "0.50"]] * 4


def test_the_weights_counted_are_those_that_a_step_reads(tiny):
    model, _ = tiny
    parameters = [p for name, p in model.named_parameters() if "norm" not in name and p.dim() > 1
                  and name.startswith(("language_model.layers", "lm_head"))]  # fmt: skip
    found = speed.measure("full", str(speed.TINY), speed.replace(PRESETS["tiny"], new=2))
    assert found.weight_bytes == 4 * sum(p.numel() for p in parameters)


def test_the_table_has_gain_and_limit_of_what_was_measured():
    """What is compiled gains over what is compiled."""
    measured = [result("full", 40.0, 3_000_000), result("PrefixKV 20%", 20.0, 600_000),
                result("full compiled", 30.0, 3_000_000), result("PrefixKV 20% compiled", 20.0, 600_000)]  # fmt: skip
    rows = rows_of(table(measured, 1e8, PRESETS["cpu"]))[1:]
    assert rows[0][3:5] == ["40.00", "1.00"]  # 4 MB at 100 MB/s take 40 ms
    assert [row[10] for row in rows] == ["1.00", "2.00", "1.00", "1.50"]
    assert rows[1][11] == "2.50"  # (1 + 3) / (1 + 0.6)


def test_medians_are_taken_figure_by_figure():
    found = median([result("full", step, 10) for step in (3.0, 1.0, 2.0)])
    assert found.step_milliseconds == 2.0 and found.contender == "full"


@pytest.mark.parametrize(
    "options, sentence",
    [(["--rounds", "0"], "found 0, 1, 128"), (["--batch", "0"], "found 3, 0, 128"), (["--new", "1"], "found 3, 1, 1"),
     (["--device", "cuda"], "needs a GPU")],
)  # fmt: skip
def test_what_cannot_be_measured_is_said(options, sentence, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--preset", "tiny", *options]) == 2
    assert sentence in capsys.readouterr().err


def test_the_papers_presets_have_the_shapes_of_llava():
    for name, parameters in (("paper-7b-1024", 7.06e9), ("paper-13b-624", 13.35e9)):
        model = speed.empty_model(PRESETS[name].model)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)


def test_a_row_names_its_method_and_budget():
    for name in (*speed.OTHERS, "PrefixKV 20%", "PrefixKV 20% compiled"):
        method = speed.compressor_of(name, 8)
        assert type(method) is speed.METHODS[name.split()[0].lower()] and method.budget == 0.2
    assert speed.compressor_of("full without all", 8) is None
    assert speed.compressor_of("plan 20%", 3).plan.ratios == [0.2] * 3


def test_scoring_divides_by_the_full_cache_of_the_same_round(capsys):
    seconds = {"full": [1.0, 2.0, 4.0, 8.0], "cover": [1.5, 2.0, 4.0, 80.0], "prefixkv": [2.0, 4.0, 8.0, 16.0]}
    assert rows_of(speed.scoring_table(seconds, PRESETS["tiny"]))[1:] == [
        ["full", "3.0000", "1.000 (1.00–1.00)"], ["cover", "3.0000", "1.250 (1.00–10.00)"],
        ["prefixkv", "6.0000", "2.000 (2.00–2.00)"],
    ]  # fmt: skip
    assert main(["--preset", "tiny", "--rounds", "1", "--scoring", "cover"]) == 0
    out = capsys.readouterr().out
    assert "592 prompt tokens" in out and [row[0] for row in rows_of(out)] == ["", "full", "cover"]


def test_a_prompts_parts_make_up_its_seconds(capsys):
    assert main(["--preset", "tiny", "--rounds", "1", "--where"]) == 0
    seconds = {name: float(taken) for name, taken, *_ in rows_of(capsys.readouterr().out)[1:]}
    whole = seconds.pop("whole prompt")
    # Each is rounded to hundredths, so off by 0.005 at most: three numbers, and seven.
    assert seconds["vision tower"] + seconds["decoder"] <= whole + 0.015 + 1e-9
    assert sum(seconds.values()) - seconds["decoder"] <= whole + 0.035 + 1e-9


def test_a_checkpoint_is_written_once_and_its_loading_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "small", speed.Preset(SHAPES, 2, 40, 2, dtype="bfloat16"))
    ask, path = ["--preset", "small", "--loading", str(tmp_path / "new")], tmp_path / "new/config.json"
    assert main(ask) == 0
    written, out = path.stat().st_mtime_ns, capsys.readouterr().out
    parameters, size = (int(text.replace(",", "")) for text in re.findall(r"[\d,]*\d", out)[:2])
    assert parameters == sum(p.numel() for p in speed.empty_model(SHAPES).parameters()) and size > 2 * parameters
    assert main(ask) == 0 and path.stat().st_mtime_ns == written
