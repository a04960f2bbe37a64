"""The training recipe: what depends on the picture's side, and conversations side by side. Nothing is trained here."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import ROOT, TINY

from minillava.model import Llava
from minillava.scenes import draw, make_scene, short_question
from train import train_tiny
from train.train_tiny import LABELS, PATCH, Conversations, Stage
from weights import load, load_processor

SIDES = (96, 192)


def test_a_wider_table_of_positions_keeps_the_class_token_and_the_places_of_patches():
    table = torch.randn(1 + 12**2, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(train_tiny.widen_positions(table, 12), table)
    table[1:, 0] = 0.7
    table[1:, 1] = torch.arange(12.0).repeat_interleave(12)  # a patch's row, the same in all its columns
    wide = train_tiny.widen_positions(table, 24)
    assert wide.shape == (1 + 24**2, 8) and torch.equal(wide[0], table[0])
    torch.testing.assert_close(wide[1:, 0], torch.full((24**2,), 0.7))
    rows = wide[1:, 1].view(24, 24)
    torch.testing.assert_close(rows, rows[:, :1].expand(24, 24))
    assert (rows[:, 0].diff() > 0).all()


def test_widening_makes_model_and_heads_fit_the_stage():
    model, heads = Llava(train_tiny.tiny_config(96, 320, 310, 311)), train_tiny.make_heads(12)
    colour = heads["colour"]
    train_tiny.widen(model, heads, Stage("test", "vision", side=192, steps=1, batch=1, rate=1.0), seed=0)
    assert model.config.num_image_tokens == 24**2
    assert heads["row"].out_features == heads["column"].out_features == 24 and heads["colour"] is colour
    features = train_tiny.look(model, torch.zeros(1, 3, 192, 192))
    assert features.shape == (1, 24**2, 128)
    features.sum().backward()
    assert model.vision_tower.position_embedding.weight.grad is not None


@pytest.mark.parametrize("side", SIDES)
def test_pixels_and_labels_have_the_shapes_of_the_stage(side):
    scene, grid = make_scene(random.Random(1)), side // PATCH
    image, cover = draw(scene)
    assert train_tiny.pixels(image, side).shape == (3, side, side)
    labels = train_tiny.patch_labels(scene, cover, grid)
    assert labels.shape == (grid**2, len(LABELS))
    names = list(LABELS)
    assert labels[:, names.index("row")].tolist() == [row for row in range(grid) for _ in range(grid)]
    assert labels[:, names.index("centre")].sum() == len(scene.things)


def test_pixels_are_what_the_checkpoint_s_processor_makes():
    processor = load_processor(TINY)
    image, _ = draw(make_scene(random.Random(2)))
    assert torch.equal(train_tiny.pixels(image, processor.config.vision.image_size), processor.image_processor(image))


def test_what_is_exported_is_the_checkpoint_again(tmp_path):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    image, (model, processor) = draw(make_scene(random.Random(2)))[0], load(TINY)
    (tmp_path / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    out = tmp_path / "out"
    for _ in range(2):  # over what was there before, too
        train_tiny.export(model, tmp_path / "tokenizer.model", Conversations(TINY / "tokenizer.model"), out)
    for name in ("model.safetensors", "tokenizer.json", "examples/scene_1.png"):
        assert (out / name).read_bytes() == (TINY / name).read_bytes(), name
    ours, theirs = load_processor(out), AutoProcessor.from_pretrained(out)
    assert ours.config == processor.config
    expected = processor(text := "USER: <image>\nWhat? ASSISTANT:", image)
    for found in (ours(text, image), theirs(text=text, images=image, return_tensors="pt")):
        assert torch.equal(found["input_ids"], expected["input_ids"])
        torch.testing.assert_close(found["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=0)
    assert LlavaForConditionalGeneration.from_pretrained(out).generation_config.eos_token_id == [2]


def test_a_conversation_beside_others_reads_as_if_it_were_alone():
    talk = Conversations(TINY / "tokenizer.model")
    torch.manual_seed(0)
    model = Llava(train_tiny.tiny_config(96, talk.size, talk.image_id, talk.pad_id))
    train_tiny.initialise(model)
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


def test_the_rate_rises_and_falls_to_nothing():
    rates = [train_tiny.rate(step, 950, 5e-4, 0.0) for step in range(950)]
    assert rates[0] < 1e-5 and rates[-1] < 1e-6
    assert 3.5e-4 < max(rates) <= 5e-4


@pytest.mark.parametrize(
    "start, options, message",
    [
        (TINY, "--first joint", "is for 192 px, and the pictures of joint have 96"),
        (TINY, "--until joint", "go together"),
        (TINY, "--first joint-small --until joint", "names no stage before"),
        (ROOT / "nothing", "--first joint", "--start: "),
    ],
)
def test_a_start_that_leads_nowhere_is_told_before_anything_is_written(
    start, options, message, tmp_path, monkeypatch, capsys
):
    work = tmp_path / "work"
    monkeypatch.setattr("sys.argv", ["train_tiny", "--start", str(start), *options.split(), "--work", str(work)])
    with pytest.raises(SystemExit) as stop:
        train_tiny.main()
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not work.exists()
