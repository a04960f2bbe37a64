"""What a method keeps of one prompt, layer by layer: `python -m bench.plan --save plan.json --plot kept.png`.

`--save` writes the ratios as a plan, which `demo.py --plan` and `bench.quality --plans` read; plans of several samples
come from `bench.quality --estimate-plan`. `--plot` shows what PrefixKV keeps (needs matplotlib).
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minillava.command import end_quietly, run_command  # isort: skip

if __name__ == "__main__":
    end_quietly()

from PIL import Image

from minillava import explore, terminal
from minillava.compressors import METHODS
from weights import estimate_plan, write_file, write_plan

PLOTS = (".png", ".pdf", ".svg")


def plot(data: dict[str, Any], suffix: str = ".png") -> bytes:
    """A picture, a file of the kind of `suffix`: patches, curves, kept shares."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    layers, columns, budget = len(data["importance"]), data["columns"], data["start"]
    shown = sorted({round(i * (layers - 1) / 3) for i in range(4)})
    image = Image.open(io.BytesIO(base64.b64decode(data["image"].split(",")[1])))
    figure = plt.figure(figsize=(10, 6.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.15))  # type: ignore[misc]
    share, rows = data["budgets"][budget], len(data["patches"]) // columns
    upper.suptitle(f"Patches that PrefixKV keeps at {share:.0%}", fontsize=11)
    for axis, layer in zip(upper.subplots(1, len(shown), squeeze=False)[0], shown):
        axis.imshow(image.resize((24 * columns, 24 * rows), Image.Resampling.BICUBIC), extent=(0, columns, rows, 0))
        here = explore.kept(data, layer, budget)
        shade = [0.0 if position is None or here[position] else 0.8 for position in data["patches"]]
        dark = [shade[r * columns : (r + 1) * columns] for r in range(rows)]
        axis.imshow([[0] * columns] * rows, cmap="gray", vmin=0, vmax=1, alpha=dark, extent=(0, columns, rows, 0),
                    interpolation="nearest")  # fmt: skip
        framed = [at for at, position in enumerate(data["patches"]) if position is not None and here[position]]
        frames = [Rectangle((at % columns, at // columns), 1, 1) for at in framed]
        axis.add_collection(PatchCollection(frames, facecolor="none", edgecolor="#2f8fff", linewidth=0.5))
        axis.set_title(f"layer {layer}: {sum(here)} of {len(data['importance'][0])} keys", fontsize=9)
        axis.set(xticks=[], yticks=[])
    left, right = lower.subplots(1, 2)
    colours = plt.get_cmap("viridis")([i / max(1, layers - 1) * 0.9 for i in range(layers)])
    at = [i / (explore.POINTS - 1) for i in range(explore.POINTS)]
    for layer, (curve, colour) in enumerate(zip(data["curves"], colours)):
        left.plot(at, curve, color=colour, linewidth=1.3, label=f"layer {layer}")
    left.axhline(data["thresholds"][budget], color="black", linestyle="--", linewidth=1)
    left.annotate(f"p = {data['thresholds'][budget]:.3f}", (1, data["thresholds"][budget]), ha="right", va="bottom")
    left.set(
        xlabel="share of the keys, most important first", ylabel="share of the importance", xlim=(0, 1), ylim=(0, 1)
    )
    if layers <= 12:
        left.legend(fontsize=7, loc="lower right")
    length = len(data["importance"][0])
    right.bar(range(layers), [count / length for count in explore.counts(data, budget)], color=colours)
    right.axhline(share, color="black", linestyle=":", linewidth=1)
    right.set(xlabel="layer", ylabel="share of the prompt kept")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format=suffix[1:])
    plt.close(figure)
    return picture.getvalue()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--save", type=terminal.output_file, metavar="FILE", help="file for the plan (JSON)")
    parser.add_argument("--plot", type=terminal.output_file, metavar="FILE", help="file for the picture")
    parser.add_argument("--budget", type=terminal.parse_budget, default=0.2, metavar="SHARE",
                        help="share of the cache to keep (default: 20%%)")  # fmt: skip
    parser.add_argument("--method", choices=METHODS, default="prefixkv", metavar="NAME",
                        help="whose plan is saved (default: prefixkv): " + ", ".join(METHODS))  # fmt: skip
    terminal.add_picture_options(parser)
    terminal.add_model_options(parser)
    args = parser.parse_args(arguments)
    if not args.save and not args.plot:
        parser.error("there is nothing to write; give --save, --plot, or both")
    if args.plot and args.method != "prefixkv":
        parser.error("--plot shows what PrefixKV keeps; leave out --method")
    if args.plot and Path(args.plot).suffix not in PLOTS:
        parser.error(f"--plot is {args.plot:.200}; expected a name that ends in {', '.join(PLOTS)}")
    if args.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install -c constraints.txt -e '.[bench]'")
    return args


def work(args: argparse.Namespace) -> None:
    """Reads the prompt, and writes what was asked for."""
    _, images = terminal.pictures(args.image, args.scene)
    model, processor = terminal.load_shown(args)
    prompt = terminal.prompt_of(processor, args.prompt, len(images))
    if args.save:
        cache = model.new_cache(0, METHODS[args.method](args.budget))
        terminal.read(model, explore.encode(model, processor, prompt, images), cache)
        write_plan(args.save, estimate_plan(args.budget, cache.kept.T, cache.prompt_lengths, args.model))
    if args.plot:
        data = explore.collect(model, processor, prompt, images, [args.budget], args.model)
        write_file(args.plot, plot(data, Path(args.plot).suffix))


def main(arguments: list[str] | None = None) -> int:
    """Exit codes as in `run_command`."""
    args = parse(arguments)
    return run_command("bench.plan", lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
