"""Our numbers beside those of several versions of transformers, for every layout: `python -m bench.parity`.

python -m bench.parity make NEW_FOLDER  with each version installed in turn: writes random checkpoints in three
                                        dtypes and every layout, and what that version computes with them
python -m bench.parity compare FOLDER…  loads each with our code and prints the table
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import table
from minillava.anyres import fit
from minillava.command import run_command
from minillava.convert import rename

IMAGE_ID, PATCHES = 310, 16
DTYPES = ("float32", "float16", "bfloat16")
CLIP = "clip-vit-test"
TO_ORIGINAL = [  # names of transformers' weights, to those of the original
    (r"^model\.(?=language_model|vision_tower|multi_modal_projector)", ""),
    (r"^multi_modal_projector\.linear_1", "model.mm_projector.0"),
    (r"^multi_modal_projector\.linear_2", "model.mm_projector.2"),
    (r"^language_model\.(?=lm_head|model\.)", ""),
    (r"^language_model\.", "model."),
    (r"^vision_tower\.(vision_model\.)?", "vision_model."),
]


def save_original(model: Any, folder: Path, image_id: int = IMAGE_ID, **config: Any) -> None:
    """Saves a LlavaForConditionalGeneration as the original LLaVA did, its tower in a CLIP folder of its own within.

    Llama's names, `mm_projector` and a vocabulary that ends before `<image>`; `config` adds to config.json.
    """
    from safetensors.torch import save_file

    llava: dict[str, Tensor] = {}
    clip = {"logit_scale": torch.ones([]), "text_model.embeddings.position_ids": torch.arange(3)}
    for name, tensor in model.state_dict().items():
        name, tensor = rename(name, TO_ORIGINAL), tensor.clone().contiguous()
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = tensor[:image_id].clone()
        (clip if name.startswith("vision_model.") else llava)[name] = tensor
    (folder / CLIP).mkdir(parents=True, exist_ok=True)
    save_file(llava, folder / "model.safetensors")
    save_file(clip, folder / CLIP / "model.safetensors")
    text, vision = model.config.text_config, model.config.vision_config
    llama = {name: getattr(text, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({
        **llama, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "vocab_size": image_id,
        "mm_vision_tower": f"somebody/{CLIP}", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "mm_hidden_size": vision.hidden_size, "image_aspect_ratio": "pad",
        "mm_use_im_start_end": False, "tie_word_embeddings": False, "pad_token_id": 0, **config,
    }))  # fmt: skip
    (folder / CLIP / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision.to_dict()}))


GRIDS = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28], [28, 140]]  # of tiles of 28 pixels
KINDS: dict[str, tuple[str, str, str, dict[str, Any], dict[str, Any]]] = {  # classes, settings of decoder and whole
    "CLIP, Llama": ("Llava", "CLIPVision", "Llama", {}, {}),
    "CLIP, Llama 3": ("Llava", "CLIPVision", "Llama", {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_parameters": {
                      "rope_type": "default", "rope_theta": 5e5}}, {}),
    "SigLIP, Qwen2": ("Llava", "SiglipVision", "Qwen2", {}, {"vision_feature_select_strategy": "full",
                      "vision_feature_layer": -1}),
    "LLaVA-NeXT, Llama": ("LlavaNext", "CLIPVision", "Llama", {}, {"image_grid_pinpoints": GRIDS}),
    "LLaVA-NeXT, Mistral": ("LlavaNext", "CLIPVision", "Mistral", {"sliding_window": None},
                            {"image_grid_pinpoints": GRIDS}),
}  # fmt: skip
FAMILY = tuple(KINDS)[1:]
PICTURES = ((40, 75), (28, 200), (90, 31), (3, 120))  # heights and widths


def random_model(kind: str, kv_heads: int = 4, seed: int = 0, tied: bool = False, text: Mapping[str, Any] | None = None,
                 vision: Mapping[str, Any] | None = None, **top: Any) -> Any:  # fmt: skip
    """A random model of transformers, of one of KINDS, with weights large enough to matter.

    text, vision and top: settings of the decoder, of the tower and of the whole.
    """
    import transformers

    llava, tower, decoder, of_decoder, of_whole = KINDS[kind]
    torch.manual_seed(seed)
    side = 30 if tower == "SiglipVision" else 28  # a border of two pixels is cut off, as in the real one's 384 / 14
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
             "image_size": side, "patch_size": 7, **(vision or {})}  # fmt: skip
    words = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": kv_heads, "max_position_embeddings": 1024,
             "tie_word_embeddings": tied, **of_decoder, **(text or {})}  # fmt: skip
    settings: dict[str, Any] = {"image_token_index": IMAGE_ID, "pad_token_id": 0, "image_seq_length": PATCHES,
                                "tie_word_embeddings": tied, **top, **of_whole}  # fmt: skip
    config = getattr(transformers, f"{llava}Config")(
        vision_config=getattr(transformers, f"{tower}Config")(**sizes),
        text_config=getattr(transformers, f"{decoder}Config")(**words),
        **settings,
    )
    model: Any = getattr(transformers, f"{llava}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            wide = parameter.dim() > 1
            noise = torch.randn(parameter.shape)
            parameter.copy_(noise * 1.2 * parameter[0].numel() ** -0.5 if wide else parameter + noise * 0.1)
        model.get_output_embeddings().weight[IMAGE_ID:] = 0  # ids that the original layout does not have
    return model


def make(folder: Path, kinds: Iterable[str] = KINDS) -> None:
    """Random checkpoints in every dtype and layout, with and without grouped queries, by the installed version."""
    import transformers
    from safetensors.torch import load_file, save_file

    for dtype, kv_heads, kind in product(DTYPES, (4, 2), kinds):
        name = f"{dtype} {kv_heads} {kind}"
        model, saved = random_model(kind, kv_heads).to(getattr(torch, dtype)), folder / f"{name} saved"
        model.save_pretrained(saved)
        # Loaded again, since `.to` has rounded RoPE's frequencies as well.
        model = type(model).from_pretrained(saved, torch_dtype=getattr(torch, dtype)).eval()  # 4.45 knows no `dtype`
        layouts = {kind: saved}
        if kind not in FAMILY:
            layouts = {"as saved": saved, "original LLaVA": folder / f"{name} original"}
            save_original(model, layouts["original LLaVA"])
            if model.state_dict().keys() != load_file(saved / "model.safetensors").keys():
                out = layouts["as in memory"] = folder / f"{name} memory"
                model.config.save_pretrained(out)
                save_file({name: t.clone() for name, t in model.state_dict().items()}, out / "model.safetensors")
        inputs = make_inputs(model, kind, dtype)
        with torch.no_grad():
            logits = model(**inputs).logits
            made = model.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=-1)[:, -64:]
        for layout, out in layouts.items():
            save_file({**inputs, "logits": logits.contiguous(), "tokens": made.contiguous()}, out / "expected.st")
            (out / "version.json").write_text(json.dumps([transformers.__version__, layout, dtype]))


def make_inputs(model: Any, kind: str, dtype: str) -> dict[str, Tensor]:
    """One prompt with one picture; for LLaVA-NeXT with several, of different shapes."""
    if kind.startswith("LLaVA-NeXT"):
        tilings = [fit(size, [(h, w) for h, w in GRIDS], 28, 4) for size in PICTURES]
        counts, tiles = [tiling.tokens for tiling in tilings], sum(tiling.tiles for tiling in tilings)
    else:
        counts, tiles = [PATCHES], 1
    row = [torch.randint(3, 300, (5,))]
    for count in counts:
        row += [torch.full((count,), IMAGE_ID), torch.randint(3, 300, (10,))]
    ids = torch.cat(row)[None]
    side = model.config.vision_config.image_size
    pixels = torch.randn(tiles, 3, side, side).to(getattr(torch, dtype))
    inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"image_sizes": torch.tensor(PICTURES)} if len(counts) > 1 else {})


def compare(folders: list[Path]) -> str:
    """Markdown: the largest difference of a logit and the greedy tokens that are equal, by version, layout, dtype."""
    from safetensors.torch import load_file

    from weights import load_model

    found: dict[tuple[str, str], dict[str, list[tuple[float, int]]]] = {}
    largest = 0.0
    for path in sorted(path for folder in folders for path in folder.glob("*/version.json")):
        version, layout, dtype = json.loads(path.read_text())
        model, inputs = load_model(path.parent, dtype=None), load_file(path.parent / "expected.st")
        expected, made = inputs.pop("logits"), inputs.pop("tokens")
        arguments: dict[str, Any] = inputs
        with torch.no_grad():
            logits = model(**arguments)
        tokens = model.generate(**arguments, max_new_tokens=64, eos_token_id=()).token_ids
        real = IMAGE_ID if layout == "original LLaVA" else None  # its vocabulary ends there, and is filled up
        apart = (logits.double() - expected.double())[..., :real].abs().max()
        equal = int((tokens == made).long().cumprod(1).sum())
        found.setdefault((version, layout), {}).setdefault(dtype, []).append((float(apart), equal))
        largest = max(largest, float(expected.abs().max()))

    def cell(runs: list[tuple[float, int]]) -> str:
        return f"{max(apart for apart, _ in runs):.1g}, {min(equal for _, equal in runs)} of 64" if runs else ""

    rows = [[*key, *(cell(runs.get(dtype, [])) for dtype in DTYPES)] for key, runs in sorted(found.items())]
    return table(["written by transformers", "layout", *DTYPES], rows) + f"\n\nThe largest logit is {largest:.1f}."


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.parity", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("action", choices=["make", "compare"])
    parser.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    if args.action == "make":
        if args.folders[0].exists():
            parser.error(f"{args.folders[0]} exists; expected the name of a new folder.")
        make(args.folders[0])
    else:
        for folder in args.folders:
            if not any(folder.glob("*/version.json")):
                parser.error(f"{folder} has nothing that `make` wrote; expected a folder that it was given.")
        print(compare(args.folders))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("bench.parity", main))
