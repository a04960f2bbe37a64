"""Checkpoints: find or download, check, map names, stream into the model.

model, processor = load("minillava/tiny")

python -m weights inspect FOLDER_OR_ID     what is in a checkpoint, and what would be missing
python -m weights convert FOLDER_OR_ID OUT the same checkpoint in the Hub layout, which everything reads
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from minillava.command import end_quietly, printable, run_command  # isort: skip  before torch: see __init__.py

if __name__ == "__main__":
    end_quietly()

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minillava.checks import LlavaError, require
from minillava.config import LlavaConfig, TextConfig, VisionConfig
from minillava.fast import optimize
from minillava.model import ACTIVATIONS, Llava
from minillava.processor import IMAGE_TOKEN, ImageProcessor, Processor, read_json
from prefixkv import Plan

# ---------------------------------------------------------------- config.json

CHOICES: dict[str, Collection[str]] = {
    "hidden_act": ACTIVATIONS,
    "projector_hidden_act": ACTIVATIONS,
    "vision_feature_select_strategy": ("default", "full"),
    "mm_projector_type": ("mlp2x_gelu", "linear"),
}
ROPE_SETTINGS = {  # of each scaling that `rope_frequencies` knows
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
DEFAULTS: dict[str, dict[str, Any]] = {  # of each kind of part, where they differ from those in config.py
    "llama": {"eos_token_id": 2},
    "mistral": {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
                "eos_token_id": 2},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
              "max_position_embeddings": 32768},
    "clip_vision_model": {},
    "siglip_vision_model": {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}  # fmt: skip
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # of LLaVA-NeXT
RELATIVES = {  # what checkpoints of the wider family need that is not here
    "llava_onevision": "its limit on tiles (anyres_max_9), which shrinks features",
    "llava_next_video": "frames of a video and their pooling",
    "video_llava": "two vision towers and frames of a video",
    "vipllava": "features of several vision layers, and the norm that joins them",
}
C = TypeVar("C")


def read_fields(cls: type[C], raw: dict[str, Any], where: str) -> C:
    """The dataclass `cls` from the keys of `raw` that it has fields for, each checked for its type.

    An absent key, or null, keeps the default, which is that of the `transformers` class: files leave defaults out.
    """
    types: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str, "dict": dict}
    values = {}
    for field in fields(cls):  # type: ignore[arg-type]
        name, value = field.name, raw.get(field.name)
        if value is None:
            continue
        kind = str(field.type).split(" ")[0].split("[")[0]  # "int | None" is an int, where it is there
        fits = isinstance(value, types[kind]) and isinstance(value, bool) == (kind == "bool")
        require(fits, f"config.json has {where}{name} = {value!r}; expected a value of type {kind}.")
        known = CHOICES.get(name, [value])
        require(value in known, f"config.json has {where}{name} = {value!r}; known are {', '.join(map(str, known))}.")
        values[name] = value
    return cls(**values)


def parse_config(raw: dict[str, Any], generation: dict[str, Any]) -> LlavaConfig:
    """The configuration in a `config.json` and a `generation_config.json` ({} if there is none).

    Raises LlavaError for an architecture that model.py does not hold and for values it cannot use.
    """
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind in RELATIVES:
        raise LlavaError(f"config.json has model_type {kind!r}, which needs {RELATIVES[kind]}; only 'llava' and "
                         "'llava_next' are implemented.")  # fmt: skip
    known = ("llava", "llava_next")
    require(kind in known, f"config.json has model_type {kind!r}; only 'llava' and 'llava_next' are implemented.")
    parts = []
    for name, kinds in (("text_config", ("llama", "mistral", "qwen2")),
                        ("vision_config", ("clip_vision_model", "siglip_vision_model"))):  # fmt: skip
        part = {} if raw.get(name) is None else raw[name]
        require(isinstance(part, dict), f"config.json has {name} = {part!r}; expected an object.")
        found = kinds[0] if part.get("model_type") is None else part["model_type"]
        names = ", ".join(map(repr, kinds))
        require(found in kinds, f"config.json has {name} of type {found!r}; only {names} are implemented.")
        # An absent key and null are the default, but these two say something by null: one per query head, no window.
        said = {key: value for key, value in part.items()
                if value is not None or key in ("num_key_value_heads", "sliding_window")}  # fmt: skip
        parts.append({**DEFAULTS[found], **said, "model_type": found})
    text, vision = parts
    # A window is how far attention reaches back. Within it nothing differs from Llama; a longer text is refused.
    window = None
    if text["model_type"] == "mistral" or (text["model_type"] == "qwen2" and text.get("use_sliding_window")):
        window = text.get("sliding_window", 4096)
        usable = window is None or (type(window) is int and window > 0)
        require(usable, f"config.json has sliding_window = {window!r:.99}; expected a number of tokens, or null.")
    if text["model_type"] == "mistral":
        text["model_type"] = "llama"
    if text["model_type"] == "qwen2":
        text.pop("attention_bias", None)  # a key of other kinds: here biases are where they are
    if window and type(text.get("max_position_embeddings")) is int:
        text["max_position_embeddings"] = min(window, text["max_position_embeddings"])
    partial = text.get("partial_rotary_factor")
    require(partial in (None, 1), f"config.json has partial_rotary_factor = {partial!r}; RoPE turns whole heads here.")
    # transformers 5 moved rope_theta and rope_scaling into one dictionary, rope_parameters.
    scaling, parameters = (text.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
    require(isinstance(scaling, dict) and isinstance(parameters, dict), "config.json: RoPE settings are no object.")
    rope = {**scaling, **parameters}
    text["rope_theta"] = rope.pop("rope_theta", text.get("rope_theta"))
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    text["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    if raw.get("tie_word_embeddings") is not None and text.get("tie_word_embeddings") is not True:
        text["tie_word_embeddings"] = raw["tie_word_embeddings"]  # either may say it
    top = {
        **raw,
        "image_token_id": first(raw.get("image_token_id"), raw.get("image_token_index")),
        "eos_token_id": None,  # this, the grids and the two parts are set below
        "image_grid_pinpoints": None,
        "vision": None,
        "text": None,
    }
    said = raw.get("text_config") or {}
    eos = first(*(part.get("eos_token_id") for part in (generation, said, raw, text)), [])
    ends = eos if isinstance(eos, list) else [eos]
    ids = all(type(end) is int and 0 <= end < 2**31 for end in ends)
    require(ids, f"eos_token_id is {str(eos)[:99]}; expected one id or a list of ids.")
    # As in transformers, a generation_config.json that is there decides. -1 stands for none: then a sample that has
    # ended is filled up with its end.
    pad = first(*(part.get("pad_token_id") for part in ((generation,) if generation else (raw, text))))
    top["pad_token_id"] = first(None if pad == -1 else pad, *ends[:1], 0)
    config = replace(
        read_fields(LlavaConfig, top, ""),
        vision=read_fields(VisionConfig, vision, "vision_config."),
        text=read_fields(TextConfig, text, "text_config."),
        eos_token_id=tuple(ends),
        image_grid_pinpoints=read_pinpoints(raw) if raw["model_type"] == "llava_next" else (),
    )
    check_config(config)
    return config


def first(*values: Any) -> Any:
    """The first of them that is not None; None if there is none."""
    return next((value for value in values if value is not None), None)


def read_pinpoints(raw: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    """LLaVA-NeXT's sizes of grids: pairs of (height, width)."""
    pinpoints = PINPOINTS if raw.get("image_grid_pinpoints") is None else raw["image_grid_pinpoints"]
    usable = isinstance(pinpoints, list) and 0 < len(pinpoints) <= 1000 and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(side) is int for side in pair) for pair in pinpoints
    )  # fmt: skip
    require(usable, f"config.json has image_grid_pinpoints = {pinpoints!s:.99}; expected pairs [height, width].")
    return tuple((pair[0], pair[1]) for pair in pinpoints)


