"""`bench.quality`: what it measures, how it goes on after a stop, alone and in several processes."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import edit, reference, write
from conftest import ROOT, TINY, ends_with_this_process
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import weights
from bench import quality
from bench.quality import PROTOCOLS, curves, gini, interval, likelihood, main, read_results
from bench.variants import empty_cache, make
from minillava.checks import LlavaError
from minillava.compressors import METHODS, Recorder
from prefixkv import PrefixKV
from weights import read_plan


@pytest.fixture(scope="module")
def quick_model(tmp_path_factory):
    """A random checkpoint with the embedded one's tokenizer, two layers, small pictures, and many end tokens."""
    tiny = weights.read_config(TINY)
    theirs = reference(
        text={"vocab_size": tiny.text.vocab_size, "num_hidden_layers": 2, "max_position_embeddings": 1024},
        image_token_index=tiny.image_token_id,
        pad_token_id=tiny.pad_token_id,
    )
    folder = write(theirs, tmp_path_factory.mktemp("model"))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    edit(folder / "generation_config.json", eos_token_id=list(range(3, tiny.text.vocab_size, 4)))
    return folder


RUNS = [("full", 1.0), ("full@2", 1.0), ("cover", 0.3), ("prefixkv", 0.3), ("plan", 0.3)]
QUICK = ["--samples", "2", "--questions", "3", "--batch-size", "2", "--budgets", "0.3", "--max-new-tokens", "12",
         "--methods", "full", "cover", "prefixkv", "plan", "full@2"]  # fmt: skip


