"""Random checkpoints of the installed `transformers`, in every layout."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

from bench.parity import IMAGE_ID, random_model

LAYOUTS = ("hub", "memory", "disk5")  # as on the Hub, in transformers' memory, as transformers 5 saves; see convert.py


def reference(seed=0, text=None, **settings):
    """A random LLaVA of CLIP and Llama with 256 positions; settings as in `random_model`."""
    return random_model("CLIP, Llama", seed=seed, text={"max_position_embeddings": 256, **(text or {})}, **settings)


def write(model, folder: Path, layout: str, tokenizer: bool = True) -> Path:
    """Saves a reference model under `folder` in one of LAYOUTS, with a tokenizer and an image processor."""
    from safetensors.torch import load_file, save_file

    model.save_pretrained(folder)
    if layout == "memory":
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        save_file(state, folder / "model.safetensors")
    if layout == "hub":
        state = load_file(folder / "model.safetensors")
        renamed = {
            re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name): tensor
            for name, tensor in state.items()
        }
        save_file(renamed, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        rope = config["text_config"].pop("rope_parameters")
        config["text_config"]["rope_theta"] = rope.pop("rope_theta")
        config["text_config"]["rope_scaling"] = rope if rope["rope_type"] != "default" else None
        (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        side = model.config.vision_config.image_size
        write_processor(folder, side)
    return folder


@functools.cache
def tokenizer_model() -> bytes:
    """A tokenizer of 300 and a few pieces."""
    import io

    import sentencepiece

    made = io.BytesIO()
    words = ["USER: What is in the image? ASSISTANT: a cat.", "describe it in detail", "yes no two three red blue"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 4), model_writer=made, model_type="bpe", vocab_size=305, hard_vocab_limit=False,
        byte_fallback=True, remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    return made.getvalue()


def write_processor(folder: Path, side: int) -> None:
    """The tokenizer, and an image processor for `side` pixels."""
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {str(IMAGE_ID): {"content": "<image>", "special": True}}})
    )
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}})
    )
