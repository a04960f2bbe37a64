"""Checkpoints: find or download, check, map names, stream into the model.

model, processor = load("minillava/tiny")
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minillava.model import ACTIVATIONS, Llava, LlavaConfig, LlavaError, TextConfig, VisionConfig, require
from minillava.processor import Processor, read_json

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
    require(kind == "llava", f"config.json has model_type {kind!r}; only 'llava', in the Hub layout, is implemented.")
    parts = []
    for name, expected in (("text_config", "llama"), ("vision_config", "clip_vision_model")):
        part = {} if raw.get(name) is None else raw[name]
        require(isinstance(part, dict), f"config.json has {name} = {part!r}; expected an object.")
        kind = part.get("model_type", expected)
        require(kind == expected, f"config.json has {name} of type {kind!r}; only {expected!r} is implemented.")
        parts.append(dict(part))
    text, vision = parts
    # transformers 5 moved rope_theta and rope_scaling into one dictionary, rope_parameters.
    scaling, parameters = (text.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
    require(isinstance(scaling, dict) and isinstance(parameters, dict), "config.json: RoPE settings are no object.")
    rope = {**scaling, **parameters}
    text["rope_theta"] = rope.pop("rope_theta", text.get("rope_theta"))
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    text["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    text.setdefault("tie_word_embeddings", raw.get("tie_word_embeddings"))
    top = {
        **raw,
        "image_token_id": raw.get("image_token_id", raw.get("image_token_index")),
        "pad_token_id": raw.get("pad_token_id", text.get("pad_token_id")),
        "eos_token_id": None,  # this and the two parts are set below
        "vision": None,
        "text": None,
    }
    eos = next((part["eos_token_id"] for part in (generation, text, raw) if part.get("eos_token_id") is not None), 2)
    ends = eos if isinstance(eos, list) else [eos]
    require(all(type(end) is int for end in ends), f"eos_token_id is {eos!r}; expected one id or a list of ids.")
    config = replace(
        read_fields(LlavaConfig, top, ""),
        vision=read_fields(VisionConfig, vision, "vision_config."),
        text=read_fields(TextConfig, text, "text_config."),
        eos_token_id=tuple(ends),
    )
    check_config(config)
    return config


def check_config(config: LlavaConfig) -> None:
    """Raises LlavaError where values are out of range or contradict each other."""
    text, vision = config.text, config.vision
    for where, part in (("text_config", text), ("vision_config", vision)):
        for name, value in vars(part).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            fits = not number or 0 < value < 1e12
            require(fits, f"config.json has {where}.{name} = {value!r}; expected a number above 0.")
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
    inside = 0 <= token < text.vocab_size
    require(inside, f"config.json: image token {token} is outside the vocabulary of {text.vocab_size}.")
    inside = 0 <= config.pad_token_id < text.vocab_size
    require(inside, f"config.json: pad token {config.pad_token_id} is outside the vocabulary of {text.vocab_size}.")
    if text.rope_scaling:
        kind = text.rope_scaling["rope_type"]
        known = ", ".join(ROPE_SETTINGS)
        require(kind in ROPE_SETTINGS, f"config.json asks for {kind!r} RoPE scaling; known are {known}.")
        for name in ROPE_SETTINGS[kind]:
            value = text.rope_scaling.get(name)
            fits = isinstance(value, (int, float)) and 0 < value < 1e12
            require(fits, f"config.json: RoPE scaling has {name} = {value!r}; expected a number above 0.")


def read_config(folder: Path) -> LlavaConfig:
    """The configuration of the checkpoint in `folder`."""
    there = (folder / "config.json").is_file()
    require(there, f"{folder} has no config.json; expected the folder of a LLaVA checkpoint.")
    return parse_config(read_json(folder / "config.json"), read_json(folder / "generation_config.json"))


# ---------------------------------------------------------------- names and files

DOWNLOADED = ["*.safetensors", "*.json", "tokenizer.model"]  # no pickles, nothing executable

# Checkpoint names to ours, applied in this order. One table serves the three layouts in use:
#   Hub, transformers up to 4.51     language_model.model.layers…        vision_tower.vision_model.encoder.layers…
#   transformers 4.52+, in memory    model.language_model.layers…        model.vision_tower.vision_model…
#   transformers 5, on disk          language_model.model.layers…        vision_tower.encoder.layers…
RENAMES = [
    (r"^model\.(?=language_model|vision_tower|multi_modal_projector)", ""),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "language_model."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^vision_tower\.(embeddings|encoder)\.", "vision_tower."),
    (r"^(vision_tower\.layers\.\d+)\.(self_attn|mlp)\.", r"\1."),
]
# Tables that old versions saved and every version computes.
IGNORED = re.compile(r"(rotary_emb\.inv_freq|\.position_ids)$")


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


def find(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: as given, or downloaded from the Hub (and kept in its cache)."""
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    name = str(path_or_id)
    if folder.exists():
        raise LlavaError(f"{name} is a file; expected the folder of a checkpoint, or a Hub id.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise LlavaError(f"There is no folder {name}, and it is not a Hub id such as llava-hf/llava-1.5-7b-hf.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=DOWNLOADED))
    except Exception as error:  # the hub's client raises its own, requests' and the system's errors
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LlavaError(
            f"There is no folder {name}, and the Hub could not give a checkpoint of that name ({reason}). "
            "Check the id and the network, or download it and pass the folder."
        ) from None


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: `model.safetensors`, or those its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise LlavaError(f"{folder} has neither model.safetensors nor model.safetensors.index.json; expected one.")
        return [single]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise LlavaError(f"{index} has no weight_map from tensors to files; copy or download it again.")
    files = []
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise LlavaError(f"{index} points to {name!r}; expected safetensors files in its own folder.")
        if not (folder / name).is_file():
            raise LlavaError(f"{index} names {name}, which is not in the folder; copy or download the missing shard.")
        files.append(folder / name)
    return files


