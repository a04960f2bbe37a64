"""A cache in few bits: codes are what they say, bytes are counted, and it goes with any method, turn and batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.quality import scenes
from minillava.checks import LlavaError
from minillava.compressors import METHODS
from minillava.config import TextConfig
from minillava.quantised import BITS, GROUP, Packed, QuantisedKVCache, dequantise, pack_bits, quantise, unpack_bits
from prefixkv import PrefixKV

seeds = st.integers(0, 2**32)
bits_ = st.sampled_from(BITS)


def noise(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10 ** torch.randn(shape[:-1], generator=generator)[..., None]


@given(seeds, bits_, st.integers(1, 6))
def test_codes_survive_packing_in_as_few_bytes_as_they_need(seed, bits, eights):
    codes = torch.randint(2**bits, (3, 8 * eights), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, bits * eights) and packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed, bits), codes)


@given(seeds, bits_)
def test_a_number_is_off_by_half_a_step_at_most_and_once_on_the_grid_it_stays(seed, bits):
    x = noise(seed, 5, GROUP)
    used = torch.rand(5, GROUP, generator=torch.Generator().manual_seed(seed)) < 0.7
    found = dequantise(*(first := quantise(x, bits, used)))
    _, scale, zero = (tensor.float() for tensor in first)
    # float16 rounds the zero by 2^-11 of itself, and the scale, which counts up to 2^bits - 1 times; 2^-24 is its least
    rounding = 2**-11 * (zero.abs() + (2**bits - 1) * scale) + 2**-24 * 2**bits
    assert ((found - x).abs() <= scale / 2 + rounding)[used].all()
    # The ends of the range are on the grid. What is on it moves by no more than the rounding of a second pass.
    again = dequantise(*quantise(found, bits, used))
    assert ((again - found).abs() <= 2 * rounding)[used].all()


def test_groups_are_channels_of_keys_and_tokens_of_values():
    """A large number spoils its own group only."""
    for per_token in (False, True):
        x = noise(0, 1, 1, 64, 64) / 100
        clean, spoilt = x.clone(), x.clone()
        spoilt[0, 0, 5, 40] = 1000.0
        found = []
        for content in (clean, spoilt):
            part = Packed(torch.zeros(1, 1, 64, 64), 4, per_token)
            part[0, :, :64] = content[0]
            found.append(part[:, :, :64][0, 0])
        changed = (found[0] != found[1]).nonzero()
        same = changed[:, 0] == 5 if per_token else changed[:, 1] == 40
        group = changed[:, 1] // 32 == 1 if per_token else changed[:, 0] // 32 == 0
        assert len(changed) and same.all() and group.all()


@pytest.mark.parametrize("bits", BITS)
def test_numbers_beyond_float16_become_its_largest(bits):
    x = torch.tensor([[1e30, -1e30, 0.0, 7e4]])
    assert dequantise(*quantise(x, bits, torch.ones_like(x, dtype=torch.bool))).abs().max() < 1.01 * 65504


@pytest.mark.parametrize("method", [None, *METHODS])
def test_eight_bits_write_what_the_full_numbers_write(tiny, method, sweep):
    model, processor = tiny
    chosen = scenes(3 if method else 50 if sweep else 6, seed=3)
    inputs = processor([sample.prompt(processor) for sample in chosen], [sample.image() for sample in chosen])
    made = []
    for kind in (model.new_cache, lambda *args: QuantisedKVCache(model.config.text, *args, bits=8)):
        cache = kind(24, method and METHODS[method](0.5))
        logits = model.read(**inputs, cache=cache)
        made.append((torch.stack(list(model.decode(logits, cache)), dim=1), cache.kept))
    assert torch.equal(made[0][1], made[1][1])
    assert (made[0][0] == made[1][0]).float().mean() > (0.999 if method is None else 0.97)  # a near tie may turn


@given(seeds, st.lists(st.integers(2, 70), min_size=1, max_size=3), bits_, st.sampled_from([None, 0.3]),
       st.lists(st.integers(1, 40), max_size=4))  # fmt: skip
def test_bytes_are_those_of_the_formula_and_what_is_held_is_what_was_written(seed, lengths, bits, budget, turns):
    config = TextConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    cache = QuantisedKVCache(config, sum(turns), budget and PrefixKV(budget), bits)
    generator, longest = torch.Generator().manual_seed(seed), max(lengths)
    present = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    written = {}  # of (layer, text, position): the value

    def bring(count, positions):
        for layer in range(2):
            key, value = torch.randn(2, len(lengths), 1, count, 16, generator=generator)
            for text, row in enumerate(positions.tolist()):
                written.update({(layer, text, at): value[text, 0, j] for j, at in enumerate(row)})
            cache.update(layer, torch.randn(len(lengths), 2, count, 16, generator=generator), key, value)

    cache.begin(present, torch.zeros_like(present))
    bring(longest, cache.block)
    for count in turns:
        bring(count, cache.advance(count))
    for layer, part in enumerate(cache.value):
        values = part[:, :, :]
        for text in range(len(lengths)):
            for slot in range(int(cache.held[layer, text])):
                own = written[layer, text, int(cache.position[layer, text, slot])]
                step = (own.max() - own.min()) / (2**bits - 1)
                assert (values[text, 0, slot] - own).abs().max() <= step * 0.51 + 0.01
    held = cache.held.tolist()
    codes = sum(map(sum, held)) * 2 * 16 * bits // 8
    scales = 4 * sum(n + -(-n // 32) * 16 for row in held for n in row)  # a group of 16 a token, and 16 channels
    assert cache.held_bytes == codes + scales + cache.newest_bytes
    assert cache.newest_bytes < 32 * 2 * 2 * 16 * 4 * len(lengths)
    assert cache.allocated_bytes >= cache.held_bytes


@pytest.mark.parametrize("bits", BITS)
def test_a_fork_more_room_and_further_turns_go_on_as_with_a_cache_of_full_numbers(small, bits):
    _, _, model, processor = small
    cache = QuantisedKVCache(model.config.text, 3, PrefixKV(0.5), bits)
    model.read(**processor(["a cat", "describe it in detail yes no two"]), cache=cache)
    turn = torch.randint(3, 300, (2, 3), generator=torch.Generator().manual_seed(0))
    twin = cache.fork()
    expected = model.read(turn, cache)
    assert torch.equal(model.read(turn, twin), expected)
    twin.reserve(40)
    for token in torch.randint(3, 300, (40, 2, 1), generator=torch.Generator().manual_seed(1)):
        assert model.read(token, twin).isfinite().all()
    assert cache.position.shape[2] < twin.position.shape[2]


@pytest.mark.parametrize("bits", [0, 1, 5, 16, 4.0, "4", None])
def test_other_numbers_of_bits_are_refused(small, bits):
    with pytest.raises(LlavaError, match=r"expected 2, 3, 4, 8"):
        QuantisedKVCache(small[2].config.text, 8, bits=bits)


@pytest.mark.parametrize("size", [4, 12, 40])
def test_heads_that_do_not_fall_into_groups_are_refused(size):
    with pytest.raises(LlavaError, match=f"Heads of {size} numbers"):
        QuantisedKVCache(TextConfig(head_dim=size), 8)
