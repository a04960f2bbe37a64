"""Our numbers beside those of several versions of transformers: `python -m bench.parity`.

python -m bench.parity make FOLDER      with each version installed in turn: writes random checkpoints in three
                                        dtypes, and what that version computes with them
python -m bench.parity compare FOLDER…  loads each with our code and prints the table
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

IMAGE_ID, PATCHES = 310, 16
DTYPES = ("float32", "float16", "bfloat16")


def make(folder: Path) -> None:
    """Random checkpoints in every dtype, with and without grouped queries, saved by the installed version."""
    import transformers
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    for dtype in DTYPES:
        for kv_heads in (4, 2):
            torch.manual_seed(0)
            vision = CLIPVisionConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
                                      image_size=28, patch_size=7)  # fmt: skip
            text = LlamaConfig(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
                               num_attention_heads=4, num_key_value_heads=kv_heads,
                               max_position_embeddings=256)  # fmt: skip
            settings: dict[str, Any] = {"image_token_index": IMAGE_ID, "pad_token_id": 0, "image_seq_length": PATCHES}
            config = LlavaConfig(vision_config=vision, text_config=text, **settings)
            model: Any = LlavaForConditionalGeneration(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    wide = parameter.dim() > 1
                    noise = torch.randn(parameter.shape)
                    parameter.copy_(noise * 1.2 * parameter[0].numel() ** -0.5 if wide else parameter + noise * 0.1)
            out = folder / f"{transformers.__version__} {dtype} {kv_heads}"
            model.to(getattr(torch, dtype)).save_pretrained(out)
            # Loaded again, since `.to` has rounded RoPE's frequencies as well.
            model = LlavaForConditionalGeneration.from_pretrained(out, torch_dtype=getattr(torch, dtype)).eval()
            ids = torch.randint(3, 300, (1, 40))
            ids[:, 5 : 5 + PATCHES] = IMAGE_ID
            pixels = torch.randn(1, 3, 28, 28).to(getattr(torch, dtype))
            inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                logits = model(**inputs).logits
                made = model.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=-1)[:, -64:]
            save_file({"ids": ids, "pixels": pixels, "logits": logits.contiguous(), "tokens": made.contiguous()},
                      out / "expected.st")  # fmt: skip
            (out / "version.json").write_text(json.dumps([transformers.__version__, dtype, kv_heads]))


def compare(folders: list[Path]) -> str:
    """Markdown: the largest difference of a logit and the greedy tokens that are equal, by version and dtype."""
    from safetensors.torch import load_file

    from weights import load_model

    rows: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    for folder in folders:
        for path in sorted(folder.glob("*/version.json")):
            version, dtype, _ = json.loads(path.read_text())
            model, expected = load_model(path.parent, dtype=None), load_file(path.parent / "expected.st")
            with torch.no_grad():
                logits = model(expected["ids"], expected["pixels"])
            tokens = model.generate(expected["ids"], expected["pixels"], max_new_tokens=64, eos_token_id=()).token_ids
            apart = float((logits.double() - expected["logits"].double()).abs().max())
            equal = int((tokens == expected["tokens"]).long().cumprod(1).sum())
            rows.setdefault((version, dtype), []).append((apart, float(expected["logits"].abs().max()), equal))
    lines = [
        "| written by | dtype | largest logit | largest difference | greedy tokens equal |",
        "|---|---|---|---|---|",
    ]
    for (version, dtype), found in sorted(rows.items()):
        largest, size = max(row[0] for row in found), max(row[1] for row in found)
        same = ", ".join(f"{row[2]} of 64" for row in found)
        lines.append(f"| transformers {version} | {dtype} | {size:.1f} | {largest:.1g} | {same} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.parity", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("action", choices=["make", "compare"])
    parser.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    if args.action == "make":
        make(args.folders[0])
    else:
        print(compare(args.folders))
    return 0


if __name__ == "__main__":
    sys.exit(main())
