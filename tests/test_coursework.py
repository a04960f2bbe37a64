"""What the coursework grades beside the project's other tests: definitions, written in the plainest way."""

from __future__ import annotations

import random
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_compressors import Largest

from coursework.published import compress
from coursework.second import answers
from minillava.compressors import divide
from minillava.config import TextConfig, VisionConfig
from minillava.model import KVCache, VisionTower, apply_rope, manual_attention
from minillava.scenes import draw, make_scene
from prefixkv import PrefixKV, attention_weights, hide, importance

seeds = st.integers(0, 2**32 - 1)


def turned(x, position, frequency):
    """RoPE at positions [B, N] by frequencies [Dh / 2]."""
    angle = (position[..., None] * frequency).repeat(1, 1, 2)[:, None]  # [B, 1, N, Dh]
    return apply_rope(x.clone(), angle.cos(), angle.sin())


@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 6))
def test_number_i_and_number_i_plus_half_are_turned_as_a_complex_number(seed, batch, heads, length, half):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, heads, length, 2 * half, generator=generator)
    position, frequency = torch.randint(0, 50, (batch, length), generator=generator), torch.rand(half)
    expected = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * (position[..., None] * frequency)[:, None])
    found = turned(x, position, frequency)
    torch.testing.assert_close(found, torch.cat([expected.real, expected.imag], dim=-1), atol=1e-5, rtol=0)


@given(seeds, st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_a_query_and_a_key_feel_only_their_distance(seed, query_at, key_at, shift):
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(seed))
    frequency = torch.tensor([1.0, 0.3, 0.1, 0.03])
    one, other = (
        turned(query, torch.tensor([[query_at + more]]), frequency)
        @ turned(key, torch.tensor([[key_at + more]]), frequency).mT
        for more in (0, shift)
    )
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)  # sums of eight products of up to 16


def tower(family, seed):
    """A tower of three layers with random weights, none of which is 0."""
    torch.manual_seed(seed)
    made = VisionTower(VisionConfig(hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2,
                                    image_size=14, patch_size=4, model_type=family))  # fmt: skip
    for weight in made.parameters():
        torch.nn.init.normal_(weight)
    return made


