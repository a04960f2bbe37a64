"""The cache that is written in place holds what a cache that cuts and concatenates would hold."""

from __future__ import annotations

import math
import weakref
from functools import partial

import pytest
import torch
from conftest import TINY
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minillava.fast import FastKVCache
from minillava.model import Attention, KVCache
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


class CacheMachine(RuleBasedStateMachine):
    """Retains, appends and evicts in any order that a model can; after each, both caches hold the same."""

    @initialize(
        lengths=st.lists(st.integers(1, 45), min_size=1, max_size=4),
        layers=st.integers(1, 3),
        new_tokens=st.integers(0, 40),
        decode=st.sampled_from(["ratio", "keep", None]),
        kind=st.sampled_from([KVCache, FastKVCache, partial(FastKVCache, compiled=True)]),
    )
    def begin(self, lengths, layers, new_tokens, decode, kind):
        self.lengths, self.layers, self.decode = lengths, layers, decode
        self.longest, self.left, self.step = max(lengths), new_tokens, 0
        self.mask = torch.tensor([[0] * (self.longest - n) + [1] * n for n in lengths])
        compressor = None if decode is None else PrefixKV(0.5, decode=decode)
        self.cache = kind(self.mask.bool(), layers, new_tokens, compressor)
        self.models: list[list[CutAndConcatenate]] = []
        self.addresses: list[int] = []

    def random(self, seed, length):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(2, len(self.lengths), HEADS, length, SIZE, generator=generator)

    @precondition(lambda self: len(self.models) < self.layers)
    @rule(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
    def retain(self, seed, share):
        """The next layer's prompt, of which any set is kept that holds the last token."""
        key, value = self.random(seed, self.longest)
        keep = self.mask.bool()
        if self.decode is not None:
            drawn = torch.rand(keep.shape, generator=torch.Generator().manual_seed(seed)) < share
            keep = keep & (drawn | (torch.arange(self.longest) == self.longest - 1))
        self.cache.store(key, value, keep)
        row = []
        for b, length in enumerate(self.lengths):
            at = keep[b].nonzero()[:, 0].tolist()
            positions = [j - (self.longest - length) for j in at]
            keys, values = ([tensor[b, :, j] for j in at] for tensor in (key, value))
            row.append(CutAndConcatenate(keys, values, positions, length, self.decode == "ratio"))
        self.models.append(row)
        self.addresses = [tensor.data_ptr() for tensor in (*self.cache.key, *self.cache.value)]

    @precondition(lambda self: len(self.models) == self.layers)
    @rule(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 8))
    def append(self, seed, count):
        """Up to `count` new tokens for every sample, as far as was allocated; a full layer gives one up for each."""
        for _ in range(min(count, self.left)):
            self.left -= 1
            self.cache.advance()
            for layer in range(self.layers):
                key, value = self.random(seed + layer, 1)
                keys, _, seen = self.cache.update(layer, key, key, value)
                for b, model in enumerate(self.models[layer]):
                    model.append(self.lengths[b] + self.step, key[b, :, 0], value[b, :, 0])
                    slots = range(keys.shape[2]) if seen is None else seen[b, 0, 0].nonzero()[:, 0].tolist()
                    assert sorted(slots) == (self.cache.position[layer, b] >= 0).nonzero()[:, 0].tolist()
            self.step += 1

    @invariant()
    def both_hold_the_same(self):
        for layer, row in enumerate(getattr(self, "models", [])):
            for b, model in enumerate(row):
                position = self.cache.position[layer, b]
                held = sorted((int(position[slot]), slot) for slot in (position >= 0).nonzero()[:, 0].tolist())
                assert [at for at, _ in held] == [at for at, _, _ in model.rows]
                for (_, slot), (_, key, value) in zip(held, model.rows):
                    assert torch.equal(self.cache.key[layer][b, :, slot], key)
                    assert torch.equal(self.cache.value[layer][b, :, slot], value)

    @invariant()
    def nothing_is_reallocated_and_bytes_are_counted(self):
        if not getattr(self, "models", None):
            return
        assert self.addresses == [tensor.data_ptr() for tensor in (*self.cache.key, *self.cache.value)]
        if len(self.models) == self.layers:
            held = sum(len(model.rows) for row in self.models for model in row)
            assert self.cache.held_bytes == held * 2 * HEADS * SIZE * 4


TestTheCacheInPlaceIsOneThatCutsAndConcatenates = CacheMachine.TestCase
TestTheCacheInPlaceIsOneThatCutsAndConcatenates.settings = settings(max_examples=60, stateful_step_count=12)


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
    assert cache.held_bytes == compressed.held_bytes


@pytest.mark.parametrize(
    "compressor", [None, PrefixKV(0.4), PrefixKV(0.3, decode="keep"), PrefixKV(plan=Plan(0.5, [0.5] * 4))]
)
def test_a_sample_gets_the_same_kept_tokens_and_text_alone_and_in_a_batch(small, compressor, new_tokens):
    _, _, model, processor = small
    texts = [
        "a cat.",
        "USER: What is in the image? ASSISTANT:",
        "two red",
        "describe it in detail yes no",
        "three blue cat",
    ]
    together = model.generate(**processor(texts), max_new_tokens=new_tokens, eos_token_id=(), compressor=compressor)
    for index, text in enumerate(texts):
        alone = model.generate(**processor(text), max_new_tokens=new_tokens, eos_token_id=(), compressor=compressor)
        assert torch.equal(alone.kept[0], together.kept[index])
        assert torch.equal(alone.token_ids[0], together.token_ids[index])