def check_config(config: LlavaConfig) -> None:
    """Raises LlavaError where values are out of range or contradict each other."""
    text, vision = config.text, config.vision
    for where, part in (("text_config", text), ("vision_config", vision)):
        for name, value in vars(part).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            limit = 1e12 if isinstance(value, float) else 1024 if name == "num_hidden_layers" else 2**24
            fits = not number or 0 < value <= limit
            require(
                fits, f"config.json has {where}.{name} = {value!r:.99}; expected a number above 0, up to {limit:g}."
            )
        width, heads = part.hidden_size, part.num_attention_heads
        even = width % heads == 0 or (part is text and text.head_dim is not None)
        require(even, f"config.json: {where}.hidden_size {width} is not a multiple of its {heads} heads.")
    heads, shared = text.num_attention_heads, text.kv_heads
    require(heads % shared == 0, f"config.json: {heads} query heads cannot share {shared} key-value heads evenly.")
    require(text.head_size % 2 == 0, f"config.json: head size {text.head_size} is odd; RoPE turns pairs.")
    side, patch, depth = vision.image_size, vision.patch_size, vision.num_hidden_layers
    require(vision.num_patches, f"config.json: patch_size {patch} exceeds image_size {side}.")
    layer, token = config.vision_feature_layer, config.image_token_id
    inside = -depth - 1 <= layer <= depth
    require(inside, f"config.json has vision_feature_layer = {layer}; the tower has {depth} layers.")
    for height, width in config.image_grid_pinpoints:
        fits = (
            min(height, width) >= side
            and height % side == width % side == 0
            and height * width <= min(100 * side**2, 10**8)
        )
        require(fits, f"config.json has [{height}, {width}] in image_grid_pinpoints; expected multiples of image_size "
                f"{side}, at most 100 tiles and 100 million pixels.")  # fmt: skip
    if config.image_grid_pinpoints:
        square = config.num_image_tokens == vision.num_patches
        require(square, f"config.json has vision_feature_select_strategy = {config.vision_feature_select_strategy!r}, "
                f"which leaves {config.num_image_tokens} features of {vision.num_patches} patches; tiles need exactly "
                "those.")  # fmt: skip
    require(config.num_image_tokens > 0, "config.json: the only patch is dropped; expected a smaller patch_size.")
    inside = 0 <= token < text.vocab_size
    require(inside, f"config.json: image token {token} is outside the vocabulary of {text.vocab_size}.")
    inside = 0 <= config.pad_token_id < text.vocab_size
    require(inside, f"config.json: pad token {config.pad_token_id} is outside the vocabulary of {text.vocab_size}.")
    if text.rope_scaling:
        kind = text.rope_scaling["rope_type"]
        known = ", ".join(ROPE_SETTINGS)
        require(
            isinstance(kind, str) and kind in ROPE_SETTINGS,
            f"config.json asks for {kind!r} RoPE scaling; known are {known}.",
        )
        for name in ROPE_SETTINGS[kind]:
            value = text.rope_scaling.get(name)
            fits = isinstance(value, (int, float)) and 0 < value < 1e12
            require(fits, f"config.json: RoPE scaling has {name} = {value!r}; expected a number above 0.")
        if kind == "llama3":
            low, high = (text.rope_scaling[name] for name in ("low_freq_factor", "high_freq_factor"))
            require(
                low < high, f"config.json: RoPE scaling has factors {low} and {high}; expected the lower one first."
            )