def tensors(files: list[Path]) -> Iterator[tuple[str, safe_open]]:
    """Every tensor of the files as (name, open file); its data is not read yet."""
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no dict)
                    yield name, opened
        except SafetensorError as error:
            raise LlavaError(
                f"{path} is damaged ({error}); its header and its size do not fit. Copy or download it again."
            ) from None


def load_weights(model: Llava, folder: Path, device: torch.device, dtype: torch.dtype | None) -> None:
    """Streams a checkpoint into a model built on the meta device, one tensor in memory beside it.

    Raises LlavaError that names every missing, unexpected and misshapen tensor, before any is read.
    """
    files = shards(folder)
    wanted = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    source: dict[str, str] = {}
    problems = []
    for name, opened in tensors(files):
        ours = our_name(name)
        if IGNORED.search(name):
            continue
        if ours not in wanted:
            problems.append(f"unexpected {name}")
        elif ours in source:
            problems.append(f"{name} and {source[ours]} are the same parameter")
        elif tuple(opened.get_slice(name).get_shape()) != tuple(wanted[ours]):
            shape = list(opened.get_slice(name).get_shape())
            problems.append(f"{name} has shape {shape}, expected {list(wanted[ours])}")
        source[ours] = name
    missing = wanted.keys() - source.keys()
    tied = model.config.text.tie_word_embeddings and "lm_head.weight" in missing
    if tied:  # a file that brings an output layer of its own is believed, whatever its config says
        missing -= {"lm_head.weight"}
    problems = [f"missing {hub_name(name)}" for name in sorted(missing)] + problems
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise LlavaError(f"{folder} does not fit its config.json: {shown}.")
    for name, opened in tensors(files):
        ours = our_name(name)
        if source.get(ours) != name:
            continue
        tensor = opened.get_tensor(name)  # backed by the file until the copy below
        if not tensor.is_floating_point():
            raise LlavaError(f"{folder}: {name} is {tensor.dtype}; expected floating-point weights.")
        tensor = tensor.to(device=device, dtype=dtype, copy=True)
        owner, _, attribute = ours.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor))
    if tied:
        model.tie_weights()


class SkipInit(TorchFunctionMode):
    """Leaves out `torch.nn.init`: weights that a checkpoint replaces need no random values.

    On the meta device drawing them would import torch's symbolic shapes, a second and 70 MB for nothing.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def load_model(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32) -> Llava:
    """The model of a checkpoint's folder, in evaluation mode; no tokenizer is needed. Parameters as in `load`."""
    with torch.device("meta"), SkipInit():
        model = Llava(read_config(folder))
    load_weights(model, folder, torch.device(device), dtype)
    return model.eval()


def load(
    path_or_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    revision: str | None = None,
) -> tuple[Llava, Processor]:
    """The model in evaluation mode, and its processor, from a folder or a Hub id.

    dtype None keeps the checkpoint's own; float32 is the default because half precision is slow on most CPUs.
    Raises LlavaError for anything that cannot be loaded.
    """
    folder = find(path_or_id, revision)
    processor = Processor.from_folder(folder, read_config(folder))
    return load_model(folder, device, dtype), processor


def save_weights(model: Llava, path: Path, dtype: torch.dtype) -> None:
    """Writes the model's weights in the Hub layout, whole or not at all."""
    from safetensors.torch import save_file

    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state[hub_name(name)] = parameter.detach().to("cpu", dtype).contiguous()
    temporary = path.with_suffix(".part")
    save_file(state, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def config_dict(config: LlavaConfig, dtype: str) -> dict[str, object]:
    """The contents of a `config.json` that both transformers and `load` read."""
    text, vision = asdict(config.text), asdict(config.vision)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token_id,
        "projector_hidden_act": config.projector_hidden_act,
        "multimodal_projector_bias": config.multimodal_projector_bias,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": dtype,
        "text_config": {"model_type": "llama", **{k: v for k, v in text.items() if v is not None}},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": config.vision.hidden_size, **vision},
    }


def write_json(path: Path, value: object) -> None:
    """Writes JSON, whole or not at all."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
