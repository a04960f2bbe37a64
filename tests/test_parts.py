"""`bench.parts`: every combination spends the budget exactly, and those that have a name are what bears the name."""

from __future__ import annotations

import itertools
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bench import parts, quality
from bench.parts import FULL, PARTS, Run, choose, evenly, evictor, expected_attention, greatest_mass, layer_sizes, main
from minillava.compressors import H2O, PyramidKV, Random, Uniform, VLCache
from minillava.model import rope_frequencies
from prefixkv import PrefixKV

seeds = st.integers(0, 2**32 - 1)
budgets = st.floats(0.05, 1.0)
runs = st.builds(Run, budgets, *(st.sampled_from(list(levels)) for levels in PARTS.values()))
lengths = st.lists(st.integers(1, 60), min_size=1, max_size=3)


def made_up(seed, layers, lengths, digits=1):
    """A prompt with random scores, many of them equal, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    prompt = parts.Prompt()
    present = torch.arange(longest) >= torch.tensor([[longest - n] for n in lengths])
    prompt.begin(present, torch.zeros_like(present), layers)
    shape = (layers, len(lengths), longest)
    scale = torch.rand(layers, 1, 1, generator=generator)
    prompt.scores = {
        name: torch.rand(shape, generator=generator).round(decimals=digits) * scale * prompt.present
        for name in parts.SCORES
    }
    prompt.scores["even"] = prompt.present.float().expand(shape)
    prompt.density = list(torch.rand(layers, len(lengths), generator=generator))
    prompt.layers = [()] * layers
    return prompt


def total(budget, layers, length):
    return max(round(budget * layers * length), layers * min(length, 2))


@pytest.fixture(scope="module")
def read(small):
    """The random model, its inputs for two prompts with pictures, the prompts read, and answers."""
    _, _, model, processor = small
    pictures = [Image.new("RGB", (28, 28), colour) for colour in ("red", "teal")]
    texts = ["USER: <image>\nWhat is in the image? ASSISTANT:", "USER: What? <image> describe it in detail. ASSISTANT:"]
    inputs = processor(texts, pictures)
    answers = [torch.randint(3, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (40, 33)]
    return model, inputs, parts.read_prompt(model, inputs, [7, 7], 40), answers


# ---------------------------------------------------------------- sizes and kept tokens


@settings(max_examples=150)
@given(seeds, st.integers(1, 5), lengths, runs)
def test_every_combination_keeps_the_total_exactly_and_the_protected_tokens(seed, layers, lengths, run):
    prompt = made_up(seed, layers, lengths)
    keep = torch.stack(choose(prompt, run))  # [L, B, N]
    assert not (keep & ~prompt.present).any()
    assert keep[:, :, -1].all()
    for row, length in enumerate(lengths):
        assert keep[:, row, -length].all()
        assert int(keep[:, row].sum()) == total(run.budget, layers, length)


@given(seeds, st.integers(1, 5), lengths, budgets)
def test_greatest_mass_keeps_as_much_as_any_sizes_can(seed, layers, lengths, budget):
    prompt = made_up(seed, layers, lengths, digits=3)
    keep = torch.stack(choose(prompt, Run(budget, "sum", "mass", "none")))
    for row, length in enumerate(lengths):
        own = prompt.scores["sum"][:, row, -length:].double()
        own = own / own.sum(-1, keepdim=True).clamp(min=1e-300)
        others = own[:, 1:-1].flatten().sort(descending=True).values
        room = total(budget, layers, length) - layers * min(length, 2)
        kept = own[:, 1:-1][keep[:, row, -length:][:, 1:-1]]
        assert float(kept.sum()) == pytest.approx(float(others[:room].sum()), abs=1e-9)


@given(st.integers(1, 6), st.integers(1, 60), budgets)
def test_greatest_mass_shares_equal_scores_equally(layers, length, budget):
    present = torch.ones(1, length, dtype=torch.bool)
    counts = greatest_mass(torch.ones(layers, 1, length), present, budget)
    assert int(counts.max() - counts.min()) <= 1


@given(st.integers(2, 80), st.data())
def test_evenly_spaced_tokens_have_gaps_that_differ_by_one(length, data):
    count = data.draw(st.integers(2, length))
    marks = evenly(torch.tensor([count]), torch.ones(1, length, dtype=torch.bool))[0, 1:-1].bool()
    assert int(marks.sum()) == count - 2
    gaps = marks.nonzero()[:, 0].diff()
    assert len(gaps) == 0 or int(gaps.max() - gaps.min()) <= 1


@given(seeds, st.integers(1, 5), lengths, budgets)
def test_sizes_with_a_name_are_those_of_the_method(seed, layers, lengths, budget):
    prompt = made_up(seed, layers, lengths)
    dense = VLCache(budget)
    dense.density = prompt.density
    methods = {"same": Uniform(budget), "prefixkv": PrefixKV(budget), "pyramidkv": PyramidKV(budget), "vlcache": dense}
    for name, method in methods.items():
        found = layer_sizes(prompt, Run(budget, "value", name, "queue"))
        method.present = prompt.present
        assert torch.equal(found, method.allocate(prompt.scores["value"]))


# ---------------------------------------------------------------- combinations that are a method


@pytest.mark.parametrize("budget", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(
    "names, method",
    [
        (("sum", "prefixkv", "queue"), PrefixKV),
        (("sum", "prefixkv", "none"), lambda budget: PrefixKV(budget, decode="keep")),
        (("sum", "same", "queue"), Uniform),
        (("words", "vlcache", "queue"), VLCache),
        (("random", "same", "queue"), lambda budget: Random(budget, 7)),
    ],
)
def test_a_combination_that_is_a_method_gives_what_the_method_gives(read, budget, names, method):
    model, inputs, prompt, answers = read
    run = Run(budget, *names)
    found = parts.fill(model, prompt, choose(prompt, run), 40, evictor(prompt, run))
    expected = model.new_cache(40, method(budget))
    logits = model.read(**inputs, cache=expected)
    assert torch.equal(found.position, expected.position) and torch.equal(found.kept, expected.kept)
    losses = quality.likelihood(model, prompt.logits, found, answers)
    assert losses == quality.likelihood(model, logits, expected, answers)
    assert torch.equal(found.position, expected.position)


def test_the_full_run_is_the_full_cache(read):
    model, inputs, prompt, answers = read
    cache = parts.fill(model, prompt, choose(prompt, FULL), 40, evictor(prompt, FULL))
    losses = quality.likelihood(model, prompt.logits, cache, answers)
    full = model.new_cache(40)
    assert losses == quality.likelihood(model, model.read(**inputs, cache=full), full, answers)


@pytest.mark.parametrize("budget", [0.3, 0.6])
@pytest.mark.parametrize("name, method", [("h2o", H2O), ("least", parts.Least)])
def test_an_eviction_that_is_a_methods_drops_what_the_method_drops(read, budget, name, method):
    """From tokens of the prompt that neither of them chose."""
    model, inputs, prompt, answers = read
    run = Run(budget, "even", "same", name)
    keep = choose(prompt, run)

    class Given(method):
        def choose(self, layer, scores, counts):
            return keep[layer]

    expected = model.new_cache(40, Given(budget))
    logits = model.read(**inputs, cache=expected)
    found = parts.fill(model, prompt, keep, 40, evictor(prompt, run))
    losses = quality.likelihood(model, prompt.logits, found, answers)
    assert losses == quality.likelihood(model, logits, expected, answers)
    assert torch.equal(found.position, expected.position)


@settings(max_examples=15)
@given(runs)
@torch.inference_mode()
def test_oldest_keeps_the_prompt_and_the_newest_and_all_evictions_hold_the_same(read, run):
    model, _, prompt, _ = read
    caches = {name: parts.fill(model, prompt, choose(prompt, run), 25, evictor(prompt, run._replace(eviction=name)))
              for name in parts.EVICTIONS}  # fmt: skip
    before = [[set(row[row >= 0].tolist()) for row in layer] for layer in caches["oldest"].position]
    for step in range(25):
        for cache in caches.values():
            cache.advance(1)
        held = {name: cache.held for name, cache in caches.items()}
        assert all(torch.equal(held[name], held["queue"]) for name in ("h2o", "least", "oldest"))
        assert (held["none"] == caches["none"].kept + step + 1).all()
        for layer, rows in enumerate(before):
            for row, prompted in enumerate(rows):
                found = caches["oldest"].position[layer, row]
                new = int(held["oldest"][layer, row]) - len(prompted)
                end = int(caches["oldest"].lengths[row])
                assert set(found[found >= 0].tolist()) == prompted | set(range(end - new, end))


# ---------------------------------------------------------------- scores


def rotation(angles):
    """RoPE's matrix [Dh, Dh] in float64; it pairs i with i + Dh / 2."""
    cos, sin = angles.cos().diag(), angles.sin().diag()
    return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])


