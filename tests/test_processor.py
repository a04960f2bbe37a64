"""Pixels are those of `transformers`' PIL image processors, ids those of sentencepiece around added tokens."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import picture
from conftest import TINY
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, LlavaImageProcessorPil

from minillava.checks import LlavaError
from minillava.processor import AddedToken, ImageProcessor, SentencePiece, Tokenizer, open_image, to_rgb
from train.train_tiny import tokenizer_json

ADDED = [AddedToken("<imag", 32002), AddedToken("<image>", 32000), AddedToken("<pad>", 32001, special=False)]


sizes = st.one_of(
    st.integers(8, 40).map(lambda edge: {"shortest_edge": edge}),
    st.fixed_dictionaries({"height": st.integers(8, 40), "width": st.integers(8, 40)}),
)
flags = st.fixed_dictionaries({f"do_{name}": st.booleans() for name in ("pad", "resize", "center_crop", "normalize")})


@given(
    st.integers(0, 2**31), st.integers(1, 90), st.integers(1, 90), st.sampled_from(["RGB", "L", "RGBA", "LA", "CMYK"]),
    sizes, st.tuples(st.integers(8, 40), st.integers(8, 40)), st.sampled_from([0, 1, 2, 3]), flags,
)  # fmt: skip
def test_pixels_are_those_of_transformers(seed, width, height, mode, size, crop, resample, flags):
    image = picture(width, height, seed, mode)
    config = {"size": size, "crop_size": {"height": crop[0], "width": crop[1]}, "resample": resample, **flags}
    theirs = LlavaImageProcessorPil(**config)(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(ImageProcessor.from_dict(config)(image), theirs[0].float())


def test_a_palette_picture_with_a_transparent_colour_lies_on_white_and_16_bit_grey_keeps_its_brightness():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 0)
    palette.info["transparency"] = 1
    assert [to_rgb(palette).getpixel((at, at)) for at in (0, 3)] == [(255, 0, 0), (255, 255, 255)]
    grey = Image.new("I;16", (3, 1))
    for x, value in enumerate((0, 32896, 65535)):
        grey.putpixel((x, 0), value)
    assert [to_rgb(grey).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_files_that_hold_no_image_are_refused_in_a_sentence(tmp_path):
    for name, image in ("cut.png", picture(300, 300)), ("bomb.png", Image.new("1", (10_000, 10_001))):
        image.save(tmp_path / name)  # the second one Pillow would read
    os.truncate(tmp_path / "cut.png", 5000)
    (tmp_path / "empty.png").touch()
    sentences = dict.fromkeys(("cut.png", "empty.png", "."), "is not an image")
    sentences |= {"missing.png": "There is no image at", "bomb.png": "100 million pixels"}
    for name, sentence in sentences.items():
        with pytest.raises(LlavaError, match=sentence) as caught:
            open_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_pictures_that_do_not_fit_the_vision_tower_are_refused(tiny):
    _, processor = tiny
    images = ImageProcessor(size={"shortest_edge": 192}, do_center_crop=False)
    made = replace(processor, image_processor=images)
    assert made("<image>", [picture(9, 9)])["pixel_values"].shape == (1, 3, 192, 192)
    with pytest.raises(LlavaError, match="384 x 192 pixels, not 192 x 192; the files belong to different"):
        made("<image><image>", [picture(9, 9), picture(18, 9)])


@pytest.mark.parametrize("pad", [False, True])
def test_a_picture_that_would_become_too_large_is_refused_before_it_does(monkeypatch, pad):
    monkeypatch.setattr("minillava.processor.MAX_PIXELS", 10**6)
    processor = ImageProcessor(size=56, crop_size=56, do_pad=pad)
    assert processor(Image.new("RGB", (1, 1000 if pad else 100))).shape == (3, 56, 56)  # 1,000 squared is the limit
    with pytest.raises(LlavaError, match="1 x 10000 pixels is too long and thin"):
        processor(Image.new("RGB", (1, 10_000)))


# ---------------------------------------------------------------- text


@pytest.fixture(scope="module")
def large():
    """Our tokenizer, and transformers' fast one as LLaVA's tokenizer.json builds it, for the same 32,000 pieces.

    They are a real sentencepiece model of Llama's kind, with byte fallback, from a package that ships one.
    """
    import tokenizers

    mistral = pytest.importorskip("mistral_common", reason="mistral-common ships the sentencepiece model")
    path = Path(mistral.__file__).parent / "data" / "tokenizer.model.v1"
    if not path.is_file():
        pytest.skip("this mistral-common ships no sentencepiece model")
    ours = Tokenizer(SentencePiece(path, {token.content: token for token in ADDED}))
    raw = tokenizer_json(ours.model, {token.id: token.content for token in ours.added.values()})
    for token in raw["added_tokens"]:
        token["special"] = ours.added[token["content"]].special
    return ours, tokenizers.Tokenizer.from_str(json.dumps(raw))


WORDS = ["USER: ", "<image>", "<imag", "\n", " ASSISTANT:", "What is this?", "  ", "</s>", "<s>", "é", "日本", "🙂",
         "▁"]  # fmt: skip
text = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(WORDS)), max_size=8).map("".join)


@settings(max_examples=50)
@given(text)
def test_ids_are_those_of_a_llava_tokenizer_json(large, words):
    ours, fast = large
    words = words.replace("\0", "")  # sentencepiece ends a text at NUL
    assert ours.encode(words) == fast.encode(words).ids


@settings(max_examples=100)
@example([35, 400])  # the byte of a space
@given(st.lists(st.one_of(st.integers(0, 300), st.integers(0, 32002), st.integers(31990, 32010)), max_size=8))
def test_the_text_of_any_ids_is_that_of_a_llava_tokenizer_json(large, ids):
    ours, fast = large
    expected = fast.decode(ids, skip_special_tokens=True)
    assume("�" not in expected)  # bytes that are no UTF-8
    assert ours.decode([*ids, -5, 10**6]) == expected


# ---------------------------------------------------------------- both


@pytest.mark.parametrize(
    "text, images", [("no image", 1), ("<image>", 0), ("<image> <image>", 1), (["<image>", "b"], 2)]
)
def test_the_count_of_images_must_be_the_count_of_image_tokens(tiny, text, images):
    with pytest.raises(LlavaError, match=f"has {''.join(text).count('<image>')} <image> and {images} images"):
        tiny[1](text, [picture(9, 9)] * images)


def test_the_embedded_inputs_padded_on_the_left_are_those_of_its_transformers_processor(tiny):
    texts, images = ["A  </s> é 🙂<image> <image>\nWhat? ASSISTANT:", "yes"], [picture(111, 97), picture(20, 50)]
    theirs = AutoProcessor.from_pretrained(TINY)
    expected = theirs(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
    found = tiny[1](texts, images)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert (found["input_ids"][1, 0], found["attention_mask"][1, 0]) == (tiny[1].config.pad_token_id, 0)


def test_added_tokens_are_read_from_every_file_that_may_hold_them(tmp_path):
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    config = {"added_tokens_decoder": {"903": {"content": "<image>", "lstrip": True}}, "add_bos_token": False}
    for id, name, content in (
        (900, "config.json", {}),  # no file names one
        (901, "added_tokens.json", {"<image>": 901}),
        (902, "tokenizer.json", {"added_tokens": [{"id": 902, "content": "<image>"}]}),
        (903, "tokenizer_config.json", config),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        tokenizer = Tokenizer.from_folder(tmp_path, 900)
        assert tokenizer.encode("<image>")[-1] == tokenizer.largest_id == id and tokenizer.piece(id) == "<image>"
    assert tokenizer.encode("  <image>") == [903]
