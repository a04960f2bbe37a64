"""Checkpoints are found, checked before they are read, streamed, and refused in a sentence when they do not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from operator import attrgetter
from pathlib import Path
from unittest import mock

import huggingface_hub.constants
import pytest
import torch
from checkpoints import edit, edit_weights, reference, same_weights
from conftest import ROOT

import weights
from minillava.checks import LlavaError
from minillava.files import write_file


@pytest.fixture
def folder(small, tmp_path) -> Path:
    """A fresh copy of the small checkpoint."""
    return Path(shutil.copytree(small[0], tmp_path / "checkpoint"))


def test_a_sharded_checkpoint_is_the_same_model_and_progress_counts_its_bytes(small, tmp_path):
    _, theirs, ours, _ = small
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    told = []
    assert same_weights(weights.load_model(tmp_path, progress=lambda *numbers: told.append(numbers)), ours)
    done, sizes = map(list, zip(*told))
    assert done == sorted({*done}) and {*sizes} == {done[-1]} == {4 * sum(p.numel() for p in ours.parameters())}


@pytest.mark.parametrize("dtype, expected", [
    (None, torch.bfloat16), (torch.float32, torch.float32), ("float16", torch.float16),
])  # fmt: skip
def test_weights_of_several_dtypes_come_in_one_which_is_the_embeddings_if_none_is_asked_for(folder, dtype, expected):
    embedding = "language_model.model.embed_tokens.weight"
    edit_weights(folder, lambda state: state.update({embedding: state[embedding].bfloat16()}))
    model = weights.load_model(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert weights.memory_needed(folder, dtype) == (sum(p.nbytes for p in model.parameters()), torch.bfloat16)


def test_an_untied_output_layer_is_used_even_if_the_config_says_tied(small, folder):
    edit(folder / "config.json", text_config={"tie_word_embeddings": True})
    assert same_weights(weights.load_model(folder), small[2])


def test_weights_in_8_bits_are_widened_and_nothing_is_computed_in_8_bits(folder):
    edit_weights(folder, lambda state: state.update({name: t.to(torch.float8_e4m3fn) for name, t in state.items()}))
    told = []
    model = weights.load_model(folder, progress=lambda *numbers: told.append(numbers))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert told[-1] == (numbers, numbers)  # bytes of the file
    assert weights.memory_needed(folder, torch.float32)[0] == 4 * numbers
    with pytest.raises(LlavaError, match="float8_e4m3fn, in which nothing can be computed"):
        weights.load(folder, dtype=None)


@pytest.mark.parametrize(
    "generation, named",
    [
        ({"repetition_penalty": 1.2, "do_sample": True}, "repetition_penalty = 1.2"),
        ({"no_repeat_ngram_size": 3, "num_beams": 1}, "no_repeat_ngram_size = 3"),
        ({"repetition_penalty": 1.0, "temperature": 0.5, "min_length": 0}, None),
    ],
)
def test_settings_that_change_transformers_tokens_are_named(folder, generation, named):
    (folder / "generation_config.json").write_text(json.dumps(generation))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights.load(folder)
    assert [named in str(warning.message) for warning in caught] == [True] * (named is not None)


WINDOW, IDS = {"sliding_window": 24}, ("pad_token_id", "eos_token_id")
SETTINGS = [  # what is read as what, of the top of config.json, its text part, and generation_config.json
    (IDS, (0, ()), {}, {}, {}),  # of Qwen2
    (IDS, (2, (2,)), {}, {"model_type": "llama"}, {}),
    (IDS, (7, ()), {"pad_token_id": None}, {"pad_token_id": 7}, {}),
    (IDS, (7, ()), {"pad_token_id": 7}, {"pad_token_id": 8}, {}),
    (IDS, (4, (4,)), {"pad_token_id": 7}, {}, {"eos_token_id": 4}), (IDS, (9, ()), {}, {}, {"pad_token_id": 9}),
    (IDS, (3, (3,)), {"pad_token_id": -1}, {"eos_token_id": 3}, {}),
    (IDS, (0, (0, 6)), {}, {}, {"eos_token_id": [0, 6]}),
    *((["text.kv_heads"], heads, {}, {"model_type": kind, **given}, {}) for kind, heads, given in (
        ("qwen2", 32, {}), ("mistral", 8, {}), ("llama", 64, {}), ("qwen2", 64, {"num_key_value_heads": None}))),
    *((["text.tie_word_embeddings"], tied, {"tie_word_embeddings": top}, {"tie_word_embeddings": text}, {})
      for top, text, tied in ((True, None, True), (True, False, True), (False, True, True), (False, None, False),
                              (None, None, False))),
    *((["text.max_position_embeddings"], positions, {}, text, {}) for text, positions in (
        ({"model_type": "mistral", **WINDOW}, 24), ({"model_type": "mistral", "sliding_window": 4096}, 256),
        ({"model_type": "mistral", "sliding_window": None, "max_position_embeddings": 9000}, 9000),
        ({"model_type": "llama", **WINDOW}, 256),
        ({"use_sliding_window": True, **WINDOW}, 24), ({"use_sliding_window": False, **WINDOW}, 256))),
]  # fmt: skip


@pytest.mark.parametrize("names, expected, top, text, generation", SETTINGS)
def test_a_setting_that_is_absent_or_stands_in_several_places_is_read_as_transformers_reads_it(
    small, names, expected, top, text, generation
):
    """Of a Qwen2, unless another kind is named. A text is refused beyond the window, which then is its positions."""
    raw = json.loads((small[0] / "config.json").read_text())
    for place in (raw, raw["text_config"]):
        for absent in ("pad_token_id", "eos_token_id", "num_key_value_heads", "tie_word_embeddings", "head_dim"):
            place.pop(absent, None)
    raw["text_config"] |= {"model_type": "qwen2", "num_attention_heads": 64, "hidden_size": 128, **text}
    assert attrgetter(*names)(weights.parse_config({**raw, **top}, generation)) == expected


@pytest.mark.parametrize("pickled", [False, True])
def test_a_hub_id_is_read_from_the_cache_and_pickles_are_asked_for_only_where_there_is_nothing_else(
    small, folder, tmp_path, monkeypatch, pickled
):
    download = mock.Mock(wraps=huggingface_hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(LlavaError, match="no folder someone/a-model, and the Hub could not give"):
        weights.load("someone/a-model")
    if pickled:
        edit_weights(folder, lambda state: None, pickled=True)
    cached, commit = tmp_path / "models--someone--a-model", 5 * "01234567"
    shutil.copytree(folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    for revision in (None, commit):
        download.reset_mock()
        assert same_weights(weights.load("someone/a-model", revision=revision)[0], small[2])
        patterns = [
            [kind, "*.json", "*.jinja", "tokenizer.model"] for kind in ("*.safetensors", "*.bin")[: 1 + pickled]
        ]
        assert download.call_args_list == [
            mock.call("someone/a-model", revision=revision, allow_patterns=asked) for asked in patterns
        ]


MEASURE = """
import gc, sys, threading, time
from pathlib import Path
import demo, torch, weights
from minillava import quantised
quantised.PART = 2**17
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024
def watch():
    global peak
    while running:
        peak = max(peak, anonymous()); time.sleep(0.001)
