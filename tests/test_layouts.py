"""Checkpoints of other origins: the original LLaVA's layout, pickled shards, Mistral; looking into them, converting."""

from __future__ import annotations

import pytest
import torch
from checkpoints import IMAGE_ID, edit_weights, picture, reference, same_weights, write_original
from conftest import TINY
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

import weights
from bench.parity import CLIP
from minillava.convert import convert
from minillava.files import write_file

LOGITS = 1e-5  # as in test_parity
PROMPT = "USER: <image>\nWhat? ASSISTANT:"


@pytest.fixture(scope="module")
def theirs():
    return reference(seed=11, kv_heads=2)


def same_logits(theirs, ours, vocabulary=IMAGE_ID):
    """Logits of the real vocabulary agree; those of filled-up ids are their mean, so they never win."""
    ids = torch.randint(3, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    ids[:, 4:20] = IMAGE_ID
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels).logits[..., :vocabulary]
        found = ours(ids, pixels)
    assert float((found[..., :vocabulary] - expected).abs().max()) < LOGITS
    mean = found[..., :vocabulary].mean(-1, keepdim=True)
    torch.testing.assert_close(found[..., vocabulary:] - mean, 0 * found[..., vocabulary:], atol=LOGITS, rtol=0)


@pytest.mark.parametrize("pickled, where", [(False, "inside"), (True, "beside")])
def test_the_original_layout_gives_the_reference_logits_here_and_converted_also_there(
    tmp_path, theirs, pickled, where, capsys
):
    folder, out = write_original(theirs, tmp_path / "llava", pickled), tmp_path / "deep" / "hub"
    if where == "beside":
        (folder / CLIP).rename(tmp_path / CLIP)
    ours, before = weights.load(folder)
    same_logits(theirs, ours)
    assert before.image_processor.do_pad
    assert weights.main(["convert", str(folder), str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["hub"]
    loaded, report = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, after = weights.load(out)
    same_logits(loaded.eval(), ours, 320)
    for name, tensor in before(PROMPT, [picture(50, 20)]).items():
        assert torch.equal(after(PROMPT, [picture(50, 20)])[name], tensor)
    assert weights.main(["convert", str(folder), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_tower_of_its_own_wins_over_the_clip_that_is_named(tmp_path, theirs):
    folder = write_original(theirs, tmp_path / "llava")
    tower = load_file(folder / CLIP / "model.safetensors")
    edit_weights(folder, lambda state: state.update(
        {f"model.vision_tower.vision_tower.{name}": t for name, t in tower.items() if name.startswith("vision_model.")}
    ))  # fmt: skip
    (folder / CLIP / "model.safetensors").unlink()
    same_logits(theirs, weights.load_model(folder))


# ---------------------------------------------------------------- inspect and convert


def test_a_linear_projector_is_one_layer_and_stays_one_when_it_is_converted(tmp_path, theirs):
    folder = write_original(theirs, tmp_path / "llava", mm_projector_type="linear")
    first, second = "model.mm_projector.0.", "model.mm_projector.2."

    def only_the_first(state):
        for name in [name for name in state if name.startswith((first, second))]:
            tensor = state.pop(name)
            if name.startswith(first):
                state[name.replace(first, "model.mm_projector.")] = tensor

    edit_weights(folder, only_the_first)
    assert weights.main(["convert", str(folder), str(tmp_path / "hub")]) == 0
    before, after = weights.load_model(folder), weights.load_model(tmp_path / "hub")
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    state = load_file(folder / "model.safetensors")
    weight, bias = (state[f"model.mm_projector.{name}"] for name in ("weight", "bias"))
    expected = before.vision_tower(pixels, -2)[:, 1:] @ weight.T + bias
    torch.testing.assert_close(before.image_features(pixels), expected, atol=LOGITS, rtol=0)
    assert same_weights(before, after)


def stopped(*_):
    """Ctrl-C comes."""
    raise KeyboardInterrupt


def test_converting_leaves_what_is_there_alone_and_nothing_behind_when_it_is_stopped(small, tmp_path, monkeypatch):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "mine").write_text("")
    monkeypatch.setattr("minillava.convert.save_weights", stopped)
    with pytest.raises(KeyboardInterrupt):
        convert(*small[2:], small[0], tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out.part", "mine"]


def test_a_file_is_written_whole_or_not_at_all_and_no_other_is_touched(tmp_path, monkeypatch):
    path, other = tmp_path / "plan.json", tmp_path / "plan.json.part"
    other.write_text("mine")
    write_file(path, b"new")
    monkeypatch.setattr("pathlib.Path.write_bytes", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_file(path, b"newer")
    assert path.read_text() == "new" and other.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_converting_the_hub_layout_changes_no_weight(tiny, tmp_path):
    assert weights.main(["convert", str(TINY), str(tmp_path / "out")]) == 0
    assert load_file(TINY / "model.safetensors").keys() == load_file(tmp_path / "out" / "model.safetensors").keys()
    assert same_weights(weights.load_model(tmp_path / "out"), tiny[0])


def test_inspecting_shows_every_tensor_its_name_here_and_that_all_are_there(tmp_path, theirs, capsys):
    assert weights.main(["inspect", str(write_original(theirs, tmp_path / "llava"))]) == 0
    shown = capsys.readouterr().out
    assert "Every parameter is there." in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("model.mm_projector.0.weight")]
    assert line.split()[1:] == ["64x48", "float32", "12,288", "multi_modal_projector.linear_1.weight"]
    assert "(not used)" in next(line for line in shown.splitlines() if line.startswith("logit_scale"))