@pytest.fixture(scope="module")
def quick(tmp_path_factory, quick_model):
    """A finished run of two descriptions and three questions, with a picture of one protocol, since each takes long."""
    out, plot = tmp_path_factory.mktemp("quick"), quality.plot
    with pytest.MonkeyPatch.context() as patch:
        known = lambda records: [record for record in records if record["protocol"] == "known"]  # noqa: E731
        patch.setattr(quality, "plot", lambda records, path: plot(known(records), path))
        assert main([*QUICK, "--model", str(quick_model), "--out", str(out)]) == 0
    return out


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Only the run of `quick` draws one."""
    monkeypatch.setattr(quality, "plot", lambda records, path: None)


def test_likelihood_of_the_full_cache_is_that_of_one_forward_pass(tiny):
    model, processor = tiny
    samples = quality.scenes(2, seed=1)
    answers = [processor.tokenizer.model.encode(sample.answer) for sample in samples]
    cache = model.new_cache()
    logits = model.read(**quality.together(model, processor, samples), cache=cache)
    found, kept = likelihood(model, logits, cache, answers), cache.kept.T.tolist()
    for sample, answer, loss, counts in zip(samples, answers, found, kept):
        inputs = processor(sample.prompt(processor), [sample.image()])
        length = inputs["input_ids"].shape[1]
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
        with torch.no_grad():
            logits = model(ids, inputs["pixel_values"])[0, length - 1 : -1].double()
        expected = -logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].sum()
        # float32 logits of up to 30, about 100 of them summed, each a few units in the last place off
        assert loss == pytest.approx(float(expected), abs=2e-3) and counts == [length] * 8


def test_every_run_is_there_once_and_the_tables_show_each(quick):
    records = read_results(quick)
    assert sorted(map(quality.key_of, records)) == sorted(
        (kind, protocol, index, *run)
        for kind, count in (("question", 3), ("description", 2))
        for protocol in PROTOCOLS
        for index in range(count)
        for run in RUNS
    )
    for record in records:
        if record["method"] == "prefixkv":
            assert sum(record["kept"]) == round(record["budget"] * 2 * record["prompt"])
        share = 3 / 16 if record["method"] == "full@2" else record["budget"]
        # 2 bits, and 1 for scale and zero. In short texts rounding, cover's notes and 31 newest tokens in full matter.
        assert share - 0.05 < record["share"] < share + {"full@2": 0.6, "cover": 0.12}.get(record["method"], 0.08)
    text = (quick / "table.md").read_text()
    for row in ("| cover |", "| prefixkv |", "| plan |", "| full@2 |", "| 1 |", "*another scene's description*"):
        assert row in text
    assert text.count("Short questions answered exactly") == text.count("By bytes held at the end") == 3
    assert Image.open(quick / "quality.png").size[0] > 300


def test_a_run_that_was_stopped_goes_on_in_two_processes_to_the_same_table(
    quick, quick_model, tmp_path, monkeypatch, capsys
):
    (tmp_path / "settings.json").write_bytes((quick / "settings.json").read_bytes())
    lines = (quick / "results-0.jsonl").read_text().splitlines(keepends=True)
    # The first line is of a batch of two.
    (tmp_path / "results-0.jsonl").write_text("".join(lines[1:-20]) + lines[-20][:30])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # what torchrun would set
    for name, value in (group | {"RANK": "1", "LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    arguments = [*QUICK, "--model", str(quick_model), "--out", str(tmp_path)]
    other = subprocess.Popen(
        [sys.executable, "-m", "bench.quality", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        preexec_fn=ends_with_this_process,
    )
    monkeypatch.setenv("RANK", "0")
    assert main(arguments) == other.wait() == 0
    assert "damaged" in capsys.readouterr().err
    assert (tmp_path / "table.md").read_bytes() == (quick / "table.md").read_bytes()
    found = [path.read_text().splitlines(keepends=True) for path in sorted(tmp_path.glob("results-*.jsonl"))]
    assert len(found) == 2 and all(found) and sorted(itertools.chain(*found)) == sorted(lines)


def test_results_of_other_settings_or_with_a_damaged_line_are_not_mixed(quick, quick_model, tmp_path, capsys):
    out = shutil.copytree(quick, tmp_path / "out")
    assert main([*QUICK, "--model", str(quick_model), "--out", str(out), "--seed", "5"]) == 2
    assert "seed 0" in capsys.readouterr().err
    (out / "results-0.jsonl").write_text('{"sample": 1\n{"sample": 2}\n')
    with pytest.raises(LlavaError, match="line 1"):
        read_results(out)


def test_bad_entries_are_named_and_the_rest_is_evaluated(quick_model, tmp_path, capsys):
    path = tmp_path / "data.json"
    Image.effect_noise((50, 40), 80).convert("RGB").save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no image")
    talk = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": "A cat."}]
    entries = [
        {"image": "a.png", "conversations": talk},
        {"image": "a.png", "conversations": [*talk, {"value": "Is it black?"}, {"value": "yes."}]},
        {"imagename": "a.png", "question": "How many?", "answer": "two."},
        {"image": "missing.png", "question": "What is it?", "answer": "A dog."},
        {"image": "a.png", "question": "What is it?", "answer": "  "},
        {"image": "text.png", "question": "What is it?", "answer": "x"},
        {"image": "a.png", "conversations": [{"value": "<image>"}]},
        "not an entry",
        {"image": "a.png", "conversations": [{"value": "no picture"}, {"value": "x"}]},
    ]
    for content in (entries, dict(enumerate(entries))):
        path.write_text(json.dumps(content))
        samples, bad = quality.read_samples(path, tmp_path, 8)
        assert [sentence.split(":")[0].split()[-1] for sentence in bad] == ["3", "4", "5", "6", "7"]
        assert [(sample.question, sample.answer, sample.earlier) for sample in samples] == [
            ("<image>\nDescribe.", "A cat.", None),
            ("<image>\nIs it black?", "yes.", ("Describe.", "A cat.")),
            ("How many?\n<image>", "two.", None),
        ]
    code = main(["--data", str(path), "--images", str(tmp_path), "--out", str(tmp_path / "out"), "--dtype", "int8",
                 "--methods", "full", "--max-new-tokens", "5", "--model", str(quick_model)])  # fmt: skip
    shown = capsys.readouterr()
    assert code == 1 and [f"entry {index}:" in shown.err for index in range(9)] == [False] * 3 + [True] * 6
    assert "Perplexity of the true description; protocol first, 3 samples." in shown.out
    assert "protocol second" not in shown.out and "Short questions" not in shown.out


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_protocol_says_after_which_tokens_the_cache_is_cut(tiny, protocol):
    _, processor = tiny
    for sample in quality.scenes(4, seed=0, short=True):
        inputs, cut = sample.split(processor, protocol)
        (ids,) = inputs["input_ids"].tolist()
        before, after = (processor.tokenizer.decode(part) for part in (ids[:cut], ids[cut:]))
        question, (asked, told) = sample.question.removeprefix("<image>\n"), sample.earlier
        if protocol == "known":
            assert f"{question} ASSISTANT:" in before and not after
        elif protocol == "first":
            assert [id == processor.config.image_token_id for id in ids[cut - 1 : cut + 1]] == [True, False]
            assert f"{question} ASSISTANT:" in after
        else:
            assert f"{asked} ASSISTANT:" in before and told in after and f"{question} ASSISTANT:" in after


def test_answers_are_those_of_reading_cutting_and_asking_one_by_one(quick, quick_model):
    model, processor = weights.load(quick_model, fast=True)
    asked = {"question": quality.scenes(3, 0, "asked", short=True), "description": quality.scenes(2, 0)}
    prompts = {
        (kind, protocol, index): sample.split(processor, protocol)
        for protocol in PROTOCOLS
        for kind, samples in asked.items()
        for index, sample in enumerate(samples)
    }
    for record in read_results(quick):
        if record["method"] == "plan":
            continue
        inputs, cut = prompts[quality.key_of(record)[:3]]
        cache = empty_cache(record["method"], model, 200, make(record["method"], record["budget"]))
        logits = model.read(inputs["input_ids"][:, :cut], cache, inputs["pixel_values"])
        if (turn := inputs["input_ids"][:, cut:]).numel():
            logits = model.read(turn, cache)
        tokens = list(itertools.islice(model.decode(logits, cache), 24 if record["kind"] == "question" else 12))
        assert processor.decode(torch.cat(tokens)).strip() == record["text"]


def test_what_is_right_in_an_answer_and_what_a_blind_one_is_worth():
    described, asked = quality.scenes(60, 0), quality.scenes(60, 0, short=True)
    for sample in described:
        count = len(sample.scene.things)
        for text, found in ((sample.answer, count), ("Nothing.", 0)):
            marks = sample.marks(text)
            assert (marks["found"], marks["true"], marks["told"]) == (found, count, found)
            for name, number in (("found", found), ("true", count)):  # by width
                assert sum(marks.get(f"{name} {width}", 0) for width in quality.WIDTHS) == number
        sentences = sample.answer.split(". ")
        assert sample.marks(". ".join(sentences[:2]) + ".")["found"] == 1
    for sample in asked:
        assert sample.marks(sample.answer) == {"right": 1} and sample.marks("") == {"right": 0}
        assert sample.earlier[0] not in sample.question
    (commonest,) = quality.blind(asked, "questions", 0).values()
    assert 20 < quality.statistic("questions", commonest) < 60  # half of the kinds are answered yes or no
    for floor in quality.blind(described, "objects", 0).values():
        assert quality.statistic("objects", floor) < 5  # of 96 objects in 9 places


@pytest.mark.parametrize("method", [None, *METHODS])
def test_a_cache_filled_from_notes_is_that_of_a_prefill(small, method):
    _, _, model, processor = small
    inputs = processor(["USER: What is in the image? ASSISTANT: a cat.", "two red"])
    prompt = quality.Collector()
    logits = model.read(**inputs, cache=model.new_cache(0, prompt))
    cache, filled = (model.new_cache(9, method and METHODS[method](0.4)) for _ in range(2))
    expected = model.read(**inputs, cache=cache)
    quality.fill(prompt, filled)
    for _ in range(9):
        assert torch.equal(logits, expected) and torch.equal(filled.position, cache.position)
        token = expected.argmax(-1, keepdim=True)
        expected, logits = model.read(token, cache), model.read(token, filled)
    assert torch.equal(logits, expected)


PUBLISHED = "Be polite. USER: What is it?\n<image> ASSISTANT:"
TEXT = "{{ messages[0]['content'][1]['text'] }}"  # part 0 is the image


@pytest.mark.parametrize(
    "template, expected",
    [(None, PUBLISHED), (f"USER: <image>\n{TEXT} ASSISTANT:", PUBLISHED),
     (f"<|im_start|>user\n<image>\n{TEXT}<|im_end|>\n<|im_start|>assistant",
      "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant")],
    ids=["none", "llava", "qwen"],
)  # fmt: skip
def test_a_prompt_is_the_published_one_unless_the_template_writes_another_form(tiny, template, expected):
    processor = copy.copy(tiny[1])  # other tests use it, too
    processor.template = template
    sample = quality.Sample("What is it?\n<image>", "A cat.", lambda: None, "Be polite. ")
    assert sample.prompt(processor) == expected


NO_ENTRY = [{"question": "What?", "answer": "a.", "image": "none.png"}]
ENTRY = [{"question": "What?", "answer": "a.", "image": str(TINY / "examples" / "scene_1.png")}]


@pytest.mark.parametrize(
    "content, options, message",
    [
        *((content, [], "data.json") for content in ("", "{}", "3", "[", None)),
        (json.dumps(NO_ENTRY), [], "no entry that can be used"),
        (json.dumps(ENTRY), ["--methods", "plan"], "needs --plans FOLDER"),
        (json.dumps(ENTRY), ["--methods", "best"], "no method 'best'"),
        (json.dumps(ENTRY), ["--protocols", "second"], "no questions for the protocol second"),
        (json.dumps(ENTRY), ["--out", "data.json/out"], "data.json"),
        (json.dumps(ENTRY), ["--model", "model"], "chat template cannot be used"),
        (json.dumps(ENTRY), ["--samples", "0"], "must be 1 or more"),
    ],
)
def test_what_cannot_be_used_ends_with_2(content, options, message, quick_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(quick_model, "model")
    Path("model", "chat_template.jinja").write_text("{{ 1 / 0 }}")
    if content is not None:
        Path("data.json").write_text(content)
    assert main(["--data", "data.json", "--out", "out", *options]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("bench.quality: error: ") == 1 and not Path("out").exists()


def test_a_plan_is_the_mean_of_what_samples_keep_and_says_how_far_they_agree(quick_model, tmp_path, capsys):
    plans, out, (model, processor) = tmp_path / "plans", tmp_path / "out", weights.load(quick_model, fast=True)
    ask = ["--samples", "3", "--batch-size", "2", "--budgets", "0.2", "0.5", "--model", str(quick_model)]
    assert main(["--estimate-plan", str(plans), *ask]) == 0
    assert "| 20% |" in capsys.readouterr().out
    for budget in (0.2, 0.5):
        plan, ratios = read_plan(plans / f"{budget}.json"), []
        for sample in quality.scenes(3, seed=0):
            cache = model.new_cache(1, PrefixKV(budget))
            model.read(**quality.together(model, processor, [sample]), cache=cache)
            ratios.append((cache.kept[:, 0] / cache.prompt_lengths).tolist())
        assert plan.samples == 3 and plan.model == str(quick_model)
        # Rounding in a batch may move a token of one sample, of some 40 and three.
        assert plan.ratios == pytest.approx(torch.tensor(ratios).mean(0).tolist(), abs=0.01)
    assert (
        main([*QUICK, *ask, "--plans", str(plans), "--out", str(out), "--protocols", "known", "--methods", "plan"]) == 0
    )
    assert "| | 20% | 50% |" in (out / "table.md").read_text()
    records = [record for record in read_results(out) if record["budget"] == 0.5]
    assert all(record["kept"] == [round(ratio * record["prompt"]) for ratio in plan.ratios] for record in records)
    assert len(records) == 6


@given(st.integers(0, 2**32 - 1), st.integers(3, 60))
def test_lorenz_curves_rise_to_one_and_gini_tells_equal_from_one_hot(seed, length):
    recorder = Recorder()
    random = torch.rand(length, generator=torch.Generator().manual_seed(seed))
    recorder.scores = torch.stack([torch.ones(length), random, torch.eye(length)[0]])[:, None]
    recorder.present = torch.ones(1, length, dtype=torch.bool)
    curve = curves(recorder)
    assert (curve.diff(dim=1) >= -1e-12).all()
    assert torch.allclose(curve[:, -1], torch.ones(3, dtype=torch.float64))
    equal, middle, alone = gini(curve).tolist()
    assert equal == pytest.approx(0, abs=1e-9) and equal - 1e-9 <= middle <= alone
    # A curve of 101 points cuts the corner of the steepest one by at most half a point.
    assert alone == pytest.approx(1 - 1 / length, abs=0.011)


def test_intervals_are_those_of_a_mean_of_normal_numbers():
    values = torch.randn(800, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = interval(values, lambda v: v.mean(-1))
    middle, half = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(800)
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=0.1 * half)


def test_a_cell_has_a_share_or_a_perplexity_and_says_whether_it_is_better_than_another_in_pairs():
    values = torch.tensor([(1.0, 2.0), (2.0, 2.0), (0.5, 2.0)], dtype=torch.float64)
    assert quality.cell("objects", values)[:4] == "58 (" and quality.cell("perplexity", values)[:6] == "1.79 ("
    less = values * torch.tensor([0.9, 1.0])  # each sample is a little below; the intervals overlap
    for measure, better, worse in (("objects", values, less), ("perplexity", less, values)):
        signs = [quality.cell(measure, *pair)[-2:] for pair in ((better, worse), (worse, better), (worse, worse))]
        assert signs == [" +", " −", " ="]
    assert quality.cell("objects", values[:0], less) == "" and quality.cell("objects", values, less[:2])[-1] == ")"
