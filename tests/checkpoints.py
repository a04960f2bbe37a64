"""Random checkpoints of the installed `transformers` and of the original LLaVA; changes to them; noisy pictures."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from bench.parity import CLIP, IMAGE_ID, random_model, save_original


def reference(seed=0, text=None, **settings):
    """A random LLaVA of CLIP and Llama with 256 positions; settings as in `random_model`."""
    return random_model("CLIP, Llama", seed=seed, text={"max_position_embeddings": 256, **(text or {})}, **settings)


def write(model, folder: Path) -> Path:
    """Saves a reference model under `folder` as transformers does, with a tokenizer and an image processor."""
    model.save_pretrained(folder)
    write_processor(folder, model.config.vision_config.image_size)
    return folder


def write_original(model, folder: Path, pickled: bool = False, **config) -> Path:
    """Saves a reference model as the original LLaVA did: its CLIP in a folder within, weights perhaps in pickles."""
    import torch
    from safetensors.torch import load_file

    save_original(model, folder, **config)
    for path in list(folder.rglob("*.safetensors")) if pickled else ():
        state = load_file(path)
        shard = {name: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(state)}
        for file in set(shard.values()):
            torch.save({name: tensor for name, tensor in state.items() if shard[name] == file}, path.with_name(file))
        edit(path.with_name("pytorch_model.bin.index.json"), weight_map=shard)
        path.unlink()
    write_processor(folder, model.config.vision_config.image_size)
    (folder / "preprocessor_config.json").rename(folder / CLIP / "preprocessor_config.json")
    (folder / "tokenizer_config.json").unlink()
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


def edit_weights(folder: Path, change, pickled: bool = False) -> None:
    """Has `change` alter the checkpoint's tensors, which it gets by name; the file may become a pickle."""
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    if pickled:
        path.unlink()
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, path)


def same_weights(one, other) -> bool:
    """Whether two models have the same parameters, to the bit."""
    import torch

    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and x.dtype == y.dtype and torch.equal(x, y) for (a, x), (b, y) in pairs)


def check_converted(folder: Path, out: Path, limit: float = 1e-5):
    """Converts a checkpoint; asserts that the copy is the same here, and in transformers gives the same logits."""
    import torch
    from transformers import AutoModelForImageTextToText

    import weights

    assert weights.main(["convert", str(folder), str(out)]) == 0
    (model, processor), (copy, copied) = weights.load(folder), weights.load(out)
    assert copy.config == model.config and same_weights(copy, model)
    prompt, images = processor.chat([("What?", None)], 1), [picture(75, 40)]
    assert copied.chat([("What?", None)], 1) == prompt
    inputs = processor(prompt, images)
    assert all(torch.equal(tensor, inputs[name]) for name, tensor in copied(prompt, images).items())
    theirs, report = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert float((theirs.eval()(**inputs).logits - model(**inputs)).abs().max()) < limit


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB"):
    """Noise, the same for the same seed."""
    import random

    from PIL import Image

    size = width * height * len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, (width, height), random.Random(seed).randbytes(size))
