"""The cache that is written in place holds what a cache that cuts and concatenates would hold."""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minillava.config import TextConfig
from minillava.fast import FastKVCache
from minillava.model import Attention, KVCache
from prefixkv import Plan, PrefixKV
from weights import load_model

HEADS, SIZE = 2, 3
KINDS = [KVCache, FastKVCache, partial(FastKVCache, compiled=True)]


def contents(key, value):
    """What slots hold, as lists: key and value [B, heads, S, size] -> B lists of S lists of numbers."""
    return torch.cat([key, value], dim=-1).transpose(1, 2).flatten(2).tolist()


class CutAndConcatenate:
    """One layer of one sample as a list of (position, content): the obvious cache, with eviction by the book."""

    def __init__(self, rows, prompt, ratio):
        self.rows, self.length, self.prompt, self.ratio = rows, prompt, prompt, ratio
        self.kept = len(rows)
        self.pinned = self.kept - 25 if self.kept - 25 >= 1 else self.kept // 2

    def allowed(self, length):
        """How many of a text's first `length` tokens may be held."""
        dropped = self.prompt - self.kept
        return math.ceil(length * (1 - dropped / self.prompt)) if self.ratio else length - dropped

    def append(self, content):
        self.rows = [*self.rows, (self.length, content)]
        self.length += 1
        if len(self.rows) > self.allowed(self.length):
            self.rows = self.rows[: self.pinned] + self.rows[self.pinned + 1 :]


class Shifted(PrefixKV):
    """Adds as much to a score as its key's position says."""

    def attend(self, layer, query, key, seen, position):
        return (position + 2) * (layer + 1) / 8  # never 0, also in a free slot


