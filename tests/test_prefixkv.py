"""The invariants of PrefixKV, one sentence a test, and agreement with the published implementation's decisions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import GOLDEN, PLANS
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from minillava.config import TextConfig
from minillava.model import KVCache
from prefixkv import Plan, PrefixKV, importance, priority, retain, search
from weights import estimate_plan, read_plan, write_plan

seeds = st.integers(0, 2**32 - 1)
budgets = st.floats(0.01, 1.0)


def random_importance(seed: int, layers: int, length: int, kind: str = "skewed") -> torch.Tensor:
    """Importance [L, N] of the kinds attention makes, and of the kinds that break a search."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(layers, length, generator=generator)
    sharpness = torch.rand(layers, 1, generator=generator) * 12
    return {
        "skewed": uniform**sharpness,
        "ties": (uniform * 3).floor(),
        "equal": torch.ones(layers, length),
        "zeros": torch.zeros(layers, length),
        "one-hot": torch.nn.functional.one_hot(uniform.argmax(-1), length).float(),
        "some layers zero": (uniform**sharpness) * (torch.arange(layers) % 2)[:, None],
        "tiny": uniform * 1e-38,
        "huge": uniform * 1e37,
    }[kind]


KINDS = ["skewed", "ties", "equal", "zeros", "one-hot", "some layers zero", "tiny", "huge"]
tables = st.builds(random_importance, seeds, st.integers(1, 8), st.integers(1, 70), st.sampled_from(KINDS))


def begun(compressor: PrefixKV, *lengths: int, layers: int = 4) -> PrefixKV:
    """The compressor, told of prompts without images, padded on the left."""
    present = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    compressor.begin(present, torch.zeros_like(present), layers)
    return compressor


def allocate(table: torch.Tensor, budget: float, num_sinks: int = 1) -> torch.Tensor:
    """Counts [L] of one prompt without padding."""
    return begun(PrefixKV(budget, num_sinks), table.shape[1]).allocate(table[:, None])[:, 0]


def keep(table: torch.Tensor, counts: torch.Tensor, num_sinks: int = 1) -> torch.Tensor:
    """Kept tokens bool [L, N]."""
    present = torch.ones(1, table.shape[1], dtype=torch.bool)
    return torch.cat([retain(row[None], count[None], present, num_sinks) for row, count in zip(table, counts)])


@given(tables, budgets, st.integers(0, 4))
def test_the_total_kept_is_the_budget_exactly(table, budget, num_sinks):
    layers, length = table.shape
    protected = min(length, num_sinks + 1)
    counts = allocate(table, budget, num_sinks)
    assert int(counts.sum()) == max(round(budget * layers * length), layers * protected)
    assert (counts >= protected).all() and (counts <= length).all()
    kept = keep(table, counts, num_sinks)
    assert torch.equal(kept.sum(-1), counts)
    assert kept[:, :num_sinks].all() and kept[:, -1].all()


@given(tables, budgets, budgets)
def test_a_larger_budget_keeps_a_superset_in_every_layer_and_never_lowers_the_threshold(table, one, other):
    totals = [PrefixKV(budget).limits(*table.shape) for budget in sorted((one, other))]
    (low, few), (high, many) = (search(priority(table), *limits) for limits in totals)
    assert low <= high and (keep(table, few) <= keep(table, many)).all()


@pytest.mark.parametrize(
    "table, protected, sizes",
    [  # Two layers are level at p = 0.5; the third layer, at 0.75, has the smallest next prefix.
        ([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0.75, 0.125, 0.125, 0]], 0, [[1, 1, 1], [2, 1, 1], [2, 2, 1]]),
        ([[0.5, 0.375, 0.125], [0.5, 0.25, 0.25]], 0, [[1, 1], [1, 2]]),  # of two level ones, whose next holds less
        # The first layer is full: its prefix of 3, which holds least, and 2 protected ones. It takes no more.
        ([[0.2] * 5, [0.9, *[0.025] * 4], [0.9, *[0.025] * 4]], 2, [[5, 3, 3], [5, 4, 3], [5, 4, 4]]),
    ],
)
def test_tokens_left_over_go_where_a_larger_threshold_would_put_them(table, protected, sizes):
    curve = priority(torch.tensor(table))
    assert [search(curve, sum(counts), protected)[1].tolist() for counts in sizes] == sizes


