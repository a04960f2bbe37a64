"""The rest of the LLaVA family beside `transformers`: SigLIP, Qwen2, Llama 3, LLaVA-NeXT, their texts and templates."""

from __future__ import annotations

import functools
import json
import random
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from checkpoints import check_converted, edit, picture
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import PatchCollection
from PIL import Image, ImageOps

import weights
from bench import plan
from bench.parity import FAMILY, GRIDS, IMAGE_ID, random_model
from minillava import TINY, anyres, explore, verify
from minillava.checks import LlavaError
from minillava.config import TextConfig
from minillava.convert import convert
from minillava.model import rope_frequencies
from minillava.processor import Processor, Tokenizer, TokenizerJson, open_image, read_template
from minillava.template import render, run
from prefixkv import PrefixKV

LOGITS = 1e-5  # as in test_parity
PINPOINTS = [(height, width) for height, width in GRIDS]

# Content as a list of parts, as in LLaVA-1.5's template, after all that a template may use; and content as text.
LANGUAGE = [
    "{% if tools %}T{% endif %}", "{% if tools is not none %}T{% endif %}",
    "{% if tools is defined and tools %}T{% endif %}",
    "{% if not tools is none and tools | length > 0 %}T{% endif %}", "{% if documents is not none %}D{% endif %}",
    "{{ 'T' if tools != none else '' }}", "{{ bos_token }}{{ eos_token }}{{ unk_token }}", "{{ strftime_now('%Y') }}",
    "  {% if true %}\n  a\n  {% endif %}\n  b {#- c #}\n", "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}"
    "{% endgeneration %}{{ x }}", "{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% set ns = namespace({'m': 0}, n=1, self=2) %}{% set ns.n = 3 %}{{ ns.n }}{{ ns.self }}{{ ns.m }}",
    "{{ {'b': '<é>', 'a': [1]} | tojson }}{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}",
    "{{ dict(b=1) | tojson }}{{ dict.fromkeys('a') | tojson }}{{ messages[0].content[1].text | upper }}",
]  # fmt: skip
LLAVA = "|".join(LANGUAGE) + (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin|>' }}{% for message in messages %}"
    "{{ '<|head|>' + message['role'] + '<|/head|>\n\n' + message['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
TEMPLATES = {"CLIP, Llama 3": LLAMA3, "SigLIP, Qwen2": LLAMA3, "LLaVA-NeXT, Llama": LLAVA}


def tokenizer(kind):
    """A byte-level BPE of transformers, of bytes and two merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<|end_of_text|>", "<|begin|>", "<|eot|>", "<|head|>", "<|/head|>"]
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "in"]
    pieces += [f"<|reserved {number}|>" for number in range(len(pieces), IMAGE_ID)]
    bpe = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, [("Ġ", "a"), ("i", "n")]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens([*special, "<image>"])
    if kind == "CLIP, Llama 3":
        bpe.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", pieces.index("<|begin|>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin|>",
        eos_token="<|end_of_text|>",
        pad_token="<|eot|>",
        padding_side="left",
    )


def write(folder, kind, model):
    """Weights, tokenizer, template and processor, every file by transformers; returns its processor."""
    import transformers as t

    side, siglip, processor = model.config.vision_config.image_size, kind.startswith("SigLIP"), t.LlavaProcessor
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if kind.startswith("LLaVA-NeXT"):
        processor = t.LlavaNextProcessor
        images = t.LlavaNextImageProcessorPil(**size, image_grid_pinpoints=GRIDS)
    else:
        images = t.SiglipImageProcessorPil(size=size["crop_size"]) if siglip else t.CLIPImageProcessorPil(**size)
    made = processor(
        images,
        tokenizer(kind),
        patch_size=7,
        vision_feature_select_strategy="full" if siglip else "default",
        num_additional_image_tokens=int(not siglip),
        chat_template=TEMPLATES.get(kind),
    )
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Of a kind: (folder, transformers' model and processor, our model and processor)."""

    @functools.cache
    def get(kind):
        folder, theirs = tmp_path_factory.mktemp("family"), random_model(kind, 2, pad_token_id=2)
        processor = write(folder, kind, theirs)
        return folder, theirs, processor, *weights.load(folder)

    return get


ONE = ["USER: <image>\nWhat is in the image? ASSISTANT:"]
SEVERAL = ["USER: <image> and <image>, please. ASSISTANT:"]
BATCH = ["a <image> cat", "USER: What?", "<image><image> a red dog and a cat."]


def draw_file(path, rng):
    """A noisy picture of any mode and size, perhaps with a camera's turn in its EXIF data."""
    size, exif = (rng.choice([1, 27, 28, 29, rng.randint(2, 200)]), rng.randint(2, 200)), Image.Exif()
    exif[274] = rng.randint(1, 8)
    noise = Image.frombytes("RGBA", size, rng.randbytes(4 * size[0] * size[1]))
    noise.convert(rng.choice(["RGB", "L", "RGBA", "LA", "P", "1"])).save(path, "png", exif=exif)
    return path


@pytest.mark.parametrize("kind", ["CLIP, Llama", *FAMILY])
@torch.no_grad()
def test_from_picture_files_through_three_turns_all_is_as_in_transformers(family, kind, tmp_path, sweep):
    """Inputs, logits of the prompt and of further blocks, greedy tokens and their text."""
    _, theirs, processor, model, ours = family(kind)
    rng, generator = random.Random(kind), torch.Generator().manual_seed(0)
    for number, texts in enumerate((ONE, SEVERAL, BATCH) * (8 if sweep else 1)):
        count = "".join(texts).count("<image>")
        files = [draw_file(tmp_path / f"{number} {index}", rng) for index in range(count)]
        turned = [ImageOps.exif_transpose(Image.open(path)) for path in files]
        expected = processor(text=texts, images=turned, padding=True, return_tensors="pt")
        inputs = ours(texts, [open_image(path) for path in files])
        if expected["pixel_values"].dim() == 5:  # filled up to the most tiles that a picture of the batch has
            tiles = [model.config.tiling(image.size[::-1]).tiles for image in turned]
            expected["pixel_values"] = torch.cat([row[:own] for row, own in zip(expected["pixel_values"], tiles)])
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in inputs.items())
        mask, cache, past, made = inputs["attention_mask"], model.new_cache(60, PrefixKV(1.0)), None, []
        turns = [torch.randint(3, 300, (len(mask), count), generator=generator) for count in (9, 14)]
        for block in (inputs["input_ids"], *turns):
            for _ in range(3):  # the turn, then two greedy tokens
                if made:
                    inputs, mask = {"input_ids": block}, torch.cat([mask, torch.ones_like(block)], dim=1)
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -block.shape[1] :]
                named = {**inputs, "attention_mask": mask, "position_ids": positions, "past_key_values": past}
                answer = theirs(**named, use_cache=True)
                if not made:
                    apart = float((model(**inputs) - answer.logits)[mask.bool()].abs().max())
                    assert (
                        apart == 0 if texts is ONE else apart < LOGITS
                    )  # no bit differs, but for sums in other orders
                found, past, logits = model.read(**inputs, cache=cache), answer.past_key_values, answer.logits[:, -1]
                # In a batch, theirs holds the padding and ours does not.
                assert float((found - logits).abs().max()) < (2 * LOGITS if texts is BATCH else LOGITS)
                block = logits.argmax(-1, keepdim=True)
                assert torch.equal(found.argmax(-1, keepdim=True), block)
                made.append(block)
        made = torch.cat(made, dim=1)
        assert processor.batch_decode(made, skip_special_tokens=True) == ours.decode(made)