class CacheMachine(RuleBasedStateMachine):
    """Prompts, tokens, turns, more room and forks in any order that a model can; both caches always hold the same."""

    @initialize(
        lengths=st.lists(st.integers(1, 45), min_size=1, max_size=4),
        layers=st.integers(1, 3),
        room=st.integers(0, 40),
        decode=st.sampled_from(["ratio", "keep", None]),
        method=st.sampled_from([PrefixKV, Shifted]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        kind=st.sampled_from(KINDS),
    )
    def begin(self, lengths, layers, room, decode, method, dtype, kind):
        self.lengths, self.layers, self.decode, self.dtype = lengths, layers, decode, dtype
        self.present = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
        compressor = None if decode is None else method(0.5, decode=decode)
        self.cache, self.given = kind(TextConfig(num_hidden_layers=layers), room, compressor), room
        self.models: list[list[CutAndConcatenate]] = []  # of each layer, one per sample
        self.left_alone: list[tuple[KVCache, list[list[CutAndConcatenate]]]] = []  # forks and originals, not used again
        self.addresses: list[int] = []

    def random(self, seed, length):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(2, len(self.lengths), HEADS, length, SIZE, generator=generator).to(self.dtype)

    def where(self):
        return [tensor.data_ptr() for tensor in (*self.cache.key, *self.cache.value)]

    @precondition(lambda self: len(self.models) < self.layers)
    @rule(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
    def retain(self, seed, share):
        """The next layer's prompt, of which any set is kept that holds the last token."""
        key, value = self.random(seed, max(self.lengths))
        if not self.models:
            self.cache.begin(self.present, self.present)
        keep = self.present.clone()
        if self.decode is not None:
            keep[:, :-1] &= torch.rand(keep[:, :-1].shape, generator=torch.Generator().manual_seed(seed)) < share
        self.cache.store(key, value, keep)
        row = []
        for length, kept, content in zip(self.lengths, keep.tolist(), contents(key, value)):
            numbered = enumerate(content, start=length - len(content))
            row.append(CutAndConcatenate([*itertools.compress(numbered, kept)], length, self.decode == "ratio"))
        self.models.append(row)
        self.addresses = self.where()

    @precondition(lambda self: len(self.models) == self.layers and self.cache.room)
    @rule(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 9), turn=st.booleans())
    def read(self, seed, count, turn):
        """New tokens for every sample, as one turn or one by one, as far as there is room."""
        count = min(count, self.cache.room)
        for size in [count] if turn else [1] * count:
            with torch.inference_mode():
                self.block(seed, size)

    def block(self, seed, count):
        """A token takes its slot and is then read. A turn sees all that was held, and itself, and then takes slots."""
        self.cache.room -= count
        asking = self.cache.advance(count).tolist()
        for layer, row in enumerate(self.models):
            key, value = self.random(seed + layer, count)
            *read, mask = self.cache.update(layer, key, key, value)
            bias = self.cache.compressor.attend(layer, key, key, None, torch.arange(400))  # of all positions
            scores = [True] * 400 if bias is None else bias.to(self.dtype).tolist()
            assert mask is None or mask.dtype == (torch.bool if bias is None else self.dtype)
            for b, (model, new, found) in enumerate(zip(row, contents(key, value), contents(*read))):
                assert asking[b] == [*range(model.length, model.length + count)]
                seen = model.rows
                for content in new:
                    model.append(content)
                for index, at in enumerate(asking[b]):
                    seen = model.rows if count == 1 else [*seen, (at, new[index])]
                    masked = [True] * len(found) if mask is None else mask[b, 0, index].tolist()
                    visible = [pair for pair in zip(found, masked) if pair[1] not in (False, -math.inf)]
                    assert sorted(visible) == sorted((content, scores[position]) for position, content in seen)
        most = self.cache.compressor.capacity(self.cache.kept, self.cache.prompt_lengths, self.cache.lengths)
        assert (self.cache.held <= most).all()

    @precondition(lambda self: len(self.models) in (0, self.layers))
    @rule(count=st.integers(0, 20))
    def reserve(self, count):
        """More room, before the prompt or later."""
        self.cache.reserve(count)
        self.given += count
        self.addresses = self.where()

    @precondition(lambda self: len(self.models) == self.layers and len(self.left_alone) < 3)
    @rule(swap=st.booleans())
    def fork(self, swap):
        """Goes on with the fork or with the original; the other one must stay as it is."""
        same = [[copy.copy(model) for model in row] for row in self.models]
        one, other = (self.cache, self.models), (self.cache.fork(), same)
        (self.cache, self.models), left = (other, one) if swap else (one, other)
        self.left_alone.append(left)
        self.addresses = self.where()

    @invariant()
    def both_hold_the_same(self):
        for cache, models in [(self.cache, self.models), *self.left_alone] if hasattr(self, "cache") else []:
            for layer, row in enumerate(models):
                held = zip(cache.position[layer].tolist(), contents(cache.key[layer], cache.value[layer]))
                for model, (position, content) in zip(row, held):
                    assert sorted((at, slot) for at, slot in zip(position, content) if at >= 0) == model.rows

    @invariant()
    def only_reserve_allocates_and_bytes_are_counted(self):
        if not getattr(self, "models", None):
            return
        assert self.addresses == self.where()
        token = 2 * HEADS * SIZE * self.dtype.itemsize
        slots = sum(max(model.allowed(model.prompt + self.given) for model in row) for row in self.models)
        assert self.cache.allocated_bytes == len(self.lengths) * slots * token  # for all the room, however it came
        if len(self.models) == self.layers:
            assert self.cache.held_bytes == sum(len(model.rows) for row in self.models for model in row) * token


TestTheCacheInPlaceIsOneThatCutsAndConcatenates = CacheMachine.TestCase
TestTheCacheInPlaceIsOneThatCutsAndConcatenates.settings = settings(max_examples=40, stateful_step_count=12)


@pytest.fixture(scope="module", params=["plain", "fast"])
def model(request, small):
    """The small model, plain and fast."""
    return small[2] if request.param == "fast" else load_model(small[0])


@settings(max_examples=12)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 20), min_size=1, max_size=3),
    st.lists(st.sampled_from([1, 1, 2, 3, 5, 9, 16]), max_size=8),
)
def test_a_text_in_blocks_has_the_logits_of_one_prompt(model, seed, lengths, sizes):
    """The prompts have different lengths; each further block of 16 tokens is an image."""
    generator, rows, longest = torch.Generator().manual_seed(seed), len(lengths), max(lengths)
    ids = torch.randint(3, 300, (rows, longest + sum(sizes)), generator=generator)
    pixels = torch.randn(rows, sizes.count(16), 3, 28, 28, generator=generator)
    prompt, *blocks = ids.split([longest, *sizes], dim=1)
    for block in blocks:
        block[:] = 310 if block.shape[1] == 16 else block
    mask = (torch.arange(ids.shape[1]) >= longest - torch.tensor(lengths)[:, None]).long()
    expected = model(ids, pixels.flatten(0, 1) if 16 in sizes else None, mask)
    cache, pictures, end = model.new_cache(sum(sizes)), iter(pixels.unbind(1)), longest
    # Rounding of float32: the largest difference measured was 7e-6, of logits of about 5.
    close = partial(torch.testing.assert_close, atol=2e-5, rtol=0)
    close(model.read(prompt, cache, attention_mask=mask[:, :longest]), expected[:, end - 1])
    for block in blocks:
        end += block.shape[1]
        close(model.read(block, cache, next(pictures) if block.shape[1] == 16 else None), expected[:, end - 1])


