"""The cache that is written in place holds what a cache that cuts and concatenates would hold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillava.model import KVCache
from prefixkv import Plan, PrefixKV

HEADS, SIZE = 2, 3


class CutAndConcatenate:
    """One layer of one sample as lists of (position, key, value): the obvious cache, with eviction by the book."""

    def __init__(self, keys, values, positions, prompt, ratio):
        self.rows = list(zip(positions, keys, values))
        self.kept, self.prompt, self.ratio = len(self.rows), prompt, ratio
        self.pinned = self.kept - 25 if self.kept - 25 >= 1 else self.kept // 2

    def append(self, position, key, value):
        self.rows = [*self.rows, (position, key, value)]
        if self.ratio:
            allowed = math.ceil((position + 1) * (1 - (self.prompt - self.kept) / self.prompt))
            if len(self.rows) > allowed:
                self.rows = self.rows[: self.pinned] + self.rows[self.pinned + 1 :]


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 3), st.integers(1, 45), st.integers(0, 40),
    st.sampled_from(["ratio", "keep", None]),
)  # fmt: skip
def test_the_cache_in_place_equals_one_that_cuts_and_concatenates(seed, batch, layers, longest, steps, decode):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (batch,), generator=generator).tolist()
    length = max(lengths)
    mask = torch.tensor([[0] * (length - n) + [1] * n for n in lengths])
    compressor = None if decode is None else PrefixKV(0.5, decode=decode)
    cache = KVCache(mask, layers, steps, compressor)
    models = []
    for layer in range(layers):
        key = torch.randn(batch, HEADS, length, SIZE, generator=generator)
        value = torch.randn(batch, HEADS, length, SIZE, generator=generator)
        keep = mask.bool()
        if compressor is not None:  # any set that holds at least one token
            keep = keep & (
                (torch.rand(batch, length, generator=generator) < 0.6) | (torch.arange(length) == length - 1)
            )
        cache.store(layer, key, value, keep)
        models.append([])
        for b in range(batch):
            at = keep[b].nonzero()[:, 0].tolist()
            positions = [j - (length - lengths[b]) for j in at]
            models[layer].append(
                CutAndConcatenate([key[b, :, j] for j in at], [value[b, :, j] for j in at], positions, lengths[b],
                                  decode == "ratio")
            )  # fmt: skip
    addresses = [tensor.data_ptr() for tensor in (*cache.key, *cache.value)]
    for step in range(steps):
        cache.advance()
        for layer in range(layers):
            key = torch.randn(batch, HEADS, 1, SIZE, generator=generator)
            value = torch.randn(batch, HEADS, 1, SIZE, generator=generator)
            keys, values, seen = cache.write(layer, key, value)
            for b, model in enumerate(models[layer]):
                model.append(lengths[b] + step, key[b, :, 0], value[b, :, 0])
                slots = range(keys.shape[2]) if seen is None else seen[b, 0, 0].nonzero()[:, 0].tolist()
                held = sorted((int(cache.position[layer, b, s]), s) for s in slots)
                assert [position for position, _ in held] == [position for position, _, _ in model.rows]
                for (_, s), (_, expected_key, expected_value) in zip(held, model.rows):
                    assert torch.equal(keys[b, :, s], expected_key)
                    assert torch.equal(values[b, :, s], expected_value)
    assert addresses == [tensor.data_ptr() for tensor in (*cache.key, *cache.value)], "something was reallocated"
    held = sum(len(model.rows) for row in models for model in row)
    assert cache.bytes == held * 2 * HEADS * SIZE * 4


@pytest.mark.parametrize("budget", [0.1, 0.2, 0.5, 0.9])
def test_the_held_bytes_follow_the_budget(small, budget):
    _, _, model, processor = small
    inputs = processor("USER: a word or two, and then some more of them ASSISTANT:")
    result = model.generate(**inputs, max_new_tokens=40, eos_token_id=(), compressor=PrefixKV(budget))
    layers, length = result.kept.shape[1], inputs["input_ids"].shape[1]
    assert int(result.kept.sum()) == round(budget * layers * length)
    token = 2 * model.config.text.kv_heads * model.config.text.head_size * 4
    expected = sum(-(-(length + 39) * kept // length) for kept in result.kept[0].tolist()) * token
    assert abs(result.cache_bytes - expected) <= layers * token  # the last bit of a ratio decides about one token


@pytest.mark.parametrize("images", [0, 1])
def test_a_full_budget_is_bit_for_bit_no_compressor(small, images):
    _, _, model, processor = small
    from PIL import Image

    pictures = [Image.effect_noise((40, 40), 90).convert("RGB")] * images
    inputs = processor(["<image>\n" * images + "describe it in detail", "yes no"], pictures)
    plain, cache = model.prefill(**inputs, max_new_tokens=20)
    full, compressed = model.prefill(**inputs, max_new_tokens=20, compressor=PrefixKV(1.0))
    assert torch.equal(plain, full)
    for _ in range(20):
        token = plain.argmax(-1)
        plain, full = model.decode_step(token, cache), model.decode_step(token, compressed)
        assert torch.equal(plain, full)
    for one, other in zip((*cache.key, *cache.value), (*compressed.key, *compressed.value)):
        assert torch.equal(one, other)
    assert cache.bytes == compressed.bytes


@pytest.mark.parametrize(
    "compressor", [None, PrefixKV(0.4), PrefixKV(0.3, decode="keep"), PrefixKV(plan=Plan(0.5, [0.5] * 4))]
)
def test_a_sample_gets_the_same_kept_tokens_and_text_alone_and_in_a_batch(small, compressor):
    _, _, model, processor = small
    texts = [
        "a cat.",
        "USER: What is in the image? ASSISTANT:",
        "two red",
        "describe it in detail yes no",
        "three blue cat",
    ]
    together = model.generate(**processor(texts), max_new_tokens=30, eos_token_id=(), compressor=compressor)
    for index, text in enumerate(texts):
        alone = model.generate(**processor(text), max_new_tokens=30, eos_token_id=(), compressor=compressor)
        assert torch.equal(alone.kept[0], together.kept[index])
        assert torch.equal(alone.token_ids[0], together.token_ids[index])
