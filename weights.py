"""From a checkpoint's folder to a model: `find`, `read_config`, `match` its tensors to an empty model, stream them in.

model, processor = load("minillava/tiny")

python -m weights inspect FOLDER_OR_ID     what is in a checkpoint, and what would be missing
python -m weights convert FOLDER_OR_ID OUT the same checkpoint in the Hub layout, which everything reads; with
                                           --dtype int8 in 8 bits, which is read here only
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from minillava.command import end_quietly, printable, run_command  # isort: skip  before torch: see __init__.py

if __name__ == "__main__":
    end_quietly()

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minillava.checks import LlavaError, require, require_value, wrong_value
from minillava.config import LlavaConfig, TextConfig, VisionConfig
from minillava.convert import INT8, UNUSED, clip_folder, convert, fill_up, hub_config, hub_name, our_name, read_tensors
from minillava.fast import optimize
from minillava.files import find, write_file
from minillava.model import ACTIVATIONS, Llava
from minillava.processor import ImageProcessor, Processor, read_json
from minillava.quantised import quantise_rows, to_int8
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
DEFAULTS: dict[str, dict[str, Any]] = {  # of kinds of parts, where they differ from those in config.py
    "mistral": {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
              "max_position_embeddings": 32768},
    "siglip_vision_model": {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}  # fmt: skip
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # of LLaVA-NeXT
RELATIVES = {  # what checkpoints of the wider family need that is not here
    "llava_onevision": "its limit on tiles (anyres_max_9), which shrinks features",
    "llava_next_video": "frames of a video and their pooling",
    "video_llava": "two vision towers and frames of a video",
    "vipllava": "features of several vision layers, and the norm that joins them",
}
TYPES: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str, "dict": dict}
LARGEST = {"num_hidden_layers": 1024, "layer_norm_eps": 1e12, "rms_norm_eps": 1e12, "rope_theta": 1e12}  # else 2**24
C = TypeVar("C")


def first(*values: Any) -> Any:
    """The first of them that is not None; None if there is none."""
    return next((value for value in values if value is not None), None)


def read_object(raw: dict[str, Any], name: str, where: str = "") -> dict[str, Any]:
    """The object `name` in config.json, or in the part of it that `where` names; {} if it is absent or null."""
    value = first(raw.get(name), {})
    require_value(isinstance(value, dict), where + name, value, "an object")
    return dict(value)


def read_part(raw: dict[str, Any], name: str, *kinds: str) -> dict[str, Any]:
    """The object `name` of config.json, with the defaults of its kind: one of `kinds`, the first if none is named."""
    part = read_object(raw, name)
    kind = first(part.get("model_type"), kinds[0])
    require_value(kind in kinds, f"{name}.model_type", kind, f"one of {', '.join(kinds)}")
    # An absent key and null are the default, but these two mean something by null: one per query head, no window.
    meant = ("num_key_value_heads", "sliding_window")
    given = {key: value for key, value in part.items() if value is not None or key in meant}
    return {**DEFAULTS.get(kind, {}), **given, "model_type": kind}


def read_fields(cls: type[C], raw: dict[str, Any], where: str = "") -> C:
    """The dataclass `cls` from the keys of `raw` that it has fields for, each checked for its type.

    Numbers of a part, which `where` names, are checked for their range, too. An absent key, or null, keeps the
    default, which is that of the `transformers` class: files leave defaults out.
    """
    values = {}
    for field in fields(cls):  # type: ignore[arg-type]
        name, value = field.name, raw.get(field.name)
        kind = str(field.type).split(" ")[0].split("[")[0]  # "int | None" is an int, where it is there
        if value is None or kind not in TYPES:
            continue
        if not isinstance(value, TYPES[kind]) or isinstance(value, bool) != (kind == "bool"):
            raise wrong_value(where + name, value, f"a value of type {kind}")
        choices, largest = CHOICES.get(name, ()), LARGEST.get(name, 2**24)
        require_value(not choices or value in choices, where + name, value, f"one of {', '.join(choices)}")
        if where and kind in ("int", "float") and not 0 < value <= largest:
            raise wrong_value(where + name, value, f"a number above 0, up to {largest:g}")
        values[name] = value
    return cls(**values)


def parse_text(raw: dict[str, Any]) -> TextConfig:
    """The decoder's settings; Mistral is Llama within its window."""
    part = read_part(raw, "text_config", "llama", "mistral", "qwen2")
    kind, factor = part["model_type"], part.get("partial_rotary_factor")
    if kind == "mistral":
        part["model_type"] = "llama"
    if kind == "qwen2":
        part.pop("attention_bias", None)  # a key of other kinds: here biases are where they are
    require_value(factor in (None, 1), "partial_rotary_factor", factor, "1: RoPE turns whole heads here")
    part["tie_word_embeddings"] = part.get("tie_word_embeddings") or raw.get("tie_word_embeddings")  # either may say it
    part["rope_theta"], part["rope_scaling"] = read_rope(part)
    text = read_fields(TextConfig, part, "text_config.")
    width, heads, shared = text.hidden_size, text.num_attention_heads, text.kv_heads
    if text.head_dim is None and width % heads:
        raise wrong_value("text_config.hidden_size", width, f"a multiple of its {heads} heads")
    require(heads % shared == 0, f"config.json: {heads} query heads cannot share {shared} key-value heads evenly.")
    require(text.head_size % 2 == 0, f"config.json: head size {text.head_size} is odd; RoPE turns pairs.")
    # A window is how far attention reaches back. Within it nothing differs from Llama; a longer text is refused.
    windowed = kind == "mistral" or (kind == "qwen2" and part.get("use_sliding_window"))
    window, longest = part.get("sliding_window", 4096) if windowed else None, text.max_position_embeddings
    if window is not None and (type(window) is not int or window < 1):
        raise wrong_value("sliding_window", window, "a number of tokens, or null")
    return replace(text, max_position_embeddings=min(window or longest, longest))