@given(
    st.floats(0.5, 64),
    st.floats(0.1, 4),
    st.floats(0.1, 8),
    st.integers(16, 131072),
    st.floats(100, 1e6),
    st.sampled_from([8, 64, 96, 128]),
)
def test_llama_3s_angles_are_those_of_transformers(factor, low, more, original, theta, size):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": low + more,
               "original_max_position_embeddings": original}  # fmt: skip
    config = TextConfig(head_dim=size, rope_theta=theta, rope_scaling=scaling)
    theirs = LlamaConfig(head_dim=size, max_position_embeddings=2**20, rope_parameters={**scaling, "rope_theta": theta})
    assert torch.equal(rope_frequencies(config), LlamaRotaryEmbedding(theirs).inv_freq)


# ---------------------------------------------------------------- tiles

sides = st.integers(1, 400)
grids = st.sampled_from([PINPOINTS, [(28, 140)], [(28, 28)], [(140, 28), (28, 140)], [(84, 56), (56, 84), (28, 28)]])


@given(sides, sides, grids)
def test_tokens_are_counted_before_as_they_are_packed_after(height, width, pinpoints):
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    tiling = anyres.fit((height, width), pinpoints, 28, 4)
    assert anyres.best_resolution((height, width), pinpoints) == select_best_resolution((height, width), pinpoints)
    features, newline = torch.randn(tiling.tiles, 16, 3), torch.randn(3)
    packed = anyres.pack(features, [tiling], newline)
    assert len(packed) == tiling.tokens

    vision = SimpleNamespace(image_size=28, patch_size=7)
    config = SimpleNamespace(image_grid_pinpoints=[list(pair) for pair in pinpoints], vision_config=vision)
    stand = SimpleNamespace(config=config)  # what `pack_image_features` reads of its model
    expected, counts = LlavaNextModel.pack_image_features(
        stand, [features], torch.tensor([[height, width]]), "default", newline
    )
    assert torch.equal(packed, expected[0]) and int(counts[0]) == tiling.tokens


