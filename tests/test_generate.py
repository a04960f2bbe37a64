"""Reading and generation: when it ends, how it draws, what it refuses; and training through `forward`."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

import weights
from minillava.checks import LlavaError
from minillava.model import sample
from prefixkv import PrefixKV

IDS, IMAGE, PIXELS = torch.tensor([[3, 4], [5, 6]]), torch.full((2, 16), 310), torch.zeros(1, 3, 28, 28)


def test_streaming_yields_what_generate_returns(small):
    _, _, model, processor = small
    batch = processor(["a cat", "describe it in detail"])
    options = {"max_new_tokens": 12, "eos_token_id": (), "compressor": PrefixKV(0.5)}
    streamed = torch.stack(list(model.stream(**batch, **options)), dim=1)
    assert torch.equal(streamed, model.generate(**batch, **options).token_ids)
    assert torch.is_grad_enabled()  # a stream that is not read to its end must not leave gradients off
    next(model.stream(**batch, **options))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("ends", [list, lambda ids: np.int64(ids[0]), lambda ids: torch.tensor(ids[0])])
def test_samples_end_at_their_own_eos_as_in_transformers(small, ends):
    _, theirs, model, processor = small
    batch = processor(["a cat", "describe it in detail", "two red"])
    free = model.generate(**batch, max_new_tokens=20, eos_token_id=()).token_ids
    eos = ends(free[0, 7:12].tolist())  # ids that the first sample does reach
    found = model.generate(**batch, max_new_tokens=20, eos_token_id=eos).token_ids
    ids = torch.as_tensor(eos).flatten().tolist()
    with torch.no_grad():
        expected = theirs.generate(**batch, max_new_tokens=20, do_sample=False, eos_token_id=ids, pad_token_id=0)
    assert torch.equal(found, expected[:, batch["input_ids"].shape[1] :])


@pytest.mark.parametrize(
    "top, text, generation", [(None, None, None), (7, None, None), (None, 8, {}), (7, 8, {"pad_token_id": 9})]
)
def test_an_ended_sample_is_filled_up_with_the_id_that_transformers_takes(small, tmp_path, top, text, generation):
    """`generation`: what generation_config.json says beside the ends; None: the file is not there."""
    folder, theirs, _, _ = small
    ids = torch.randint(3, 300, (2, 4), generator=torch.Generator().manual_seed(0))
    ends, other = theirs.generate(input_ids=ids, max_new_tokens=1, do_sample=False, eos_token_id=-1)[:, -1:].tolist()
    assert ends != other  # the first text ends at once and is filled up while the second goes on
    config = json.loads((folder / "config.json").read_text())
    config["pad_token_id"], config["text_config"]["pad_token_id"] = top, text
    config["text_config"]["eos_token_id"] = config["eos_token_id"] = ends
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, **generation}))
    expected = type(theirs).from_pretrained(tmp_path).eval().generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(weights.load_model(tmp_path).generate(ids, max_new_tokens=4).token_ids, expected[:, 4:])


least = st.sampled_from([1e-8, 1e-40, 1e-300, 5e-324])


@given(
    st.integers(0, 2**31), st.integers(1, 30), st.floats(0.1, 3) | least, st.integers(0, 40), st.floats(0.01, 1) | least
)
def test_tokens_are_drawn_by_the_softmax_of_the_top_k_in_the_nucleus(seed, vocabulary, temperature, top_k, top_p):
    """A tiny temperature or nucleus takes the likeliest."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, vocabulary, generator=generator) * 3
    drawn = sample(logits.repeat_interleave(10000, dim=0), temperature, top_k, top_p, generator)
    for row, tokens in zip(logits.double(), drawn.view(2, 10000)):
        order = row.argsort(descending=True)[: top_k or vocabulary]
        probability = (row[order] / max(temperature, 1e-9)).softmax(-1)
        probability = probability * (probability.cumsum(-1) - probability < top_p)
        expected = torch.zeros_like(row).scatter(0, order, probability / probability.sum())
        share = torch.bincount(tokens, minlength=vocabulary).double() / 10000
        assert not share[expected == 0].any()
        # five standard deviations of a share from 10,000 draws
        torch.testing.assert_close(share, expected, atol=5 * 0.5 / 10000**0.5, rtol=0)


