"""`bench.variants`: parts of methods combined, further methods, and the rules of the published code."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compressors import attention, choose, seeds

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


def read_on(model, ids, steps, compressor):
    """The positions of new tokens, the logits of each step, and the cache."""
    found, plain = [], model.language_model.cos_sin
    cache = ShortPositions(model.config.text, steps, compressor)
    model.read(ids, cache)
    model.language_model.cos_sin = lambda positions: found.append(positions[:, 0].tolist()) or plain(positions)
    try:
        return found, [model.read(ids[:, [step]], cache) for step in range(steps)], cache
    finally:
        del model.language_model.cos_sin


@settings(max_examples=15)
@given(seeds, st.integers(10, 60), st.floats(0.1, 1) | st.just(1.0))
def test_positions_as_published_follow_the_first_layer_and_are_true_ones_where_all_is_kept(small, seed, length, budget):
    model, ids = small[2], torch.randint(3, 300, (2, length), generator=torch.Generator().manual_seed(seed))
    found, logits, cache = read_on(model, ids, 6, PrefixKV(budget))
    for step, positions in enumerate(found):
        for position, kept in zip(positions, cache.kept[0].tolist()):
            # 1: the published rounding
            assert position - math.ceil((length + step) * kept / length - 1e-9) in (0, 1)
            assert position == kept or step > 0
    assert int(cache.position.max()) == length + 5  # the cache keeps true ones
    if budget == 1:
        cache = model.new_cache(6)
        model.read(ids, cache)
        assert all(torch.equal(one, model.read(ids[:, [step]], cache)) for step, one in enumerate(logits))


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


@pytest.fixture
def asked(tiny):
    """The embedded model and a question about a scene."""
    model, processor = tiny
    (sample,) = quality.scenes(1, 0)
    return model, processor([sample.prompt(processor)], [sample.image()])


@pytest.mark.parametrize("name", ["random+words", "prefixkv+words", "snapkv+words/queue"])
def test_words_come_first(asked, name):
    model, inputs = asked
    words = (inputs["input_ids"][0] != model.config.image_token_id).nonzero()[:, 0]
    cache = model.new_cache(1, make(name, 0.2))
    model.read(**inputs, cache=cache)
    assert all(set(words.tolist()) <= set(row.tolist()) for row in cache.position[:, 0])


def test_without_eviction_as_many_tokens_are_held_at_the_end(asked):
    model, inputs = asked
    length, held = inputs["input_ids"].shape[1], []
    for name in ("random", "random/keep"):
        cache = model.new_cache(50, make(name, 0.2, further=50, prompt=length))
        for block in (inputs, *[{"input_ids": torch.tensor([[5]])}] * 50):
            model.read(**block, cache=cache)
        held.append(int(cache.held.sum()))
    assert abs(held[0] - held[1]) <= 8  # a token a layer, for rounding


@pytest.mark.parametrize(
    "name", ["best", "cover@5", "full/queue", "full+words", "cover+words+words", "cover/most", "", "pooled/least"]
)
def test_a_method_that_is_none_is_refused(name, tmp_path, capsys):
    assert quality.main(["--methods", "full", name, "--out", str(tmp_path / "out")]) == 2
    assert repr(name) in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_budget_that_the_answer_alone_exceeds_leaves_nothing_to_keep():
    with pytest.raises(LlavaError, match="nothing is left to keep"):
        make("cover/keep", 0.05, further=100, prompt=600)


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


def test_kvzip_scores_are_the_largest_attention_from_a_second_reading(tiny):
    model, processor = tiny
    samples = quality.scenes(2, 0)
    inputs = processor(["USER: <image>\nWhat? ASSISTANT:", "USER: <image>\nDescribe it. ASSISTANT:"],
                       [sample.image() for sample in samples])  # fmt: skip
    scores = twice(model, inputs)
    length = inputs["input_ids"].shape[1]
    end = length - int((inputs["input_ids"][1] == model.config.image_token_id).flip(0).long().argmax())
    again = torch.cat([inputs["input_ids"][1], inputs["input_ids"][1, :end]])[None]  # the longer prompt has no padding
    prompt = quality.Collector()
    model.read(again, model.new_cache(0, prompt), inputs["pixel_values"][[1, 1]])
    for layer, (query, key, _) in enumerate(prompt.layers):
        seen = torch.ones(again.shape[1], again.shape[1], dtype=torch.bool).tril()[length:]
        weights = attention_weights(query[:, :, length:], key, hide(seen[None, None]))
        torch.testing.assert_close(scores[layer, 1], weights[0, :, :, :length].amax((0, 1)), atol=1e-4, rtol=1e-3)


def test_kvzip_keeps_the_best_of_all_layers_together():
    method = make("kvzip", 0.5)
    present = torch.ones(1, 5, dtype=torch.bool)
    method.begin(present, present, 2)
    scores = torch.tensor([[[0.0, 0.9, 0.8, 0.7, 0.0]], [[0.0, 0.1, 0.2, 0.3, 0.0]]])
    assert method.allocate(scores)[:, 0].tolist() == [3, 2]  # of ten tokens five, four of them protected
