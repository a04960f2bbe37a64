"""Every method meets the budget exactly, protects what it says, and decides alike every time and in every batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from checkpoints import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.variants import VARIANTS, PublishedElastic, WithoutSquares, WithoutWeights
from minillava import compressors
from minillava.compressors import H2O, METHODS, Cover, question_queries, question_weights
from minillava.config import TextConfig
from minillava.model import KVCache
from prefixkv import Plan, PrefixKV, importance, retain

# Of the variants, some have no budget, read twice, or do not keep the first token.
BUDGETED = sorted((METHODS | VARIANTS).keys() - {"pooled", "kvzip", "h2o as published"})
ASKED = "USER: <image>\nWhat is in the image? ASSISTANT:"
seeds = st.integers(0, 2**32 - 1)
budgets = st.floats(0.05, 1.0)


def attention(seed: int, layers: int, lengths: list[int]):
    """Random queries [L, B, 4, N, 6] and keys [L, B, 2, N, 6] of prompts padded on the left, and which are present."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    shape = (layers, len(lengths), 4, longest, 6)
    query = torch.randn(shape, generator=generator) * 2
    key = torch.randn((*shape[:2], 2, *shape[3:]), generator=generator) * 2
    return query, key, torch.arange(longest) >= torch.tensor([[longest - n] for n in lengths])


def image_of(present):
    """The image in prompts like these: bool [B, N]. Two words stand before it, a quarter of the prompt after it."""
    number = present.cumsum(-1)
    return present & (number > 2) & (4 * number <= 3 * number[:, -1:])


def choose(compressor, query, key, present, image=None):
    """Counts [L, B] and kept tokens [L, B, N]."""
    compressor.begin(present, image_of(present) if image is None else image, len(key))
    scores = torch.stack([compressor.score(layer, q, k, k) for layer, (q, k) in enumerate(zip(query, key))])
    counts = compressor.allocate(scores)
    return counts, torch.stack([compressor.choose(layer, *pair) for layer, pair in enumerate(zip(scores, counts))])


@torch.inference_mode()
def read(cache, query, key, present=None):
    """A block of every layer, [L, B, heads, N, Dh], goes through a cache: a prompt, where present, or a further one."""
    if present is None:
        cache.advance(key.shape[3])
    else:
        cache.begin(present, image_of(present))
    for layer, (q, k) in enumerate(zip(query, key)):
        cache.update(layer, q, k, k)


def cached(compressor, room, query, key, present):
    """A cache that has read a prompt."""
    cache = KVCache(TextConfig(num_hidden_layers=len(key)), room, compressor)
    read(cache, query, key, present)
    return cache


def converse(model, inputs, turn, compressor, count):
    """The answers to a prompt and to a further turn [B, N], each `count` tokens: [B, 2 * count]; and the cache."""
    cache = model.new_cache(count, compressor)
    answer = [*model.decode(model.read(**inputs, cache=cache), cache, eos_token_id=())]
    cache.reserve(turn.shape[1] + count - 1)  # the last token was not read
    answer += model.decode(model.read(turn, cache), cache, eos_token_id=())
    return torch.stack(answer, dim=1), cache


def weights_of(query, key):
    """The definition of attention for one prompt without padding, in float64: [H, N, N]."""
    heads, length, size = query.shape[1:]
    key = key[0].repeat_interleave(heads // key.shape[1], 0).double()
    scores = query[0].double() @ key.mT / size**0.5
    return scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), float("-inf")).softmax(-1)