def compare_features(made, pixels, layer, depth):
    """Patch after patch in reading order; a border that is no whole patch is cut."""
    blocks = [pixels[..., y : y + 4, x : x + 4].flatten(1) for y in (0, 4, 8) for x in (0, 4, 8)]
    conv = made.patch_embedding
    hidden = torch.stack(blocks, dim=1) @ conv.weight.flatten(1).mT + (0 if conv.bias is None else conv.bias)
    if made.class_embedding is not None:
        hidden = torch.cat([made.class_embedding.expand(len(pixels), 1, -1), hidden], dim=1)
    hidden = made.pre_layrnorm(hidden + made.position_embedding.weight)
    for above in made.layers[:depth]:
        hidden = above(hidden)
    # three layers of float32, added in another order; numbers are of size 10
    torch.testing.assert_close(made(pixels, layer), hidden, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("layer, depth", [(-2, 2), (-1, 3), (0, 0), (1, 1)])
def test_the_tower_puts_a_class_token_before_the_patches(layer, depth):
    compare_features(tower("clip_vision_model", 0), torch.randn(2, 3, 14, 14), layer, depth)


@pytest.mark.parametrize("layer, depth", [(-2, 2), (3, 3)])
def test_a_tower_of_siglip_has_patches_only(layer, depth):
    compare_features(tower("siglip_vision_model", 1), torch.randn(2, 3, 14, 14), layer, depth)


def test_layers_above_the_chosen_one_are_not_run():
    made = tower("clip_vision_model", 2)
    made.layers[2].forward = mock.Mock(side_effect=AssertionError("the last layer was run"))
    made(torch.randn(1, 3, 14, 14), -2)


@given(seeds, st.sampled_from([(1, 1), (4, 2), (6, 2)]), st.integers(1, 6), st.integers(0, 20), st.data())
def test_attention_weights_are_those_of_the_definition_under_every_mask(seed, heads, queries, before, data):
    generator, keys = torch.Generator().manual_seed(seed), before + queries
    query = torch.randn(2, heads[0], queries, 8, generator=generator)
    key = torch.randn(2, heads[1], keys, 8, generator=generator)
    width = data.draw(st.sampled_from([None, queries, keys]))
    seen = torch.rand(2, 1, queries, keys, generator=generator) < 0.6
    seen[..., : keys - (width or 0)] = seen[..., -1] = True  # the mask is of the last keys, and no query sees nothing
    expected = manual_attention(query, key, key, seen)[1]
    found = attention_weights(query.clone(), key.clone(), None if width is None else hide(seen[..., keys - width :]))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("padding", [0, 3])
def test_importance_never_holds_the_weights_of_all_queries(padding):
    query, key = torch.randn(1, 4, 600, 6), torch.randn(1, 2, 600, 6)
    with Largest() as largest:
        importance(query, key, torch.arange(600)[None] >= padding)
    assert largest.numbers < 2 * 4 * 64 * 600  # a block's weights; all would be 4 x 600 x 600


def compare_kept(scores, counts, start):
    """A layer keeps the first `start` tokens, then those with the highest scores."""
    kept = compress(scores.clone(), counts.clone(), start)
    for row, layer, count in zip(kept, scores.tolist(), counts.tolist()):
        others = sorted(range(start, len(layer)), key=lambda token, layer=layer: -layer[token])
        assert row.nonzero()[:, 0].tolist() == sorted([*range(start), *others[: count - start]])


@given(seeds, st.integers(1, 4), st.integers(2, 30), st.data())
def test_the_most_important_tokens_stay_in_every_layer(seed, layers, length, data):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.stack([torch.randperm(length, generator=generator).float() for _ in range(layers)])
    compare_kept(scores, torch.tensor([data.draw(st.integers(1, length)) for _ in range(layers)]), 0)


@given(seeds, st.integers(4, 30), st.integers(1, 3), st.data())
def test_no_layer_keeps_more_tokens_than_it_may(seed, length, start, data):
    scores = torch.stack([torch.randperm(length, generator=torch.Generator().manual_seed(seed)).float()])
    compare_kept(scores, torch.tensor([data.draw(st.integers(start, length))]), start)


@given(seeds, st.integers(4, 30), st.data())
def test_of_two_tokens_that_are_nearly_level_the_more_important_stays(seed, length, data):
    scores = torch.randperm(length, generator=torch.Generator().manual_seed(seed))[None] * 1e-4 + 1
    compare_kept(scores, torch.tensor([data.draw(st.integers(1, length))]), 0)


@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))
def test_each_text_of_each_layer_gives_up_its_own_oldest_queued_token(seed, layers, batch, num_sinks):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randint(1, 45, (layers, batch), generator=generator)
    new = torch.randint(0, 10, (layers, batch), generator=generator)
    position = torch.full((layers, batch, 60), -1)
    for row, own, more in zip(position.flatten(0, 1), kept.flatten().tolist(), new.flatten().tolist()):
        row[:own] = torch.randperm(60, generator=generator)[:own].sort().values
        later = torch.arange(60, 60 + more)
        row[own : own + more] = later[torch.randperm(more, generator=generator)]
        gone = torch.randperm(own, generator=generator)[: own // 3]  # slots of dropped tokens hold later ones
        row[gone] = 100 + torch.randperm(len(gone), generator=generator)
    found = PrefixKV(0.5, num_sinks=num_sinks).victim(position.clone(), kept.clone())
    assert found.shape == (layers, batch)
    for row, own, slot in zip(position.flatten(0, 1).tolist(), kept.flatten().tolist(), found.flatten().tolist()):
        pinned = max(own - 25 if own > 25 else own // 2, min(own - 1, num_sinks))
        assert slot == min((at, slot) for slot, at in enumerate(row) if slot >= pinned and at >= 0)[1]


@given(st.integers(1, 3), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 5))
def test_a_token_takes_the_next_free_slot_of_every_layer(layers, lengths, count):
    cache, longest = KVCache(TextConfig(num_hidden_layers=layers), count), max(lengths)
    present = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    cache.begin(present, present)
    key = torch.zeros(len(lengths), 1, longest, 1)
    for _ in range(layers):
        cache.store(key, key, present)
    for step in range(count):
        at = torch.tensor(lengths) + step
        slot = cache.take_slot(at)
        assert slot.tolist() == [at.tolist()] * layers  # slots count from 0, as positions do
        assert cache.held.tolist() == [(at + 1).tolist()] * layers
        for row, own in zip(cache.position.flatten(0, 1).tolist(), lengths * layers):
            assert row[: own + step + 1] == [*range(own + step + 1)]


def begun(compressor, *lengths, layers=1):
    """The compressor, told of prompts padded on the left."""
    present = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    compressor.begin(present, torch.zeros_like(present), layers)
    return compressor


@given(seeds, st.integers(1, 5), st.lists(st.integers(40, 90), min_size=1, max_size=3))
def test_a_budget_is_divided_in_proportion(seed, layers, lengths):
    method = begun(PrefixKV(0.5), *lengths, layers=layers)
    ratios = 1 + torch.rand(layers, len(lengths), generator=torch.Generator().manual_seed(seed)) / 2
    counts = divide(method, ratios.clone())
    for column, ratio, length in zip(counts.unbind(1), ratios.unbind(1), lengths):
        total = round(0.5 * layers * length)
        assert int(column.sum()) == total
        assert ((column - total * ratio / ratio.sum()).abs() < 1).all()  # far from both bounds: only rounded


@given(st.integers(2, 5), st.integers(10, 60))
def test_no_layer_gets_more_tokens_than_there_are_nor_fewer_than_are_protected(layers, length):
    method = begun(PrefixKV(0.6), length, layers=layers)
    counts = divide(method, torch.tensor([[1.0], *[[1e-6]] * (layers - 1)]))[:, 0]
    assert int(counts.sum()) == round(0.6 * layers * length)
    assert int(counts[0]) == length and int(counts.min()) >= 2 and int(counts[1:].max() - counts[1:].min()) <= 1


QUESTIONS = ("How many objects are there?", "What is at the top left?", "Is there a red square?")


@pytest.fixture(scope="module")
def picture():
    return draw(make_scene(random.Random("second")))[0]


def test_the_answers_are_those_of_whole_conversations_and_nothing_is_read_twice(tiny, picture):
    model, processor = tiny
    with mock.patch.object(type(model), "read", autospec=True, side_effect=type(model).read) as read:
        found, expected = answers(model, processor, picture, QUESTIONS), []
    for question in QUESTIONS:
        talk = [(QUESTIONS[0], expected[0]), (question, None)] if expected else [(question, None)]
        inputs = processor(processor.chat(talk, num_images=1), images=[picture])
        expected.append(processor.decode(model.generate(**inputs, max_new_tokens=40).token_ids[0]).strip())
    assert found == expected and len({*found}) > 1
    names = ("model", "input_ids", "cache", "pixel_values")
    blocks = [dict(zip(names, call.args)) | call.kwargs for call in read.call_args_list]
    assert sum(block.get("pixel_values") is not None for block in blocks) == 1  # the picture is read once
    turns = [block["input_ids"].shape[1] for block in blocks[1:] if block["input_ids"].shape[1] > 1]
    assert len(turns) == 2 and max(turns) < 40  # a question's own words and what the form of a chat puts around


def test_a_question_does_not_know_of_the_others(tiny, picture):
    model, processor = tiny
    together = answers(model, processor, picture, [*QUESTIONS, *QUESTIONS[1:]], PrefixKV(0.3))
    alone = [answers(model, processor, picture, [QUESTIONS[0], other], PrefixKV(0.3))[1] for other in QUESTIONS[1:]]
    assert together[1:] == [*alone, *alone]