def read_config(folder: Path) -> LlavaConfig:
    """The configuration of the checkpoint in `folder`."""
    there = (folder / "config.json").is_file()
    require(there, f"{folder} has no config.json; expected the folder of a LLaVA checkpoint.")
    raw = read_json(folder / "config.json")
    if "mm_vision_tower" in raw:
        raw = from_original(raw, read_json(clip_folder(folder, raw) / "config.json"))
    return parse_config(raw, read_json(folder / "generation_config.json"))


# ---------------------------------------------------------------- the original LLaVA's layout


def clip_folder(folder: Path, raw: dict[str, Any]) -> Path:
    """The CLIP checkpoint that an original LLaVA names: a folder inside its own or beside it, or a Hub id."""
    name = raw["mm_vision_tower"]
    last = Path(name).name if isinstance(name, str) else ""
    for candidate in (folder / last, folder.parent / last):
        if (
            last not in ("", "..")
            and os.path.isfile(candidate / "config.json")
            and candidate.resolve() != folder.resolve()
        ):
            return candidate
    usable = isinstance(name, str) and re.fullmatch(HUB_ID, name)
    require(
        usable,
        f"config.json has mm_vision_tower = {name!r}, and there is no folder {last!r} in {folder} or beside it; "
        "expected a Hub id such as openai/clip-vit-large-patch14-336. Copy the CLIP checkpoint there.",
    )
    return find(name)


