"""The training recipe: what depends on the picture's side, conversations side by side, and a run of two steps."""

from __future__ import annotations

import argparse
import random

import pytest
import torch
from checkpoints import same_weights
from conftest import ROOT, TINY

from minillava.checks import LlavaError
from minillava.model import Llava
from minillava.scenes import draw, make_scene, short_question
from train import train_tiny
from train.train_tiny import LABELS, PATCH, Conversations, Stage
from weights import load, load_processor


def beginning(talk, seed=0):
    """A model and heads for pictures of 96 pixels, with random weights."""
    torch.manual_seed(seed)
    model = Llava(train_tiny.tiny_config(96, talk.size, talk.image_id, talk.pad_id))
    train_tiny.initialise(model)
    return model, train_tiny.make_heads(12)


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
    made, processor = train_tiny.pixels(image, side), load_processor(TINY)
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
    for _ in range(2):  # over what was there before, too
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


def test_a_conversation_beside_others_reads_as_if_it_were_alone(talk):
    model, _ = beginning(talk)
    rng = random.Random(3)
    scene = make_scene(rng)
    picture = train_tiny.pixels(draw(scene)[0], 96)[None]
    turns = [short_question(rng, scene) for _ in range(3)]
    both, alone = talk.encode([turns[:2], turns[2:]], 144), talk.encode([turns[2:]], 144)
    words = both.branch.count(0)
    ids, branch, position = (torch.tensor([part]) for part in (both.ids, both.branch, both.position))
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[words:]
    mask = causal & ((branch[:, words:, None] == branch[:, None]) | (branch[:, None] == 0))
    with torch.no_grad():
        embeddings = model.embed(ids, picture)
        hidden, _, _ = train_tiny.decode(model, embeddings, model.language_model.cos_sin(position), mask[:, None])
        expected = model(torch.tensor([alone.ids]), picture)
    torch.testing.assert_close(model.lm_head(hidden)[0, branch[0, words:] == 2], expected[0, words:])


@pytest.mark.parametrize("kind", ["vision", "language", "joint"])
def test_a_stage_that_was_stopped_goes_on_to_the_same_weights(talk, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(train_tiny, "rate", lambda *_: 1e-3)  # else it follows from the number of steps
    stage, found = Stage(kind, kind, side=96, steps=2, batch=1, rate=1e-3), []
    for name, seed, limit in (("whole", 0, None), ("stopped", 0, 1), ("stopped", 1, None)):
        (tmp_path / name).mkdir(exist_ok=True)
        found.append(beginning(talk, seed))
        args = argparse.Namespace(work=tmp_path / name, device="cpu", seed=0, limit=limit, compile=False, start=None)
        train_tiny.run_stage(stage, *found[-1], talk, args)
    whole, half, again = (torch.nn.ModuleList(pair) for pair in found)
    assert same_weights(whole, again) and not same_weights(half, again)
    args.seed = 1
    with pytest.raises(LlavaError, match="is of seed 0, begun from nothing, and this is seed 1"):
        train_tiny.run_stage(stage, *found[-1], talk, args)


def test_the_rate_rises_and_falls_to_nothing():
    rates = [train_tiny.rate(step, 950, 5e-4, 0.0) for step in range(950)]
    assert rates[0] < 1e-5 and rates[-1] < 1e-6
    assert 3.5e-4 < max(rates) <= 5e-4


@pytest.mark.parametrize("start, options, message", [
    (TINY, "--first joint", "is for 192 px, and the pictures of joint have 96"), (TINY, "--until joint", "go together"),
    (TINY, "--first joint-small --until joint", "names no stage before"),
    (ROOT / "nothing", "--first joint", "--start: "),
])  # fmt: skip
def test_a_start_that_leads_nowhere_is_told_before_anything_is_written(start, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_tiny.main(["--start", str(start), *options.split(), "--work", str(tmp_path / "work")])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
