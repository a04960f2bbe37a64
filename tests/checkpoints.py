"""Random checkpoints of the installed `transformers`, in every layout."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import torch

LAYOUTS = ("hub", "memory", "disk5")  # as on the Hub, in transformers' memory, as transformers 5 saves; see weights.py
IMAGE_ID = 310


def reference(seed=0, *, kv_heads=4, tied=False, text=None, vision=None, **top):
    """A randomly initialised `LlavaForConditionalGeneration` in float32, with weights large enough to matter."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **{"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
               "image_size": 28, "patch_size": 7, **(vision or {})}
        ),
        text_config=LlamaConfig(
            **{"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
               "num_attention_heads": 4, "num_key_value_heads": kv_heads, "max_position_embeddings": 256,
               "tie_word_embeddings": tied, **(text or {})}
        ),
        **{"image_token_index": IMAGE_ID, "tie_word_embeddings": tied, "pad_token_id": 0, **top},
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.2 * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


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