def from_original(raw: dict[str, Any], clip: dict[str, Any]) -> dict[str, Any]:
    """The config of an original LLaVA (keys `mm_...`, Llama's at the top) as the Hub layout's.

    The original marks images by an id outside its vocabulary; here, as on the Hub, `<image>` is the first id behind
    it, and the vocabulary is filled up to a multiple of 64.
    """
    kinds = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
    kind, feature = str(raw.get("model_type")), raw.get("mm_vision_select_feature", "patch")
    require(kind in kinds, f"config.json has model_type {kind!r}; known are {', '.join(kinds)}.")
    merge = first(raw.get("mm_patch_merge_type"), "flat")
    require(merge == "flat", f"config.json has mm_patch_merge_type {merge!r}: LLaVA-1.6 is read in the Hub's layout, "
            "such as that of llava-hf/llava-v1.6-vicuna-7b-hf.")  # fmt: skip
    features = {"patch": "default", "cls_patch": "full"}
    known = isinstance(feature, str) and feature in features
    require(known, f"config.json has mm_vision_select_feature = {feature!r}; known are {', '.join(features)}.")
    tower = clip.get("vision_config", clip)
    tower = tower.get("model_type") if isinstance(tower, dict) else None
    clips = tower in (None, "clip", "clip_vision_model")
    require(clips, f"{raw['mm_vision_tower']!r:.99} is of type {tower!r}; in the original layout only CLIP is read.")
    vocabulary = raw.get("vocab_size", TextConfig.vocab_size)
    usable = type(vocabulary) is int and 0 < vocabulary < 2**24
    require(usable, f"config.json has vocab_size = {vocabulary!r:.99}; expected a number of tokens.")
    aspect = first(raw.get("image_aspect_ratio"), "square")
    require(aspect in ("square", "pad"), f"config.json has image_aspect_ratio = {aspect!r:.99}; in the original layout "
            "only 'square' and 'pad' are read.")  # fmt: skip
    marked = raw.get("mm_use_im_start_end")
    require(not marked, "config.json has mm_use_im_start_end: tokens around images are not implemented.")
    text = {name: value for name, value in raw.items() if not name.startswith("mm_")}
    return {
        "model_type": "llava",
        "text_config": {**text, "model_type": kinds[kind], "vocab_size": math.ceil((vocabulary + 2) / 64) * 64},
        "vision_config": clip.get("vision_config", clip),
        "image_token_id": vocabulary,
        "pad_token_id": raw.get("pad_token_id", 0),
        "eos_token_id": raw.get("eos_token_id"),
        "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": features[feature],
        "mm_projector_type": raw.get("mm_projector_type", "linear"),
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
    }


# ---------------------------------------------------------------- names and files

DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]  # no pickles, nothing executable
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
PICKLES = ["*.bin", *DOWNLOADED[1:]]  # for repositories that have nothing else; read as plain tensors

# Checkpoint names to ours, applied in this order. One table serves the layouts in use:
#   Hub, transformers up to 4.51     language_model.model.layers…        vision_tower.vision_model.encoder.layers…
#   transformers 4.52+, in memory    model.language_model.layers…        model.vision_tower.vision_model…
#   transformers 5, on disk          language_model.model.layers…        vision_tower.encoder.layers…
#   original LLaVA, and its CLIP     model.layers…, model.mm_projector…  vision_model.encoder.layers…
RENAMES = [
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
# Tables that old versions saved and every version computes; and SigLIP's pooling, which LLaVA does not use.
IGNORED = re.compile(r"(rotary_emb\.inv_freq|\.position_ids)$|^(model\.)?vision_tower\.(vision_model\.)?head\.")
CLIP_TEXT = re.compile(r"^(text_model\.|text_projection\.|visual_projection\.|logit_scale$)")


def our_name(name: str) -> str:
    """The parameter of `Llava` that a checkpoint's tensor of any known layout belongs to."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def hub_name(name: str) -> str:
    """The name of our parameter in the Hub layout, which every version of transformers reads."""
    name = re.sub(r"^language_model\.", "language_model.model.", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    name = re.sub(
        r"^vision_tower\.(class_embedding|patch_embedding|position_embedding)", r"vision_tower.embeddings.\1", name
    )
    name = re.sub(
        r"^vision_tower\.layers\.(\d+)\.(\w_proj|out_proj)", r"vision_tower.encoder.layers.\1.self_attn.\2", name
    )
    name = re.sub(r"^vision_tower\.layers\.(\d+)\.(fc\d)", r"vision_tower.encoder.layers.\1.mlp.\2", name)
    name = re.sub(r"^vision_tower\.layers\.", "vision_tower.encoder.layers.", name)
    return re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)


def find_device(name: str) -> torch.device:
    """The device of that name; raises LlavaError if it cannot be used here."""
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except Exception as error:  # each kind of device raises its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LlavaError(f"The device {name!r} cannot be used ({reason}); try --device cpu.") from None
    return device


def find(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: as given, or downloaded from the Hub (and kept in its cache)."""
    name = str(path_or_id)
    if os.path.isdir(name):  # unlike Path.is_dir, no error for a name that is too long for any file
        return Path(name)
    if os.path.exists(name):
        raise LlavaError(f"{name} is a file; expected the folder of a checkpoint, or a Hub id.")
    if not re.fullmatch(HUB_ID, name):
        raise LlavaError(f"There is no folder {name:.200}, and it is not a Hub id such as llava-hf/llava-1.5-7b-hf.")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=DOWNLOADED))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=PICKLES))
        return folder
    except Exception as error:  # the hub's client raises its own, requests' and the system's errors
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LlavaError(
            f"There is no folder {name}, and the Hub could not give a checkpoint of that name ({reason}). "
            "Check the id and the network, or download it and pass the folder."
        ) from None


