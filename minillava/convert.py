"""Layouts of checkpoints: names of weights, the original LLaVA's settings, files; the Hub layout is written here.

`weights.py` uses it to load, and for its commands `inspect` and `convert`.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minillava.checks import LlavaError, require, require_value
from minillava.config import LlavaConfig, TextConfig
from minillava.files import HUB_ID, find, replacing, write_file, write_json
from minillava.model import Llava
from minillava.processor import IMAGE_TOKEN, Processor, read_json

INT8 = "minillava_int8"  # the quant_method in config.json: matrices as int8, with a scale for each row

# ---------------------------------------------------------------- names of weights

# Checkpoint names to ours, applied in this order. One table serves the layouts in use:
#   Hub, transformers up to 4.51     language_model.model.layers…        vision_tower.vision_model.encoder.layers…
#   transformers 4.52+, in memory    model.language_model.layers…        model.vision_tower.vision_model…
#   transformers 5, on disk          language_model.model.layers…        vision_tower.encoder.layers…
#   original LLaVA, and its CLIP     model.layers…, model.mm_projector…  vision_model.encoder.layers…
TO_OURS = [
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),
    (r"^vision_model\.", "vision_tower."),
    (r"^model\.(?=layers\.|embed_tokens\.|norm\.)", "language_model."),
    (r"^model\.mm_projector\.(0\.)?(?=weight|bias)", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.(?=language_model|vision_tower|multi_modal_projector|image_newline)", ""),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "language_model."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^vision_tower\.(embeddings|encoder)\.", "vision_tower."),
    (r"^(vision_tower\.layers\.\d+)\.(self_attn|mlp)\.", r"\1."),
]
TO_HUB = [
    (r"^language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^vision_tower\.(?=(class|patch|position)_embedding)", "vision_tower.embeddings."),
    (r"^(vision_tower\.layers\.\d+\.)(?=[qkv]_proj|out_proj)", r"\1self_attn."),
    (r"^(vision_tower\.layers\.\d+\.)(?=fc)", r"\1mlp."),
    (r"^vision_tower\.(?=layers\.)", "vision_tower.encoder."),
    (r"^vision_tower\.", "vision_tower.vision_model."),
]
# Tables that old versions saved and every version computes; SigLIP's pooling, which LLaVA does not use; the newline
# of a LLaVA-NeXT, saved without tiles, too; and CLIP's text tower beside the original LLaVA.
UNUSED = re.compile(
    r"(rotary_emb\.inv_freq|\.position_ids)$|^(model\.)?vision_tower\.(vision_model\.)?head\.|^(model\.)?image_newline$"
    r"|^(text_model\.|text_projection\.|visual_projection\.|logit_scale$)"
)


def rename(name: str, table: Sequence[tuple[str, str]]) -> str:
    """The name after every replacement of the table."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def our_name(name: str) -> str:
    """The parameter of `Llava` that a checkpoint's tensor of any known layout belongs to."""
    return rename(name, TO_OURS)


def hub_name(name: str) -> str:
    """The name of our parameter in the Hub layout, which every version of transformers reads."""
    return rename(name, TO_HUB)


# ---------------------------------------------------------------- the original LLaVA, and files of weights


def clip_folder(folder: Path) -> Path | None:
    """The CLIP checkpoint that an original LLaVA names: a folder inside its own or beside it, or a Hub id.

    None for a checkpoint in another layout, which has its vision tower itself.
    """
    raw = read_json(folder / "config.json")
    if "mm_vision_tower" not in raw:
        return None
    name = raw["mm_vision_tower"]
    last = Path(name).name if isinstance(name, str) else ""
    for candidate in (folder / last, folder.parent / last):
        config = candidate / "config.json"
        if last not in ("", "..") and os.path.isfile(config) and candidate.resolve() != folder.resolve():
            return candidate
    if isinstance(name, str) and re.fullmatch(HUB_ID, name):
        return find(name)
    raise LlavaError(
        f"config.json has mm_vision_tower = {name!r}, and there is no folder {last!r} in {folder} or beside it; "
        "expected a Hub id such as openai/clip-vit-large-patch14-336. Copy the CLIP checkpoint there."
    )


