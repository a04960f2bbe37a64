"""`minillava.fast`: everything in it can be left out without changing a token."""

from __future__ import annotations

import itertools
import shutil
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from checkpoints import reference, write
from hypothesis import given
from hypothesis import strategies as st
from test_attention import drawn, fused
from torch import nn

from minillava import fast
from minillava.checks import LlavaError
from minillava.compressors import H2O, METHODS
from minillava.config import LlavaConfig
from minillava.fast import FastLinear, compile_steps, optimize
from minillava.model import DecoderLayer, Llava
from prefixkv import PrefixKV
from weights import load, load_model

PROMPTS = [["two red"], ["a cat", "describe it in detail"]]


def undo(model, *names):
    """The model with some of the fast classes replaced by the plain ones that they derive from."""
    for module in model.modules():
        if type(module).__name__ in names:
            module.__class__ = type(module).__bases__[0]
    return model


def same_tokens(models, processor, prompts, max_new_tokens, compressor=None):
    """What both models generate; their tokens are equal."""
    options = {"max_new_tokens": max_new_tokens, "eos_token_id": (), "compressor": compressor}
    expected, found = (model.generate(**processor(prompts), **options) for model in models)
    assert torch.equal(found.token_ids, expected.token_ids)
    return expected, found


def shallow(folder, layers, dtype="default"):
    """A random checkpoint of few layers, since each one is traced again for every graph: (folder, model, processor)."""
    write(reference(1, kv_heads=2, text={"num_hidden_layers": layers}), folder)
    return folder, *load(folder, fast=True, dtype=dtype)


@pytest.mark.parametrize(
    "dtype, kv_heads", [(torch.float32, 4), (torch.float32, 2), (torch.bfloat16, 2), (torch.float16, 4), ("int8", 2)]
)
def test_tokens_are_those_of_the_plain_classes_in_every_dtype(tmp_path, dtype, kv_heads, new_tokens):
    folder = write(reference(kv_heads=kv_heads, text={"num_hidden_layers": 2}), tmp_path)
    plain, processor = load(folder, dtype=dtype)
    quick = load_model(folder, dtype=dtype, fast=True)
    if dtype in fast.HALF:  # what is rounded less may choose another token where two are equally likely
        quick = undo(quick, "FastVisionLayer", "FastAttention", "FastLinear")
    if dtype == "int8":
        plain, quick = plain.float(), quick.float()  # all but what is in 8 bits
    for prompts, compressor in zip(PROMPTS * 2, (None, PrefixKV(0.5), PrefixKV(0.3, decode="keep"), H2O(0.5))):
        expected, found = same_tokens((plain, quick), processor, prompts, new_tokens // 2, compressor)
        assert torch.equal(found.kept, expected.kept)
        assert (found.cache_bytes, found.allocated_bytes) == (expected.cache_bytes, expected.allocated_bytes)


@pytest.mark.parametrize("method", ["h2o", "cover"])
def test_attention_hands_a_method_the_weights_that_the_plain_model_computes_for_it(small, monkeypatch, method):
    folder, _, _, processor = small
    inputs = processor(PROMPTS[1])
    further = torch.randint(3, 300, (9, 2, 1), generator=torch.Generator().manual_seed(0))
    noted = []
    for each in (load_model(folder), load_model(folder, fast=True)):
        cache = each.new_cache(9, METHODS[method](0.4))
        each.read(**inputs, cache=cache)
        if noted:
            monkeypatch.setattr("minillava.compressors.attention_weights", None)  # is not called
        for ids in further:
            each.read(ids, cache)
        noted.append((cache.position.sort(-1).values, cache.compressor.received))
    assert torch.equal(noted[0][0], noted[1][0])
    # sums of a dozen weights of up to 1, from keys that differ by rounding
    torch.testing.assert_close(noted[0][1], noted[1][1], atol=1e-5, rtol=0)


def test_every_method_keeps_the_same_of_a_cache_that_is_wider_than_the_weights(small, monkeypatch):
    model = load_model(small[0], dtype=torch.bfloat16, fast=True)
    ids = torch.randint(3, 300, (2, 49), generator=torch.Generator().manual_seed(0))
    for method in METHODS.values():
        caches = []
        for free in (2**30, None):
            monkeypatch.setattr(fast, "free_memory", lambda free=free: free)
            caches.append(model.new_cache(9, method(0.4)))
            for block in ids.split([40, 5, 1, 1, 1, 1], dim=1):
                model.read(block, caches[-1])
        wide, narrow = caches
        assert torch.equal(wide.kept, narrow.kept) and torch.equal(wide.held, narrow.held)
        notes = getattr(wide.compressor, "notes_bytes", 0)
        assert wide.held_bytes - notes == 2 * (narrow.held_bytes - notes)


@pytest.mark.parametrize(
    "dtype, kv_heads, free", [(torch.bfloat16, 2, 2**30), (torch.float16, 4, None), ("int8", 2, 2**30)]
)
def test_in_few_bits_logits_are_as_near_to_those_of_float32_as_the_plain_ones_are(
    tmp_path, monkeypatch, dtype, kv_heads, free
):
    """The plain ones are in 16 bits, to the last bit, those of transformers (`bench.parity`)."""
    monkeypatch.setattr(fast, "free_memory", lambda: free)
    own = torch.bfloat16 if dtype == "int8" else dtype
    folder = write(reference(kv_heads=kv_heads).to(own), tmp_path)
    models = {name: load_model(folder, dtype=dtype, fast=name == "quick") for name in ("exact", "plain", "quick")}
    models["exact"] = models["exact"].float()  # of the same weights
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (4, 80), generator=generator)
    ids[:, 5:21] = 310
    pixels = torch.randn(4, 3, 28, 28, generator=generator).to(own)

    @torch.no_grad()
    def logits(model):
        """Of the whole prompt; and of a prompt, a turn, and single tokens."""
        prompt, *blocks = ids.split([72, 3, 1, 1, 1, 1, 1], dim=1)
        cache = model.new_cache(8)
        read = [model.read(prompt, cache, pixels), *(model.read(block, cache) for block in blocks)]
        wide = isinstance(model, fast.FastLlava) and free is not None
        assert cache.key[0].dtype == (torch.float32 if wide else model.language_model.norm.weight.dtype)
        return [model(ids, pixels), torch.stack(read)]

    for exact, plain, quick in zip(*(logits(models[name]) for name in ("exact", "plain", "quick"))):
        # Both round the same numbers as often, but not the same way: distances differ by chance, here by up to 4 %.
        assert 0 < (quick.double() - exact).norm() <= 1.1 * (plain.double() - exact).norm()