def shards(folder: Path) -> list[Path]:
    """The files with a checkpoint's weights: safetensors, or PyTorch's `.bin`; one, or those that an index names."""
    for stem, kind in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{kind}.index.json", folder / f"{stem}.{kind}"
        if index.is_file():
            break
        if single.is_file():
            return [single]
    else:
        raise LlavaError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json, nor pytorch_model.bin; "
            "expected one."
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise LlavaError(f"{index} has no weight_map from tensors to files; copy or download it again.")
    files = []
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(f".{kind}"):
            raise LlavaError(f"{index} points to {name!r}; expected {kind} files in its own folder.")
        if not os.path.isfile(folder / name):
            raise LlavaError(f"{index} names {name}, which is not in the folder; copy or download the missing shard.")
        files.append(folder / name)
    return files


@dataclass(frozen=True)
class Entry:
    """A tensor in a file, not read yet."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]  # while the file is open


def tensors(files: list[Path]) -> Iterator[Entry]:
    """Every tensor of the files, in their order; `read` works until the next file is begun.

    A `.bin` is a pickle; it is read by PyTorch's restricted reader, which makes tensors and executes nothing.
    """
    for path in files:
        if path.suffix == ".bin":
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                items = list(state.items())
            except Exception as error:  # pickle's, zip's and torch's own errors
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                raise LlavaError(
                    f"{path} cannot be read as weights ({reason}). Copy it again, or save it as safetensors."
                ) from None
            for name, tensor in items:
                if isinstance(name, str) and isinstance(tensor, Tensor):
                    dtype = str(tensor.dtype).removeprefix("torch.")
                    yield Entry(name, path, tuple(tensor.shape), dtype, lambda tensor=tensor: tensor)  # type: ignore[misc]
            continue
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no dict)
                    part = opened.get_slice(name)
                    yield Entry(name, path, tuple(part.get_shape()), part.get_dtype(), partial(opened.get_tensor, name))
        except SafetensorError as error:
            raise LlavaError(
                f"{path} is damaged ({error}); its header and its size do not fit. Copy or download it again."
            ) from None


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint; for an original LLaVA those of its CLIP too, unless its own hold a vision tower."""
    files = shards(folder)
    raw = read_json(folder / "config.json")
    if "mm_vision_tower" in raw and not any(our_name(e.name).startswith("vision_tower.") for e in tensors(files)):
        files += shards(clip_folder(folder, raw))
    return files


@dataclass(frozen=True)
class Match:
    """How a checkpoint's tensors fit the model."""

    files: list[Path]
    source: dict[str, str]  # our name -> the checkpoint's
    tied: bool  # the output layer is the embedding, as the config says, and not in the files
    problems: list[str]  # every missing, unexpected and misshapen tensor


def match(model: Llava, folder: Path) -> Match:
    """Compares names and shapes; nothing is read but headers."""
    files = weight_files(folder)
    wanted = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    source: dict[str, str] = {}
    problems = []
    for entry in tensors(files):
        name, ours, shape = entry.name, our_name(entry.name), entry.shape
        if IGNORED.search(name) or CLIP_TEXT.search(name):
            continue
        if ours == "image_newline" and not model.config.image_grid_pinpoints:  # saved, and not used without tiles
            continue
        if ours not in wanted:
            problems.append(f"unexpected {name}")
        elif ours in source:
            problems.append(f"{name} and {source[ours]} are the same parameter")
        elif shape != tuple(wanted[ours]) and not grows(ours, shape, model):
            problems.append(f"{name} has shape {list(shape)}, expected {list(wanted[ours])}")
        source[ours] = name
    missing = wanted.keys() - source.keys()
    tied = model.config.text.tie_word_embeddings and "lm_head.weight" in missing
    if tied:  # where a file brings an output layer of its own, the two are not shared, whatever its config says
        missing -= {"lm_head.weight"}
    return Match(files, source, tied, [f"missing {hub_name(name)}" for name in sorted(missing)] + problems)


def grows(name: str, shape: tuple[int, ...], model: Llava) -> bool:
    """Whether rows are to be added: an original LLaVA's vocabulary ends before `<image>`."""
    rows, width = model.config.image_token_id, model.config.text.hidden_size
    return name in ("language_model.embed_tokens.weight", "lm_head.weight") and shape == (rows, width)


Progress = Callable[[int, int], None]  # told how many bytes are loaded so far, and how many there are


def own_dtype(fit: Match) -> torch.dtype:
    """The dtype of a checkpoint: that of its embedding. Others may differ, such as those of a CLIP folder."""
    name = fit.source["language_model.embed_tokens.weight"]
    dtype = next(entry.read().dtype for entry in tensors(fit.files) if entry.name == name)
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise LlavaError(f"{name} is {dtype}, in which nothing can be computed; load in another dtype, as float32.")
    return dtype