@given(seeds, st.integers(1, 3), st.integers(3, 7), st.data())
def test_no_other_allocation_has_a_larger_smallest_prefix(seed, layers, length, data):
    table = random_importance(seed, layers, length, data.draw(st.sampled_from(["skewed", "ties", "one-hot"])))
    total = data.draw(st.integers(layers * 2, layers * length))
    curve = priority(table)

    def smallest(counts):
        """The least share that any layer's prefix holds; a layer with all its tokens holds all."""
        return min(1.0 if count == length else float(row[count - 2]) for row, count in zip(curve, counts))

    _, counts = search(curve.clone(), total, 2)
    every = itertools.product(range(2, length + 1), repeat=layers)
    best = max(smallest(candidate) for candidate in every if sum(candidate) == total)
    assert smallest(counts.tolist()) == best


@given(tables, st.integers(0, 4), st.data())
def test_the_threshold_is_the_largest_that_fits(table, protected, data):
    layers, length = table.shape
    curve, protected = priority(table), min(length, protected)
    total = data.draw(st.integers(layers * protected, layers * length))
    threshold, counts = search(curve.clone(), total, protected)

    def sizes(p):  # straight from the definition: the shortest prefix that holds p, and the protected on top
        shortest = torch.tensor([min(k for k in range(length + 1) if row[k] >= p) for row in curve])
        return (shortest + protected).clamp(max=length)

    assert int(sizes(threshold).sum()) <= total
    assert (counts >= sizes(threshold)).all()
    above = curve[curve > threshold + 1e-9]  # so near may a bisection stop
    if len(above):
        assert int(sizes(float(above.min())).sum()) > total


@given(seeds, st.integers(2, 8), st.integers(3, 60), budgets, st.integers(-20, 20))
def test_scaling_a_layer_changes_nothing_and_permuting_layers_permutes_counts(seed, layers, length, budget, power):
    table = torch.rand(layers, length, generator=torch.Generator().manual_seed(seed))  # no two prefixes are equal
    order = torch.randperm(layers, generator=torch.Generator().manual_seed(seed))
    scaled = table[order]
    scaled[0] *= 2.0**power  # a power of two is exact in floating point
    assert torch.equal(allocate(scaled, budget), allocate(table, budget)[order])


@given(seeds, st.integers(2, 8), st.integers(3, 60), budgets, st.sampled_from(KINDS))
def test_equal_layers_get_equal_counts(seed, layers, length, budget, kind):
    counts = allocate(random_importance(seed, 1, length, kind).expand(layers, -1), budget)
    assert int(counts.max() - counts.min()) <= 1


@given(tables)
def test_priority_is_the_share_of_the_importance_that_the_largest_hold(table):
    curve = priority(table)
    assert (curve.diff(dim=-1) >= 0).all() and (curve[:, 0] == 0).all() and (curve[:, -1] == 1).all()
    for row, found in zip(table.tolist(), curve.tolist()):
        sums = [*itertools.accumulate(sorted(row, reverse=True) if sum(row) else [1.0] * len(row), initial=0.0)]
        # Sums of up to 70 numbers in float64, in another order.
        assert found == pytest.approx([part / sums[-1] for part in sums], rel=1e-13)


@given(seeds, st.integers(4, 40), st.data())
def test_retention_prefers_importance_and_then_the_earlier_token(seed, length, data):
    row = random_importance(seed, 1, length, data.draw(st.sampled_from(["skewed", "ties", "zeros"])))
    count = data.draw(st.integers(2, length))
    kept = set(keep(row, torch.tensor([count]))[0].nonzero()[:, 0].tolist())
    others = sorted(range(1, length - 1), key=lambda j: (-float(row[0, j]), j))
    assert kept == {0, length - 1, *others[: count - 2]}


