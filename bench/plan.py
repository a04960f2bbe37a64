"""What a method keeps of one prompt, layer by layer: `python -m bench.plan --save plan.json --plot kept.png`.

`--save` writes the ratios as a plan, which `demo.py --plan` and `bench.quality --plans` read; plans of several samples
come from `bench.quality --estimate-plan`. `--plot` shows what methods keep, of the picture and of the words after it
(needs matplotlib).
"""

from __future__ import annotations

import argparse
import io
import sys
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from minillava import explore, terminal
from minillava.command import run_command
from minillava.compressors import METHODS
from minillava.model import Llava
from minillava.processor import Processor
from weights import estimate_plan, write_file, write_plan

PLOTS = (".png", ".pdf", ".svg")
SHOWN = 4  # layers
LETTERS = 36  # that fit in a line under a layer's picture


def kept_tokens(model: Llava, inputs: dict[str, Tensor], method: str, budget: float) -> list[set[int]]:
    """Which places of the prompt each layer keeps."""
    cache = model.new_cache(0, METHODS[method](budget))
    terminal.read(model, inputs, cache)
    return [set(places[0, : int(held[0])].tolist()) for places, held in zip(cache.position, cache.held)]


def plot(processor: Processor, inputs: dict[str, Tensor], kept: dict[str, list[set[int]]], suffix: str) -> bytes:
    """A picture, a file of the kind of `suffix`: a row for each method, with the patches and words that layers keep.

    The layers are evenly spaced from the first to the last; left of them is the image as the model sees it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    image, columns, cells = explore.drawn(inputs, processor)
    rows, ids = len(cells) // columns, inputs["input_ids"][0].tolist()
    first = ids.index(processor.config.image_token_id)
    words = {
        at: processor.tokenizer.piece(id).replace("\u2581", " ").replace("<0x0A>", "\u23ce")
        for at, id in enumerate(ids)
        if at > first and id != processor.config.image_token_id
    }
    layers = len(next(iter(kept.values())))
    shown = sorted({round(i * (layers - 1) / (SHOWN - 1)) for i in range(SHOWN)})
    figure, axes = plt.subplots(len(kept), 1 + len(shown), squeeze=False, layout="constrained",
                                figsize=(2.2 + 2.2 * len(shown), 2.75 * len(kept)))  # fmt: skip
    for line, (method, by_layer) in zip(axes, kept.items()):
        for axis, layer in zip(line, [None, *shown]):
            axis.imshow(image, extent=(0, columns, rows, 0))
            axis.set(xticks=[], yticks=[])
            if layer is None:
                axis.set_ylabel("PrefixKV" if method == "prefixkv" else method, fontsize=12)
                axis.set_title("the picture", fontsize=9)
                continue
            stays = [cell is not None and first + cell in by_layer[layer] for cell in cells]
            dark = [[0.0 if stays[r * columns + c] else 0.72 for c in range(columns)] for r in range(rows)]
            axis.imshow([[0] * columns] * rows, cmap="gray", vmin=0, vmax=1, alpha=dark, extent=(0, columns, rows, 0),
                        interpolation="nearest")  # fmt: skip
            frames = [Rectangle((at % columns, at // columns), 1, 1) for at, here in enumerate(stays) if here]
            axis.add_collection(PatchCollection(frames, facecolor="none", edgecolor="#2f8fff", linewidth=0.6))
            axis.set_title(f"layer {layer}: {len(by_layer[layer])} of {len(ids)} tokens", fontsize=9)
            x, y = 0.0, 1.02 * rows
            for at, word in words.items():  # after the picture: black where it is kept
                width = columns * len(word) / LETTERS
                x, y = (x, y) if x + width <= columns else (0.0, y + 0.06 * rows)
                axis.text(x, y, word, fontsize=7, family="monospace", va="top",
                          parse_math=False, color="black" if at in by_layer[layer] else "#c4c4c4")  # fmt: skip
                x += width
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format=suffix[1:])
    plt.close(figure)
    return picture.getvalue()


def work(args: argparse.Namespace) -> None:
    """Reads the prompt, and writes what was asked for."""
    _, images = terminal.pictures(args.image, args.scene)
    model, processor = terminal.load_shown(args)
    inputs = explore.encode(model, processor, terminal.prompt_of(processor, args.prompt, len(images)), images)
    methods = args.method or ["prefixkv", "cover"]
    if args.save:
        cache = model.new_cache(0, METHODS[methods[0]](args.budget))
        terminal.read(model, inputs, cache)
        write_plan(args.save, estimate_plan(args.budget, cache.kept.T, cache.prompt_lengths, args.model))
    if args.plot:
        kept = {method: kept_tokens(model, inputs, method, args.budget) for method in methods}
        write_file(args.plot, plot(processor, inputs, kept, Path(args.plot).suffix))


def main(arguments: list[str] | None = None) -> int:
    """Exit codes as in `run_command`."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--save", type=terminal.output_file, metavar="FILE", help="file for the plan (JSON)")
    parser.add_argument("--plot", type=terminal.output_file, metavar="FILE", help="file for the picture")
    parser.add_argument("--budget", type=terminal.parse_budget, default=0.2, metavar="SHARE",
                        help="share of the cache to keep (default: 20%%)")  # fmt: skip
    parser.add_argument("--method", action="append", choices=METHODS, metavar="NAME",
                        help="the first one's plan is saved; repeatable for the picture (default: prefixkv, cover): "
                        + ", ".join(METHODS))  # fmt: skip
    terminal.add_picture_options(parser)
    terminal.add_model_options(parser)
    args = parser.parse_args(arguments)
    if not args.save and not args.plot:
        parser.error("there is nothing to write; give --save, --plot, or both")
    if args.plot and Path(args.plot).suffix not in PLOTS:
        parser.error(f"--plot is {args.plot:.200}; expected a name that ends in {', '.join(PLOTS)}")
    if args.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install -c constraints.txt -e '.[bench]'")
    return run_command("bench.plan", lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