def test_a_picture_of_more_tokens_than_positions_is_refused_with_both_numbers(family):
    *_, processor = family("LLaVA-NeXT, Llama")
    text = replace(processor.config.text, max_position_embeddings=60)
    processor = replace(processor, config=replace(processor.config, text=text))
    with pytest.raises(LlavaError, match=r"An image of 56 x 56 pixels becomes 88 tokens.* 60 positions"):
        processor("<image>", [picture(56, 56)])


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda x: {"image_sizes": torch.tensor([[56, 30]])}, "hold 88 image tokens, but 1 images make"),
        (lambda x: {"pixel_values": x["pixel_values"][:4]}, r"are 4 tiles; pictures of these image_sizes have 5"),
        (lambda x: {"image_sizes": None}, "give image_sizes"),
        (lambda x: {"image_sizes": torch.tensor([56, 56])}, r"image_sizes are \[56, 56\]; expected \[I, 2\]"),
        (lambda x: {"pixel_values": x["pixel_values"][None]}, r"pixel_values are \[1, 5, 3, 28, 28\]; expected"),
    ],
)
def test_tokens_and_tiles_that_do_not_fit_are_refused_with_both_numbers(family, change, sentence):
    *_, model, processor = family("LLaVA-NeXT, Llama")
    inputs = processor(ONE, [picture(56, 56)])
    with pytest.raises(LlavaError, match=sentence):
        model(**{**inputs, **change(inputs)})


# ---------------------------------------------------------------- text


words = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(["<image>", "<|eot|>", " a", "\n"])), max_size=6)


@given(words.map("".join), st.lists(st.integers(0, IMAGE_ID + 9), max_size=8))
def test_ids_and_text_of_a_tokenizer_json_are_those_of_transformers(family, words, others):
    for kind in FAMILY[:2]:
        _, _, theirs, _, ours = family(kind)
        ids = theirs.tokenizer(words)["input_ids"]
        assert ours.tokenizer.encode(words) == ids
        for some in (ids, others):
            assert ours.decode([*some, -5]) == theirs.tokenizer.decode(some, skip_special_tokens=True)


