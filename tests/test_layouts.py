"""Checkpoints of other origins: the original LLaVA's layout, pickled shards, Mistral; looking into them, converting."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from checkpoints import IMAGE_ID, reference, write, write_processor
from conftest import TINY
from PIL import Image
from safetensors.torch import load_file, save_file

import weights
from bench.parity import CLIP, save_original
from minillava.checks import LlavaError
from minillava.convert import convert
from minillava.files import write_file

# The same float32 operations on both sides; see test_parity.
LOGITS = 1e-5


def original(folder, model, kind="safetensors", where="inside", **config):
    """Saves a reference model as the original LLaVA did: its CLIP in its own folder, weights perhaps in pickles."""
    save_original(model, folder, **config)
    clip = folder / CLIP
    if kind == "bin":
        ours, tower = (load_file(path / "model.safetensors") for path in (folder, clip))
        names = sorted(ours)
        parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, held in parts.items():
            torch.save({name: ours[name] for name in held}, folder / file)
        index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        torch.save(tower, clip / "pytorch_model.bin")
        for path in (folder, clip):
            (path / "model.safetensors").unlink()
    write_processor(folder, model.config.vision_config.image_size)
    (folder / "preprocessor_config.json").rename(clip / "preprocessor_config.json")
    (folder / "tokenizer_config.json").write_text("{}")
    if where == "beside":
        clip.rename(folder.parent / CLIP)
    return folder


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


@pytest.mark.parametrize("where", ["inside", "beside"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_original_layout_gives_the_reference_logits(tmp_path, theirs, kind, where):
    ours, processor = weights.load(original(tmp_path / "llava", theirs, kind, where))
    same_logits(theirs, ours)
    assert processor.image_processor.do_pad
    inputs = processor("USER: <image>\nWhat? ASSISTANT:", [Image.new("RGB", (50, 20), "red")])
    assert int((inputs["input_ids"] == IMAGE_ID).sum()) == 16
    ours.generate(**inputs, max_new_tokens=3)


def test_a_tower_of_its_own_wins_over_the_clip_that_is_named(tmp_path, theirs):
    folder = original(tmp_path / "llava", theirs)
    state, tower = load_file(folder / "model.safetensors"), load_file(folder / CLIP / "model.safetensors")
    state |= {f"model.vision_tower.vision_tower.{n}": t for n, t in tower.items() if n.startswith("vision_model.")}
    save_file(state, folder / "model.safetensors")
    (folder / CLIP / "model.safetensors").unlink()
    same_logits(theirs, weights.load(folder)[0])


@pytest.mark.parametrize(
    "config, sentence",
    [({"mm_vision_tower": 3}, "mm_vision_tower = 3"), ({"model_type": "llava_mpt"}, "'llava_mpt'; expected llava or"),
     ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature"), ({"vocab_size": "many"}, "vocab_size"),
     ({"mm_projector_type": "resampler"}, "mm_projector_type"), ({"mm_vision_tower": "../../etc"}, "Hub id"),
     ({"mm_vision_tower": "llava"}, "no folder .llava. in"),
     ({"mm_vision_select_feature": ["patch"]}, "mm_vision_select_feature"), ({"vocab_size": 10**400}, "vocab_size"),
     ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio"), ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
     ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type .spatial.: LLaVA-1.6")],
)  # fmt: skip
def test_an_original_config_that_cannot_be_used_is_refused(tmp_path, theirs, config, sentence):
    with pytest.raises(LlavaError, match=sentence):
        weights.load(original(tmp_path / "llava", theirs, **config))


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "pickle", "nothing"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, theirs, how):
    folder = original(tmp_path / "llava", theirs, "bin")
    path = folder / "pytorch_model-00001-of-00002.bin"
    if how == "torch":
        torch.save({"lm_head.weight": Trap(tmp_path / "run")}, path)
    else:
        path.write_bytes(pickle.dumps(Trap(tmp_path / "run")) if how == "pickle" else b"")
    with pytest.raises(LlavaError, match="cannot be read as weights"):
        weights.load(folder)
    assert not (tmp_path / "run").exists()


def test_mistral_is_llama_within_its_window(tmp_path):
    theirs = reference(seed=4, kv_heads=2)
    folder = write(theirs, tmp_path, "disk5")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"model_type": "mistral", "sliding_window": 24}
    (folder / "config.json").write_text(json.dumps(config))
    ours, _ = weights.load(folder)
    ids = torch.randint(3, 300, (1, 30))
    with pytest.raises(LlavaError, match="24 positions"):
        ours(ids)
    ids = ids[:, :24]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(input_ids=ids).logits, atol=LOGITS, rtol=0)


# ---------------------------------------------------------------- inspect and convert


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_converted_original_is_read_by_transformers_and_by_us(tmp_path, theirs, kind, capsys):
    from transformers import LlavaForConditionalGeneration

    folder, out = original(tmp_path / "llava", theirs, kind), tmp_path / "deep" / "hub"
    assert weights.main(["convert", str(folder), str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["hub"]
    loaded, report = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, processor = weights.load(out)
    same_logits(loaded.eval(), ours, 320)
    before, picture = weights.load(folder)[1], Image.effect_noise((50, 20), 90).convert("RGB")
    prompt = "USER: <image>\nWhat? ASSISTANT:"
    for name, tensor in before(prompt, [picture]).items():
        assert torch.equal(processor(prompt, [picture])[name], tensor)
    assert weights.main(["convert", str(folder), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_linear_projector_is_one_layer_and_stays_one_when_it_is_converted(tmp_path, theirs):
    folder = original(tmp_path / "llava", theirs, mm_projector_type="linear")
    state = load_file(folder / "model.safetensors")
    one = {
        name.replace("mm_projector.0.", "mm_projector."): t for name, t in state.items() if "projector.2" not in name
    }
    save_file(one, folder / "model.safetensors")
    assert weights.main(["convert", str(folder), str(tmp_path / "hub")]) == 0
    before, after = weights.load(folder)[0], weights.load(tmp_path / "hub")[0]
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    weight, bias = (one[f"model.mm_projector.{name}"] for name in ("weight", "bias"))
    expected = before.vision_tower(pixels, -2)[:, 1:] @ weight.T + bias
    torch.testing.assert_close(before.image_features(pixels), expected, atol=LOGITS, rtol=0)
    assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())


def stopped(*_):
    """Ctrl-C comes."""
    raise KeyboardInterrupt


def test_converting_leaves_what_is_there_alone_and_nothing_behind_when_it_is_stopped(tmp_path, monkeypatch):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "mine").write_text("")
    monkeypatch.setattr("minillava.convert.save_weights", stopped)
    with pytest.raises(KeyboardInterrupt):
        convert(*weights.load(TINY), TINY, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out.part", "mine"]


def test_a_file_is_written_whole_or_not_at_all_and_no_other_is_touched(tmp_path, monkeypatch):
    path, other = tmp_path / "plan.json", tmp_path / "plan.json.part"
    other.write_text("mine")
    write_file(path, b"new")
    monkeypatch.setattr("pathlib.Path.write_bytes", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_file(path, b"newer")
    assert path.read_text() == "new" and other.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_converting_the_hub_layout_changes_no_weight(tmp_path):
    assert weights.main(["convert", str(TINY), str(tmp_path / "out")]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (TINY, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_conversion_that_fails_leaves_nothing(tmp_path, theirs, capsys):
    folder = original(tmp_path / "llava", theirs)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    assert weights.main(["convert", str(folder), str(tmp_path / "out")]) == 2
    assert "damaged" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_inspecting_shows_every_tensor_its_name_here_and_what_is_missing(tmp_path, theirs, capsys):
    folder = original(tmp_path / "llava", theirs)
    assert weights.main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "Every parameter is there." in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("model.mm_projector.0.weight")]
    assert line.split()[1:] == ["64x48", "float32", "12,288", "multi_modal_projector.linear_1.weight"]
    assert "(not used)" in next(line for line in shown.splitlines() if line.startswith("logit_scale"))
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors")
    assert weights.main(["inspect", str(folder)]) == 1
    assert "missing language_model.model.norm.weight" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["inspect", "/nowhere"], ["convert", "/nowhere", "out"]])
def test_a_folder_that_is_not_there_ends_with_2(arguments, capsys):
    assert weights.main(arguments) == 2
    assert "no folder" in capsys.readouterr().err