@pytest.mark.parametrize("planned", [True, False])
def test_with_a_plan_the_whole_prompt_is_held_for_one_layer_at_a_time(small, monkeypatch, planned):
    """Allocation accounting: bytes of keys and values alive while the prompt is read, at their peak."""
    _, _, model, processor = small
    inputs = processor("USER: " + "a word or two and then some more of them " * 5 + "ASSISTANT:")
    full, layers = model.generate(**inputs, max_new_tokens=1).cache_bytes, model.config.text.num_hidden_layers
    compressor = PrefixKV(plan=Plan(0.2, [0.1, 0.3] * (layers // 2))) if planned else PrefixKV(0.2)
    sizes, peaks = {}, []

    def counted(method, made):
        """The method, after which what it has `made` counts until it is freed."""

        def call(*arguments):
            returned = method(*arguments)
            for tensor in made(arguments, returned):
                sizes[id(tensor)] = tensor.nbytes
                weakref.finalize(tensor, sizes.pop, id(tensor))
            peaks.append(sum(sizes.values()))
            return returned

        return call

    monkeypatch.setattr(Attention, "project", counted(Attention.project, lambda _, returned: returned[1:]))
    monkeypatch.setattr(KVCache, "store", counted(KVCache.store, lambda a, _: (a[0].key[-1], a[0].value[-1])))
    model.read(**inputs, cache=model.new_cache(1, compressor))
    if planned:
        assert max(peaks) <= (1 / layers + 0.2 + 0.05) * full
    else:
        assert full <= max(peaks) <= (1 + 1 / layers) * full  # every layer waits for the search


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_lie_as_the_step_reads_them(dtype):
    """In float32, products read rows of keys and columns of values; the kernel of half precision reads rows of both."""
    cache, present = FastKVCache(TextConfig(num_hidden_layers=1), 4), torch.ones(2, 9, dtype=torch.bool)
    cache.begin(present, present)
    key, value = torch.randn(2, 2, HEADS, 9, SIZE).to(dtype)
    cache.store(key, value, present)
    for _ in ("as allocated", "as reserved"):
        assert cache.key[0].is_contiguous()
        assert (cache.value[0].mT if dtype == torch.float32 else cache.value[0]).is_contiguous()
        cache.reserve(3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_bias_is_in_the_mask_for_the_keys_it_is_meant_for(kind, dtype):
    present = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    cache = kind(TextConfig(num_hidden_layers=2), 11, Shifted(0.5))

    def read(positions):
        """Every number of a key is its position + 1; a free slot holds 0."""
        key = (positions + 1)[:, None, :, None].expand(-1, HEADS, -1, SIZE).to(dtype)
        return [cache.update(layer, key.repeat(1, 2, 1, 1), key, key) for layer in range(2)]

    read(cache.begin(present, present))
    for count in (1, 4, 1, 1, 4):
        asking = cache.advance(count)
        for layer, (key, _, mask) in enumerate(read(asking)):
            assert mask.dtype == dtype and mask.shape == (2, 1, count, key.shape[2])
            at = key[:, :1, :, 0].double() - 1  # [2, 1, S]
            seen = (at >= 0) & (at <= asking[..., None])
            expected = ((at + 2) * (layer + 1) / 8).where(seen, -math.inf)
            assert torch.equal(mask[:, 0].double(), expected)  # few eighths: no dtype rounds them