def load_weights(
    model: Llava,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    fast: bool = False,
    progress: Progress | None = None,
) -> None:
    """Streams a checkpoint into a model built on the meta device, one tensor in memory beside it.

    fast and progress as in `load`. Raises LlavaError that names every missing, unexpected and misshapen tensor, before
    any is read.
    """
    fit = match(model, folder)
    if fit.problems:
        shown = "; ".join(fit.problems[:20])
        shown += f"; and {len(fit.problems) - 20} more" if len(fit.problems) > 20 else ""
        raise LlavaError(f"{folder} does not fit its config.json: {shown}.")
    used = {name: ours for ours, name in fit.source.items()}
    sizes = {e.name: math.prod(e.shape) * BYTES.get(e.dtype, 1) for e in tensors(fit.files) if e.name in used}
    done, size = 0, sum(sizes.values())
    dtype = dtype or own_dtype(fit)
    for entry in tensors(fit.files):
        if (ours := used.get(entry.name)) is None:
            continue
        tensor = entry.read()  # backed by the file
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            kind = "no numbers" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
            raise LlavaError(f"{folder}: {entry.name} is {kind}; expected dense floating-point weights.")
        done += sizes[entry.name]
        copy = fast and size < 2e9  # where a file begins its weights they are not aligned, and read up to 8 % slower
        tensor = tensor.to(device=device, dtype=dtype, copy=copy).contiguous()
        parameter = model.get_parameter(ours)
        if tensor.shape != parameter.shape:  # the mean of all rows: its logit is never the largest
            mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
            tensor = torch.cat([tensor, mean.expand(len(parameter) - len(tensor), -1)])
        owner, _, attribute = ours.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor))
        if progress is not None:
            progress(done, size)
    if fit.tied:
        model.lm_head.weight = model.language_model.embed_tokens.weight


class SkipInit(TorchFunctionMode):
    """Leaves out `torch.nn.init`: weights that a checkpoint replaces need no random values.

    On the meta device drawing them would import torch's symbolic shapes, a second and 70 MB for nothing.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def empty_model(config: LlavaConfig) -> Llava:
    """The model without weights, on the meta device."""
    with torch.device("meta"), SkipInit():
        return Llava(config)


def load_model(
    folder: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    fast: bool = False,
    progress: Progress | None = None,
) -> Llava:
    """The model of a checkpoint's folder, in evaluation mode; no tokenizer is needed. Parameters as in `load`."""
    model, device = empty_model(read_config(folder)).eval(), torch.device(device)
    load_weights(model, folder, device, dtype, fast, progress)
    return optimize(model) if fast else model


def load(
    path_or_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    revision: str | None = None,
    fast: bool = False,
    progress: Progress | None = None,
) -> tuple[Llava, Processor]:
    """The model in evaluation mode, and its processor, from a folder or a Hub id.

    dtype: None takes the checkpoint's own, that of its embedding, which for most has 16 bits.
    fast: the same tokens, sooner: `fast.optimize` changes the classes of modules. Without it a debugger stops in
    model.py.
    progress: called with the bytes loaded so far and the bytes of all weights.
    Raises LlavaError for anything that cannot be loaded.

    On a CPU, weights that need no conversion are mapped, not copied (with fast: from 2 GB on). The system reads a page
    of the file when it is used, and may drop it when memory is short. Do not write into the file while the model is in
    use: its weights would change, and if the file is cut short, the process ends. Renaming a new file over it is safe;
    the model keeps the old one.
    """
    folder = find(path_or_id, revision)
    model = load_model(folder, device, dtype, fast, progress)
    if not fast and model.lm_head.weight.is_cpu and model.lm_head.weight.dtype in (torch.float16, torch.bfloat16):
        warnings.warn("Weights in 16 bits on a CPU: load(..., fast=True) is several times sooner.", stacklevel=2)
    if ignored := ignored_settings(read_json(folder / "generation_config.json")):
        warnings.warn(f"generation_config.json has {ignored}, which changes transformers' tokens and is not done here.",
                      stacklevel=2)  # fmt: skip
    return model, load_processor(folder)


def ignored_settings(generation: dict[str, Any]) -> str:
    """What a generation_config.json asks for that would change the likeliest tokens, as text; empty if nothing."""
    without = {"repetition_penalty": 1, "encoder_repetition_penalty": 1, "guidance_scale": 1, "num_beams": 1}
    asked = {name: generation.get(name) for name in (
        *without, "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
        "begin_suppress_tokens", "sequence_bias", "min_length", "min_new_tokens", "forced_bos_token_id",
        "forced_eos_token_id", "exponential_decay_length_penalty", "penalty_alpha",
    )}  # fmt: skip
    return ", ".join(f"{k} = {v!r:.99}" for k, v in asked.items() if v and v != without.get(k))