for dtype, parts in (("bfloat16", 0), ("int8", 4)):  # parts of a weight in float32, while it is rounded
    before, peak, running = anonymous(), 0, True
    thread = threading.Thread(target=watch); thread.start()
    model = weights.load_model(Path(sys.argv[1]), dtype=dtype); running = False; thread.join()
    size, used = sum(p.nbytes for p in model.parameters()), max(peak, anonymous()) - before
    assert 25e6 < size and used < 1.05 * size + parts * 4 * quantised.PART, (dtype, size, used)
    del model; gc.collect()
assert "transformers" not in sys.modules
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_loading_holds_one_model_and_one_tensor_and_nothing_imports_transformers(tmp_path):
    """1.00 of the model was measured; a second copy would make it 2."""
    model = reference(text={"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "vocab_size": 4000})
    model.save_pretrained(tmp_path, max_shard_size="50MB")
    # What is freed goes back to the system at once. Else the C library keeps up to 70 MB, of any model.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    subprocess.run([sys.executable, "-c", MEASURE, tmp_path], cwd=ROOT, check=True, env=env)


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
    kinds = (("default", False, mapped), (None, False, mapped), (None, True, ""), (torch.float16, False, ""),
             (torch.int8, False, ""))  # fmt: skip
    for dtype, fast, expected in kinds:
        assert mapped_files(weights.load_model(folder, dtype=dtype, fast=fast)) == {expected}


def test_a_mapped_model_outlives_the_name_of_its_file(small, tmp_path):
    folder = shutil.copytree(small[0], tmp_path / "copy")
    model = weights.load_model(folder, dtype=None)
    before = model.lm_head.weight.clone()
    write_file(folder / "model.safetensors", b"another file")  # replaced as a download is, not written into
    assert torch.equal(model.lm_head.weight, before)
