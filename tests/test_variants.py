"""`bench.variants`: parts of methods combined, further methods, and the rules of the published code."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from checkpoints import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compressors import attention, choose, image_of, seeds

from bench import quality
from bench.variants import PublishedElastic, PublishedH2O, ShortPositions, make, twice
from minillava.checks import LlavaError
from prefixkv import PrefixKV, attention_weights, hide, importance

# ---------------------------------------------------------------- selection


@pytest.mark.parametrize("method", [PublishedElastic, PublishedH2O])
@given(seeds, st.lists(st.integers(2, 60), min_size=1, max_size=3), st.floats(0.01, 1))
def test_the_selection_as_published_takes_entries_of_an_argsort_for_ranks(method, seed, lengths, budget):
    """H2O takes the mean over layers for a score, and does not keep the first token."""
    query, key, present = attention(seed, 2, lengths)
    counts, kept = choose(method(budget), query, key, present)
    scores = torch.stack([importance(q, k, present) for q, k in zip(query, key)])
    start, scores = (1, scores) if method is PublishedElastic else (0, scores.mean(0).expand_as(scores))
    for layer, (row, length) in itertools.product(range(2), enumerate(lengths)):
        between = scores[layer, row, -length:].tolist()[start:-1]
        order = sorted(range(len(between)), key=lambda place: between[place])
        forget = len(between) - (int(counts[layer, row]) - start - 1) - 1  # entries above this number are kept
        own = [True] * start + [entry > forget for entry in order] + [True]
        assert kept[layer, row].tolist() == [False] * (max(lengths) - length) + own


# ---------------------------------------------------------------- positions


@settings(max_examples=15)
@given(seeds, st.integers(10, 60), st.floats(0.1, 1) | st.just(1.0))
def test_positions_as_published_follow_the_first_layer_and_are_true_ones_where_all_is_kept(small, seed, length, budget):
    model, ids = small[2], torch.randint(3, 300, (2, length), generator=torch.Generator().manual_seed(seed))
    cache, plain = ShortPositions(model.config.text, 6, PrefixKV(budget)), model.new_cache(6)
    model.read(ids, cache)
    model.read(ids, plain)
    advance, found = cache.advance, []
    cache.advance = lambda count: found.append(advance(count)) or found[-1]
    for step in range(6):
        logits = model.read(ids[:, [step]], cache)
        assert budget < 1 or torch.equal(logits, model.read(ids[:, [step]], plain))
        for position, kept in zip(found[step][:, 0].tolist(), cache.kept[0].tolist()):
            # 1: the published rounding
            assert position - math.ceil((length + step) * kept / length - 1e-9) in (0, 1)
            assert position == kept or step > 0
    assert int(cache.position.max()) == length + 5  # the cache keeps true ones


# ---------------------------------------------------------------- methods that are combined


@given(st.integers(0, 2**31), st.lists(st.integers(30, 60), min_size=1, max_size=3), st.floats(0.3, 0.9),
       st.sampled_from(["random", "h2o", "vlcache", "cover", "prefixkv", "local"]), st.sampled_from(["", "+words"]),
       st.sampled_from(["", "/queue", "/least"]))  # fmt: skip
def test_a_combined_method_keeps_its_budget_and_the_words(small, seed, lengths, budget, base, words, rule):
    if base == "cover":
        words = ""  # it keeps them anyway, and the name is refused
    model = small[2]
    generator, longest = torch.Generator().manual_seed(seed), max(lengths)
    ids = torch.randint(3, 300, (len(lengths), longest), generator=generator)
    present = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    caches = []
    for name in (base + words + rule, base):
        cache = model.new_cache(9, make(name, budget, range(len(lengths))))
        model.read(ids, cache, attention_mask=present.long())
        caches.append(cache)
        for token in torch.randint(3, 300, (9, len(lengths), 1), generator=torch.Generator().manual_seed(1)):
            model.read(token, cache)
    assert torch.equal(caches[0].held, caches[1].held)
    if rule == "/least" and base == "cover":  # whose rule it is
        assert torch.equal(caches[0].position, caches[1].position)
    if rule == "/queue":
        method, slots = caches[0].compressor, (caches[0].position, caches[0].kept)
        assert torch.equal(method.victim(*slots), PrefixKV.victim(method, *slots))


@given(seeds, st.integers(20, 60), st.floats(0.1, 0.9), st.sampled_from(["random", "prefixkv", "snapkv"]))
def test_words_come_first(seed, length, budget, base):
    query, key, present = attention(seed, 3, [length, length // 2])
    counts, kept = choose(make(f"{base}+words/queue", budget, (0, 1)), query, key, present)
    words = present & ~image_of(present)
    has_room = counts >= words.sum(-1) + 2  # the first and the last token are words, too
    assert torch.equal((kept & words)[has_room], words.expand_as(kept)[has_room])


def test_without_eviction_as_many_tokens_are_held_at_the_end(small):
    ids, held = torch.arange(3, 63)[None], []
    for name in ("random", "random/keep"):
        cache = small[2].new_cache(30, make(name, 0.6, further=30, prompt=60))
        small[2].read(ids, cache)
        for token in ids.split(1, dim=1)[:30]:
            small[2].read(token, cache)
        held.append(int(cache.held.sum()))
    assert abs(held[0] - held[1]) <= 4  # a token a layer, for rounding
    with pytest.raises(LlavaError, match="nothing is left to keep"):
        make("cover/keep", 0.05, further=100, prompt=600)


@pytest.mark.parametrize(
    "name", ["cover@5", "full/queue", "full+words", "cover+words+words", "cover/most", "", "pooled/least"]
)
def test_a_method_that_is_none_is_refused(name):
    with pytest.raises(LlavaError, match=re.escape(repr(name))):
        make(name, 0.2)


@settings(max_examples=20)
@given(seeds, st.integers(20, 60), st.floats(0.1, 0.9), st.sampled_from(["random", "snapkv", "cover"]))
def test_sizes_are_equal_or_those_that_the_search_finds(seed, length, budget, base):
    query, key, present = attention(seed, 3, [length])
    found = {}
    for sizes in ("", "~equal", "~prefix"):
        method = make(base + sizes, budget)
        counts, kept = choose(method, query, key, present)
        assert torch.equal(kept.sum(-1), counts)
        found[sizes] = counts[:, 0].tolist()
    assert found["~equal"] == found[""] and max(found[""]) - min(found[""]) <= 1
    plain = PrefixKV(budget)
    plain.begin(present, present, 3)
    scores = torch.stack([method.score(layer, q, k, k) for layer, (q, k) in enumerate(zip(query, key))])
    assert found["~prefix"] == plain.allocate(scores)[:, 0].tolist()


# ---------------------------------------------------------------- further methods


def test_pooled_patches_are_means_of_squares_that_count_four_times():
    method = make("pooled", 0.5)
    image = torch.zeros(1, 20, dtype=torch.bool)
    image[0, 2:18] = True  # 4 x 4 patches
    method.begin(torch.ones(1, 20, dtype=torch.bool), image, 1)
    key = torch.arange(20.0).view(1, 1, 20, 1)
    ((keys, values, keep),) = method.compress([(0, key, -key, torch.zeros(1, 20))])
    first = [2, 4, 10, 12]  # of each square; its others are 1, 4 and 5 further
    assert keep[0].nonzero()[:, 0].tolist() == [0, 1, *first, 18, 19]
    assert keys[0, 0, first, 0].tolist() == [place + 2.5 for place in first] and torch.equal(values, -keys)
    assert method.log_weights[0, 0, first].exp().tolist() == pytest.approx([4] * 4)
    assert not method.log_weights[0, 0, [0, 1, 18, 19, 20]].any()


def test_kvzip_scores_are_the_largest_attention_from_a_second_reading(small):
    _, _, model, processor = small
    inputs = processor(
        ["USER: <image>\nWhat? ASSISTANT:", "USER: <image>\nDescribe it. ASSISTANT:"],
        [picture(40, 40, seed) for seed in (0, 1)],
    )
    scores, row = twice(model, inputs), inputs["input_ids"][1]  # the longer prompt has no padding
    end = int((row == model.config.image_token_id).nonzero()[-1]) + 1
    again, prompt = torch.cat([row, row[:end]])[None], quality.Collector()
    model.read(again, model.new_cache(0, prompt), inputs["pixel_values"][[1, 1]])
    seen = torch.ones(len(row) + end, len(row) + end, dtype=torch.bool).tril()[len(row) :]
    for layer, (query, key, _) in enumerate(prompt.layers):
        weights = attention_weights(query[:, :, len(row) :], key, hide(seen[None, None]))
        expected = weights[0, :, :, : len(row)].amax((0, 1))
        torch.testing.assert_close(scores[layer, 1], expected, atol=1e-4, rtol=1e-3)


def test_kvzip_keeps_the_best_of_all_layers_together():
    method = make("kvzip", 0.5)
    present = torch.ones(1, 5, dtype=torch.bool)
    method.begin(present, present, 2)
    scores = torch.tensor([[[0.0, 0.9, 0.8, 0.7, 0.0]], [[0.0, 0.1, 0.2, 0.3, 0.0]]])
    assert method.allocate(scores)[:, 0].tolist() == [3, 2]  # of ten tokens five, four of them protected
