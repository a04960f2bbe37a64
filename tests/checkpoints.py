"""Random checkpoints of the installed `transformers`, in every layout; changes to them; noisy pictures."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

from bench.parity import CLIP, IMAGE_ID, random_model, save_original

LAYOUTS = ("hub", "memory", "disk5")  # as on the Hub, in transformers' memory, as transformers 5 saves; see convert.py


def reference(seed=0, text=None, **settings):
    """A random LLaVA of CLIP and Llama with 256 positions; settings as in `random_model`."""
    return random_model("CLIP, Llama", seed=seed, text={"max_position_embeddings": 256, **(text or {})}, **settings)


def write(model, folder: Path, layout: str) -> Path:
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
    write_processor(folder, model.config.vision_config.image_size)
    return folder


def write_original(model, folder: Path, pickled: bool = False, **config) -> Path:
    """Saves a reference model as the original LLaVA did: its CLIP in a folder within, weights perhaps in pickles."""
    import torch
    from safetensors.torch import load_file

    save_original(model, folder, **config)
    clip = folder / CLIP
    if pickled:
        ours, tower = (load_file(path / "model.safetensors") for path in (folder, clip))
        names = sorted(ours)
        parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, held in parts.items():
            torch.save({name: ours[name] for name in held}, folder / file)
        index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        torch.save(tower, clip / "pytorch_model.bin")
        for path in (folder, clip):
            (path / "model.safetensors").unlink()
    write_processor(folder, model.config.vision_config.image_size)
    (folder / "preprocessor_config.json").rename(clip / "preprocessor_config.json")
    (folder / "tokenizer_config.json").write_text("{}")
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
    edit(folder / "tokenizer_config.json", added_tokens_decoder={IMAGE_ID: {"content": "<image>", "special": True}})
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    edit(folder / "preprocessor_config.json", **size)


def edit(path: Path, **change) -> None:
    """Changes values in a JSON file, and those within its objects; makes the file where there is none."""
    value = json.loads(path.read_text()) if path.exists() else {}
    for name, new in change.items():
        inside = isinstance(new, dict) and isinstance(value.get(name), dict)
        value[name] = {**value[name], **new} if inside else new
    path.write_text(json.dumps(value))


def edit_weights(folder: Path, change) -> None:
    """Has `change` alter the checkpoint's tensors, which it gets by name."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def same_weights(one, other) -> bool:
    """Whether two models have the same parameters, to the bit."""
    import torch

    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and x.dtype == y.dtype and torch.equal(x, y) for (a, x), (b, y) in pairs)


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB"):
    """Noise, the same for the same seed."""
    import random

    from PIL import Image

    size = width * height * len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, (width, height), random.Random(seed).randbytes(size))