def naive_importance(query, key, present):
    """The definition, with the whole attention matrix, in float64."""
    heads, length = query.shape[1:3]
    key = key.repeat_interleave(heads // key.shape[1], dim=1).double()
    scores = query.double() @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & present[:, None, None]
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
    return (weights * present[:, None, :, None]).mean(1).sum(1)


@given(
    seeds, st.integers(1, 3), st.sampled_from([(1, 1), (4, 4), (6, 2), (4, 1)]), st.integers(1, 40), st.integers(1, 45)
)
def test_block_wise_importance_is_the_naive_one_for_every_block_size(seed, batch, heads, length, block):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads[0], length, 6, generator=generator) * 2
    key = torch.randn(batch, heads[1], length, 6, generator=generator) * 2
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    present = torch.arange(length) >= (length - lengths)[:, None]
    found = importance(query, key, present, block)
    # float32 softmax of up to 40 weights, summed over up to 40 queries: a few units in the last place of each
    torch.testing.assert_close(found.double(), naive_importance(query, key, present), rtol=1e-5, atol=1e-6)
    # Every real query hands out an attention of 1 in all.
    torch.testing.assert_close(found.sum(-1), lengths.float(), rtol=1e-5, atol=0)
    assert (found[~present] == 0).all()


@pytest.mark.parametrize("compressor", [None, PrefixKV(0.3), PrefixKV(plan=Plan(0.3, [0.3] * 4)), PrefixKV(1.0)])
def test_everything_happens_on_the_device_of_the_input_whatever_the_default_device(small, compressor):
    _, _, model, processor = small
    inputs, made = processor(["a cat", "describe it in detail yes no two three"]), []
    for device in ("cpu", "meta"):
        with torch.device(device):
            made.append(model.generate(**inputs, max_new_tokens=9, eos_token_id=(), compressor=compressor))
    assert torch.equal(made[0].token_ids, made[1].token_ids) and torch.equal(made[0].kept, made[1].kept)


def test_one_first_token_is_protected_unless_told_otherwise():
    compressor = PrefixKV()
    assert (compressor.budget, compressor.num_sinks, compressor.decode, compressor.plan) == (0.2, 1, "ratio", None)
    row, present, counts = torch.arange(8.0)[None], torch.ones(1, 8, dtype=torch.bool), torch.tensor([3])
    for options, kept in (({}, [0, 6, 7]), ({"num_sinks": 0}, [5, 6, 7]), ({"num_sinks": 2}, [0, 1, 7])):
        chosen = retain(row, counts, present, **options)
        assert chosen[0].nonzero()[:, 0].tolist() == kept
        assert torch.equal(begun(PrefixKV(0.5, **options), 8).choose(0, row, counts), chosen)
    assert not retain(-row, counts, present.triu(2))[0, :2].any()  # padding is not kept, whatever its scores


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_importance_is_accumulated_in_float32_whatever_the_dtype(dtype):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 600, 8, generator=generator).to(dtype) for _ in range(2))
    present = torch.ones(1, 600, dtype=torch.bool)
    found = importance(query, key, present, block=4)  # 150 sums of sums: in bfloat16 they would be 11 % off
    assert found.dtype == torch.float32
    # Only the scores themselves are rounded to the dtype (8 bits of mantissa in bfloat16): 0.4 % was measured.
    torch.testing.assert_close(found.double(), naive_importance(query, key, present), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_importance_that_is_not_finite_is_refused_with_its_layer(value):
    scores = torch.rand(4, 2, 9)
    scores[2, 1, 3] = value
    compressor = begun(PrefixKV(0.5), 9, 9)
    with pytest.raises(ValueError) as error:
        next(compressor.compress([(layer, scores, scores, row) for layer, row in enumerate(scores)]))
    assert str(error.value) == "The importance of layer 2 holds NaN or infinity; check the weights and dtype."


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        *[
            ({"budget": budget}, f"The budget is {budget}; expected a part of the cache above 0 and at most 1.")
            for budget in (0, -0.1, 1.0001, float("nan"), float("inf"))
        ],
        ({"num_sinks": -1}, "num_sinks is -1; expected a number of tokens, 0 or more."),
        ({"num_sinks": 1.5}, "num_sinks is 1.5; expected a number of tokens, 0 or more."),
        ({"plan": Plan(0.5, [float("nan")])}, "The plan has the ratios [nan]; expected numbers from 0 to 1."),
        ({"plan": Plan(0.5, [1, 1.01])}, "The plan has the ratios [1, 1.01]; expected numbers from 0 to 1."),
        ({"decode": "drop"}, "decode is 'drop'; expected 'ratio' or 'keep'."),
        ({"plan": Plan(0.5, [0.1, 0.5, 0.9])}, "The plan is for 3 layers; the model has 4."),
    ],
)
def test_arguments_out_of_range_are_refused(wrong, sentence):
    with pytest.raises(ValueError) as error:
        begun(PrefixKV(**wrong), 9)
    assert str(error.value) == sentence