@pytest.mark.parametrize("method", BUDGETED)
@settings(max_examples=12)
@given(seeds, st.integers(1, 5), st.lists(st.integers(1, 90), min_size=1, max_size=3), budgets)
def test_the_total_kept_is_prefixkvs_budget_exactly(method, seed, layers, lengths, budget):
    """The first tokens and the last are among them."""
    compressor = (METHODS | VARIANTS)[method](budget)
    counts, kept = choose(compressor, *attention(seed, layers, lengths))
    assert torch.equal(kept.sum(-1), counts)
    for row, length in enumerate(lengths):
        protected = min(length, compressor.num_sinks + 1)
        assert int(counts[:, row].sum()) == max(round(budget * layers * length), layers * protected)
        assert kept[:, row, -length:][:, : protected - 1].all() and kept[:, row, -1].all()


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=10)
@given(seeds, st.integers(1, 6), st.lists(st.integers(1, 80), min_size=2, max_size=3), budgets, st.booleans())
def test_the_choice_is_the_same_alone_and_in_a_batch(method, seed, layers, lengths, budget, whole):
    """Of prompts with an image and without; or `whole` ones, which are an image. All layers look at these equally, so
    rounding must not decide which gets one more token; which tokens are kept of equal ones, it may."""
    query, key, present = attention(seed, layers, lengths)
    image = present if whole else image_of(present) & (present.sum(-1, keepdim=True) % 2 == 1)
    counts, kept = choose(METHODS[method](budget), query, key, present, image)
    for b, length in enumerate(lengths):
        alone = choose(
            METHODS[method](budget),
            *(t[:, b : b + 1, :, -length:] for t in (query, key)),
            torch.ones(1, length, dtype=torch.bool),
            image[b : b + 1, -length:],
        )
        assert torch.equal(counts[:, b], alone[0][:, 0])
        assert whole or torch.equal(kept[:, b, -length:], alone[1][:, 0])


@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 60), st.data())
def test_apportioned_numbers_sum_to_the_total_and_keep_order(layers, low, width, data):
    total = data.draw(st.integers(layers * low, layers * (low + width)))
    weight = torch.tensor(data.draw(st.lists(st.floats(0, 200), min_size=layers, max_size=layers)))
    counts = compressors.apportion(total, weight, low, low + width)
    assert int(counts.sum()) == total
    assert counts.min() >= low and counts.max() <= low + width
    assert ((weight[:, None] <= weight) | (counts[:, None] >= counts - 1)).all()


def test_uniform_layers_differ_by_one_token_at_most_and_choose_as_prefixkv_does():
    query, key, present = attention(0, 4, [50])
    counts, kept = choose(METHODS["uniform"](0.33), query, key, present)
    assert int(counts.max() - counts.min()) <= 1
    for layer in range(4):
        scores = importance(query[layer], key[layer], present)
        assert torch.equal(kept[layer], retain(scores, counts[layer], present))


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"prefixkv", "pyramidkv", "vlcache", "tgvkv"}))
def test_all_layers_are_alike_where_a_method_says_nothing_of_sizes(method):
    query, key, present = attention(0, 4, [50])
    sharper = torch.tensor([0.1, 0.5, 1.0, 4.0]).view(4, 1, 1, 1, 1)  # attention of layers that PrefixKV tells apart
    counts, _ = choose(METHODS[method](0.33), query * sharper, key, present)
    assert int(counts.max() - counts.min()) <= 1


def test_local_keeps_sinks_and_the_newest():
    _, kept = choose(METHODS["local"](0.4), *attention(0, 2, [20]))
    assert kept[0, 0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 16, 17, 18, 19]