NOT_A_MASK = "expected 1 for a token and 0 for padding"
WRONG = [
    ({"attention_mask": torch.tensor([[1, 2, 1]])}, NOT_A_MASK),
    ({"attention_mask": torch.tensor([[0.0, -1e9, 0.0]])}, NOT_A_MASK),
    ({"attention_mask": torch.tensor([[1, 1]])}, r"int64 \[1, 2\]; expected \[1, 3\]"),
    ({"attention_mask": torch.tensor([1, 1, 1])}, r"int64 \[3\]; expected \[1, 3\]"),
    ({"input_ids": torch.tensor([3, 4, 5])}, r"int64 \[3\]; expected int64 \[B, N\]"),
    ({"input_ids": torch.ones(1, 3, dtype=torch.bool)}, "torch.bool"),
    ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one token in each row"),
    ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, "at least one token in each row"),
    ({"input_ids": torch.tensor([[3.0, 4.0]])}, "float32"),
    *(({"input_ids": torch.tensor([[3, wrong]])}, "expected 0 to 319") for wrong in (-1, 320)),
    ({"input_ids": torch.full((1, 257), 5)}, "257 .*256 positions"),
    ({"pixel_values": PIXELS}, "hold 0 image tokens, but 1 images make 16"),
    ({"input_ids": IMAGE[:1]}, "hold 16 image tokens, but 0 images make 0"),
    ({"input_ids": IMAGE[:1, 1:], "pixel_values": PIXELS}, "hold 15 image tokens, but 1 images make 16"),
    ({"input_ids": IMAGE[:1], "pixel_values": PIXELS.view(1, 3, 14, 56)}, r"expected \[I, 3, 28, 28\]"),
    ({"input_ids": IMAGE[:1], "pixel_values": PIXELS[..., :27]}, r"expected \[I, 3, 28, 28\]"),
]
SETTINGS = [  # of `generate` only
    *(({"attention_mask": torch.tensor([mask])}, "pad prompts on the left")
      for mask in ([1, 1, 0], [True, False, True], [0.0, 0.0, 0.0])),
    ({"temperature": -1}, "out of range"), ({"temperature": float("nan")}, "out of range"),
    ({"top_k": -1}, "out of range"), ({"top_k": 2.5}, "out of range"), ({"top_p": 0}, "out of range"),
    ({"top_p": 1.5}, "out of range"), ({"compressor": PrefixKV}, "the class PrefixKV; give an object"),
    ({"max_new_tokens": -1}, r"\(max_new_tokens\) is -1; expected a whole number, 0 or more"),
    ({"input_ids": torch.full((1, 250), 5), "max_new_tokens": 7}, "250 tokens and room for 7 more exceed"),
    ({"max_new_tokens": 1.5}, r"\(max_new_tokens\) is 1.5; expected a whole number, 0 or more"),
]  # fmt: skip


@pytest.mark.parametrize(
    "call, wrong, sentence",
    [*(("forward", *case) for case in WRONG), *(("generate", *case) for case in [*WRONG, *SETTINGS])],
)
def test_ids_masks_images_and_settings_that_cannot_be_used_are_refused(small, call, wrong, sentence):
    with pytest.raises(LlavaError, match=sentence):
        getattr(small[2], call)(**{"input_ids": torch.tensor([[3, 4, 5]]), **wrong})


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float32, torch.uint8])
def test_a_mask_of_any_dtype_means_the_same(small, dtype):
    batch = small[3](["a cat", "describe it in detail"])
    mask = batch["attention_mask"]
    with torch.no_grad():
        assert torch.equal(*(small[2](batch["input_ids"], attention_mask=either) for either in (mask, mask.to(dtype))))