# ---------------------------------------------------------------- eviction


def cached(kept: torch.Tensor, room: int) -> KVCache:
    """A cache that holds the kept tokens [L, N] of a prompt."""
    present, key = torch.ones(1, kept.shape[1], dtype=torch.bool), torch.zeros(1, 1, kept.shape[1], 1)
    cache = KVCache(TextConfig(num_hidden_layers=len(kept)), room, PrefixKV(0.5))
    cache.begin(present, present)
    for layer in kept:
        cache.store(key, key, layer[None])
    return cache


@given(seeds, st.integers(2, 80), st.integers(1, 90), st.data())
def test_eviction_is_a_queue_behind_pinned_tokens(seed, kept, steps, data):
    """The slots hold what a list holds from which the oldest recent entry is cut whenever it grows too long."""
    prompt = data.draw(st.integers(kept, kept + 60))
    order = torch.randperm(prompt, generator=torch.Generator().manual_seed(seed))
    cache, model = cached(order[None] < kept, steps), (order < kept).nonzero()[:, 0].tolist()
    pinned = kept - 25 if kept - 25 >= 1 else kept // 2
    for length in range(prompt + 1, prompt + steps + 1):
        model.append(length - 1)
        if len(model) > math.ceil(length * (1 - (prompt - kept) / prompt)):
            del model[pinned]
        cache.advance(1)
        assert cache.position[cache.position >= 0].sort().values.tolist() == model


@pytest.mark.parametrize("kept, oldest_queued", [(1, 0), (2, 1), (3, 1), (24, 12), (25, 12), (26, 1), (30, 5)])
@pytest.mark.parametrize("num_sinks", [0, 1, 4])
def test_the_oldest_token_behind_the_pinned_ones_goes_first(kept, oldest_queued, num_sinks):
    """Sinks are pinned, except that one token is always queued."""
    position = torch.arange(40).view(1, 1, 40)
    victim = PrefixKV(0.5, num_sinks=num_sinks).victim(position, torch.tensor([[kept]]))
    assert int(victim) == max(oldest_queued, min(num_sinks, kept - 1))


# ---------------------------------------------------------------- the published implementation


@pytest.fixture(params=range(6))
def case(request):
    """What the published implementation decided on some random attention."""
    if not GOLDEN.is_dir():
        pytest.skip("the published implementation's decisions are not here")
    return load_file(GOLDEN / f"case_{request.param}.safetensors")


def test_importance_positions_and_decode_steps_are_the_published_ones(case):
    for query, key, expected in zip(case["queries"], case["keys"], case["importance"]):
        present = torch.ones(1, query.shape[2], dtype=torch.bool)
        torch.testing.assert_close(importance(query, key, present)[0], expected, rtol=1e-5, atol=0)
    for budget in (0.1, 0.2, 0.4, 0.5, 0.8):
        counts = case[f"kept_counts/{budget}"]
        # The published search is approximate. The rest is compared with the counts that it found.
        assert int((allocate(case["importance"], budget) - counts).abs().max()) <= 3
        kept = keep(case["importance"], counts)
        cache = cached(kept, 64)
        for expected in case[f"decode_lengths/{budget}"]:
            cache.advance(1)
            assert torch.equal(cache.held[:, 0], expected.long())
        for layer, row in enumerate(cache.position[:, 0]):
            assert torch.equal(kept[layer].nonzero()[:, 0].int(), case[f"kept/{budget}/{layer}"])
            assert torch.equal(row[row >= 0].sort().values.int(), case[f"decode_kept/{budget}/{layer}"])