def test_a_token_is_shown_as_text_with_its_space(family):
    tokenizer = family("SigLIP, Qwen2")[4].tokenizer
    assert "".join(map(tokenizer.piece, tokenizer.encode("What is<|eot|> it?"))) == "What▁is<|eot|>▁it?"
    assert tokenizer.piece(10**6) == ""


@pytest.mark.parametrize("sentencepiece", [True, False])
def test_a_text_that_is_no_unicode_is_refused(family, tiny, sentencepiece):
    with pytest.raises(LlavaError, match=r"surrogates not allowed.*type it anew, as UTF-8 text"):
        (tiny[1] if sentencepiece else family("SigLIP, Qwen2")[4])("a \ud800 b")


def test_sentencepiece_is_used_where_it_is(tmp_path, family, monkeypatch):
    folder = family("SigLIP, Qwen2")[0]
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as if not installed
    with pytest.raises(LlavaError, match=r"pip install -c constraints.txt -e '.\[hub\]'"):
        Tokenizer.from_folder(folder, IMAGE_ID)
    shutil.copy(folder / "tokenizer.json", tmp_path)
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    assert not isinstance(Tokenizer.from_folder(tmp_path, IMAGE_ID).library, TokenizerJson)


def test_a_tokenizer_json_counts_without_its_truncation_and_padding_and_with_tokens_of_other_files(tmp_path, family):
    raw = json.loads((family("SigLIP, Qwen2")[0] / "tokenizer.json").read_text())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != "<image>"]
    raw["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {"strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 2,
                      "pad_type_id": 0, "pad_token": "<|eot|>"}  # fmt: skip
    edit(tmp_path / "tokenizer.json", **raw)
    pad = {"content": "<pad>", "rstrip": True, "special": False}
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder={IMAGE_ID + 1: pad})
    made = Tokenizer.from_folder(tmp_path, IMAGE_ID)
    (a,), (b,) = map(made.encode, "ab")
    assert made.encode("a<image><pad>  b") == [a, IMAGE_ID, IMAGE_ID + 1, b]
    assert made.decode([IMAGE_ID, IMAGE_ID + 1]) == made.piece(IMAGE_ID + 1) == "<pad>"
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(LlavaError, match=rf"gives <image> the id {IMAGE_ID}, others 319; .* different checkpoints"):
        Tokenizer.from_folder(tmp_path, 319)


# ---------------------------------------------------------------- templates