@pytest.mark.parametrize(
    "width, out, dtype",
    [(300, 512, torch.float32), (300, 511, torch.float32), (8, 16, torch.float32), (300, 4096, torch.float32),
     *((40, out, dtype) for out in (1, 70) for dtype in (torch.bfloat16, torch.float16))],
)  # fmt: skip
def test_a_product_shared_out_or_in_parts_is_the_product_rounded_once(width, out, dtype):
    torch.manual_seed(0)
    sizes = [(1, 1), (2, 1), (4, 1), (5, 1), (33, 1), (1, 3), (4, 2), (3, 9)]
    for (batch, tokens), bias, compiled in itertools.product(sizes, (False, True), (False, True)):
        layer, x = FastLinear(width, out, bias=bias).to(dtype), torch.randn(batch, tokens, width).to(dtype)
        with (
            mock.patch("torch.compiler.is_compiling", lambda compiled=compiled: compiled),
            mock.patch.object(fast, "PART", 640),  # of the weight's numbers
            torch.no_grad(),
        ):
            found = layer(x)
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        assert found.dtype == dtype and found.is_contiguous()  # what follows reads it row by row
        # half a unit in the last place, and what float32 loses in sums of 300 products of about 0.06
        assert ((found.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 2e-6).all()


@pytest.mark.parametrize("name", ["FastLinear", "FastAttention", "FastTopLayer", "FastLlava"])
def test_each_class_can_be_left_out_by_itself(small, name):
    folder, _, model, processor = small
    without = undo(load_model(folder, fast=True), name)
    assert name not in {type(module).__name__ for module in without.modules()}
    for compressor in (None, PrefixKV(0.5)):
        same_tokens((model, without), processor, PROMPTS[1], 8, compressor)


def test_loading_gives_the_plain_classes_unless_speed_is_asked_for(small):
    plain, quick = load_model(small[0]), small[2]
    assert "minillava.fast" not in {type(module).__module__ for module in plain.modules()}
    kinds = [type(module) for module in quick.modules()]
    assert {kind.__name__ for kind in kinds if kind.__module__ == "minillava.fast"} == {
        "FastLinear",
        "FastAttention",
        "FastVisionLayer",
        "FastTopLayer",
        "FastLlava",
    }
    assert list(plain.state_dict()) == list(quick.state_dict())
    assert all(type(layer) is DecoderLayer for layer in quick.language_model.layers[:-1])
    assert optimize(quick) is quick  # once more changes nothing
    assert [type(module) for module in quick.modules()] == kinds


def compiled_model(folder, monkeypatch=None, dtype="default"):
    """A model with compiled steps, and torch's counters. With monkeypatch, steps are traced but not compiled."""
    if monkeypatch:
        trace = partial(torch.compile, backend="eager")

        def only_trace(step, dynamic, options):  # this backend knows no options but torch's own
            return trace(step, dynamic=dynamic, options={key: options[key] for key in options if "guard" in key})

        monkeypatch.setattr(fast.torch, "compile", only_trace)
    model = load_model(folder, fast=True, dtype=dtype)
    compile_steps(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return model, torch._dynamo.utils.counters


# PrefixKV's widest layer is the first with the one, the last with the other (see `FastKVCache.new_slots`). With neither
# do both have equally many slots: torch would make a graph for that (`torch.fx.experimental._config.use_duck_shape`).
WIDEST = (["what is that", "a cat and a dog on the mat"], ["a cat", "yes two three red blue a cat describe"])


@pytest.mark.parametrize("how", ["traced", "compiled"])
def test_one_graph_serves_all_prompts(tmp_path, monkeypatch, sweep, how):
    """Also after H2O, whose steps look at attention and are not compiled."""
    if how == "compiled" and not (sweep and shutil.which("g++")):
        pytest.skip("each graph takes half a minute to compile, and a C++ compiler; --sweep does it")
    folder, model, processor = shallow(tmp_path, 2)
    with torch._dynamo.config.patch(recompile_limit=1):  # torch allows 8; each takes seconds, so there are fewer here
        compiled, counters = compiled_model(folder, monkeypatch if how == "traced" else None)
        for widest, compressor in ((0, PrefixKV(0.5)), (1, PrefixKV(0.5)), (0, H2O(0.5))):
            _, found = same_tokens((model, compiled), processor, WIDEST[widest], 12, compressor)
            assert isinstance(compressor, H2O) or int(found.kept.amax(0).argmax()) == widest
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_steps_in_8_bits_compile(tmp_path, monkeypatch):
    """With the kernel; and a product of more tokens than it is for."""
    folder, model, processor = shallow(tmp_path, 1, "int8")
    traced, counters = compiled_model(folder, monkeypatch, "int8")
    same_tokens((model, traced), processor, ["two red"], 12)
    x = torch.randn(8, 1, model.lm_head.weight.shape[1]).bfloat16()
    assert torch.equal(torch.compile(traced.lm_head, dynamic=True, options={})(x), model.lm_head(x))
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_compiled_models_do_not_share_graphs_and_new_weights_are_noticed(tmp_path, monkeypatch):
    folder, model, processor = shallow(tmp_path, 1)

    def logits(model):
        cache = model.new_cache(1)
        first = model.read(**processor(["two red"]), cache=cache)
        return model.read(first.argmax(-1, keepdim=True), cache)

    def same(one, two):
        return torch.allclose(logits(one), logits(two), rtol=1e-5, atol=1e-4)  # sums in another order

    compiled, counters = compiled_model(folder, monkeypatch)
    assert same(compiled, model)
    other, turned = load_model(folder, fast=True), load_model(folder, fast=True)
    for either in (other, turned):
        for layer in either.language_model.layers:
            layer.mlp.activation = F.relu  # all shapes are as before, so the other's graph would fit
    compile_steps(turned)
    assert same(turned, other) and not same(turned, compiled)
    graphs = counters["stats"]["unique_graphs"]
    for either in (other, turned):
        either.lm_head.weight.data *= 2
    assert same(turned, other) and counters["stats"]["unique_graphs"] == graphs
    for either in (other, turned):
        either.lm_head.weight = nn.Parameter(either.lm_head.weight[:100])
    assert same(turned, other)
    assert counters["stats"]["unique_graphs"] == graphs + 1  # the old one would read past the weight's end


@given(
    st.integers(0, 2**31), st.integers(1, 3), st.sampled_from([(4, 4), (6, 2), (3, 1)]), st.integers(1, 60),
    st.sampled_from(["all keys", "some", "weighted"]), st.sampled_from([None, 0, 1, 64, 65, 200]), st.booleans(),
)  # fmt: skip
def test_one_tokens_attention_is_the_plain_one(seed, batch, heads, slots, mask_kind, free, compiled):
    """Values lie as keys do, or turned, with so many free slots behind each row."""
    generator, layer = torch.Generator().manual_seed(seed), fused(heads)
    query, key, value = drawn(seed, batch, heads, 1, slots)
    value = value if free is None else F.pad(value.mT.contiguous(), (0, free))[..., :slots].mT
    mask = None
    if mask_kind != "all keys":
        mask = torch.rand(batch, 1, 1, slots, generator=generator) < 0.6
        mask[..., 0] = True
        if mask_kind == "weighted":
            mask = torch.randn(mask.shape, generator=generator).masked_fill(~mask, -torch.inf)
    expected = layer.attend(query, key, value, mask)
    layer.__class__ = fast.FastAttention
    with mock.patch("torch.compiler.is_compiling", lambda: compiled):
        found = layer.attend(query, key, value, mask)
    # means of up to 60 numbers up to 4, in float32 in another order
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_training_goes_through_the_fast_classes_as_through_the_plain_ones(small):
    folder = small[0]
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    gradients = []
    for model in (load_model(folder), load_model(folder, fast=True)):
        model(ids).logsumexp(-1).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_class_of_your_own_is_not_compiled_but_refused():
    class Mine(Llava):
        """Left as it is by `optimize`."""

    with torch.device("meta"):
        model = Mine(LlavaConfig())
    with pytest.raises(LlavaError, match="The model is a Mine; compile_steps expects a Llava"):
        compile_steps(model)