def hub_config(folder: Path) -> dict[str, Any]:
    """The `config.json` in a folder; that of an original LLaVA (keys `mm_...`, Llama's at the top) as the Hub has it.

    The original marks images by an id outside its vocabulary; here, as on the Hub, `<image>` is the first id after
    it, and the vocabulary is filled up to a multiple of 64.
    """
    raw, clip = read_json(folder / "config.json"), clip_folder(folder)
    if clip is None:
        return raw
    kinds = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
    features = {"patch": "default", "cls_patch": "full"}
    defaults = {"mm_patch_merge_type": "flat", "mm_vision_select_feature": "patch", "image_aspect_ratio": "square",
                "vocab_size": TextConfig.vocab_size, "model_type": None}  # fmt: skip
    given = {**defaults, **{name: value for name, value in raw.items() if value is not None}}
    merge, hub = given["mm_patch_merge_type"], "the Hub's layout, such as that of llava-hf/llava-v1.6-vicuna-7b-hf"
    require_value(merge == "flat", "mm_patch_merge_type", merge, f"flat: LLaVA-1.6 is read in {hub}")
    choices = {"model_type": kinds, "mm_vision_select_feature": features, "image_aspect_ratio": ("square", "pad")}
    for name, known in choices.items():
        require_value(given[name] in list(known), name, given[name], f"{' or '.join(known)} in the original layout")
    vocabulary, tower = given["vocab_size"], read_json(clip / "config.json")
    tower = tower.get("vision_config", tower)
    sane = type(vocabulary) is int and 0 < vocabulary < 2**24
    require_value(sane, "vocab_size", vocabulary, "a number of tokens")
    start_end = given.get("mm_use_im_start_end")
    require(not start_end, "config.json has mm_use_im_start_end: tokens around images are not implemented.")
    name, kind = raw["mm_vision_tower"], tower.get("model_type") if isinstance(tower, dict) else None
    is_clip = kind in (None, "clip", "clip_vision_model")
    require(is_clip, f"{name!r:.99} is of type {kind!r:.99}; in the original layout only CLIP is read.")
    text = {name: value for name, value in raw.items() if not name.startswith("mm_")}
    size = math.ceil((vocabulary + 2) / 64) * 64
    return {
        "model_type": "llava",
        "text_config": {**text, "model_type": kinds[given["model_type"]], "vocab_size": size},
        "vision_config": tower,
        "image_token_id": vocabulary,
        "pad_token_id": raw.get("pad_token_id", 0),
        "eos_token_id": raw.get("eos_token_id"),
        "vision_feature_layer": given.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": features[given["mm_vision_select_feature"]],
        "mm_projector_type": given.get("mm_projector_type", "linear"),
        "tie_word_embeddings": given.get("tie_word_embeddings", False),
    }


def fill_up(tensor: Tensor, rows: int) -> Tensor:
    """The tensor with so many rows; new ones are the mean of the others, whose logit is never the largest."""
    if len(tensor) == rows:
        return tensor
    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), -1)])


def read_tensors(paths: Sequence[Path]) -> list[tuple[str, Tensor]]:
    """Every tensor of the files with its name there. They are mapped: what nobody uses is not read.

    Of a pickle, `.bin`, PyTorch's restricted reader makes tensors only and executes nothing.
    """
    tensors: list[tuple[str, Tensor]] = []
    for path in paths:
        try:
            pickled = path.suffix == ".bin"
            state = torch.load(path, "cpu", weights_only=True, mmap=True) if pickled else load_file(path)
            tensors += [(name, t) for name, t in state.items() if isinstance(name, str) and isinstance(t, Tensor)]
        except Exception as error:  # those of pickle, zip, torch and safetensors
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            damaged = f"{path} is damaged, or cannot be read as weights ({reason:.200})"
            raise LlavaError(f"{damaged}. Copy or download it again, or save it as safetensors.") from None
    return tensors