def test_five_different_prompts_alone_and_in_a_batch_on_the_embedded_checkpoint(tiny):
    """The same kept tokens, and the same 64 greedy tokens; three of the prompts show an image."""
    from PIL import Image

    model, processor = tiny
    pictures = [Image.open(path) for path in sorted((TINY / "examples").glob("*.png"))]
    ask = [
        ("Describe the image in detail.", pictures[0]),
        ("How many objects are there?", pictures[1]),
        ("Is there a red circle?", None),
        ("What do you see in this image? Describe everything.", pictures[2]),
        ("Count.", None),
    ]
    prompts = [processor.chat([(question, None)], int(picture is not None)) for question, picture in ask]
    options = {"max_new_tokens": 64, "eos_token_id": (), "compressor": PrefixKV(0.3)}
    batch = processor(prompts, [picture for _, picture in ask if picture is not None])
    together = model.generate(**batch, **options)
    assert together.token_ids.shape == (5, 64)
    _, cache = model.prefill(**batch, compressor=options["compressor"])
    for index, (prompt, (_, picture)) in enumerate(zip(prompts, ask)):
        inputs = processor(prompt, [] if picture is None else [picture])
        alone = model.generate(**inputs, **options)
        assert torch.equal(alone.kept[0], together.kept[index])
        assert torch.equal(alone.token_ids[0], together.token_ids[index])
        _, own = model.prefill(**inputs, compressor=options["compressor"])
        for layer, count in enumerate(alone.kept[0].tolist()):
            assert torch.equal(cache.position[layer, index, :count], own.position[layer, 0, :count])


@pytest.mark.parametrize("planned", [True, False])
def test_with_a_plan_the_whole_prompt_is_held_for_one_layer_at_a_time(small, monkeypatch, planned):
    """Allocation accounting: bytes of keys and values alive in prefill, at their peak."""
    _, _, model, processor = small
    alive = peak = 0

    def count(*tensors):
        nonlocal alive, peak
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            alive += size
            weakref.finalize(tensor, release, size)
        peak = max(peak, alive)

    def release(size):
        nonlocal alive
        alive -= size

    project, store = Attention.project, KVCache.store

    def counted_project(self, hidden, rope):
        query, key, value = project(self, hidden, rope)
        count(key, value)
        return query, key, value

    def counted_store(self, key, value, keep):
        store(self, key, value, keep)
        count(self.key[-1], self.value[-1])

    monkeypatch.setattr(Attention, "project", counted_project)
    monkeypatch.setattr(KVCache, "store", counted_store)
    inputs = processor("USER: " + "a word or two and then some more of them " * 5 + "ASSISTANT:")
    layers, length = len(model.language_model.layers), inputs["input_ids"].shape[1]
    full = layers * length * 2 * model.config.text.kv_heads * model.config.text.head_size * 4
    compressor = PrefixKV(plan=Plan(0.2, [0.1, 0.3] * (layers // 2))) if planned else PrefixKV(0.2)
    model.prefill(**inputs, max_new_tokens=1, compressor=compressor)
    if planned:
        assert peak <= (1 / layers + 0.2 + 0.05) * full
    else:
        assert full <= peak <= (1 + 1 / layers) * full  # every layer waits for the search


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_lie_as_the_step_reads_them(dtype):
    """In float32, products read rows of keys and columns of values; the kernel of half precision reads rows of both."""
    cache = FastKVCache(torch.ones(2, 9, dtype=torch.bool), 1, 4, None)
    key, value = torch.randn(2, 2, HEADS, 9, SIZE).to(dtype)
    cache.store(key, value, cache.present)
    assert cache.key[0].is_contiguous()
    assert (cache.value[0].mT if dtype == torch.float32 else cache.value[0]).is_contiguous()
    assert torch.equal(cache.value[0][:, :, :9], value) and torch.equal(cache.key[0][:, :, :9], key)


class Shifted(PrefixKV):
    """Adds as much to a score as its key's position says."""

    def bias(self, layer, position):
        return (position * (layer + 1) / 10).sin()


@pytest.mark.parametrize("kind", [KVCache, FastKVCache, partial(FastKVCache, compiled=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_bias_is_in_the_mask_for_the_keys_it_is_meant_for(kind, dtype):
    present = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    cache = kind(present, 2, 5, Shifted(0.5))
    query, key = torch.randn(2, 4, 6, SIZE).to(dtype), torch.randn(2, HEADS, 6, SIZE).to(dtype)
    for layer in range(2):
        cache.update(layer, query, key, key)
    for _ in range(5):
        cache.advance()
        for layer in range(2):
            read, _, mask = cache.update(layer, query[:, :, :1], key[:, :, :1], key[:, :, :1])
            assert mask.dtype == dtype and mask.shape == (2, 1, 1, read.shape[2])
            for row in range(2):
                for slot, at in enumerate(cache.position[layer, row, : read.shape[2]].tolist()):
                    expected = math.sin(at * (layer + 1) / 10) if at >= 0 else -math.inf
                    assert float(mask[row, 0, 0, slot]) == pytest.approx(expected, abs=torch.finfo(dtype).eps)