def naive_expected(query, key, value, frequency, coming):
    """Of one prompt without padding: query [H, N, Dh], key and value [Hkv, N, Dh] -> [N], by the definition."""
    heads, length, size = query.shape
    query, key, value, frequency = query.double(), key.double(), value.double(), frequency.double()
    ahead = torch.stack([rotation((length + p) * frequency) for p in range(coming)]).mean(0)
    received = torch.zeros(length, dtype=torch.float64)
    for head in range(heads):
        shared = head * len(key) // heads
        before = torch.stack([rotation(i * frequency).T @ query[head, i] for i in range(length)])
        mean = ahead @ before.mean(0)
        covariance = ahead @ torch.cov(before.T, correction=0).reshape(size, size) @ ahead.T
        scores = torch.stack([k @ mean / size**0.5 + k @ covariance @ k / (2 * size) for k in key[shared]])
        received += scores.softmax(0) * value[shared].norm(dim=-1) / heads
    return received


@settings(max_examples=25)
@given(seeds, st.lists(st.integers(1, 12), min_size=1, max_size=2), st.integers(1, 20))
def test_expected_attention_is_that_of_its_formula(seed, lengths, coming):
    generator = torch.Generator().manual_seed(seed)
    longest, frequency = max(lengths), torch.tensor([1.0, 0.1, 0.01])
    query = torch.randn(len(lengths), 4, longest, 6, generator=generator)
    key, value = torch.randn(2, len(lengths), 2, longest, 6, generator=generator)
    present = torch.arange(longest) >= torch.tensor([[longest - n] for n in lengths])
    positions = (present.cumsum(-1) - 1).clamp(min=0)

    def cos_sin(at):
        angle = (at[:, None, :, None] * frequency).repeat(1, 1, 1, 2)
        return angle.cos(), angle.sin()

    ahead = cos_sin(torch.tensor(lengths)[:, None] + torch.arange(coming))
    mean = tuple(part.mean(2, keepdim=True) for part in ahead)
    found = expected_attention(query, key, value, present, cos_sin(positions), mean)
    for row, n in enumerate(lengths):
        naive = naive_expected(query[row, :, -n:], key[row, :, -n:], value[row, :, -n:], frequency, coming)
        # float32 softmax of scores of about 10
        torch.testing.assert_close(found[row, -n:].double(), naive, rtol=1e-4, atol=1e-5)