# ---------------------------------------------------------------- writing the Hub layout


def config_dict(config: LlavaConfig, dtype: str) -> dict[str, object]:
    """The contents of a `config.json` that `weights.load` reads, and transformers, too, unless the dtype is int8."""
    text, vision = asdict(config.text), asdict(config.vision)
    if config.text.model_type == "qwen2":  # which always has its biases
        del text["attention_bias"], text["mlp_bias"]
    vision |= {"projection_dim": config.vision.hidden_size} if config.vision.has_cls else {"vision_use_head": False}
    raw: dict[str, object] = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    if config.image_grid_pinpoints:
        raw = {
            "model_type": "llava_next",
            "architectures": ["LlavaNextForConditionalGeneration"],
            "image_grid_pinpoints": config.image_grid_pinpoints,
        }
    names = ("projector_hidden_act", "multimodal_projector_bias", "mm_projector_type", "vision_feature_layer",
             "vision_feature_select_strategy", "pad_token_id")  # fmt: skip
    if dtype == "int8":
        raw["quantization_config"], dtype = {"quant_method": INT8}, "bfloat16"  # of all that is not in 8 bits
    return {
        **raw,
        **{name: getattr(config, name) for name in names},
        "image_token_index": config.image_token_id,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "torch_dtype": dtype,
        "text_config": {name: value for name, value in text.items() if value is not None},
        "vision_config": vision,
    }


def save_weights(model: Llava, path: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the model's weights in the Hub layout, whole or not at all, in this dtype, or each in its own."""
    state = {hub_name(name): p.detach().to("cpu", dtype).contiguous() for name, p in model.named_parameters()}
    with replacing(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})


def convert(model: Llava, processor: Processor, folder: Path, out: Path) -> None:
    """Writes the checkpoint in `folder`, loaded, in the Hub layout, to the folder `out`; whole or not at all."""
    config, dtype = model.config, model.lm_head.weight.dtype
    tokenizer = read_json(folder / "tokenizer_config.json")
    added = {}
    for token in map(asdict, processor.tokenizer.added.values()):
        id = token.pop("id")
        added[str(id)] = {**token, "normalized": False, "single_word": False}
    if not (folder / "tokenizer.model").is_file():  # tokenizer.json has them all but for <image>
        added = {id: token for id, token in added.items() if token["content"] == IMAGE_TOKEN}
        added |= tokenizer.get("added_tokens_decoder") or {}
    images: dict[str, object] = asdict(processor.image_processor)
    if config.image_grid_pinpoints:
        images["image_processor_type"] = "LlavaNextImageProcessor"
        images["image_grid_pinpoints"] = config.image_grid_pinpoints
    files = {
        "config.json": config_dict(config, str(dtype).removeprefix("torch.")),
        "tokenizer_config.json": {**tokenizer, "added_tokens_decoder": added},
        "preprocessor_config.json": images,
        "processor_config.json": {
            "processor_class": "LlavaNextProcessor" if config.image_grid_pinpoints else "LlavaProcessor",
            "patch_size": config.vision.patch_size,
            "image_token": IMAGE_TOKEN,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "num_additional_image_tokens": int(config.vision.has_cls),
        },
        "generation_config.json": {"eos_token_id": list(config.eos_token_id), "pad_token_id": config.pad_token_id},
    }
    with replacing(out) as temporary:
        temporary.mkdir(parents=True)
        save_weights(model, temporary / "model.safetensors")
        for name, content in files.items():
            write_json(temporary / name, content)
        for name in ("tokenizer.model", "tokenizer.json", "special_tokens_map.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
        if processor.template is not None:
            write_file(temporary / "chat_template.jinja", processor.template.encode())