def read_rope(part: dict[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """RoPE's theta and scaling. transformers 5 moved both, rope_theta and rope_scaling, into rope_parameters."""
    rope = read_object(part, "rope_scaling", "text_config.") | read_object(part, "rope_parameters", "text_config.")
    theta = rope.pop("rope_theta", part.get("rope_theta"))
    kind = rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    if kind == "default":
        return theta, None
    require_value(kind in list(ROPE_SETTINGS), "rope_type", kind, f"one of default, {', '.join(ROPE_SETTINGS)}")
    for name in ROPE_SETTINGS[kind]:
        value = rope.get(name)
        if not isinstance(value, (int, float)) or not 0 < value < 1e12:
            raise wrong_value(f"{name} for RoPE", value, "a number above 0")
    low, high = rope.get("low_freq_factor", 0), rope.get("high_freq_factor", 0)
    if kind == "llama3" and low >= high:
        raise LlavaError(f"config.json: RoPE scaling has factors {low} and {high}; expected the lower one first.")
    return theta, rope


def parse_vision(raw: dict[str, Any]) -> VisionConfig:
    """The vision tower's settings."""
    part = read_part(raw, "vision_config", "clip_vision_model", "siglip_vision_model")
    vision = read_fields(VisionConfig, part, "vision_config.")
    width, heads, patch, side = vision.hidden_size, vision.num_attention_heads, vision.patch_size, vision.image_size
    require_value(width % heads == 0, "vision_config.hidden_size", width, f"a multiple of its {heads} heads")
    require_value(patch <= side, "patch_size", patch, f"at most image_size, {side}")
    return vision


def read_pinpoints(raw: dict[str, Any], side: int) -> tuple[tuple[int, int], ...]:
    """LLaVA-NeXT's sizes of grids of tiles of `side` pixels: pairs of (height, width)."""
    pinpoints = first(raw.get("image_grid_pinpoints"), PINPOINTS)
    if not isinstance(pinpoints, list) or not 0 < len(pinpoints) <= 1000 or not all(
        isinstance(pair, list) and [type(length) for length in pair] == [int, int] for pair in pinpoints
    ):  # fmt: skip
        raise wrong_value("image_grid_pinpoints", pinpoints, "pairs [height, width]")
    expected = f"multiples of image_size {side}, at most 100 tiles and 100 million pixels"
    for height, width in pinpoints:
        if min(height, width) < side or height % side or width % side or height * width > min(100 * side**2, 10**8):
            raise wrong_value("a pair of image_grid_pinpoints", [height, width], expected)
    return tuple((height, width) for height, width in pinpoints)


def parse_config(raw: dict[str, Any], generation: dict[str, Any]) -> LlavaConfig:
    """The configuration in a `config.json` and a `generation_config.json` ({} if there is none).

    Raises LlavaError for an architecture that model.py does not hold and for values it cannot use.
    """
    kind = raw.get("model_type")
    needs = f"; this one needs {RELATIVES[str(kind)]}" if str(kind) in RELATIVES else ""
    require_value(kind in ("llava", "llava_next"), "model_type", kind, f"llava or llava_next{needs}")
    text, vision = parse_text(raw), parse_vision(raw)
    part, default = read_object(raw, "text_config"), [2] if text.model_type == "llama" else []
    eos = first(*(place.get("eos_token_id") for place in (generation, part, raw)), default)
    ends = eos if isinstance(eos, list) else [eos]
    if not all(type(end) is int and 0 <= end < 2**31 for end in ends):
        raise LlavaError(f"eos_token_id is {eos!s:.99}; expected one id or a list of ids.")
    # As in transformers, a generation_config.json that is there decides. -1 stands for none: then a sample that has
    # ended is filled up with its end.
    pad = first(*(place.get("pad_token_id") for place in ((generation,) if generation else (raw, part))))
    image = first(raw.get("image_token_id"), raw.get("image_token_index"))
    pad = first(None if pad == -1 else pad, *ends[:1], 0)
    config = replace(
        read_fields(LlavaConfig, {**raw, "image_token_id": image, "pad_token_id": pad}),
        vision=vision,
        text=text,
        eos_token_id=tuple(ends),
        image_grid_pinpoints=read_pinpoints(raw, vision.image_size) if kind == "llava_next" else (),
    )
    for name, token in (("image", config.image_token_id), ("pad", config.pad_token_id)):
        if not 0 <= token < text.vocab_size:
            raise LlavaError(f"config.json: {name} token {token} is outside the vocabulary of {text.vocab_size}.")
    depth, layer = vision.num_hidden_layers, config.vision_feature_layer
    require_value(-depth - 1 <= layer <= depth, "vision_feature_layer", layer, f"one of the tower's {depth} layers")
    require(config.num_image_tokens > 0, "config.json: the only patch is dropped; expected a smaller patch_size.")
    if config.image_grid_pinpoints and config.num_image_tokens != vision.num_patches:
        expected = f"{'default' if vision.has_cls else 'full'}, since tiles need one feature per patch"
        raise wrong_value("vision_feature_select_strategy", config.vision_feature_select_strategy, expected)
    return config


def read_config(folder: Path) -> LlavaConfig:
    """The configuration of the checkpoint in `folder`."""
    require((folder / "config.json").is_file(), f"{folder} has no config.json; expected a LLaVA checkpoint's folder.")
    return parse_config(hub_config(folder), read_json(folder / "generation_config.json"))


# ---------------------------------------------------------------- files of weights


def find_device(name: str) -> torch.device:
    """The device of that name; raises LlavaError if it cannot be used here."""
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except Exception as error:  # each kind of device raises its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LlavaError(f"The device {name!r} cannot be used ({reason}); try --device cpu.") from None
    return device


def shards(folder: Path) -> list[Path]:
    """The files with a checkpoint's weights: safetensors, or PyTorch's `.bin`; one, or those that an index names."""
    for stem, kind in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{kind}.index.json", folder / f"{stem}.{kind}"
        if index.is_file():
            break
        if single.is_file():
            return [single]
    else:
        raise LlavaError(f"{folder} has neither model.safetensors nor pytorch_model.bin, nor an index; expected one.")
    weight_map: Any = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise LlavaError(f"{index} has no weight_map from tensors to files; copy or download it again.")
    names = sorted({*weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(f".{kind}"):
            raise LlavaError(f"{index} points to {name!r}; expected {kind} files in its own folder.")
        if not os.path.isfile(folder / name):
            raise LlavaError(f"{index} names {name}, which is not in the folder; copy or download the missing shard.")
    return [folder / name for name in names]


@dataclass(frozen=True)
class Match:
    """How a checkpoint's tensors fit the model."""

    num_files: int
    tensors: list[tuple[str, Tensor]]  # all of them, with the checkpoint's names
    state: dict[str, Tensor]  # those that the model takes, with our names
    tied: bool  # the output layer is the embedding, as the config says, and not in the files
    problems: list[str]  # every missing, unexpected and misshapen tensor, and every one without numbers to compute with

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of a checkpoint: int8, or its embedding's. Others may differ, such as those of a CLIP folder."""
        if "lm_head.scale" in self.state:
            return torch.int8
        embedding = self.state.get("language_model.embed_tokens.weight")
        return torch.float32 if embedding is None else embedding.dtype


def match(model: Llava, folder: Path) -> Match:
    """Compares names, shapes and dtypes; no number is read."""
    paths, clip, config = shards(folder), clip_folder(folder), model.config
    tensors = read_tensors(paths)
    if clip is not None and not any(our_name(name).startswith("vision_tower.") for name, _ in tensors):
        tower = shards(clip)
        paths, tensors = paths + tower, tensors + read_tensors(tower)
    wanted, problems, state = model.state_dict(), list[str](), dict[str, Tensor]()
    without_image = [config.image_token_id, config.text.hidden_size]  # an original's vocabulary ends before <image>
    for name, tensor in tensors:
        ours, shape = our_name(name), list(tensor.shape)
        if ours not in wanted:
            if not UNUSED.search(name):
                problems.append(f"unexpected {name}")
            continue
        if ours in state:
            problems.append(f"{name} and another tensor are the same parameter, {hub_name(ours)}")
        fills_up = shape == without_image and ours in ("language_model.embed_tokens.weight", "lm_head.weight")
        if shape != list(wanted[ours].shape) and not fills_up:
            problems.append(f"{name} has shape {shape}, expected {list(wanted[ours].shape)}")
        rounded = wanted[ours].dtype == torch.int8 or ours.endswith(".scale")  # these need their dtype, others any
        fits = tensor.dtype == wanted[ours].dtype if rounded else tensor.is_floating_point()
        if not fits or tensor.layout != torch.strided or tensor.is_meta:
            kind = "no numbers" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
            expected = wanted[ours].dtype if rounded else "floating-point"
            problems.append(f"{name} is {kind}, expected dense {expected} weights")
        state[ours] = tensor
    missing = wanted.keys() - state.keys()
    # Where a file brings an output layer of its own, the two are not shared, whatever its config says.
    tied = config.text.tie_word_embeddings and "lm_head.weight" in missing
    if tied:
        missing.remove("lm_head.weight")
    problems = [f"missing {hub_name(name)}" for name in sorted(missing)] + problems
    return Match(len(paths), tensors, state, tied, problems)


# ---------------------------------------------------------------- loading

Progress = Callable[[int, int], None]  # told how many bytes are loaded so far, and how many there are
Dtype = torch.dtype | str | None  # see `load`


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


def open_checkpoint(folder: Path) -> tuple[Llava, Match]:
    """The model of a checkpoint without weights, in 8 bits if the checkpoint is, and how the checkpoint fits it."""
    model, raw = empty_model(read_config(folder)).eval(), read_json(folder / "config.json")
    if read_object(raw, "quantization_config").get("quant_method") == INT8:
        to_int8(model)
    return model, match(model, folder)


def choose_dtype(dtype: Dtype, own: torch.dtype) -> torch.dtype:
    """The dtype to load in, of a checkpoint of the dtype `own`; raises LlavaError if that cannot be."""
    if dtype == "default":
        dtype = torch.int8 if own == torch.int8 else torch.float32
    chosen: Any = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype or own
    if chosen not in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8):
        raise LlavaError(f"The dtype is {chosen}, in which nothing can be computed; load in another, such as float32.")
    if chosen != own and own == torch.int8:
        asked = f"The checkpoint has weights in 8 bits, and {chosen} was asked for"
        raise LlavaError(f"{asked}. Load it without a dtype, or load the checkpoint that it was made from.")
    return chosen


def load_model(
    folder: Path,
    device: str | torch.device = "cpu",
    dtype: Dtype = "default",
    fast: bool = False,
    progress: Progress | None = None,
) -> Llava:
    """The model of a checkpoint's folder, in evaluation mode; no tokenizer is needed. Parameters as in `load`.

    Built on the meta device; then tensor after tensor comes, so that one is in memory beside the model, and of one that
    is rounded to 8 bits a part. Raises LlavaError that names every missing, unexpected and misshapen tensor, before any
    is read.
    """
    model, fit = open_checkpoint(folder)
    if fit.problems:
        more = f"; and {len(fit.problems) - 20} more" if len(fit.problems) > 20 else ""
        raise LlavaError(f"{folder} does not fit its config.json: {'; '.join(fit.problems[:20])}{more}.")
    state, dtype = fit.state, choose_dtype(dtype, fit.dtype)
    model = to_int8(model) if dtype == torch.int8 else model.to(dtype)
    if fit.tied and dtype == torch.int8:  # the output layer is rounded, and the embedding is not
        state["lm_head.weight"] = state["language_model.embed_tokens.weight"]
    done, size = 0, sum(tensor.nbytes for tensor in state.values())
    # Mapped weights may begin at an odd address, and are then read up to 8 % slower. And where weights are rounded to
    # 8 bits, a tensor that stays mapped would keep its whole file in memory.
    copy = (fast and size < 2e9) or (dtype == torch.int8 and fit.dtype != torch.int8)
    fit.tensors.clear()  # a file is let go of when its last tensor is replaced
    for name in list(state):
        tensor = state[name]
        done += tensor.nbytes
        parameter = model.get_parameter(name)
        if parameter.dtype == torch.int8 != tensor.dtype:
            tensor, scale = quantise_rows(fill_up(tensor.to(device), len(parameter)))
            state[name.replace(".weight", ".scale")] = nn.Parameter(scale, requires_grad=False)
        else:
            tensor = tensor.to(device=device, dtype=parameter.dtype, copy=copy).contiguous()
        state[name] = nn.Parameter(fill_up(tensor, len(parameter)), requires_grad=parameter.requires_grad)
        if progress is not None:
            progress(done, size)
    if fit.tied and dtype != torch.int8:
        state["lm_head.weight"] = state["language_model.embed_tokens.weight"]
    check_scales(state)
    model.load_state_dict(state, strict=True, assign=True)
    return optimize(model) if fast else model


def check_scales(state: dict[str, Tensor]) -> None:
    """Raises LlavaError unless every scale is finite and above 0; it may be 0 where a row holds nothing but zeros."""
    for name, scale in ((name, state[name]) for name in state if name.endswith(".scale")):
        zeros = state[name.replace(".scale", ".weight")][scale == 0]
        sound = scale.isfinite().all() and (scale >= 0).all() and not zeros.any()
        cause = "the weights hold NaN or infinity, or the file is damaged. Copy or convert the checkpoint again."
        require(sound, f"{hub_name(name)} is not finite and above 0 for every row; {cause}")


def load(
    path_or_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: Dtype = "default",
    revision: str | None = None,
    fast: bool = False,
    progress: Progress | None = None,
) -> tuple[Llava, Processor]:
    """The model in evaluation mode, and its processor, from a folder or a Hub id.

    dtype: torch's, or its name. None takes the checkpoint's own, that of its embedding, which for most has 16 bits.
    "int8" rounds the decoder's and the output layer's matrices to 8 bits; all else has 16. "default" is float32, and
    int8 for a checkpoint that is in 8 bits.
    fast: `fast.optimize` changes the classes of modules. In float32 the tokens stay the same. Without it a debugger
    stops in model.py.
    progress: called with the bytes loaded so far and the bytes of all weights.
    Raises LlavaError for anything that cannot be loaded.

    On a CPU, weights that need no conversion are mapped, not copied (with fast: from 2 GB on). The system reads a page
    of the file when it is used, and may drop it when memory is short. Do not write into the file while the model is in
    use: its weights would change, and if the file is cut short, the process ends. Renaming a new file over it is safe;
    the model keeps the old one.
    """
    folder = find(path_or_id, revision)
    model = load_model(folder, device, dtype, fast, progress)
    if not fast and model.lm_head.weight.is_cpu and model.lm_head.weight.itemsize < 4:
        warnings.warn(f"Weights in {8 * model.lm_head.weight.itemsize} bits on a CPU: load(..., fast=True) is several "
                      "times faster.", stacklevel=2)  # fmt: skip
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


def memory_needed(folder: Path, dtype: Dtype) -> tuple[int, torch.dtype]:
    """Bytes of a checkpoint's weights in this dtype, as in `load`, and the checkpoint's own dtype."""
    model, fit = open_checkpoint(folder)
    dtype = choose_dtype(dtype, fit.dtype)
    model = to_int8(model) if dtype == torch.int8 else model.to(dtype)
    return sum(parameter.nbytes for parameter in model.parameters()), fit.dtype


def load_processor(folder: Path) -> Processor:
    """The processor of a checkpoint's folder. An original LLaVA's images are prepared as its CLIP says."""
    processor, clip = Processor.from_folder(folder, read_config(folder)), clip_folder(folder)
    if clip is not None:
        do_pad = read_json(folder / "config.json").get("image_aspect_ratio") == "pad"
        raw = {**read_json(clip / "preprocessor_config.json"), "do_pad": do_pad}
        processor.image_processor = ImageProcessor.from_dict(raw)
    return processor


# ---------------------------------------------------------------- plans


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
        plan: dict[str, Any] = {"ratios": [1 - ratio for ratio in raw]} if isinstance(raw, list) else raw
        ratios = [float(ratio) for ratio in plan["ratios"]]
        if not ratios or not all(0 <= ratio <= 1 for ratio in ratios):
            raise ValueError("ratios between 0 and 1, one per layer, are missing")
        budget = float(plan.get("budget", sum(ratios) / len(ratios)))
        return Plan(budget, ratios, str(plan.get("model", "")), int(plan.get("samples", 0)))
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise LlavaError(f"{path} holds no plan ({error}); expected what python -m bench.plan writes.") from None


# ---------------------------------------------------------------- commands


def inspect(folder: Path) -> int:
    """Prints a table of a checkpoint's tensors with their names here, and what does not fit; returns the exit code."""
    model, fit = open_checkpoint(folder)
    total, parameters = 0, sum(p.numel() for name, p in model.named_parameters() if not name.endswith(".scale"))
    for name, tensor in fit.tensors:
        ours, shape = our_name(name), "x".join(map(str, tensor.shape)) or "scalar"
        dtype, size = str(tensor.dtype).removeprefix("torch."), tensor.numel() * tensor.element_size()
        shown = ours if ours in fit.state else "(not used)"
        print(printable(f"{name:75} {shape:>14} {dtype:>8} {size:>12,}  {shown}"))
        total += size
    files = f"{len(fit.tensors)} tensors in {fit.num_files} files, {total:,} bytes"
    print(f"\n{files}; the model has {parameters:,} parameters.")
    if fit.tied:
        print("The output layer is the embedding (tie_word_embeddings).")
    if fit.dtype == torch.int8:
        print("The decoder's and the output layer's matrices are in 8 bits, with a scale for each row.")
    print("\n".join(map(printable, fit.problems)) or "Every parameter is there.")
    return 1 if fit.problems else 0


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 for a checkpoint that does not fit its config; others as in `run_command`."""
    parser = argparse.ArgumentParser(prog="python -m weights", description="Looks into checkpoints and converts them.")
    commands = parser.add_subparsers(dest="command", required=True)
    looks = commands.add_parser("inspect", help="tensors, shapes, dtypes, bytes, names here, what is missing")
    converts = commands.add_parser("convert", help="write any supported layout as the Hub layout")
    for command in (looks, converts):
        command.add_argument("checkpoint", help="folder or Hub id")
    converts.add_argument("out", type=Path, help="folder to be made")
    converts.add_argument("--dtype", choices=["int8"], help="round the decoder's matrices to 8 bits (default: as is)")
    args = parser.parse_args(arguments)

    def work() -> int:
        if args.command == "inspect":
            return inspect(find(args.checkpoint))
        require(not args.out.exists(), f"{args.out} exists already; choose a new folder.")
        folder = find(args.checkpoint)
        convert(load_model(folder, dtype=args.dtype), load_processor(folder), folder, args.out)
        return 0

    return run_command("weights", work)


if __name__ == "__main__":
    sys.exit(main())
