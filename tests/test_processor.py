"""Pixels are those of `transformers`' PIL image processors, ids those of sentencepiece around added tokens."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from minillava.checks import LlavaError
from minillava.processor import AddedToken, ImageProcessor, SentencePiece, Tokenizer, llava_prompt, open_image, to_rgb
from train.train_tiny import tokenizer_json

ADDED = [AddedToken("<imag", 32002), AddedToken("<image>", 32000), AddedToken("<pad>", 32001, special=False)]


def picture(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise in any mode."""
    generator = torch.Generator().manual_seed(seed)
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = torch.randint(0, 256, (height, width, channels), generator=generator, dtype=torch.uint8)
    return Image.frombytes(mode, (width, height), values.numpy().tobytes())


def theirs(image: Image.Image, **config) -> torch.Tensor:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    return LlavaImageProcessorPil(**config)(image, return_tensors="pt")["pixel_values"][0]


sizes = st.one_of(
    st.integers(8, 40).map(lambda edge: {"shortest_edge": edge}),
    st.fixed_dictionaries({"height": st.integers(8, 40), "width": st.integers(8, 40)}),
)
flags = st.fixed_dictionaries({f"do_{name}": st.booleans() for name in ("pad", "resize", "center_crop", "normalize")})


@settings(max_examples=80)
@given(
    st.integers(0, 2**31), st.integers(1, 90), st.integers(1, 90), st.sampled_from(["RGB", "L", "RGBA", "LA", "CMYK"]),
    sizes, st.tuples(st.integers(8, 40), st.integers(8, 40)), st.sampled_from([0, 1, 2, 3]), flags,
)  # fmt: skip
def test_pixels_are_those_of_transformers(seed, width, height, mode, size, crop, resample, flags):
    image = picture(seed, width, height, mode)
    config = {"size": size, "crop_size": {"height": crop[0], "width": crop[1]}, "resample": resample, **flags}
    assert torch.equal(ImageProcessor.from_dict(config)(image), theirs(image, **config).float())


def test_a_palette_picture_with_a_transparent_colour_lies_on_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    image.info["transparency"] = 1
    assert to_rgb(image).getpixel((0, 0)) == (255, 0, 0)
    assert to_rgb(image).getpixel((3, 3)) == (255, 255, 255)


def test_a_config_that_does_not_convert_to_rgb_is_read_and_pictures_are_converted_all_the_same():
    grey = Image.effect_noise((20, 20), 90)
    config = {"size": 20, "crop_size": 20, "do_convert_rgb": False}
    assert torch.equal(ImageProcessor.from_dict(config)(grey), ImageProcessor.from_dict(config)(grey.convert("RGB")))


def test_sixteen_bit_grey_keeps_its_brightness():
    image = Image.new("I;16", (3, 1))
    for x, value in enumerate((0, 32896, 65535)):
        image.putpixel((x, 0), value)
    assert [to_rgb(image).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_a_photo_is_turned_as_its_exif_data_says():
    image = picture(0, 6, 4)
    exif = image.getexif()
    exif[274] = 6  # the camera was held upright
    stored = io.BytesIO()
    image.save(stored, "png", exif=exif)
    turned = to_rgb(Image.open(stored))
    assert turned.size == (4, 6)
    assert turned.tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0}, {"size": {"height": 4}}, {"size": "large"}, {"crop_size": {"height": -1, "width": 3}},
        {"rescale_factor": 10**400}, {"image_mean": [10**400, 1, 1]}, {"rescale_factor": True},
        {"size": 10**9}, {"image_mean": [1, 2]}, {"image_mean": "grey"}, {"image_std": [0, 1, 1]}, {"resample": 17},
    ],
)  # fmt: skip
def test_an_image_processor_config_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(LlavaError, match=next(iter(wrong))):
        ImageProcessor.from_dict(wrong)


def test_files_that_hold_no_image_are_refused_in_a_sentence(tmp_path):
    whole = io.BytesIO()
    picture(0, 300, 300).save(whole, "png")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:5000])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    bomb = io.BytesIO()
    Image.new("1", (10_000, 10_001)).save(bomb, "png")  # Pillow would read it
    (tmp_path / "bomb.png").write_bytes(bomb.getvalue())
    for name in ("cut.png", "text.png", "empty.png", "bomb.png", "missing.png", "."):
        with pytest.raises(LlavaError, match=name if name != "." else "image") as caught:
            open_image(tmp_path / name)
        assert "\n" not in str(caught.value) and ("100 million pixels" in str(caught.value)) == (name == "bomb.png")


def test_pictures_that_do_not_fit_the_vision_tower_are_refused(tiny):
    _, processor = tiny
    images = ImageProcessor(size={"shortest_edge": 192}, do_center_crop=False)
    made = replace(processor, image_processor=images)
    assert made("<image>", [picture(0, 9, 9)])["pixel_values"].shape == (1, 3, 192, 192)
    with pytest.raises(LlavaError, match="384 x 192 pixels, not 192 x 192; the files belong to different"):
        made("<image><image>", [picture(0, 9, 9), picture(0, 18, 9)])


@pytest.mark.parametrize("pad", [False, True])
def test_a_picture_that_would_become_too_large_is_refused_before_it_does(pad):
    processor = ImageProcessor(size=56, crop_size=56, do_pad=pad)
    assert processor(Image.new("RGB", (1, 10_000))).shape == (3, 56, 56)  # 10,000 squared is the limit of a square
    with pytest.raises(LlavaError, match="1 x 1000000 pixels is too long and thin"):
        processor(Image.new("RGB", (1, 1_000_000)))


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


text = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(
            [
                "USER: ",
                "<image>",
                "<imag",
                "\n",
                " ASSISTANT:",
                "What is this?",
                "  ",
                "</s>",
                "<s>",
                "é",
                "日本",
                "🙂",
                "▁",
            ]
        ),
    ),
    max_size=8,
).map("".join)


@settings(max_examples=300)
@given(text)
def test_ids_are_those_of_a_llava_tokenizer_json(large, words):
    ours, fast = large
    words = words.replace("\0", "")  # sentencepiece ends a text at NUL
    assert ours.encode(words) == fast.encode(words).ids


def test_text_around_an_image_gets_its_own_leading_space(large):
    tokenizer, _ = large
    ids = tokenizer.encode("USER: <image>\nWhat")
    at = ids.index(32000)
    pieces = [tokenizer.model.id_to_piece(i) for i in (*ids[1:at], *ids[at + 1 :])]
    assert pieces[-3:] == ["▁", "<0x0A>", "What"]
    assert pieces[at - 2] == "▁"


@settings(max_examples=200)
@given(st.text(max_size=40))
def test_decoding_gives_the_text_back(large, words):
    tokenizer, _ = large
    words = "".join(c for c in words if c not in "\0▁" and not 0xD800 <= ord(c) < 0xE000)
    if any(token in words for token in tokenizer.added):
        return
    assert tokenizer.decode(tokenizer.encode(words)) == words


@settings(max_examples=300)
@example([35, 400])  # the byte of a space
@given(st.lists(st.one_of(st.integers(0, 300), st.integers(0, 32002), st.integers(31990, 32010)), max_size=8))
def test_the_text_of_any_ids_is_that_of_a_llava_tokenizer_json(large, ids):
    ours, fast = large
    expected = fast.decode(ids, skip_special_tokens=True)
    assume("�" not in expected)  # bytes that are no UTF-8
    assert ours.decode([*ids, -5, 10**6]) == expected


def test_text_of_a_batch_of_ids(tiny):
    _, processor = tiny
    ids = processor.tokenizer.encode("<s>yes.</s>")
    assert processor.decode(torch.tensor([ids, ids])) == [processor.decode(ids)] * 2 == ["yes.", "yes."]


# ---------------------------------------------------------------- both


def test_every_image_token_becomes_as_many_as_the_image_has_patches(tiny):
    model, processor = tiny
    inputs = processor("USER: <image>\nOne <image> two ASSISTANT:", [picture(0, 30, 20), picture(1, 20, 50)])
    count = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert count == 2 * model.config.num_image_tokens == 2 * 576
    assert inputs["pixel_values"].shape == (2, 3, 192, 192)


@pytest.mark.parametrize(
    "text, images", [("no image", 1), ("<image>", 0), ("<image> <image>", 1), (["<image>", "b"], 2)]
)
def test_the_count_of_images_must_be_the_count_of_image_tokens(tiny, text, images):
    _, processor = tiny
    named = "".join(text).count("<image>")
    with pytest.raises(LlavaError, match=f"has {named} <image> and {images} images"):
        processor(text, [picture(0, 9, 9)] * images)


def test_shorter_prompts_are_padded_on_the_left(tiny):
    _, processor = tiny
    inputs = processor(["How many objects are there? Count the objects.", "yes"])
    assert inputs["attention_mask"][0].all()
    row, mask = inputs["input_ids"][1], inputs["attention_mask"][1]
    assert (mask.diff() >= 0).all() and not mask[0]
    assert (row[mask == 0] == processor.config.pad_token_id).all()
    assert row[mask == 1].tolist() == processor.tokenizer.encode("yes")


def test_a_conversation_is_written_as_llava_was_trained():
    assert llava_prompt([("What?", "A cat."), ("Where?", None)], num_images=1) == (
        "USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Where? ASSISTANT:"
    )


@settings(max_examples=50)
@given(text)
def test_the_embedded_inputs_are_those_of_its_transformers_processor(embedded, words):
    ours, theirs = embedded
    words = words.replace("\0", "").replace("<image>", "") + "USER: <image>\nWhat? ASSISTANT:"
    image = picture(3, 111, 97)
    found, expected = ours(words, [image]), theirs(text=words, images=image, return_tensors="pt")
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


@pytest.fixture(scope="module")
def embedded(tiny):
    """Our processor of the embedded checkpoint, and the one that transformers makes of the same files."""
    from transformers import AutoProcessor

    return tiny[1], AutoProcessor.from_pretrained(TINY)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x0a\x05hello"])
def test_a_tokenizer_that_is_no_sentencepiece_model_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(LlavaError, match=r"tokenizer\.model"):
        Tokenizer.from_folder(tmp_path, 900)


def test_added_tokens_are_read_from_every_file_that_may_hold_them(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
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


@pytest.mark.parametrize(
    "name, content",
    [
        ("added_tokens.json", {"<image>": "7"}),
        ("added_tokens.json", {"": 7}),
        ("added_tokens.json", {"<image>": -7}),
        ("tokenizer.json", {"added_tokens": [{"id": 3}]}),
        ("tokenizer.json", {"added_tokens": "many"}),
        ("tokenizer.json", {"added_tokens": [{"id": 3, "content": ["<image>"]}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<image>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1, 2]}),
    ],
)
def test_added_tokens_that_make_no_sense_are_refused(tmp_path, name, content):
    (tmp_path / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(LlavaError, match="added token"):
        Tokenizer.from_folder(tmp_path, 900)