TALK = [("What is this?", "A red cat."), ("And that?", None)]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_prompts_are_those_that_transformers_makes_of_the_template_and_bos_stands_once(family, kind):
    _, _, theirs, _, ours = family(kind)

    def message(role, text, *images):
        parts = [*images, {"type": "text", "text": text}]
        return {"role": role, "content": parts if TEMPLATES[kind] is LLAVA else "<image>\n" * len(images) + text}

    talk = [
        message("user", "What is this?", {"type": "image"}),
        message("assistant", "A red cat."),
        message("user", "And that?"),
    ]
    expected = theirs.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    prompt, image = ours.chat(TALK, 1), picture(28, 28)
    assert prompt == expected.removeprefix("<|begin|>" if kind == "CLIP, Llama 3" else "")
    ids = theirs(text=expected, images=[image], return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert torch.equal(ours(prompt, [image])["input_ids"], ids)


def test_without_a_template_the_form_is_llava_15s(family):
    processor = family("LLaVA-NeXT, Mistral")[4]
    assert processor.template is None
    assert processor.chat(TALK, 1) == "USER: <image>\nWhat is this? ASSISTANT: A red cat.</s>USER: And that? ASSISTANT:"


@pytest.mark.parametrize(
    "template, sentence",
    [
        ("{{ 7 ** (10 ** 9) }}", "did not end within"),  # one operation, which no clock in its process interrupts
        ("{{ 'x' * 10 ** 11 }}", "too much memory"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('x\n' * 10 ** 6) }}", "x x x"),
        ("Hello", "leaves out an image or a question"),
    ],
)
def test_a_template_that_fails_or_runs_away_is_refused_in_a_sentence(family, monkeypatch, template, sentence):
    if sentence.startswith("did not end"):
        monkeypatch.setattr("minillava.template.SECONDS", 0.3)
    processor = family("SigLIP, Qwen2")[4]
    monkeypatch.setattr(processor, "template", template)
    with pytest.raises(LlavaError, match=f"chat template cannot be used: .*{sentence}") as caught:
        processor.chat([("What?", None)], 1)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "template, reason",
    [("{% for i in range(10 ** 6) %}", "endfor"), ("{% for i in range(10 ** 6) %}{% endfor %}", "Range too big"),
     ("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}", "more than 1,000,000 characters"),
     ("{% for m in messages %}{{ raise_exception('unknown role ' + m.role) }}{% endfor %}", "unknown role user"),
     ("{{ undefined.name }}", "undefined"), ("{{ 1 | tojson(default=range) }}", "default"),
     ("{{ messages.append(1) }}", "unsafe"), ("{{ ''.__class__.__mro__ }}", "unsafe"),
     ("{{ dict.update(messages[0]) }}", "no attribute"), ("{{ dict.mro() }}", "no attribute"),
     ("{{ raise_exception.__globals__.x }}", "unsafe"), ("{{ namespace.__init__.__globals__ }}", "unsafe"),
     ("{{ namespace({'_a': 1}) }}", "underscore"), ("{{ namespace(_a=1) }}", "underscore"),
     ("{% set ns = namespace() %}{% set ns.__class__ = 3 %}", "underscore"),
     ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"), ("{% include '/etc/passwd' %}", "no loader"),
     ("{% for %}", "Expected an expression")],
)  # fmt: skip
def test_the_sandbox_lets_no_template_out(template, reason):
    with pytest.raises(Exception, match=reason):
        run(template, {"messages": [{"role": "user", "content": "What?"}]})


@pytest.mark.parametrize("installed", [[], [SimpleNamespace(version="3.1.5")]])
def test_without_a_jinja_whose_sandbox_holds_no_template_is_rendered(monkeypatch, installed):
    monkeypatch.setattr("minillava.template.metadata.distributions", lambda name: installed)
    with pytest.raises(ValueError, match=r"pip install 'jinja2>=3\.1\.6'"):
        render("", {})


