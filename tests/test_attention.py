"""Attention by its definition, and the fused call that must give the same."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from minillava.config import TextConfig
from minillava.model import Attention, manual_attention, visible

seeds = st.integers(0, 2**31)
heads = st.sampled_from([(4, 4), (6, 2), (3, 1)])


def drawn(seed, batch, heads, queries, keys):
    """Random query [B, H, N, Dh], key and value [B, Hkv, S, Dh]."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads[0], queries, 8, generator=generator)
    return query, *torch.randn(2, batch, heads[1], keys, 8, generator=generator)


def fused(heads):
    config = TextConfig(hidden_size=8, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=8)
    return Attention(config, 0)


@given(seeds, st.integers(1, 3), heads, st.integers(1, 40))
def test_a_whole_prompts_fused_attention_is_the_definition(seed, batch, heads, length):
    query, key, value = drawn(seed, batch, heads, length, length)
    context, _ = manual_attention(query, key, value, None)
    # means of up to 40 numbers up to 4, in float32 in another order
    torch.testing.assert_close(fused(heads).attend(query, key, value, None), context, atol=2e-6, rtol=0)


@given(seeds, heads, st.integers(1, 40))
def test_a_single_token_sees_every_key(seed, heads, keys):
    query, key, value = drawn(seed, 2, heads, 1, keys)
    context, weights = manual_attention(query, key, value, None)
    assert (weights > 0).all()
    torch.testing.assert_close(fused(heads).attend(query, key, value, None), context, atol=2e-6, rtol=0)


@given(seeds, heads, st.integers(1, 20))
def test_a_key_with_the_logarithm_of_n_added_to_its_score_counts_as_n_keys(seed, heads, keys):
    query, key, value = drawn(seed, 2, heads, 1, keys)
    copies = torch.randint(1, 5, (keys,), generator=torch.Generator().manual_seed(seed))
    expected, _ = manual_attention(query, *(t.repeat_interleave(copies, dim=2) for t in (key, value)), None)
    bias = copies.log().expand(2, 1, 1, keys)
    context, weights = manual_attention(query, key, value, bias)
    torch.testing.assert_close(context, expected, atol=2e-6, rtol=0)  # means of up to 80 numbers up to 4, in float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, heads[0], 1))
    torch.testing.assert_close(fused(heads).attend(query, key, value, bias), context, atol=2e-6, rtol=0)


@given(seeds, heads, st.lists(st.integers(1, 20), min_size=2, max_size=3))
def test_padded_prompts_fused_attention_is_the_definition_and_nobody_else_sees_padding(seed, heads, lengths):
    longest = max(lengths)
    present = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    query, key, value = drawn(seed, len(lengths), heads, longest, longest)
    position = torch.where(present, present.cumsum(1) - 1, -1)
    mask = visible(position, position)
    context, weights = manual_attention(query, key, value, mask)
    torch.testing.assert_close(fused(heads).attend(query, key, value, mask), context, atol=2e-6, rtol=0)
    for row, length in zip(weights, lengths):
        assert (row[:, longest - length :, : longest - length] == 0).all()


def test_each_group_of_query_heads_reads_its_own_key_head():
    query, key, value = drawn(0, 1, (6, 2), 4, 4)
    context, weights = manual_attention(query, key, value, None)
    for head in range(6):
        single = manual_attention(query[:, head : head + 1], key[:, [head // 3]], value[:, [head // 3]], None)
        assert torch.equal(single[0][:, 0], context[:, head]) and torch.equal(single[1][:, 0], weights[:, head])
