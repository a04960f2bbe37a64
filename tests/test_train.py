"""The training recipe: what depends on the picture's side, conversations side by side, and a run of two steps."""

from __future__ import annotations

import argparse
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from checkpoints import same_weights
from conftest import ROOT, TINY

from minillava.checks import LlavaError
from minillava.scenes import Question, describe, draw, make_scene, short_question
from train import evaluate, train_tiny
from train.train_tiny import LABELS, PATCH, Conversations, Stage
from weights import load, load_processor


def beginning(talk, seed=0):
    """A model and heads for pictures of 96 pixels, with random weights."""
    torch.manual_seed(seed)
    return train_tiny.new_model(96, talk), train_tiny.make_heads(12)


def options(work, seed=0, limit=None):
    """What the command line says."""
    return argparse.Namespace(work=work, device="cpu", seed=seed, limit=limit, compile=False, start=None)


@pytest.fixture(scope="module")
def talk():
    return Conversations(TINY / "tokenizer.model")


def test_widening_keeps_the_class_token_and_the_places_of_patches_and_makes_the_heads_fit(talk):
    model, heads = beginning(talk)
    table, colour = model.vision_tower.position_embedding.weight.data, heads["colour"]
    table[1:, 0] = 0.7
    table[1:, 1] = torch.arange(12.0).repeat_interleave(12)  # a patch's row, the same in all its columns
    train_tiny.widen(model, heads, Stage("test", "vision", side=192, steps=1, batch=1, rate=1.0), seed=0)
    assert model.config.num_image_tokens == 24**2
    assert train_tiny.look(model, torch.zeros(1, 3, 192, 192)).shape == (1, 24**2, 128)
    assert heads["row"].out_features == heads["column"].out_features == 24 and heads["colour"] is colour
    wide = model.vision_tower.position_embedding.weight
    assert wide.requires_grad and torch.equal(wide[0], table[0])
    torch.testing.assert_close(wide[1:, 0], torch.full((24**2,), 0.7))
    rows = wide[1:, 1].view(24, 24)
    torch.testing.assert_close(rows, rows[:, :1].expand(24, 24))
    assert (rows[:, 0].diff() > 0).all()


@pytest.mark.parametrize("side", [96, 192])
def test_pixels_and_labels_are_those_of_the_stage_and_pixels_the_processor_s(side):
    scene, grid = make_scene(random.Random(1)), side // PATCH
    (image, cover), names = draw(scene), list(LABELS)
    made, processor = train_tiny.image_processor(side)(image), load_processor(TINY)
    assert made.shape == (3, side, side)
    if side == processor.config.vision.image_size:
        assert torch.equal(made, processor.image_processor(image))
    labels = train_tiny.patch_labels(scene, cover, grid)
    assert labels.shape == (grid**2, len(LABELS))
    assert labels[:, names.index("row")].tolist() == [row for row in range(grid) for _ in range(grid)]
    assert labels[:, names.index("centre")].sum() == len(scene.things)


