"""Checkpoints are found, checked before they are read, streamed, and refused in a sentence when they do not fit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from checkpoints import reference, write
from conftest import ROOT
from safetensors.torch import load_file, save_file

import weights
from minillava.checks import LlavaError
from minillava.convert import hub_name, our_name
from minillava.files import write_file
from minillava.quantised import PART


@pytest.fixture
def folder(small, tmp_path) -> Path:
    """A fresh copy of the small checkpoint."""
    return Path(shutil.copytree(small[0], tmp_path / "checkpoint"))


def edit(path: Path, change: dict) -> None:
    """Changes values in a JSON file, and those within its objects."""
    value = json.loads(path.read_text())
    for name, new in change.items():
        inside = isinstance(new, dict) and isinstance(value.get(name), dict)
        value[name] = {**value[name], **new} if inside else new
    path.write_text(json.dumps(value))


def refused(folder) -> str:
    """The sentence with which a checkpoint is refused."""
    with pytest.raises(LlavaError) as caught:
        weights.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(one, other) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items())
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_a_sharded_checkpoint_is_the_same_model(small, tmp_path):
    _, theirs, ours, _ = small
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    for name in ("tokenizer.model", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(small[0] / name, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same(weights.load(tmp_path)[0], ours)


@pytest.mark.parametrize("dtype, expected", [
    (None, torch.bfloat16), (torch.float32, torch.float32), ("float16", torch.float16),
])  # fmt: skip
def test_weights_of_several_dtypes_come_in_one_which_is_the_embeddings_if_none_is_asked_for(folder, dtype, expected):
    state = load_file(folder / "model.safetensors")
    halved = {name: tensor.bfloat16() if "embed_tokens" in name else tensor for name, tensor in state.items()}
    save_file(halved, folder / "model.safetensors")
    model = weights.load_model(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert weights.memory_needed(folder, dtype) == (numbers * expected.itemsize, torch.bfloat16)


def test_names_survive_the_way_to_the_hub_layout_and_back(small):
    for name, _ in small[2].named_parameters():
        assert our_name(hub_name(name)) == name


def test_every_problem_of_the_weights_is_named_at_once(folder):
    state = load_file(folder / "model.safetensors")
    del state["language_model.model.norm.weight"]
    state["multi_modal_projector.linear_1.bias"] = torch.zeros(3)
    state["language_model.model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(state, folder / "model.safetensors")
    sentence = refused(folder)
    assert "missing language_model.model.norm.weight" in sentence
    assert "multi_modal_projector.linear_1.bias has shape [3], expected [64]" in sentence
    assert "unexpected language_model.model.layers.9.mlp.up_proj.weight" in sentence


def test_the_same_parameter_under_two_names_is_refused(folder):
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["language_model.lm_head.weight"].clone()
    save_file(state, folder / "model.safetensors")
    assert "same parameter" in refused(folder)


def test_an_untied_output_layer_is_used_even_if_the_config_says_tied(small, folder):
    edit(folder / "config.json", {"text_config": {"tie_word_embeddings": True}})
    assert same(weights.load(folder)[0], small[2])


@pytest.mark.parametrize("name", ["language_model.model.norm.weight", "language_model.model.embed_tokens.weight"])
@pytest.mark.parametrize("change, word", [
    (lambda tensor: tensor.int(), "is torch.int32"), (lambda tensor: tensor.to("meta"), "is no numbers"),
    (lambda tensor: tensor.to_sparse(), "is torch.float32, torch.sparse_coo"),
])  # fmt: skip
def test_weights_that_are_not_dense_floating_point_numbers_are_refused(folder, tmp_path, name, change, word, capsys):
    state = load_file(folder / "model.safetensors")
    state[name] = change(state[name])
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert f"{name} {word}" in refused(folder)
    assert weights.main(["convert", str(folder), str(tmp_path / "out")]) == 2 and not (tmp_path / "out").exists()
    assert weights.main(["inspect", str(folder)]) == 1
    assert f"{name} {word}" in capsys.readouterr().out


def test_weights_in_8_bits_are_widened_and_nothing_is_computed_in_8_bits(folder):
    state = {name: t.to(torch.float8_e4m3fn) for name, t in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    told = []
    model = weights.load_model(folder, progress=lambda done, size: told.append((done, size)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert told[-1] == (sum(t.nbytes for t in state.values()),) * 2
    assert weights.memory_needed(folder, torch.float32)[0] == 4 * told[-1][0]
    with pytest.raises(LlavaError, match="float8_e4m3fn, in which nothing can be computed"):
        weights.load(folder, dtype=None)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, "fp8", "nn"])
def test_dtypes_in_which_nothing_can_be_computed_are_refused(folder, dtype):
    with pytest.raises(LlavaError, match="in which nothing can be computed; load in another"):
        weights.load(folder, dtype=dtype)


def test_names_that_a_terminal_would_obey_are_shown_harmlessly(folder, capsys):
    state = load_file(folder / "model.safetensors")
    save_file({**state, "\x1b[2J\nred": torch.ones(1)}, folder / "model.safetensors")
    assert weights.main(["inspect", str(folder)]) == 1
    assert weights.main(["convert", str(folder), str(folder / "out")]) == 2
    for text in capsys.readouterr():
        assert r"unexpected \x1b[2J\nred" in text and "\x1b" not in text


@pytest.mark.parametrize("generation, named", [
    ({"repetition_penalty": 1.2, "do_sample": True}, "repetition_penalty = 1.2"),
    ({"no_repeat_ngram_size": 3, "num_beams": 1}, "no_repeat_ngram_size = 3"),
    ({"repetition_penalty": 1.0, "temperature": 0.5, "min_length": 0}, None),
])  # fmt: skip
def test_settings_that_change_transformers_tokens_are_named(folder, generation, named):
    (folder / "generation_config.json").write_text(json.dumps(generation))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights.load(folder)
    assert [named in str(warning.message) for warning in caught] == [True] * (named is not None)


@pytest.mark.parametrize("size", [0, 4, 100, 5000, -4])
def test_a_truncated_file_is_refused(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "model.safetensors is damaged" in refused(folder)


@pytest.mark.parametrize(
    "header", [b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}', b"{", b"[]", b"\xff" * 9]
)
def test_a_lying_header_is_refused(folder, header):
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    assert "damaged" in refused(folder)


def test_an_index_must_stay_in_its_folder_and_its_shards_must_be_there(folder):
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    for target, word in (
        ("../outside.safetensors", "outside"),
        ("/etc/passwd", "own folder"),
        ("gone.safetensors", "missing"),
    ):
        index.write_text(json.dumps({"weight_map": {"a": target}}))
        assert word in refused(folder)
    for content in ("{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[1]", "{", '{"weight_map": {}}'):
        index.write_text(content)
        refused(folder)


LLAMA3 = {"rope_type": "llama3", "factor": 2, "low_freq_factor": 3, "high_freq_factor": 3,
          "original_max_position_embeddings": 9}  # fmt: skip
TILED = {"model_type": "llava_next", "image_grid_pinpoints": [[28, 56]]}


@pytest.mark.parametrize("change, sentence", [
    ({"model_type": "paligemma"}, "model_type = 'paligemma'"), ({"model_type": None}, "model_type = None"),
    ({"model_type": []}, r"model_type = \[\]"), ({"model_type": "llava_onevision"}, "llava_onevision.*anyres_max_9"),
    ({"model_type": "llava_next_video"}, "frames"), ({"model_type": "video_llava"}, "two vision towers"),
    ({"model_type": "vipllava"}, "several vision layers"),
    ({"text_config": []}, r"text_config = \[\]; expected an object"), ({"text_config": "llama"}, "text_config"),
    ({"text_config": {"model_type": "qwen3"}}, "model_type = 'qwen3'; expected one of llama, mistral, qwen2"),
    ({"vision_config": {"model_type": "dinov2"}}, "vision_config.model_type = 'dinov2'"),
    ({"text_config": {"hidden_size": -4}}, "text_config.hidden_size = -4"),
    ({"text_config": {"hidden_size": 2**62}}, "text_config.hidden_size"),
    ({"text_config": {"hidden_size": "big"}}, "hidden_size = 'big'; expected a value of type int"),
    ({"text_config": {"hidden_size": True}}, "hidden_size = True; expected a value of type int"),
    ({"text_config": {"hidden_size": 66, "head_dim": None}}, "hidden_size = 66; expected a multiple of its 4 heads"),
    ({"text_config": {"num_hidden_layers": 0}}, "num_hidden_layers = 0"),
    ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers = 1000000000; .*up to 1024"),
    ({"vision_config": {"num_hidden_layers": 10**9}}, "vision_config.num_hidden_layers"),
    ({"text_config": {"vocab_size": -5}}, "vocab_size"), ({"vision_config": {"image_size": 10**12}}, "image_size"),
    ({"text_config": {"num_key_value_heads": 3}}, "3 key-value heads"),
    ({"text_config": {"head_dim": 15}}, "odd"), ({"text_config": {"head_dim": 0}}, "head_dim = 0"),
    ({"text_config": {"model_type": "mistral", "sliding_window": "64"}}, "sliding_window = '64'"),
    ({"text_config": {"model_type": "mistral", "sliding_window": 64.0}}, "sliding_window = 64.0"),
    ({"text_config": {"model_type": "mistral", "sliding_window": True}}, "sliding_window = True"),
    ({"text_config": {"hidden_act": "relu6"}}, "hidden_act = 'relu6'; expected one of .*silu"),
    ({"text_config": {"rms_norm_eps": "small"}}, "rms_norm_eps"),
    ({"text_config": {"rms_norm_eps": float("inf")}}, "rms_norm_eps"),
    ({"text_config": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ({"text_config": {"rope_parameters": [1]}}, r"rope_parameters = \[1\]; expected an object"),
    ({"text_config": {"rope_parameters": {"rope_type": "yarn", "factor": 2}}}, "rope_type = 'yarn'"),
    ({"text_config": {"rope_parameters": None, "rope_scaling": {"rope_type": [1]}}}, r"rope_type = \[1\]"),
    ({"text_config": {"rope_parameters": {"rope_type": "linear"}}}, "factor"),
    ({"text_config": {"rope_parameters": {**LLAMA3, "low_freq_factor": None}}}, "low_freq_factor"),
    ({"text_config": {"rope_parameters": LLAMA3}}, "the lower one first"),
    ({"vision_config": {"patch_size": 99}}, "patch_size = 99; expected at most image_size, 28"),
    ({"vision_config": {"num_attention_heads": 5}}, "hidden_size = 48; expected a multiple of its 5 heads"),
    ({"vision_config": {"patch_size": 28, "model_type": "siglip_vision_model"}}, "the only patch is dropped"),
    ({"vision_feature_layer": -9}, "vision_feature_layer = -9"),
    ({"vision_feature_layer": [-2, -3]}, "vision_feature_layer"),
    ({"vision_feature_select_strategy": "some"}, "vision_feature_select_strategy = 'some'"),
    ({"projector_hidden_act": "relu"}, "projector_hidden_act"), ({"image_token_index": 10**6}, "image token 1000000"),
    ({"image_token_index": "x"}, "image_token"), ({"pad_token_id": 10**6}, "pad token 1000000"),
    ({"text_config": {"eos_token_id": "x"}}, "eos_token_id is x"),
    ({"multimodal_projector_bias": "no"}, "multimodal_projector_bias"),
    ({**TILED, "image_grid_pinpoints": [[28]]}, r"\[\[28\]\]; expected pairs"),
    ({**TILED, "image_grid_pinpoints": 5}, "expected pairs"), ({**TILED, "image_grid_pinpoints": []}, "expected pairs"),
    ({**TILED, "image_grid_pinpoints": [[28, 56], [28, 40]]}, r"\[28, 40\]; expected multiples of image_size 28"),
    ({**TILED, "image_grid_pinpoints": [[28, 2828]]}, "at most 100 tiles"),
    ({**TILED, "vision_feature_select_strategy": "full"}, "'full'; expected default, since tiles"),
])  # fmt: skip
def test_a_config_that_cannot_be_used_is_refused_by_name(folder, change, sentence):
    edit(folder / "config.json", change)
    (folder / "generation_config.json").unlink()  # its ids would count
    assert re.search(sentence, refused(folder))


@pytest.mark.parametrize(
    "top, text, generation, pad, eos",
    [({}, {}, {}, 0, ()), ({"pad_token_id": None}, {"pad_token_id": 7}, {}, 7, ()),
     ({}, {}, {"pad_token_id": 9}, 9, ()),
     ({"pad_token_id": -1}, {"eos_token_id": 3}, {}, 3, (3,)), ({}, {}, {"eos_token_id": [5, 6]}, 5, (5, 6)),
     ({}, {"eos_token_id": 4}, {}, 4, (4,))],
)  # fmt: skip
def test_pad_and_end_of_qwen2_are_none_unless_a_file_names_them(small, top, text, generation, pad, eos):
    raw = json.loads((small[0] / "config.json").read_text())
    for place in (raw, raw["text_config"]):
        place.pop("pad_token_id", None), place.pop("eos_token_id", None)
    raw["text_config"] |= {"model_type": "qwen2", **text}
    config = weights.parse_config({**raw, **top}, generation)
    assert (config.pad_token_id, config.eos_token_id) == (pad, eos)


@pytest.mark.parametrize("kind, heads", [("qwen2", 32), ("mistral", 8), ("llama", 64)])
def test_key_value_heads_that_a_file_does_not_name_are_those_of_its_kind(small, kind, heads):
    raw = json.loads((small[0] / "config.json").read_text())
    del raw["text_config"]["num_key_value_heads"]
    raw["text_config"] |= {"model_type": kind, "num_attention_heads": 64, "hidden_size": 128, "head_dim": None}
    assert weights.parse_config(raw, {}).text.kv_heads == heads
    raw["text_config"]["num_key_value_heads"] = None
    assert weights.parse_config(raw, {}).text.kv_heads == 64


@pytest.mark.parametrize("top, text, tied", [(True, None, True), (True, False, True), (False, True, True),
                                             (False, None, False), (None, None, False)])  # fmt: skip
def test_the_config_or_its_text_part_may_tie_the_output_layer(folder, top, text, tied):
    edit(folder / "config.json", {"tie_word_embeddings": top, "text_config": {"tie_word_embeddings": text}})
    assert weights.read_config(folder).text.tie_word_embeddings == tied


@pytest.mark.parametrize("text, positions", [
    ({"model_type": "mistral", "sliding_window": 24}, 24), ({"model_type": "mistral", "sliding_window": 4096}, 256),
    ({"model_type": "mistral", "sliding_window": None}, 256), ({"model_type": "llama", "sliding_window": 24}, 256),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 24}, 24),
    ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 24}, 256),
])  # fmt: skip
def test_a_text_is_refused_beyond_the_sliding_window(folder, text, positions):
    edit(folder / "config.json", {"text_config": text})
    assert weights.read_config(folder).text.max_position_embeddings == positions


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "[" * 10**5]
)
def test_a_config_that_is_no_json_object_is_refused(folder, content):
    (folder / "config.json").write_text(content, encoding="latin-1")
    assert "config.json" in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "tokenizer_config.json"])
def test_a_file_larger_than_any_of_its_kind_is_not_read(folder, name):
    with (folder / name).open("ab") as file:
        file.truncate(10**12)  # takes no room on the disk
    assert f"{name} has 1000000000000 bytes" in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_folder_that_lacks_a_file_is_refused_by_its_name(folder, name):
    (folder / name).unlink()
    assert name in refused(folder)


def test_parts_of_different_checkpoints_are_refused(folder):
    edit(folder / "preprocessor_config.json", {"crop_size": 20})
    _, processor = weights.load(folder)
    from PIL import Image

    with pytest.raises(LlavaError, match="20 x 20"):
        processor("<image>", [Image.new("RGB", (9, 9))])
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"7": {"content": "<image>"}}}')
    assert "different checkpoints" in refused(folder)


@pytest.mark.parametrize(
    "name", ["no such folder", "no/such/folder", "/nowhere", "word " * 10**5, "\0"], ids=lambda name: name[:20]
)
def test_what_is_neither_folder_nor_hub_id_is_refused(name):
    assert "no folder" in refused(name)


def test_a_file_in_place_of_a_folder_is_refused(folder):
    assert "is a file" in refused(folder / "config.json")


def test_a_hub_id_is_read_from_the_cache_and_without_network_refused_in_a_sentence(small, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "no folder someone/a-model" in refused("someone/a-model")
    repository = tmp_path / "models--someone--a-model"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(small[0], repository / "snapshots" / commit)
    assert same(weights.load("someone/a-model")[0], small[2])
    assert same(weights.load("someone/a-model", revision=commit)[0], small[2])


@pytest.mark.parametrize("pickled", [False, True])
def test_only_weights_configs_and_the_tokenizer_are_downloaded_and_pickles_where_nothing_else_is(
    monkeypatch, folder, pickled
):
    import huggingface_hub

    asked, rest = [], ["*.json", "*.jinja", "tokenizer.model"]

    def fake(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(folder)

    if pickled:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    weights.load("someone/a-model", revision="v1")
    patterns = [["*.safetensors", *rest], ["*.bin", *rest]][: 1 + pickled]
    assert asked == [("someone/a-model", "v1", pattern) for pattern in patterns]


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch, weights
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024
before, peak, running = anonymous(), 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous()); time.sleep(0.001)
thread = threading.Thread(target=watch); thread.start()
model = weights.load_model(Path(sys.argv[1]), dtype=sys.argv[2]); running = False; thread.join()
print(sum(p.numel() * p.element_size() for p in model.parameters()), max(peak, anonymous()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_loading_holds_one_model_and_one_tensor(tmp_path):
    model = reference(text={"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "vocab_size": 4000})
    write(model, tmp_path, "disk5")
    model.save_pretrained(tmp_path, max_shard_size="100MB")
    (tmp_path / "model.safetensors").unlink()
    del model
    # What is freed goes back to the system at once. Else the C library keeps up to 70 MB, of any model.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for dtype, parts in (("float32", 0), ("int8", 4)):  # parts of a weight in float32, while it is rounded
        command = [sys.executable, "-c", MEASURE, tmp_path, dtype]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=env)
        size, used = map(int, done.stdout.split())
        assert size > 50e6
        assert used < 1.05 * size + parts * 4 * PART  # 1.00 was measured; a second copy of the model would make it 2


def mapped_files(model) -> set[str]:
    """The files that memory with the model's weights belongs to, by Linux' table of this process; "" for none."""
    table = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        places, *_, name = [*line.split(maxsplit=5), ""][:6]
        table.append((*(int(place, 16) for place in places.split("-")), name if name.startswith("/") else ""))
    return {name for p in model.parameters() for low, high, name in table if low <= p.data_ptr() < high}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux' /proc")
def test_weights_are_mapped_where_they_need_no_conversion_and_copied_by_fast_if_they_are_few(small):
    folder = small[0]
    mapped = str(folder / "model.safetensors")
    kinds = ((None, False, mapped), (None, True, ""), (torch.float16, False, ""), (torch.int8, False, ""))
    for dtype, fast, expected in kinds:
        assert mapped_files(weights.load_model(folder, dtype=dtype, fast=fast)) == {expected}


def test_a_mapped_model_outlives_the_name_of_its_file(small, tmp_path):
    folder = shutil.copytree(small[0], tmp_path / "copy")
    model = weights.load_model(folder, dtype=None)
    before = model.lm_head.weight.clone()
    write_file(folder / "model.safetensors", b"another file")  # replaced as a download is, not written into
    assert torch.equal(model.lm_head.weight, before)


def test_progress_counts_the_bytes_of_the_weights(small):
    folder, told = small[0], []
    model = weights.load_model(folder, dtype=None, progress=lambda done, size: told.append((done, size)))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert [done for done, _ in told] == sorted({done for done, _ in told}) and told[-1][0] == 4 * numbers
    assert {size for _, size in told} == {4 * numbers}


def test_the_main_job_never_imports_transformers():
    code = "import sys, demo, weights, minillava.model, minillava.processor; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
