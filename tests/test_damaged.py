"""A checkpoint that is damaged, or not made for this code, is refused in a sentence that says what is wrong with it."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import edit, edit_weights, write_original

import weights
from minillava.checks import LlavaError


@pytest.fixture(scope="session")
def bases(small, tmp_path_factory):
    """Whole checkpoints: the small one, it in 8 bits, an original LLaVA, and one in pickles."""
    folder = tmp_path_factory.mktemp("bases")
    assert weights.main(["convert", str(small[0]), str(folder / "int8"), "--dtype", "int8"]) == 0
    return {
        "small": small[0],
        "int8": folder / "int8",
        "original": write_original(small[1], folder / "original"),
        "pickled": write_original(small[1], folder / "pickled", pickled=True),
    }


# ---------------------------------------------------------------- what to do to a checkpoint


def on(name, change):
    """Does something to a file."""
    return lambda folder: change(folder / name)


def put(name, content):
    """A file has this content: bytes, or what becomes JSON."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return on(name, lambda path: path.write_bytes(data))


def cut(size):
    """The weights' file ends after so many bytes, or, below 0, so many before its end."""
    return on("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:size]))


def config(**values):
    return on("config.json", partial(edit, **values))


def header(content):
    return put("model.safetensors", len(content).to_bytes(8, "little") + content + b"\0" * 4)


def several(*damages):
    return lambda folder: [damage(folder) for damage in damages]


def tensors(change):
    return lambda folder: edit_weights(folder, change)


def as_pickle(name, change):
    """A tensor as safetensors cannot hold it."""
    return lambda folder: edit_weights(folder, lambda state: state.update({name: change(state[name])}), pickled=True)


def trap(save):
    """A pickle that makes a folder where it is unpickled."""

    def damage(folder):
        made = type("Trap", (), {"__reduce__": lambda self: (os.mkdir, (str(folder.parent / "run"),))})()
        save(made, folder / "pytorch_model-00001-of-00002.bin")

    return damage


# ---------------------------------------------------------------- damages, and what is said

LLAMA3 = {"rope_type": "llama3", "factor": 2, "low_freq_factor": 3, "high_freq_factor": 3,
          "original_max_position_embeddings": 9}  # fmt: skip
TILED = {"model_type": "llava_next", "image_grid_pinpoints": [[28, 56]]}
WRONG = {  # values of config.json and of its parts, each refused by its name and as it stands
    None: {"model_type": ["paligemma", None, []], "vision_feature_layer": [-9, [-2, -3]], "text_config": [[], "llama"],
           "vision_feature_select_strategy": ["some"], "projector_hidden_act": ["relu"],
           "multimodal_projector_bias": ["no"]},
    "text_config": {"model_type": ["qwen3"], "hidden_size": [-4, 2**62, "big", True], "vocab_size": [-5],
                    "num_hidden_layers": [0, 10**9], "head_dim": [0], "hidden_act": ["relu6"],
                    "rms_norm_eps": ["small", float("inf")], "partial_rotary_factor": [0.5], "rope_parameters": [[1]]},
    "vision_config": {"model_type": ["dinov2"], "num_hidden_layers": [10**9], "image_size": [10**12],
                      "patch_size": [99]},
}  # fmt: skip
CONFIG = [  # what else is said
    ({"model_type": "llava_onevision"}, "llava_onevision.*anyres_max_9"), ({"text_config": 1}, "expected an object"),
    ({"model_type": "llava_next_video"}, "frames"), ({"model_type": "video_llava"}, "two vision towers"),
    ({"model_type": "vipllava"}, "several vision layers"),
    ({"text_config": {"model_type": "phi"}}, "expected one of llama, mistral, qwen2"),
    ({"text_config": {"hidden_size": 2.0}}, "expected a value of type int"),
    ({"text_config": {"hidden_size": 66, "head_dim": None}}, "hidden_size = 66; expected a multiple of its 4 heads"),
    ({"text_config": {"num_hidden_layers": 2000}}, "a number above 0, up to 1024"),
    ({"text_config": {"num_key_value_heads": 3}}, "3 key-value heads"), ({"text_config": {"head_dim": 15}}, "odd"),
    *(({"text_config": {"model_type": "mistral", "sliding_window": window}}, f"sliding_window = {window!r}")
      for window in ("64", 64.0, True)),
    ({"text_config": {"rope_parameters": {"rope_type": "yarn", "factor": 2}}}, "rope_type = 'yarn'"),
    ({"text_config": {"rope_parameters": None, "rope_scaling": {"rope_type": [1]}}}, r"rope_type = \[1\]"),
    ({"text_config": {"rope_parameters": {"rope_type": "linear"}}}, "factor for RoPE = None"),
    ({"text_config": {"rope_parameters": {"rope_type": "linear", "factor": 0}}}, "factor for RoPE = 0"),
    ({"text_config": {"rope_parameters": {**LLAMA3, "low_freq_factor": None}}}, "low_freq_factor for RoPE = None"),
    ({"text_config": {"rope_parameters": LLAMA3}}, "the lower one first"),
    ({"vision_config": {"num_attention_heads": 5}}, "hidden_size = 48; expected a multiple of its 5 heads"),
    ({"vision_config": {"patch_size": 28, "model_type": "siglip_vision_model"}}, "the only patch is dropped"),
    ({"image_token_index": 10**6}, "image token 1000000"), ({"pad_token_id": 10**6}, "pad token 1000000"),
    ({"image_token_index": "x"}, "image_token"), ({"text_config": {"eos_token_id": "x"}}, "eos_token_id is x"),
    *(({**TILED, "image_grid_pinpoints": pairs}, "expected pairs") for pairs in ([[28]], 5, [])),
    ({**TILED, "image_grid_pinpoints": [[28, 56], [28, 40]]}, r"\[28, 40\]; expected multiples of image_size 28"),
    ({**TILED, "image_grid_pinpoints": [[28, 2828]]}, "at most 100 tiles"),
    ({**TILED, "vision_feature_select_strategy": "full"}, "'full'; expected default, since tiles"),
    *(({name: value} if part is None else {part: {name: value}}, re.escape(f"{name} = {value!r}"))
      for part, names in WRONG.items() for name, values in names.items() for value in values),
]  # fmt: skip
ORIGINAL = [
    ({"model_type": "llava_mpt"}, "'llava_mpt'; expected llava or"), ({"mm_vision_tower": "../../etc"}, "Hub id"),
    ({"mm_vision_tower": "llava"}, "no folder .llava. in"), ({"mm_patch_merge_type": "spatial"}, "LLaVA-1.6"),
    *(({name: value}, name) for name, values in {
        "mm_vision_tower": [3], "mm_vision_select_feature": ["cls", ["patch"]], "vocab_size": ["many", 10**400],
        "mm_projector_type": ["resampler"], "image_aspect_ratio": ["anyres"], "mm_use_im_start_end": [True],
      }.items() for value in values),
]  # fmt: skip
IMAGES = {  # each is refused by its name
    "size": [0, {"height": 4, "shortest_edge": None}, "large", 10**9],
    "crop_size": [{"height": -1, "width": 3}],
    "rescale_factor": [10**400, True, "a"],
    "image_mean": [[10**400, 1, 1], [1, 2], "grey"],
    "image_std": [[0, 1, 1]],
    "resample": [17],
    "do_resize": ["no"],
}
NORM, EMBEDDING = "language_model.model.norm.weight", "language_model.model.embed_tokens.weight"
UNEXPECTED = "language_model.model.layers.9.mlp.up_proj.weight"
TENSORS = [
    (
        lambda state: (
            state.pop(NORM),
            state.update({UNEXPECTED: torch.zeros(2, 2), "multi_modal_projector.linear_1.bias": torch.zeros(3)}),
        ),
        rf"missing {NORM}; (?=.*linear_1.bias has shape \[3\], expected \[64\]).*unexpected {UNEXPECTED}",
    ),  # all at once
    (lambda state: state.update({"lm_head.weight": state["language_model.lm_head.weight"].clone()}), "same parameter"),
    (lambda state: state.update({EMBEDDING: state[EMBEDDING][:-2].clone()}), f"{EMBEDDING} has shape"),
]
SCALE = "language_model.model.layers.1.mlp.up_proj.scale"
MATRIX = SCALE.replace(".scale", ".weight")
INT8 = [
    (lambda state: state.pop(SCALE), f"missing {SCALE}"),
    (lambda state: state.update({SCALE: state[SCALE][:-1].clone()}), f"{SCALE} has shape"),
    (lambda state: state.update({SCALE: state[SCALE].float()}), f"{SCALE} is torch.float32, .* dense torch.bfloat16"),
    (lambda state: state.update({MATRIX: state[MATRIX].half()}), "dense torch.int8"),
    *(
        (lambda state, value=value: state[SCALE].__setitem__(3, value), f"{SCALE} is not finite and above 0")
        for value in (0, -1e-3, float("nan"), float("inf"))
    ),
]
NOT_NUMBERS = [
    (lambda tensor: tensor.int(), "is torch.int32"),
    (lambda tensor: tensor.to("meta"), "is no numbers"),
    (lambda tensor: tensor.to_sparse(), "is torch.float32, torch.sparse_coo"),
]
INDEX = [
    ({"weight_map": {"a": "../out.safetensors"}}, "own folder"), ({"weight_map": {"a": "/etc/passwd"}}, "own folder"),
    ({"weight_map": {"a": "gone.safetensors"}}, "missing shard"), ({"weight_map": {}}, "missing language_model"),
    ({}, "no weight_map"), ({"weight_map": 3}, "no weight_map"), ({"weight_map": {"a": 3}}, "no weight_map"),
    ([1], "index.json"), (b"{", "index.json"),
]  # fmt: skip
ADDED = [
    ("added_tokens.json", {"<image>": "7"}),
    ("added_tokens.json", {"": 7}),
    ("added_tokens.json", {"<image>": -7}),
    ("tokenizer.json", {"added_tokens": [{"id": 3}]}),
    ("tokenizer.json", {"added_tokens": "many"}),
    ("tokenizer.json", {"added_tokens": [{"id": 3, "content": ["<image>"]}]}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<image>"}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": [1, 2]}),
]
SMALL = [
    *((config(**change), sentence) for change, sentence in CONFIG),
    *((on("preprocessor_config.json", partial(edit, **{name: value})), name)
      for name, values in IMAGES.items() for value in values),
    *((tensors(change), sentence) for change, sentence in TENSORS),
    *((as_pickle(name, change), f"{name} {kind}") for name in (NORM, EMBEDDING) for change, kind in NOT_NUMBERS),
    *((put("model.safetensors.index.json", content), sentence) for content, sentence in INDEX),
    *((put(name, content), "added token") for name, content in ADDED),
    *((cut(size), "model.safetensors is damaged") for size in (0, 4, 100, 5000, -4)),
    *((header(content), "damaged") for content in (
        b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}', b"{", b"[]", b"\xff" * 9)),
    *((put("config.json", content), "config.json") for content in (
        b"", b"{", b"[]", b"null", b"\xed\xa0\x80", b"[" * 10**5)),
    *((on(name, partial(os.truncate, length=10**12)), f"{name} has 1000000000000 bytes") for name in (
        "config.json", "tokenizer.model", "tokenizer_config.json")),
    *((on(name, Path.unlink), sentence) for name, sentence in {
        "config.json": "no config.json", "model.safetensors": "neither model.safetensors nor",
        "tokenizer.model": "neither tokenizer.model nor tokenizer.json"}.items()),
    *((put("tokenizer.model", content), r"tokenizer\.model") for content in (b"", b"junk", b"\x0a\x05hello")),
    *((several(on("tokenizer.model", Path.unlink), put("tokenizer.json", content)), r"tokenizer\.json") for content in (
        b"{}", b"[1]", b"\xff", b'{"model": {"type": "BPE", "vocab": 3}}')),
    (put("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "<image>"}}}), "different checkpoints"),
    (on("tokenizer_config.json", partial(edit, chat_template=3)), "template is int"),
    (put("chat_template.jinja", b"\xff"), "not UTF-8"),
    (on("processor_config.json", partial(edit, image_processor="x")), "no object"),
    (several(config(**TILED), on("preprocessor_config.json", partial(edit, image_grid_pinpoints=[[28, 28]])),
             tensors(lambda state: state.update({"image_newline": torch.zeros(64)}))), "different checkpoints"),
]  # fmt: skip
DAMAGES = [
    *(("small", damage, sentence) for damage, sentence in SMALL),
    *(("original", config(**change), sentence) for change, sentence in ORIGINAL),
    *(("int8", tensors(change), sentence) for change, sentence in INT8),
    *(("pickled", trap(save), "cannot be read as weights") for save in (
        lambda made, path: torch.save({"lm_head.weight": made}, path),
        lambda made, path: path.write_bytes(pickle.dumps(made)), lambda made, path: path.write_bytes(b""))),
]  # fmt: skip


@pytest.mark.parametrize("base, damage, sentence", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_a_sentence_and_nothing_in_it_is_run(
    bases, tmp_path, base, damage, sentence
):
    folder = shutil.copytree(bases[base], tmp_path / "llava")
    (folder / "generation_config.json").unlink(missing_ok=True)  # its ids would count instead of config.json's
    damage(folder)
    with pytest.raises(LlavaError) as caught:
        weights.load(folder)
    assert re.search(sentence, str(caught.value)) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["llava"]


@pytest.mark.parametrize(
    "damage, options, code, sentence",
    [
        (as_pickle(NORM, NOT_NUMBERS[0][0]), [], 1, f"{NORM} is torch.int32"),
        (as_pickle(EMBEDDING, NOT_NUMBERS[1][0]), [], 1, f"{EMBEDDING} is no numbers"),
        (tensors(lambda state: state.pop(NORM)), [], 1, f"missing {NORM}"),
        (cut(5000), [], 2, "is damaged"),
        (tensors(lambda state: state.update({"\x1b[2J\nred": torch.ones(1)})), [], 1, r"unexpected \x1b[2J\nred"),
        (tensors(lambda state: state[MATRIX].fill_(float("nan"))), ["--dtype", "int8"], 0, f"{SCALE} is not finite"),
    ],
)
def test_what_does_not_load_is_not_converted_either_and_inspect_shows_why(
    small, tmp_path, capsys, damage, options, code, sentence
):
    """Names that a terminal would obey are shown harmlessly. `inspect` reads no number, so it says nothing of NaN."""
    folder = shutil.copytree(small[0], tmp_path / "llava")
    damage(folder)
    assert weights.main(["convert", str(folder), str(tmp_path / "out"), *options]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["llava"]
    said = capsys.readouterr().err
    assert weights.main(["inspect", str(folder)]) == code
    shown = "".join(capsys.readouterr())
    assert sentence in said and (sentence in shown) == (code > 0) and "\x1b" not in said + shown


@pytest.mark.parametrize(
    "name", ["no such folder", "no/such/folder", "/nowhere", "word " * 10**5, "\0"], ids=lambda name: name[:20]
)
def test_what_is_neither_folder_nor_hub_id_is_refused_and_ends_a_command_with_2(name, capsys):
    with pytest.raises(LlavaError, match="no folder"):
        weights.load(name)
    assert [weights.main(command) for command in (["inspect", name], ["convert", name, "out"])] == [2, 2]
    assert capsys.readouterr().err.count("no folder") == 2


def test_a_file_is_no_checkpoint(small):
    with pytest.raises(LlavaError, match="is a file"):
        weights.load(small[0] / "config.json")


@pytest.mark.parametrize("base, dtype, sentence", [
    *(("small", dtype, "in which nothing can be computed; load in another")
      for dtype in (torch.int32, torch.bool, "fp8", "nn")),
    *(("int8", dtype, r"has weights in 8 bits, and torch.\w+ was asked for")
      for dtype in (torch.float32, torch.bfloat16, "float16")),
])  # fmt: skip
def test_a_dtype_that_cannot_be_used_is_refused(bases, base, dtype, sentence):
    with pytest.raises(LlavaError, match=sentence):
        weights.load(bases[base], dtype=dtype)