def test_what_is_exported_is_the_checkpoint_again_with_a_card(talk, tmp_path):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    image, (model, processor) = draw(make_scene(random.Random(2)))[0], load(TINY)
    (tmp_path / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    out = tmp_path / "out"
    (out / "examples").mkdir(parents=True)
    (out / "model.safetensors").write_text("what was there before")
    train_tiny.export(model, tmp_path / "tokenizer.model", talk, out)
    for name in ("model.safetensors", "tokenizer.json", "examples/scene_1.png"):
        assert (out / name).read_bytes() == (TINY / name).read_bytes(), name
    ours, theirs = load_processor(out), AutoProcessor.from_pretrained(out)
    assert ours.config == processor.config
    expected = processor(text := "USER: <image>\nWhat? ASSISTANT:", image)
    for found in (ours(text, image), theirs(text=text, images=image, return_tensors="pt")):
        assert torch.equal(found["input_ids"], expected["input_ids"])
        torch.testing.assert_close(found["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=0)
    assert LlavaForConditionalGeneration.from_pretrained(out).generation_config.eos_token_id == [2]
    args = argparse.Namespace(device="cpu", seed=5, compile=True)
    train_tiny.write_card(model, out, args, train_tiny.STAGES[:5], {"count": 0.5}, seconds=120.0)
    card = (out / "README.md").read_text()
    assert "    python -m train.train_tiny --until joint-192 --seed 5 --compile\n" in card
    assert "\nAll stages took 2 minutes" in card and "| count | 50.0 % | 1" in card and "joint-small" not in card


def test_the_loss_of_conversations_side_by_side_is_that_of_each_alone(talk):
    (model, heads), rng = beginning(talk), random.Random(3)
    scene = make_scene(rng)
    image, cover = draw(scene)
    pixels, targets = train_tiny.image_processor(96)(image)[None], train_tiny.patch_labels(scene, cover, 12)[None]
    turns, losses, weights = [short_question(rng, scene) for _ in range(3)], 0.0, 0.0
    with torch.no_grad():
        for conversation in (turns[:2], turns[2:]):
            ids, label = torch.tensor(talk.encode([conversation], 144))[:, [0, 3]].T
            logits = model(ids[None], pixels)[0]
            for answered, group in itertools.groupby(range(len(ids)), lambda at, label=label: label[at] != -100):
                if answered:
                    at = torch.tensor([*group])
                    weights += len(at) ** 0.5
                    losses += F.cross_entropy(logits[at - 1], label[at]) * len(at) ** 0.5
        features, tokens = train_tiny.look(model, pixels), torch.tensor([talk.encode([turns[:2], turns[2:]], 144)])
        blocks = train_tiny.project, train_tiny.finish
        found, _, _ = train_tiny.answer_loss(model, heads, features, tokens, targets, blocks)
    torch.testing.assert_close(found, losses / weights)


@pytest.mark.parametrize(
    "kind, parts",
    [
        ("vision", {"vision_tower"}),
        ("language", {"multi_modal_projector", "language_model", "lm_head"}),
    ],
)
def test_a_stage_trains_its_own_parts(talk, tmp_path, kind, parts):
    (model, heads), (before, _) = beginning(talk), beginning(talk)
    train_tiny.run_stage(Stage(kind, kind, side=96, steps=1, batch=1, rate=1e-3), model, heads, talk, options(tmp_path))
    pairs = zip(before.parameters(), model.named_parameters())
    assert {name.split(".")[0] for old, (name, new) in pairs if not torch.equal(old, new)} == parts


def test_a_stage_that_was_stopped_goes_on_to_the_same_weights(talk, tmp_path, monkeypatch):
    monkeypatch.setattr(train_tiny, "rate", lambda *_: 1e-3)  # else it follows from the number of steps
    stage, found = Stage("joint", "joint", side=96, steps=2, batch=1, rate=1e-3), []
    for name, seed, limit in (("whole", 0, None), ("stopped", 0, 1), ("stopped", 1, None)):
        (tmp_path / name).mkdir(exist_ok=True)
        found.append(beginning(talk, seed))
        train_tiny.run_stage(stage, *found[-1], talk, options(tmp_path / name, limit=limit))
    whole, half, again = (torch.nn.ModuleList(pair) for pair in found)
    assert same_weights(whole, again) and not same_weights(half, again)
    with pytest.raises(LlavaError, match="is of seed 0, begun from nothing, and this is seed 1"):
        train_tiny.run_stage(stage, *found[-1], talk, options(tmp_path / name, seed=1))


def test_the_rate_rises_and_falls_to_nothing():
    rates = [train_tiny.rate(step, 950, 5e-4, 0.0) for step in range(950)]
    assert rates[0] < 1e-5 and rates[-1] < 1e-6
    assert 3.5e-4 < max(rates) <= 5e-4


def test_an_exam_has_the_shares_of_what_is_right(tiny, monkeypatch):
    """The embedded model gets most of a few right. In made-up answers, a scene of three is described, three times."""
    monkeypatch.setattr(evaluate, "BATCH", 2)
    scores = evaluate.evaluate(*tiny, 1, 5)
    assert scores["objects found"] > 0.5 and scores["questions right"] > 0.5
    scenes = [evaluate.held_out("description", index)[1] for index in range(3)]
    first, *others = (len(scene.things) for scene in scenes)
    asked = [Question("count", "", answer, ()) for answer in ("one.", "one.", "two.")]
    asked.append(Question("compare", "", "yes.", ()))
    told = [[describe(scenes[0]) * 2, describe(scenes[0]), ""], ["one.", "One.", "two", "yes."]]
    monkeypatch.setattr(evaluate, "exam", lambda _: [(scenes[0], question) for question in asked])
    monkeypatch.setattr(evaluate, "answers", lambda *_: told.pop(0))
    assert evaluate.evaluate(*tiny, 3, 4) == {
        "objects found": first / (first + sum(others)),
        "objects named that exist": first / (3 * first),
        "questions right": 2 / 4,
        "count": 1 / 3,
        "compare": 1.0,
    }
    assert evaluate.commonest(4) == {"count": 2 / 3, "compare": 1.0, "questions right": 3 / 4}


@pytest.mark.parametrize(
    "start, options, message",
    [
        (TINY, "--first joint", "is for 192 px, and the pictures of joint have 96"),
        (TINY, "--until joint", "go together"),
        (TINY, "--first joint-small --until joint", "names no stage before"),
        (ROOT / "nothing", "--first joint", "--start: "),
    ],
)
def test_a_start_that_leads_nowhere_is_told_before_anything_is_written(start, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_tiny.main(["--start", str(start), *options.split(), "--work", str(tmp_path / "work")])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