def memory_needed(folder: Path, dtype: torch.dtype | None) -> tuple[int, torch.dtype]:
    """Bytes of a checkpoint's weights in this dtype (None: the checkpoint's own), and the checkpoint's own dtype."""
    model = empty_model(read_config(folder))
    fit = match(model, folder)
    own = own_dtype(fit) if not fit.problems else torch.float32  # what does not fit is refused by `load`
    return sum(parameter.numel() for parameter in model.parameters()) * (dtype or own).itemsize, own


def load_processor(folder: Path) -> Processor:
    """The processor of a checkpoint's folder. An original LLaVA's images are prepared as its CLIP says."""
    config, raw = read_config(folder), read_json(folder / "config.json")
    processor = Processor.from_folder(folder, config)
    if "mm_vision_tower" in raw:
        made = read_json(clip_folder(folder, raw) / "preprocessor_config.json")
        made["do_pad"] = raw.get("image_aspect_ratio") == "pad"
        processor.image_processor = ImageProcessor.from_dict(made)
    return processor


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a new name beside `path`. What is written there takes the place of `path`, or goes if that fails."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


def save_weights(model: Llava, path: Path, dtype: torch.dtype) -> None:
    """Writes the model's weights in the Hub layout, whole or not at all."""
    from safetensors.torch import save_file

    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state[hub_name(name)] = parameter.detach().to("cpu", dtype).contiguous()
    with replacing(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})


def config_dict(config: LlavaConfig, dtype: str) -> dict[str, object]:
    """The contents of a `config.json` that both transformers and `load` read."""
    text, vision = asdict(config.text), asdict(config.vision)
    if config.text.model_type == "qwen2":  # whose biases need no saying
        del text["attention_bias"], text["mlp_bias"]
    pinpoints = [list(pair) for pair in config.image_grid_pinpoints]
    tiled = {"model_type": "llava_next", "image_grid_pinpoints": pinpoints} if pinpoints else {"model_type": "llava"}
    return {
        "architectures": [f"Llava{'Next' if pinpoints else ''}ForConditionalGeneration"],
        **tiled,
        "image_token_index": config.image_token_id,
        "projector_hidden_act": config.projector_hidden_act,
        "multimodal_projector_bias": config.multimodal_projector_bias,
        "mm_projector_type": config.mm_projector_type,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": dtype,
        "text_config": {k: v for k, v in text.items() if v is not None},
        "vision_config": {**vision, **({"projection_dim": vision["hidden_size"]} if config.vision.has_cls else
                                       {"vision_use_head": False})},
    }  # fmt: skip


def write_file(path: str | Path, content: bytes) -> None:
    """Writes a file, whole or not at all; raises LlavaError where that cannot be done. A link is followed."""
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise LlavaError(f"{path:.200} is no file that can be written; choose another place.")
    try:
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise LlavaError(f"{path!s:.200} cannot be written ({error.strerror}); choose another place.") from None


def write_json(path: Path, value: object) -> None:
    """Writes JSON, whole or not at all."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def estimate_plan(budget: float, kept: Tensor, prompt_lengths: Tensor, model: str = "") -> Plan:
    """The mean ratios of some samples: tokens kept [B, L] of prompts of `prompt_lengths` [B] tokens."""
    ratios = (kept.double() / prompt_lengths[:, None]).mean(0).tolist()
    return Plan(budget, ratios, model, len(kept))


def write_plan(path: str | Path, plan: Plan) -> None:
    """Writes the file that `read_plan` reads: a line for every number, to be read and compared."""
    write_file(path, (json.dumps(asdict(plan), indent=1) + "\n").encode())


def read_plan(path: str | Path) -> Plan:
    """Reads what `write_plan` wrote, or a published plan: a list of the ratios that the layers forget.

    Raises LlavaError for a file that holds neither.
    """
    try:
        with open(path, "rb") as file:
            raw = json.loads(file.read(10**6))  # a plan is far shorter; a device may never end
        ratios = [1 - ratio for ratio in raw] if isinstance(raw, list) else raw["ratios"]
        if not ratios or not all(0 <= float(ratio) <= 1 for ratio in ratios):
            raise ValueError("ratios between 0 and 1, one per layer, are missing")
        known = {} if isinstance(raw, list) else raw
        budget = float(known.get("budget", sum(ratios) / len(ratios)))
        return Plan(budget, [float(r) for r in ratios], str(known.get("model", "")), int(known.get("samples", 0)))
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise LlavaError(f"{path} holds no plan ({error}); expected what --save-plan writes.") from None


# ---------------------------------------------------------------- commands


def inspect(folder: Path) -> tuple[str, int]:
    """A table of a checkpoint's tensors with their names here, what does not fit, and the exit code."""
    model = empty_model(read_config(folder))
    fit = match(model, folder)
    rows, total = [], 0
    for entry in tensors(fit.files):
        ours = our_name(entry.name)
        size = math.prod(entry.shape) * BYTES.get(entry.dtype, 1)
        total += size
        shape = "x".join(map(str, entry.shape)) or "scalar"
        name = ours if fit.source.get(ours) == entry.name else "(not used)"
        rows.append(printable(f"{entry.name:75} {shape:>14} {entry.dtype:>8} {size:>12,}  {name}"))
    parameters = sum(p.numel() for p in model.parameters())
    rows.append(
        f"\n{len(rows)} tensors in {len(fit.files)} files, {total:,} bytes; the model has {parameters:,} parameters."
    )
    if fit.tied:
        rows.append("The output layer is the embedding (tie_word_embeddings).")
    rows += [printable(problem) for problem in fit.problems] or ["Every parameter is there."]
    return "\n".join(rows), 1 if fit.problems else 0


