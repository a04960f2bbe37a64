"""Generation: when it ends, how it draws, what it refuses; and training through `forward`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minillava.model import LlavaError, sample
from prefixkv import PrefixKV


def inputs(processor, *texts):
    return processor(list(texts))


def test_streaming_yields_what_generate_returns(small):
    _, _, model, processor = small
    batch = inputs(processor, "a cat", "describe it in detail")
    options = {"max_new_tokens": 12, "eos_token_id": (), "compressor": PrefixKV(0.5)}
    streamed = torch.stack(list(model.stream(**batch, **options)), dim=1)
    assert torch.equal(streamed, model.generate(**batch, **options).token_ids)
    assert torch.is_grad_enabled()  # a stream that is not read to its end must not leave gradients off
    next(model.stream(**batch, **options))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("ends", [1, 2, 5])
def test_samples_end_at_their_own_eos_as_in_transformers(small, ends):
    _, theirs, model, processor = small
    batch = inputs(processor, "a cat", "describe it in detail", "two red")
    free = model.generate(**batch, max_new_tokens=40, eos_token_id=()).token_ids
    eos = free[0, 7 : 7 + ends].tolist()  # ids that the first sample does reach
    found = model.generate(**batch, max_new_tokens=40, eos_token_id=eos).token_ids
    with torch.no_grad():
        expected = theirs.generate(**batch, max_new_tokens=40, do_sample=False, eos_token_id=eos, pad_token_id=0)
    assert torch.equal(found, expected[:, batch["input_ids"].shape[1] :])


def test_one_eos_may_be_given_as_a_number(small):
    _, _, model, processor = small
    batch = inputs(processor, "a cat")
    free = model.generate(**batch, max_new_tokens=20, eos_token_id=()).token_ids[0].tolist()
    ended = model.generate(**batch, max_new_tokens=20, eos_token_id=free[4]).token_ids[0].tolist()
    assert ended == free[: free.index(free[4]) + 1]


def test_no_new_tokens_is_an_empty_answer(small):
    _, _, model, processor = small
    assert model.generate(**inputs(processor, "a cat"), max_new_tokens=0).token_ids.shape == (1, 0)


@given(st.integers(0, 2**31), st.integers(1, 30), st.floats(0.1, 3), st.integers(0, 40), st.floats(0.01, 1))
def test_drawn_tokens_are_among_the_top_k_and_in_the_nucleus(seed, vocabulary, temperature, top_k, top_p):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocabulary, generator=generator) * 3
    drawn = sample(logits, temperature, top_k, top_p, generator)
    for row, token in zip(logits / temperature, drawn.tolist()):
        order = row.argsort(descending=True).tolist()
        rank = order.index(token)
        allowed = order[: top_k or vocabulary]
        assert token in allowed
        probability = row[allowed].softmax(-1)
        assert float(probability[:rank].sum()) < top_p + 1e-5 or rank == 0


def test_drawing_follows_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20000, 3)
    drawn = sample(logits, 0.5, 0, 1.0, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=3) / 20000
    # three standard deviations of a share from 20,000 draws
    torch.testing.assert_close(share, (logits[0] / 0.5).softmax(-1), atol=3 * 0.25**0.5 / 20000**0.5, rtol=0)


def test_temperature_zero_takes_the_likeliest():
    assert sample(torch.tensor([[0.0, 3.0, 2.0]]), 0.0, 0, 1.0, None).tolist() == [1]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"temperature": float("nan")}]
)
def test_sampling_settings_out_of_range_are_refused(small, wrong):
    _, _, model, processor = small
    with pytest.raises(LlavaError, match="out of range"):
        model.generate(**inputs(processor, "a cat"), **wrong)


@pytest.mark.parametrize("mask", [[1, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]])
def test_padding_after_the_prompt_is_refused(small, mask):
    with pytest.raises(LlavaError, match="pad prompts on the left"):
        small[2].generate(torch.tensor([[3, 4, 5, 6]]), attention_mask=torch.tensor([mask]), max_new_tokens=2)


def test_a_prompt_longer_than_the_model_has_positions_is_refused(small):
    model = small[2]
    long = torch.full((1, 257), 5)
    for call in (model, model.generate):
        with pytest.raises(LlavaError, match=r"257 .*256 positions"):
            call(long)
    with pytest.raises(LlavaError, match="exceed"):
        model.generate(long[:, :250], max_new_tokens=7)
    assert model.generate(long[:, :250], max_new_tokens=6, eos_token_id=()).token_ids.shape == (1, 6)


def test_image_tokens_must_match_the_images(small):
    model = small[2]
    pixels = torch.zeros(1, 3, 28, 28)
    for ids, images in (
        (torch.full((1, 15), 310), pixels),
        (torch.full((1, 16), 310), None),
        (torch.ones(1, 4).long(), pixels),
    ):
        with pytest.raises(LlavaError, match="image tokens"):
            model(ids, images)


def test_training_through_forward_reaches_every_parameter_and_fits_a_batch(small):
    import copy

    model = copy.deepcopy(small[2]).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.full((2, 16), 310), torch.randint(3, 300, (2, 10), generator=generator)], dim=1)
    pixels = torch.randn(2, 3, 28, 28, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        logits = model(ids, pixels)
        loss = F.cross_entropy(logits[:, 15:-1].flatten(0, 1), ids[:, 16:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    silent = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    # Features are taken after layer -2, so the last vision layer and the norm behind it take no part.
    assert all(name.startswith(("vision_tower.layers.2", "vision_tower.post_layernorm")) for name in silent)
    assert losses[-1] < 0.1 * losses[0]