# ---------------------------------------------------------------- plans


def test_a_plan_survives_the_way_to_its_file_and_back(tmp_path):
    kept, prompt = torch.tensor([[10, 20, 5], [30, 10, 40]]), torch.tensor([50, 100])
    plan = estimate_plan(0.2, kept, prompt, "a model")
    assert plan.ratios == pytest.approx([0.25, 0.25, 0.25])
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan == Plan(0.2, plan.ratios, "a model", 2)
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert lines[0] == "{" and lines[1] == ' "budget": 0.2,'  # a line for every number, to be read and compared


@pytest.mark.parametrize(
    "content, plan",
    [
        ('{"ratios": [0, 0.25, 1]}', Plan(pytest.approx(1.25 / 3), [0, 0.25, 1])),
        ("[0.25, 1, 0, 0.75]", Plan(0.5, [0.75, 0, 1, 0.25])),  # a published one lists the ratios to forget
        ('{"ratios": [0.5], "model": "猫"}', Plan(0.5, [0.5], "猫")),
    ],
)
def test_a_plan_needs_no_more_than_its_ratios_and_may_be_in_any_script(tmp_path, content, plan):
    (tmp_path / "plan.json").write_bytes(content.encode())
    assert read_plan(tmp_path / "plan.json") == plan


@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(0, 3))
def test_a_plan_keeps_its_ratio_and_the_protected_tokens_of_each_layer_at_once(seed, length, num_sinks):
    ratios = [0.0, 1.0, *torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()]
    compressor, scores = begun(PrefixKV(num_sinks=num_sinks, plan=Plan(0.5, ratios)), length), torch.rand(1, length)
    assert compressor.budget == 0.5
    for layer, ratio in enumerate(ratios):
        ((_, _, kept),) = compressor.compress([(layer, scores, scores, scores)])
        assert int(kept.sum()) == min(length, max(num_sinks + 1, round(length * ratio)))


@pytest.mark.skipif(not PLANS.is_dir(), reason="the published plans are not here")
@pytest.mark.parametrize("model, layers", [("7b", 32), ("13b", 40)])
@pytest.mark.parametrize("forget", [0.0, 0.1, 0.2, 0.5, 0.9])  # their names say the ratio to forget
def test_published_plans_load_as_they_are(model, layers, forget):
    plan = read_plan(PLANS / f"prefixkv_llava-v1.5-{model}_{forget}.json")
    assert len(plan.ratios) == layers
    assert plan.budget == pytest.approx(1 - forget, abs=0.01)  # their search stops a few tokens from its target


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", "[2]", "[-0.1]", '["a"]', "[null]", '{"ratios": 3}', '{"ratios": [1.5]}', "nan", "[NaN]",
     '{"ratios": [0.5], "budget": "x"}', "[" * 10**5, '{"ratios": {"a": 1}}', None, 10**12],
)  # fmt: skip
def test_a_file_that_holds_no_plan_is_refused(tmp_path, content):
    """None: it is missing; a number: so many bytes, which take no room on the disk."""
    path = tmp_path / "plan.json"
    if isinstance(content, int):
        with path.open("wb") as file:
            file.truncate(content)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(ValueError) as error:
        read_plan(path)
    assert str(error.value).startswith(f"{path} holds no plan (")
    assert str(error.value).endswith("); expected what python -m bench.plan writes.")
    if content == "[2]":
        assert "(ratios between 0 and 1, one per layer, are missing)" in str(error.value)
