"""`bench.report`: one file about a checkpoint, whole or not at all."""

from __future__ import annotations

import re
import subprocess

import pytest
from checkpoints import reference, write
from conftest import TINY
from PIL import Image

from bench import report
from minillava import verify


def rows(text):
    """Cells of all tables, by their first one; escapes taken out."""
    lines = [line[2:-2].replace("\\", "").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name: [line[1:] for line in lines if line[0] == name] for name in {line[0] for line in lines}}


def test_the_embedded_checkpoint_agrees_answers_and_reads_only_what_is_new(tmp_path, tiny, monkeypatch, capsys):
    def run(command, really=subprocess.run, **options):
        if "minillava.verify" not in command:
            return really(command, **options)
        assert command[command.index("--image") + 1].endswith("scene 7.png")
        code = verify.main([*command[3:], "--new-tokens", "4"])  # here, where transformers is imported
        return subprocess.CompletedProcess(command, code, capsys.readouterr().out)

    monkeypatch.setattr(subprocess, "run", run)
    assert report.main([str(TINY), "--out", str(tmp_path / "report.md")]) == 0
    text = (tmp_path / "report.md").read_text()
    found = rows(text)
    assert "63 stages agree with transformers" in text and "greedy tokens" in text and "## scene 7.png" in text
    assert f"{sum(p.numel() for p in tiny[0].parameters()):,}" == found["parameters"][0][0]
    image, processor = Image.new("RGB", (9, 9)), tiny[1]
    first = processor(processor.chat([(report.QUESTIONS[0], None)], 1), [image])["input_ids"].shape[1]
    for name, share in (("full", 1.0), ("prefixkv", 0.2), ("cover", 0.2)):
        assert [row[0] for row in found[name]] == list(report.QUESTIONS)
        assert int(found[name][0][2]) == first and all(int(row[2]) < 100 for row in found[name][1:])  # tokens read
        held, tokens = map(int, re.findall(r"\d+", found[name][2][5]))
        assert held == pytest.approx(share * tokens, abs=2)
    assert found["full"][1][1] == found["cover"][1][1] == "two."


def test_a_random_checkpoint_and_pictures_of_ones_own_without_transformers(tmp_path, monkeypatch):
    folder = write(reference(text={"max_position_embeddings": 1024}), tmp_path / "model")
    (tmp_path / "transformers.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(report, "ANSWER", 5)
    arguments = [str(folder), "--images", str(TINY / "examples"), "--out", str(tmp_path / "report.md")]
    assert report.main(arguments) == 0
    text = (tmp_path / "report.md").read_text()
    assert "Not compared: verify: error: transformers is not installed" in text
    assert [f"## scene_{number}.png" in text for number in (1, 2, 3)] == [True] * 3
    assert len(rows(text)["cover"]) == len(report.QUESTIONS) + 2


@pytest.mark.parametrize("model, images", [("/nothing", None), (TINY, "nothing"), (TINY, ""), (TINY, "bad")])
def test_what_cannot_be_used_ends_in_a_sentence(model, images, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no picture")
    given = [] if images is None else ["--images", str(tmp_path / images)]
    assert report.main([str(model), *given, "--out", str(tmp_path / "report.md")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.glob("report.md*"))


def test_nothing_that_a_model_writes_is_a_mark():
    assert report.table(["a"], [["x | *y*\n<b>"]]).splitlines()[2] == r"| x \| \*y\* \<b> |"