def test_scores_are_those_of_their_definitions(read):
    model, _, prompt, _ = read
    assert all(score.shape == prompt.scores["sum"].shape for score in prompt.scores.values())
    frequency = rope_frequencies(model.config.text)
    for row, present in enumerate(prompt.present):
        length = int(present.sum())
        coming = min(512, model.config.text.max_position_embeddings - len(present))
        for layer, (query, key, value) in enumerate(prompt.layers):
            query, key, value = (tensor[row, :, present].double() for tensor in (query, key, value))
            shared = key.repeat_interleave(query.shape[0] // key.shape[0], 0)
            scores = (query @ shared.mT / key.shape[-1] ** 0.5).masked_fill(
                ~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf
            )
            received = scores.softmax(-1).mean(0)  # [N, N]
            first = length - min(32, length // 2)  # of the window
            window = received[first:].sum(0)
            before = window.masked_fill(torch.arange(length) >= first, 0.0)
            mean_key = key.mean(1, keepdim=True)
            cosine = (key * mean_key).sum(-1) / key.norm(dim=-1) / mean_key.norm(dim=-1)
            expected = {
                "sum": received.sum(0),
                "mean": received.sum(0) / torch.arange(length, 0, -1),
                "window": window,
                "pooled": torch.stack([*(before[max(0, j - 3) : j + 4].max() for j in range(first)), *window[first:]]),
                "value": received.sum(0) * value.pow(2).sum((0, 2)).sqrt(),
                "distance": 1 - cosine.mean(0),
                "expected": naive_expected(query, key, value, frequency, coming),
            }
            for name, wanted in expected.items():
                found = prompt.scores[name][layer, row, present].double()
                # float32 sums over up to 40 tokens; angles are float32, too
                torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert all((score[:, ~prompt.present] == 0).all() for score in prompt.scores.values())


# ---------------------------------------------------------------- tables


def records_of(loss, rouge, samples=5, budget=0.2):
    """Records of every combination; loss and rouge are functions of its three names and the sample."""
    every = [FULL, *(Run(budget, *names) for names in itertools.product(*PARTS.values()))]
    return [{"sample": sample, **run._asdict(), "tokens": 10 + sample,
             "nll": (10 + sample) * (0.0 if run == FULL else loss(*run[1:], sample)),
             "rouge": 1.0 if run == FULL else rouge(*run[1:], sample)}
            for run in every for sample in range(samples)]  # fmt: skip


@settings(max_examples=5)
@given(seeds)
def test_effects_of_parts_that_add_up_are_those_that_were_put_in(seed):
    generator = torch.Generator().manual_seed(seed)
    put = {part: dict(zip(levels, torch.randn(len(levels), generator=generator).tolist()))
           for part, levels in PARTS.items()}  # fmt: skip

    def loss(score, sizes, eviction, sample):
        return put["score"][score] + put["sizes"][sizes] + put["eviction"][eviction] + sample

    results = parts.Results(records_of(loss, lambda *names: loss(*names) / 10), 0.2)
    for part, level, moved in results.effects():
        expected = put[part][level] - sum(put[part].values()) / len(put[part])
        for (mean, low, high), scale in zip(moved, (1, 10)):
            assert mean * scale == pytest.approx(expected, abs=1e-9)
            assert low * scale == pytest.approx(expected, abs=1e-9) == high * scale  # alike in every sample


def test_the_ten_best_are_those_of_the_chosen_results_and_hold_the_same_bytes():
    names = list(itertools.product(*PARTS.values()))
    number = {name: index for index, name in enumerate(names)}
    ours = records_of(lambda *run: 1 + number[run[:3]] / 100, lambda *run: number[run[:3]] / len(names))
    theirs = records_of(lambda *run: 1 - number[run[:3]] / 1000, lambda *run: 0.5, samples=3)
    same = [name for name in names if name[2] != "none"]
    for chosen, expected in ((ours, same[:10]), (theirs, same[::-1][:10])):
        table = parts.tables(ours, chosen).split("hold the same bytes")[1]
        rows = [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in table.split("\n") if "| " in line]
        assert rows[1:11] == expected
    place = same.index(("sum", "prefixkv", "queue")) + 1
    rouge = len(same) + 1 - place
    assert f"PrefixKV as published is the last row: {place} of {len(same)} by perplexity, {rouge} by ROUGE-L." in table
    assert "| **sum** | **prefixkv** | **queue** | 2.89 " in table  # e to the power of 1.06


# ---------------------------------------------------------------- the command


QUICK = ["--samples", "3", "--batch-size", "2", "--budgets", "0.3", "--scores", "sum", "even", "--sizes", "prefixkv",
         "--evictions", "queue", "none", "--max-new-tokens", "5"]  # fmt: skip


def shorten(patch):
    """Scenes with short answers."""
    short = [replace(sample, answer=sample.answer[:60]) for sample in quality.scenes(3, 0, "parts reading")]
    patch.setattr(quality, "scenes", lambda count, seed, split: {"parts reading": short}[split])


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    """A finished run of three scenes."""
    out = tmp_path_factory.mktemp("parts") / "reading"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        assert main([*QUICK, "--out", str(out)]) == 0
    return out


def test_a_run_that_was_stopped_goes_on_to_the_same_table(reading, tmp_path, monkeypatch, capsys):
    out = ["--out", str(shutil.copytree(reading, tmp_path / "out"))]
    path = tmp_path / "out" / "results.jsonl"
    lines, table = path.read_text().splitlines(), (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "parts.png").stat().st_size > 10000
    assert len(lines) == len(set(lines)) == 3 * 5
    shorten(monkeypatch)
    monkeypatch.setattr(parts, "plot", lambda *arguments: None)  # once is enough
    path.write_text("\n".join([*lines[:4], lines[4][:20]]))
    assert main([*QUICK, *out]) == 0
    assert sorted(path.read_text().splitlines()) == sorted(lines)
    assert table == (tmp_path / "out" / "table.md").read_text()
    assert table.strip() == capsys.readouterr().out.strip()
    assert main([*QUICK, "--seed", "1", *out]) == 2
    assert "seed 0 → 1" in capsys.readouterr().err


def test_splits_have_scenes_of_their_own():
    answers = {split: [sample.answer for sample in quality.scenes(9, 0, f"parts {split}")]
               for split in ("reading", "testing")}  # fmt: skip
    assert answers["reading"] != answers["testing"]


def test_the_pretrained_decoder_reads_passages_and_is_told_by_perplexity_alone(small, tmp_path, monkeypatch, capsys):
    model, asked = small[2], []
    ids = torch.randint(3, 300, (5, 60), generator=torch.Generator().manual_seed(0)).tolist()

    def passages(tokenizer, count, split, length):
        asked.append((tokenizer, count, split, length))
        return ids[:count]

    real = SimpleNamespace(
        INSTALL="pip install it", find=lambda: "file", load=lambda path: (model, path), passages=passages
    )
    monkeypatch.setattr(parts, "real", real)
    monkeypatch.setattr(parts, "ANSWER", 20)
    arguments = [*QUICK, "--real", "--split", "testing", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert asked == [("file", 3, "testing", 768 + 20)]
    table = capsys.readouterr().out
    assert "| score | sizes | eviction | perplexity |\n" in table
    losses = [r["nll"] for r in quality.read_results(tmp_path) if r["score"] == "full"]
    for row, loss in zip(ids, losses):
        with torch.no_grad():
            logits = model(torch.tensor([row]))[0, 39:-1].double().log_softmax(-1)
        expected = -float(logits.gather(1, torch.tensor(row[40:])[:, None]).sum())
        assert loss == pytest.approx(expected, abs=1e-3)  # float32 logits, 20 of them summed
    real.find = lambda: None
    assert main(arguments) == 2
    assert "pip install it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--budgets", "0"], ["--budgets", "1.5"], ["--samples", "0"], ["--scores", "best"], ["--split", "x"]],
)
def test_arguments_that_make_no_sense_end_with_2(arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


def test_nothing_is_chosen_on_what_it_is_reported_on(reading, tmp_path, capsys):
    assert main([*QUICK, "--chosen", str(reading), "--out", str(tmp_path / "again")]) == 2
    assert "is of the split reading, too" in capsys.readouterr().err


def test_a_folder_without_results_cannot_be_chosen_from(tmp_path, capsys):
    assert main([*QUICK, "--chosen", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "lacks results" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_ratio_lies_in_its_interval():
    values, weights = torch.tensor([2.0, 6.0, 1.0]).double(), torch.tensor([1.0, 2.0, 3.0]).double()
    found, low, high = parts.ratio(values, weights)
    assert found == 1.5 and low <= found <= high and math.isclose(high, 3)