def state(cache):
    """All that a cache and its compressor hold, as numbers."""
    both = {**vars(cache), **vars(cache.compressor), "compressor": None}
    return [leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf for leaf in tree_leaves(both)]


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda read, cache, _: read(IDS.repeat(1, 2), cache), r"4 tokens .* for 3; call cache.reserve\(1\) first"),
        (lambda read, cache, _: read(IDS + 315, cache), "expected 0 to 319"),
        (lambda read, cache, _: read(IDS[:, :0], cache), "at least one token in each row"),
        (lambda read, cache, _: read(IDS, cache, attention_mask=IDS != 3), "padding in a further turn"),
        (lambda read, cache, _: read(IDS[:1], cache), "have 1 rows and the cache holds 2 texts"),
        (lambda read, cache, _: read(IMAGE, cache, PIXELS.repeat(2, 1, 1, 1)), "takes images only with its prompt"),
        (lambda read, cache, _: read(IMAGE[:, :3], cache), "6 image tokens, but 0 images make 0"),
        (lambda _, cache, __: cache.reserve(-1), "is -1; expected a whole number"),
        (lambda _, cache, __: cache.reserve(250), "room for 250 more exceed the model's 256 positions"),
        (lambda _, cache, other: other(IDS, cache), "made for a model of other sizes"),
    ],
)
def test_what_a_cache_cannot_take_is_refused_and_leaves_it_as_it_was(small, tiny, call, sentence):
    _, _, model, processor = small
    cache = model.new_cache(5, PrefixKV(0.5))
    model.read(**processor(["a cat", "describe it in detail"]), cache=cache)
    model.read(IDS, cache)
    before = state(cache.fork())
    with pytest.raises(LlavaError, match=sentence):
        call(model.read, cache, tiny[0].read)
    assert state(cache) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_refused_after_the_prompt_too(small, value):
    model, cache = copy.deepcopy(small[2]), small[2].new_cache(5)
    model.read(**small[3](["a cat"]), cache=cache)
    model.lm_head.weight.data[7] = value
    with pytest.raises(LlavaError, match="NaN or infinity"):
        model.read(torch.tensor([[5]]), cache)


def test_autocast_reaches_through_images_cache_and_compression(small):
    model = small[2]
    ids = torch.cat([torch.full((1, 16), 310), torch.tensor([[3, 4, 5]])], dim=1)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids, pixels)
        for compressor in (None, PrefixKV(0.5)):
            made = model.generate(ids, pixels, max_new_tokens=3, eos_token_id=(), compressor=compressor)
            assert made.token_ids.shape == (1, 3)
            # Keys are float32 there, values bfloat16: 2 and 4 bytes a number.
            tokens = made.cache_bytes / (model.config.text.kv_heads * model.config.text.head_size * 6)
            assert made.cache_bytes <= made.allocated_bytes and tokens == int(tokens)
    # bfloat16 has 8 bits; logits reach 5, after 7 layers
    torch.testing.assert_close(logits.float(), model(ids, pixels), atol=0.5, rtol=0)


def test_held_and_allocated_bytes_are_both_told_and_slots_are_those_of_the_longest_sample(small):
    _, _, model, processor = small
    batch = processor(["a cat", "describe it in detail yes no"])
    lengths, text = batch["attention_mask"].sum(-1), model.config.text
    token = 2 * text.num_hidden_layers * text.kv_heads * text.head_size * 4
    full = model.generate(**batch, max_new_tokens=20, eos_token_id=())
    assert full.cache_bytes == token * int((lengths + 19).sum())  # the last token is never read
    assert full.allocated_bytes == token * 2 * (int(lengths.max()) + 20)


@pytest.mark.parametrize("count", [0, 6])
def test_a_text_may_fill_all_positions(small, count):
    made = small[2].generate(torch.full((1, 250), 5), max_new_tokens=count, eos_token_id=())
    assert made.token_ids.shape == (1, count)


def test_gradients_reach_every_parameter_through_forward(small):
    model = copy.deepcopy(small[2]).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.full((2, 16), 310), torch.randint(3, 300, (2, 10), generator=generator)], dim=1)
    logits = model(ids, torch.randn(2, 3, 28, 28, generator=generator))
    F.cross_entropy(logits[:, 15:-1].flatten(0, 1), ids[:, 16:].flatten()).backward()
    silent = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    # Features are taken after layer -2, so the last vision layer and the norm behind it take no part.
    assert all(name.startswith(("vision_tower.layers.2", "vision_tower.post_layernorm")) for name in silent)