BYTES = {  # of a number; 1 for those that are not here
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "I64": 8,
    "int64": 8, "I32": 4, "int32": 4, "I16": 2, "int16": 2,
}  # fmt: skip


def convert(folder: Path, out: Path) -> None:
    """Writes a checkpoint of any layout in the Hub layout, with its dtype, to a folder that must not exist yet."""
    require(not out.exists(), f"{out} exists already; choose a new folder.")
    with replacing(out) as temporary:
        temporary.mkdir(parents=True)
        processor = load_processor(folder)
        model = load_model(folder, dtype=None)
        dtype = model.lm_head.weight.dtype
        write_json(temporary / "config.json", config_dict(model.config, str(dtype).removeprefix("torch.")))
        save_weights(model, temporary / "model.safetensors", dtype)
        tokenizer = read_json(folder / "tokenizer_config.json")
        plain = (folder / "tokenizer.model").is_file()  # else tokenizer.json has them all but for <image>
        added = {
            str(token.id): {"content": token.content, "lstrip": token.lstrip, "rstrip": token.rstrip,
                            "special": token.special, "normalized": False, "single_word": False}
            for token in processor.tokenizer.added.values()
            if plain or token.content == IMAGE_TOKEN
        }  # fmt: skip
        if not plain:
            added |= tokenizer.get("added_tokens_decoder") or {}
        write_json(temporary / "tokenizer_config.json", {**tokenizer, "added_tokens_decoder": added})
        images: dict[str, object] = asdict(processor.image_processor)
        if model.config.image_grid_pinpoints:
            images["image_processor_type"] = "LlavaNextImageProcessor"
            images["image_grid_pinpoints"] = [list(pair) for pair in model.config.image_grid_pinpoints]
        write_json(temporary / "preprocessor_config.json", images)
        config = model.config
        write_json(temporary / "processor_config.json", {
            "processor_class": f"Llava{'Next' if config.image_grid_pinpoints else ''}Processor",
            "patch_size": config.vision.patch_size, "image_token": IMAGE_TOKEN,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "num_additional_image_tokens": int(config.vision.has_cls),
        })  # fmt: skip
        ends = {"eos_token_id": list(config.eos_token_id), "pad_token_id": config.pad_token_id}
        write_json(temporary / "generation_config.json", ends)
        for name in ("tokenizer.model", "tokenizer.json", "special_tokens_map.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
        if processor.template is not None:
            write_file(temporary / "chat_template.jinja", processor.template.encode())


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 for a checkpoint that does not fit its config; others as in `run_command`."""
    parser = argparse.ArgumentParser(prog="python -m weights", description="Looks into checkpoints and converts them.")
    commands = parser.add_subparsers(dest="command", required=True)
    looks = commands.add_parser("inspect", help="tensors, shapes, dtypes, bytes, names here, what is missing")
    converts = commands.add_parser("convert", help="write any supported layout as the Hub layout")
    for command in (looks, converts):
        command.add_argument("checkpoint", help="folder or Hub id")
    converts.add_argument("out", type=Path, help="folder to be made")
    args = parser.parse_args(arguments)

    def work() -> int:
        if args.command == "inspect":
            text, code = inspect(find(args.checkpoint))
            print(text)
            return code
        convert(find(args.checkpoint), args.out)
        return 0

    return run_command("weights", work)


if __name__ == "__main__":
    sys.exit(main())