@pytest.mark.parametrize(
    "files, template",
    [({"chat_template.jinja": "é", "chat_template.json": {"chat_template": "J"}}, "é"),
     ({"chat_template.json": {"chat_template": "J"}, "tokenizer_config.json": {"chat_template": "T"}}, "J"),
     ({"tokenizer_config.json": {"chat_template": "T"}}, "T"),
     ({"tokenizer_config.json": {"chat_template": [{"name": "tools", "template": "x"}, "?", {"name": ["default"]},
                                                   {"name": "default", "template": "T"}]}}, "T"), ({}, None)],
)  # fmt: skip
def test_a_template_and_special_tokens_are_found_where_checkpoints_keep_them(tmp_path, files, template):
    for name, content in files.items():
        text = content if name.endswith("jinja") else json.dumps(content)
        (tmp_path / name).write_text(text, encoding="utf-8")
    edit(tmp_path / "special_tokens_map.json", bos_token="<s>", eos_token="x")
    edit(tmp_path / "tokenizer_config.json", bos_token=None, eos_token={"content": "</s>"})
    assert read_template(tmp_path) == (template, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize("name", ["tool_use", ["default"], 7])
def test_of_several_templates_without_a_default_none_is_used_in_silence(tmp_path, name):
    edit(tmp_path / "tokenizer_config.json", chat_template=[{"name": name, "template": LLAVA}])
    with pytest.raises(ValueError, match="there are several, and none has the name default"):
        run(read_template(tmp_path)[0], {})


# ---------------------------------------------------------------- the rest of the project on it


@pytest.mark.parametrize("kind", FAMILY[1:])
def test_verify_compares_every_stage_of_every_kind(family, kind, tmp_path, capsys):
    """In bfloat16; float32 is compared above, with picture files."""
    picture(75, 40).save(tmp_path / "picture.png")
    arguments = ["--model", str(family(kind)[0]), "--image", str(tmp_path / "picture.png"), "--dtype", "bfloat16"]
    assert verify.main([*arguments, "--new-tokens", "4"]) == 0
    shown = capsys.readouterr().out
    assert "stages agree" in shown and "not compared" not in shown
    assert ("tiles" in shown) == ("newline" in shown) == ("packed features" in shown) == kind.startswith("LLaVA-NeXT")


def test_verify_names_the_stage_where_packing_goes_wrong(family, monkeypatch):
    folder, _, _, model, _ = family("LLaVA-NeXT, Llama")
    reference, pack = verify.Reference(folder, new_tokens=2), anyres.pack
    for name, wrong in {
        "newline": lambda features, tilings, newline: pack(features, tilings, 0 * newline),
        "packed features": lambda features, tilings, newline: pack(features.roll(-1, 0), tilings, newline),
    }.items():
        monkeypatch.setattr("minillava.model.pack", wrong)
        assert verify.first_difference(verify.verify(model, reference))[0].name == name


@pytest.mark.parametrize("kind", FAMILY)
def test_every_kind_is_converted_with_its_template_for_transformers_too(family, kind, tmp_path):
    from transformers import AutoProcessor

    check_converted(family(kind)[0], tmp_path / "out")
    AutoProcessor.from_pretrained(tmp_path / "out")(text=["<image>"], images=[picture(75, 40)], return_tensors="pt")


def test_converting_keeps_the_added_tokens_that_a_tokenizer_config_names(family, tmp_path):
    *_, model, processor = family("SigLIP, Qwen2")
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder={"7": {"content": "<|head|>"}})
    convert(model, processor, tmp_path, tmp_path / "out")
    added = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {number: token["content"] for number, token in added.items()} == {"7": "<|head|>", str(IMAGE_ID): "<image>"}


@pytest.mark.parametrize("strategy, cells", [("full", list(range(16))), ("default", [None, *range(15)])])
def test_the_page_shows_siglips_patches_with_and_without_the_first(family, strategy, cells):
    *_, processor = family("SigLIP, Qwen2")
    config = replace(processor.config, vision_feature_select_strategy=strategy)
    made = Processor(processor.tokenizer, processor.image_processor, config)
    assert explore.drawn(made("<image>", [picture(28, 28)]), made)[1:] == (4, cells)


def test_a_question_may_hold_what_a_failed_template_would_print(family):
    text = "What is {'type': 1}? Is <image> a word?"
    assert text in family("LLaVA-NeXT, Llama")[4].chat([(text, None)], 1)


def test_the_page_shows_tiles(family):
    *_, model, processor = family("LLaVA-NeXT, Llama")
    image, tiling = picture(75, 40), model.config.tiling((40, 75))
    inputs = processor(ONE, [image])
    data = explore.collect(model, processor, ONE[0], [image], (0.2,))
    patches, columns = data["patches"], data["columns"]
    cells = [position for position in patches if position is not None]
    assert len(cells) == tiling.tokens and cells == sorted(cells)  # overview first, then row by row
    assert columns == tiling.width + 1 and len(patches) == columns * (tiling.side + tiling.height)
    positions = (inputs["input_ids"][0] == IMAGE_ID).nonzero().flatten()
    assert patches[columns - 1 :: columns][tiling.side :] == positions[tiling.newlines].tolist()
    assert "null" in explore.page(data)
    kept = {"h2o": plan.kept_tokens(model, inputs, "h2o", 0.5)}
    with mock.patch("matplotlib.collections.PatchCollection", wraps=PatchCollection) as framed:
        assert plan.plot(processor, inputs, kept, ".png")[:4] == b"\x89PNG"
    shown = [len(layer.intersection(cells)) for layer in kept["h2o"]]
    assert [len(call.args[0]) for call in framed.call_args_list] == shown  # no cell that is empty