@given(seeds, st.integers(3, 60), st.integers(0, 40))
def test_h2o_keeps_the_first_tokens_half_for_the_newest_and_half_for_heavy_hitters(seed, length, num_sinks):
    query, key, present = attention(seed, 1, [length])
    counts, kept = choose(H2O(0.4, num_sinks), query, key, present)
    newest = max(1, min(int(counts) // 2, int(counts) - num_sinks))
    first, last = set(range(min(num_sinks, length))), set(range(length - newest, length))
    scores = importance(query[0], key[0], present)[0]
    others = sorted({*range(length)} - first - last, key=lambda j: (-float(scores[j]), j))
    assert {*kept[0, 0].nonzero()[:, 0].tolist()} == first | last | {*others[: int(counts) - len(first | last)]}


def test_pyramidkv_falls_in_equal_steps():
    counts, _ = choose(METHODS["pyramidkv"](0.3), *attention(0, 5, [200]))
    assert counts[0, 0] > counts[-1, 0]
    assert counts.diff(dim=0).unique().numel() <= 2  # steps are equal, but for rounding
    assert int(counts[-1, 0]) in (31, 32)  # the window, half of 60, and a twentieth of the other half


@pytest.mark.parametrize("method, shift", [(METHODS["elastic"], 0), (PublishedElastic, 1)])
@settings(max_examples=15)
@given(seeds, st.integers(2, 40), budgets)
def test_elastic_merges_every_dropped_token_into_the_nearest_anchor(method, shift, seed, length, budget):
    """As published, what is merged is the left neighbour of each dropped token, whether that was dropped or not."""
    query, key, present = attention(seed, 1, [length, length])
    value = torch.randn(key[0].shape, generator=torch.Generator().manual_seed(seed))
    compressor = method(budget)
    _, kept = choose(compressor, query, key, present)
    for source, merged in zip((key[0], value), compressor.merge(key[0], value, kept[0])):
        for b, keep in enumerate(kept[0].tolist()):
            buckets = {j: [j] for j in range(1, length - 1) if keep[j]}  # of each anchor
            places = [j - shift for j in range(length) if not keep[j] and buckets]
            for place in places:
                buckets[min(buckets, key=lambda anchor: (abs(anchor - place), anchor))].append(place)
            expected = torch.stack([source[b][:, buckets.get(j, [j])].mean(1) for j in range(length)], 1)
            # a mean of up to 40 numbers of size 1 to 10, in float32 in another order
            torch.testing.assert_close(merged[b][:, keep], expected[:, keep], rtol=1e-5, atol=1e-5)


@given(st.lists(st.lists(st.sampled_from("wi"), min_size=1, max_size=50), min_size=1, max_size=3))
def test_the_words_after_the_last_image_ask_or_the_last_tokens(prompts):
    longest = max(map(len, prompts))
    rows = [["-"] * (longest - len(prompt)) + prompt for prompt in prompts]
    present = torch.tensor([[kind != "-" for kind in row] for row in rows])
    image = torch.tensor([[kind == "i" for kind in row] for row in rows])
    for row, found in zip(rows, compressors.question_mask(present, image).tolist()):
        text = "".join(row)
        after = len(text) - 1 - text.rfind("i") if "i" in text else 0
        expected = after or min(32, len(text.lstrip("-")))
        assert found == [index >= len(text) - expected for index in range(len(text))]


def last_weights(query, key, present, width):
    """`question_weights` of the last `width` queries."""
    asked = (torch.arange(present.shape[1]) >= present.shape[1] - width).expand_as(present)
    return question_weights(query, key, *question_queries(present, asked))


@given(seeds, st.integers(2, 30), st.integers(1, 30), st.data())
def test_attention_of_the_last_queries_does_not_see_padding(seed, length, padding, data):
    query, key, present = attention(seed, 1, [length, length + padding])
    width = data.draw(st.integers(1, length))
    together = last_weights(query[0], key[0], present, width)[0]
    alone = last_weights(query[0, :1, :, padding:], key[0, :1, :, padding:], present[:1, padding:], width)[0]
    assert not together[..., :padding].any()
    torch.testing.assert_close(together[..., padding:], alone, rtol=1e-5, atol=1e-6)  # sums in another order


def test_attention_of_the_last_queries_is_finite_where_products_are_too_large_for_float16():
    query, key = torch.full((1, 4, 9, 6), 120.0).half(), torch.full((1, 2, 9, 6), 120.0).half()  # 86,400, scaled 35,273
    expected = torch.ones(3, 9).tril(6) / torch.tensor([[7.0], [8.0], [9.0]])
    found = last_weights(query, key, torch.ones(1, 9, dtype=torch.bool), 3)[0]
    torch.testing.assert_close(found, expected.expand(4, 3, 9))


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor has that is made meanwhile."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


def test_attention_of_the_last_queries_takes_no_room_for_the_others():
    query, key, present = attention(0, 1, [500])
    with Largest() as largest:
        last_weights(query[0], key[0], present, 3)
    assert largest.numbers <= query[0].numel()  # a whole table has 4 x 500 x 500, and queries have 4 x 500 x 6


def snapkv(weights, image, key):
    """Attention of the last five queries; of the keys before them the largest of seven neighbours."""
    window = min(5, max(1, len(image) // 4))
    received = weights[:, -window:].mean(0).sum(0)
    before = received.clone()
    before[-window:] = 0  # SnapKV pools what stands before its window
    pooled = [before[max(0, j - 3) : j + 4].max() for j in range(len(image) - window)]
    return torch.stack([*pooled, *received[-window:]])


def mixkv(weights, image, key):
    """SnapKV's scores, and diversity, which counts as much as keys are alike; a mean over the heads of keys."""
    attended, length, mixed = snapkv(weights, image, key), len(image), []
    for head in key.double():  # [N, Dh]
        cosine = torch.nn.functional.cosine_similarity(head[:, None], head[None], dim=-1)  # [N, N]
        alike = ((cosine.sum() - length) / (length * (length - 1))).clamp(0, 1)
        apart = cosine.mean(0).max() - cosine.mean(0)  # the cosines with all keys: with their mean, but for its length
        mixed.append((1 - alike) * attended + alike * apart * attended.mean() / apart.mean())
    return torch.stack(mixed).mean(0)


def vlcache(weights, image, key):
    """Attention of the words after the image."""
    return weights[:, int(image.nonzero()[-1]) + 1 :].mean(0).sum(0)


def tgvkv(weights, image, key):
    """Of the same words, each weighed by the attention that it receives from those after it."""
    weights = weights.mean(0)  # [N, N]
    words = range(int(image.nonzero()[-1]) + 1, len(image))
    weighty = {i: sum(float(weights[k, i]) for k in words if k >= i) / sum(k >= i for k in words) for i in words}
    return sum(weighty[i] * weights[i] for i in words)


@pytest.mark.parametrize(
    "definition, options", [(snapkv, {"window": 5}), (mixkv, {"window": 5}), (vlcache, {}), (tgvkv, {})]
)
@given(seeds, st.integers(8, 60))
def test_scores_and_notes_are_those_of_the_equations(definition, options, seed, length):
    query, key, present = attention(seed, 2, [length])
    compressor, image = METHODS[definition.__name__](0.5, **options), image_of(present)[0]
    _, kept = choose(compressor, query, key, present)
    for layer, (q, k) in enumerate(zip(query, key)):
        weights, found = weights_of(q, k), compressor.score(layer, q, k, k)[0].double()
        # float32 softmax of at most 60 weights
        torch.testing.assert_close(found, definition(weights, image, k[0]).double(), rtol=1e-5, atol=1e-6)
        rows = weights[:, int(image.nonzero()[-1]) + 1 :]  # [H, W, N]
        if definition in (snapkv, mixkv):
            assert kept[layer, 0, -min(5, max(1, length // 4)) :].all()
        if definition is vlcache:
            dense = sum(float(w) >= 0.01 * float(row.max()) for head in rows for row in head for w in row if w > 0)
            pairs = rows.shape[0] * sum(range(length - rows.shape[1] + 1, length + 1))
            # a weight within rounding of a hundredth of the largest may fall on either side
            assert float(compressor.density[layer]) == pytest.approx(dense / pairs, abs=2 / pairs)
        if definition is tgvkv:
            assert float(compressor.looks[layer]) == pytest.approx(float(rows.mean(0)[:, image].sum()), rel=1e-5)
            assert kept[layer, 0, ~image].all() or not kept[layer, 0, image].any()  # words first
            _, plain = choose(METHODS["tgvkv"](0.3), query, key, present, torch.zeros_like(present))
            assert not plain[layer, 0, 1:-32].any()  # without an image, the last 32 are the words


@settings(max_examples=20)
@given(seeds, st.integers(12, 40), st.floats(0.2, 0.9))
def test_attention_matching_solves_both_least_squares(seed, length, budget):
    query, key, present = attention(seed, 1, [length])
    value = torch.randn(key.shape, generator=torch.Generator().manual_seed(seed))
    made = METHODS["matching"](budget)
    made.ROUNDS, made.RIDGE = 1000, 1e-9
    made.begin(present, image_of(present), 1)
    waiting = [(0, key[0], value[0], made.score(0, query[0], key[0], value[0]))]
    ((_, fitted, keep),) = made.compress(waiting)
    kept = keep[0]
    weights = weights_of(query[0], key[0])  # [H, N, N]
    times = made.log_weights[0, 0, :-1][kept].double().exp()
    flat = weights[..., kept].flatten(0, 1)  # [H * N, F]
    slope = flat.mT @ (flat @ times - 1)  # of half the squared error of the mass
    assert (slope > -1e-2).all() and (slope * times).abs().max() < 1e-2  # no weight of 0 or more does better
    compact = weights[..., kept] * times
    compact = compact / compact.sum(-1, keepdim=True)
    full = weights.unflatten(0, (2, 2)) @ value[0, 0][:, None].double()  # [Hkv, G, N, Dh]
    compact, found = compact.unflatten(0, (2, 2)), fitted[0][:, kept].double()
    missing = (compact @ found[:, None] - full).flatten(1, 2)  # [Hkv, G * N, Dh]
    assert (compact.flatten(1, 2).mT @ missing).abs().max() < 1e-3  # nothing that values could add is left


@pytest.mark.parametrize("missing", [None, "words", "attention", "spacing", "squares"])
@given(seeds, st.lists(st.integers(12, 90), min_size=1, max_size=3), st.floats(0.1, 0.9), st.booleans())
def test_cover_keeps_words_what_they_attend_to_and_spaced_tokens_that_stand_for_all_others(
    missing, seed, lengths, budget, pictured
):
    """Each variant lacks a part. Without a picture, all are words, of which the last 32 ask, and nothing is spaced."""
    query, key, present = attention(seed, 2, lengths)
    images = image_of(present) & pictured
    compressor = VARIANTS[f"cover without {missing}"](budget) if missing else Cover(budget)
    _, kept = choose(compressor, query, key, present, images)
    assert pictured or not compressor.drop_last.any()  # without a picture no word is spared for ever
    part = {"attention": 0.0, "spacing": 1.0}.get(missing, 0.2) if pictured else 1.0
    for layer, (row, length) in itertools.product(range(2), enumerate(lengths)):
        position = torch.arange(-1, length + 3).expand(len(lengths), -1)  # a free slot, the prompt, three new ones
        weight = compressor.bias(layer, position)[row, 1:].exp()
        held, image = (mask[-length:] for mask in (kept[layer, row], images[row]))
        assert (weight[length:] == 1).all() and (weight[:length][~held] == 1).all()
        words = (~image).nonzero()[:, 0].tolist()[-max(1, int(held.sum()) // 2) :] if missing != "words" else []
        asking = length - 1 - int(image.nonzero()[-1]) if pictured else 32
        looks = weights_of(*(tensor[layer, row : row + 1, :, -length:] for tensor in (query, key)))[:, -asking:]
        looks = (looks if missing == "squares" else looks.square()).mean(0).sum(0).tolist()
        others = sorted({*range(length)} - {0, length - 1, *words}, key=lambda j: -looks[j])
        room = int(held.sum()) - (length - len(others))
        best = others[: round(part * room)]
        assert held[words + best].all() and (weight[words + best] == 1).all()
        spaced = room - len(best)
        if spaced:  # all weigh the same: float32's logarithm of up to 90, and up to 90 such weights in the sum
            assert float(weight[:length][held].sum()) == pytest.approx(length, rel=1e-5)
            assert len(weight[:length][held].unique()) <= 2
            assert int((weight != 1).sum()) == (spaced if spaced < len(others) - len(best) else 0)


def test_covers_spacing_is_spread_in_both_directions_of_the_picture():
    """Of 24 x 24 patches, about a fifth: every row, every column, every window of 4 x 4, and all by some layer."""
    present = torch.ones(1, 600, dtype=torch.bool)
    image = torch.zeros_like(present)
    image[0, 8:584] = True
    _, kept = choose(VARIANTS["cover without attention"](0.2), *attention(0, 8, [600]), image)
    patches = kept[:, 0, 8:584].view(8, 24, 24).float()
    assert patches.sum(2).min() >= 3 and patches.sum(1).min() >= 3
    assert torch.nn.functional.max_pool2d(patches[:, None], 4, stride=1).all()
    assert patches.any(0).all()


def test_variants_of_cover_space_all_layers_alike_count_no_token_twice_or_have_a_queue():
    query, key, present = attention(0, 1, [90])
    alike = query.expand(3, -1, -1, -1, -1), key.expand(3, -1, -1, -1, -1), present  # in three layers
    still, single, queue = (VARIANTS[f"cover without {part}"](0.2) for part in ("shift", "weights", "looking"))
    (_, moved), (sizes, kept) = choose(Cover(0.2), *alike), choose(still, *alike)
    assert sizes[0] == sizes[1] and torch.equal(kept[0], kept[1]) and not torch.equal(moved[0], moved[1])
    assert single.bias(0, torch.arange(90)[None]) is None
    slots = torch.randperm(40).expand(3, 1, 40), torch.full((3, 1), 30)
    assert torch.equal(queue.victim(*slots), PrefixKV(0.2).victim(*slots))


@pytest.mark.parametrize("words, victim", [([2], 3), ([1, 2, 3, 4], 2), ([0, 1, 2, 3, 4, 5], 2)])
def test_words_go_last_and_among_themselves_the_one_with_least_attention(words, victim):
    compressor, position = Cover(0.5), torch.arange(6)
    compressor.begin(torch.ones(1, 6, dtype=torch.bool), torch.zeros(1, 6, dtype=torch.bool), 1)
    compressor.watch(torch.tensor([[[1.0, 8, 3, 4, 5, 2]]]), torch.isin(position, torch.tensor(words))[None])
    assert compressor.victim(position[None, None], torch.tensor([[6]])) == victim  # the first and the newest stay


@pytest.mark.parametrize("method", [H2O, Cover])
def test_a_method_that_begins_with_the_scores_of_all_layers_takes_no_plan(method):
    present = torch.ones(1, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="takes no plan"):
        method(plan=Plan(0.5, [0.5])).begin(present, present, 1)


@pytest.mark.parametrize("wrong", [{"kernel": 0}, {"kernel": 4}, {"window": 0}])
def test_a_window_or_kernel_that_cannot_be_pooled_is_refused(wrong):
    with pytest.raises(ValueError, match="an odd number"):
        METHODS["snapkv"](0.5, **wrong)


def test_each_prompt_of_a_batch_may_draw_with_a_seed_of_its_own():
    query, key, present = attention(0, 2, [40, 40])
    _, alike = choose(METHODS["random"](0.3, 5), query, key, present)
    _, apart = choose(METHODS["random"](0.3, [5, 6]), query, key, present)
    assert torch.equal(alike[:, 0], alike[:, 1]) and torch.equal(apart[:, 0], alike[:, 0])
    assert not torch.equal(apart[:, 0], apart[:, 1])


@pytest.mark.parametrize("method", METHODS)
def test_a_method_does_not_depend_on_the_default_dtype(small, method, request):
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    _, _, model, processor = small
    inputs, made = processor([ASKED, "two red"], [picture(28, 28)]), []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        made.append(model.generate(**inputs, max_new_tokens=2, eos_token_id=(), compressor=METHODS[method](0.33)))
    for other in made[1:]:
        assert torch.equal(other.kept, made[0].kept) and torch.equal(other.token_ids, made[0].token_ids)


@pytest.mark.parametrize("method", METHODS)
def test_a_full_budget_gives_the_text_of_the_full_cache_and_with_prefixkv_every_bit(small, method):
    _, _, model, processor = small
    inputs, turn = processor([ASKED, "two red"], [picture(28, 28)]), torch.arange(3, 13).view(2, 5)
    compressor = METHODS[method](1.0)
    (plain, cache), (full, other) = (converse(model, inputs, turn, c, 4) for c in (None, compressor))
    assert torch.equal(plain, full)
    assert other.held_bytes == cache.held_bytes + getattr(compressor, "notes_bytes", 0)
    if method == "prefixkv":
        assert all(map(torch.equal, (*cache.key, *cache.value), (*other.key, *other.value)))


OTHERS = {
    "full": lambda budget: None,
    "keep": lambda budget, sinks=1: PrefixKV(budget, sinks, decode="keep"),
    "plan": lambda budget, sinks=1: PrefixKV(0.2, sinks, plan=Plan(budget, [budget, budget / 2, 1, budget])),
}


@pytest.mark.parametrize("method", [*METHODS, *OTHERS])
def test_a_sample_gets_the_same_answers_and_cache_alone_and_in_a_batch(small, method):
    _, _, model, processor = small
    texts, image = (
        ["USER: <image>What is in it? ASSISTANT: a cat.", "describe it in detail yes no two"],
        picture(28, 28),
    )
    turns = torch.randint(3, 300, (2, 6), generator=torch.Generator().manual_seed(0))
    made = (METHODS | OTHERS)[method]
    together, cache = converse(model, processor(texts, [image]), turns, made(0.4), 4)
    for index, text in enumerate(texts):
        inputs = processor(text, [image] * (index == 0))
        alone, own = converse(model, inputs, turns[index : index + 1], made(0.4), 4)
        assert torch.equal(alone[0], together[index])
        assert torch.equal(own.kept[:, 0], cache.kept[:, index])
        for one, other in zip(own.position[:, 0], cache.position[:, index]):
            assert torch.equal(one[one >= 0].sort().values, other[other >= 0].sort().values)


@pytest.mark.parametrize("method", ["prefixkv", "plan", "keep", "local", "h2o", "cover"])
@settings(max_examples=10)
@given(seeds, st.lists(st.integers(1, 60), min_size=1, max_size=3), budgets, st.integers(0, 50),
       st.lists(st.integers(1, 9), max_size=6))  # fmt: skip
def test_after_a_turn_a_layer_holds_the_first_tokens_and_as_many_as_it_may(
    method, seed, lengths, budget, num_sinks, turns
):
    """All of them different. A queue holds what it would if the tokens had come one by one. Others drop as prefixkv."""
    compressor = (METHODS | OTHERS)[method](budget, num_sinks)
    cache = cached(compressor, sum(turns), *attention(seed, 4, lengths))
    one_by_one = cache.fork()
    for index, count in enumerate(turns):
        query, key, _ = attention(seed + index + 1, 4, [count] * len(lengths))
        most = compressor.capacity(cache.kept, cache.prompt_lengths, cache.lengths + count)
        expected = (cache.held + count).minimum(most)
        read(cache, query, key)
        position = cache.position.sort(-1).values
        held = position >= 0
        assert torch.equal(cache.held, expected) and torch.equal(held.sum(-1), expected)
        assert (position.diff(dim=-1) > 0)[held[..., :-1]].all() and (position[..., -1] < cache.lengths).all()
        for row, length in enumerate(lengths):
            assert all({*range(min(num_sinks, length))} <= {*held} for held in position[:, row].tolist())
        if method not in ("h2o", "cover"):
            for token in zip(query.split(1, dim=3), key.split(1, dim=3)):
                read(one_by_one, *token)
            assert torch.equal(one_by_one.position.sort(-1).values, position)


class Least(WithoutWeights, WithoutSquares):
    """Cover's eviction by sums of attention, for the definition below."""


@pytest.mark.parametrize("method", [H2O, Cover, Least])
@settings(max_examples=10)
@given(seeds, st.integers(6, 80), st.lists(st.sampled_from([1, 1, 1, 2, 4, 7]), max_size=20))
def test_the_token_goes_that_has_least_attention_which_goes_on_accumulating(method, seed, length, blocks):
    """The cache in place against lists: a token's attention is its own wherever it stands, and a fork's is its own."""
    query, key, present = attention(seed, 1, [length])
    compressor = method(0.5)
    cache = cached(compressor, sum(blocks), query, key, present)
    kept, count = cache.position[0, 0].sort().values.tolist()[-int(cache.kept) :], int(cache.kept)
    scores = compressor.score(0, query[0], key[0], key[0])[0]
    words = set((~image_of(present)[0]).nonzero()[:, 0].tolist()) if issubclass(method, Cover) else set()  # go last
    stands_for = compressor.log_weights[0][0].exp() if method is Cover else torch.ones(length)
    spared = min(8, count // 4) if issubclass(method, Cover) else count // 2 - 1
    rows = [(j, key[0, 0, :, j], stands_for[j], scores[j].item()) for j in kept]

    def enter(rows, new):
        """Each new row takes, in a full layer, the place of the one with least attention."""
        for row in new:
            if len(rows) == int(compressor.capacity(cache.kept, cache.prompt_lengths, torch.tensor([row[0] + 1]))):
                candidates = [row for row in rows[: len(rows) - spared] if row[0] > 0]
                leaving = min(candidates, key=lambda row: (row[0] in words, row[3]))
                rows = [row for row in rows if row is not leaving]
            rows = [*rows, row]
        return rows

    original, cache = cache, cache.fork()
    compressor = cache.compressor
    for index, block in enumerate(blocks):
        read(original, *attention(seed + index + 100, 1, [block])[:2])
        query, key, _ = attention(seed + index + 1, 1, [block])
        read(cache, query, key)
        new = [(length + i, key[0, 0, :, i], torch.tensor(1.0), 0.0) for i in range(block)]
        length += block
        rows = enter(rows, new) if block == 1 else rows + new  # a turn is read before its tokens enter
        held = torch.stack([row[1] for row in rows], 1)  # [2, S, 6]
        shares = (query[0, 0].view(2, 2, block, 6) @ held[:, None].mT / 6**0.5).exp()  # [2, 2, N, S]
        shares = (shares * torch.stack([row[2] for row in rows])).tril(len(rows) - block)
        shares = shares / shares.sum(-1, keepdim=True)
        gained = (shares.square().sum((0, 1, 2)) if method is Cover else shares.mean((0, 1)).sum(0)).tolist()
        rows = [(at, k, n, score + gain) for (at, k, n, score), gain in zip(rows, gained)]
        rows = rows if block == 1 else enter(rows[:-block], rows[-block:])
        position = cache.position[0]
        assert sorted(position[position >= 0].tolist()) == [row[0] for row in rows]


def test_a_recorder_keeps_everything_and_remembers_the_importance_of_every_layer():
    (query, key, present), recorder = attention(0, 3, [20, 12]), compressors.Recorder()
    assert torch.equal(cached(recorder, 0, query, key, present).kept, torch.tensor([[20, 12]] * 3))
    expected = torch.stack([importance(q, k, present) for q, k in zip(query, key)])
    assert torch.equal(recorder.scores, expected) and torch.equal(recorder.present, present)
