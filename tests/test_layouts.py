"""Checkpoints of other origins: the original LLaVA's layout, pickled shards; looking into them, converting."""

from __future__ import annotations

import pytest
import torch
from checkpoints import IMAGE_ID, check_converted, edit_weights, same_weights, write_original
from conftest import TINY
from safetensors.torch import load_file

import weights
from bench.parity import CLIP
from minillava.convert import convert
from minillava.files import write_file


@pytest.mark.parametrize("pickled", [False, True])
def test_the_original_layout_is_read_and_converted_and_its_vocabulary_filled_up(tmp_path, small, pickled, capsys):
    """That its logits are the reference's, `bench.parity` shows. Ids without weights get their mean, so never win."""
    folder, out = write_original(small[1], tmp_path / "llava", pickled), tmp_path / "deep" / "hub"
    if pickled:
        (folder / CLIP).rename(tmp_path / CLIP)  # beside the folder, not inside
    check_converted(folder, out)
    assert [path.name for path in out.parent.iterdir()] == ["hub"]
    model, processor = weights.load(folder)
    known = small[2].state_dict()
    assert all(torch.equal(p[:IMAGE_ID], known[name][:IMAGE_ID]) for name, p in model.state_dict().items())
    for matrix in (model.lm_head.weight, model.language_model.embed_tokens.weight):
        torch.testing.assert_close(matrix[IMAGE_ID:], matrix[:IMAGE_ID].mean(0).expand(10, -1))
    assert processor.image_processor.do_pad
    assert weights.main(["convert", str(folder), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_converting_the_hub_layout_changes_no_name(tmp_path):
    check_converted(TINY, tmp_path / "out", limit=4e-5)  # as in test_parity
    assert load_file(TINY / "model.safetensors").keys() == load_file(tmp_path / "out" / "model.safetensors").keys()


def test_a_tower_of_its_own_wins_over_the_clip_that_is_named(tmp_path, small):
    folder = write_original(small[1], tmp_path / "llava")
    before, path = weights.load_model(folder), folder / CLIP / "model.safetensors"
    tower = {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in load_file(path).items()}
    edit_weights(
        folder, lambda state: state.update({name: tensor for name, tensor in tower.items() if ".vision_model." in name})
    )
    path.unlink()
    assert same_weights(weights.load_model(folder), before)


def test_a_linear_projector_is_one_layer_and_stays_one_when_it_is_converted(tmp_path, small):
    folder = write_original(small[1], tmp_path / "llava", mm_projector_type="linear")

    def keep_one_layer(state):
        for part in ("weight", "bias"):
            del state[f"model.mm_projector.2.{part}"]
            state[f"model.mm_projector.{part}"] = state.pop(f"model.mm_projector.0.{part}")

    edit_weights(folder, keep_one_layer)
    assert weights.main(["convert", str(folder), str(tmp_path / "hub")]) == 0
    before, after = weights.load_model(folder), weights.load_model(tmp_path / "hub")
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    state = load_file(folder / "model.safetensors")
    weight, bias = (state[f"model.mm_projector.{part}"] for part in ("weight", "bias"))
    expected = before.vision_tower(pixels, -2)[:, 1:] @ weight.T + bias
    torch.testing.assert_close(before.image_features(pixels), expected, atol=1e-5, rtol=0)
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


def test_inspecting_shows_every_tensor_its_name_here_and_that_all_are_there(tmp_path, small, capsys):
    assert weights.main(["inspect", str(write_original(small[1], tmp_path / "llava"))]) == 0
    shown = capsys.readouterr().out
    assert "Every parameter is there." in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("model.mm_projector.0.weight")]
    assert line.split()[1:] == ["64x48", "float32", "12,288", "multi_modal_projector.linear_1.weight"]
    assert "(not used)" in next(line for line in shown.splitlines() if line.startswith("logit_scale"))
