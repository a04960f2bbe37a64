"""What PrefixKV keeps of an image and its prompt, to look at: a page (`demo.py --explore`) and a picture (`--plot`).

The page is one file without network: patches by layer, budget and method, importance and rank of a patch in every
layer, the layers' curves with the threshold that cuts them, kept shares, and the answers side by side.
"""

from __future__ import annotations

import base64
import difflib
import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minillava.checks import LlavaError
from minillava.compressors import H2O, Cover, Recorder, SnapKV
from minillava.model import Generation, Llava
from minillava.processor import IMAGE_TOKEN, Processor
from prefixkv import PrefixKV, priority, retain, search

SHARES = tuple(step / 20 for step in range(1, 21))  # stops of the budget's slider
POINTS = 101  # of every curve
OTHERS: dict[str, type[PrefixKV]] = {"cover": Cover, "H2O": H2O, "SnapKV": SnapKV}  # to compare PrefixKV with


class Beside(Recorder):
    """Keeps everything, as a Recorder, and asks other compressors what they would keep."""

    def __init__(self, others: Sequence[PrefixKV]):
        self.others = others
        self.found: list[list[Tensor]] = [[] for _ in others]  # of each one, its scores by layer

    def begin(self, present: Tensor, image: Tensor, layers: int) -> None:
        super().begin(present, image, layers)
        for other in self.others:
            other.begin(present, image, layers)

    def score(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for other, found in zip(self.others, self.found):
            found.append(other.score(layer, query, key, value))
        return super().score(layer, query, key, value)

    def choices(self) -> list[list[Tensor]]:
        """What each of the others keeps of each layer of the first prompt: bool [N]."""
        return [
            [other.choose(layer, *pair)[0] for layer, pair in enumerate(zip(found, other.allocate(torch.stack(found))))]
            for other, found in zip(self.others, self.found)
        ]


def seen_image(pixels: Tensor, processor: Processor, patch: int) -> Image.Image:
    """The picture as the model sees it, from pixel_values [3, R, R]; a border narrower than a patch is cut off."""
    image = processor.image_processor
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (image.image_mean, image.image_std))
    values = pixels.double().cpu() * std + mean if image.do_normalize else pixels.double().cpu()
    side = pixels.shape[1] // patch * patch
    data = (values * 255).round().clamp(0, 255).byte().permute(1, 2, 0)[:side, :side].contiguous()
    return Image.frombytes("RGB", (side, side), bytes(data.flatten().tolist()))


def drawn(inputs: dict[str, Tensor], processor: Processor) -> tuple[Image.Image, int, list[int | None]]:
    """The first image as a grid of cells: picture, columns, and each cell's position among the image's tokens.

    LLaVA-NeXT's overview stands above its tiles, whose rows end in a grey cell, the newline. None: an empty cell.
    """
    config, vision = processor.config, processor.config.vision
    side, patch = vision.image_size // vision.patch_size, vision.patch_size
    if "image_sizes" not in inputs:
        surplus = config.num_image_tokens - side**2  # 1 with CLS before the patches, -1 where a patch was dropped
        cells: list[int | None] = (
            [None, *range(side**2 - 1)] if surplus < 0 else list(range(surplus, surplus + side**2))
        )
        return seen_image(inputs["pixel_values"][0], processor, patch), side, cells
    tiling = config.tiling(inputs["image_sizes"][0].tolist())
    overview, *tiles = [seen_image(pixels, processor, patch) for pixels in inputs["pixel_values"][: tiling.tiles]]
    grid = Image.new("RGB", (tiling.columns * overview.width, tiling.rows * overview.height))
    for index, tile in enumerate(tiles):
        grid.paste(tile, (index % tiling.columns * tile.width, index // tiling.columns * tile.height))
    left, top = tiling.left * patch, tiling.top * patch
    row_tokens = tiling.width + 1  # with the newline
    columns = max(side, row_tokens)
    picture = Image.new("RGB", (columns * patch, (side + tiling.height) * patch), "grey")
    picture.paste(overview)
    picture.paste(grid.crop((left, top, grid.width - left, grid.height - top)), (0, side * patch))
    tokens = iter(range(tiling.tokens))
    cells = []
    for count in [side] * side + [row_tokens] * tiling.height:
        cells += [*itertools.islice(tokens, count), *[None] * (columns - count)]
    return picture, columns, cells


def words(left: str, right: str) -> tuple[list[tuple[bool, str]], list[tuple[bool, str]]]:
    """Both texts in stretches of words, each with whether the other text has it too."""
    one, other = left.split(), right.split()
    sides: tuple[list[tuple[bool, str]], list[tuple[bool, str]]] = ([], [])
    for kind, a, b, c, d in difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        for side, part in zip(sides, (one[a:b], other[c:d])):
            if part:
                side.append((kind == "equal", " ".join(part)))
    return sides


@torch.no_grad()
def collect(
    model: Llava,
    processor: Processor,
    prompt: str,
    images: Sequence[Image.Image],
    budgets: Sequence[float] = (0.5, 0.2),
    max_new_tokens: int = 128,
    name: str = "",
) -> dict[str, Any]:
    """All that page and picture show, in plain Python values; of several images the first is shown.

    Raises LlavaError for a prompt without an image.
    """
    if not images:
        raise LlavaError("There is nothing to explore without an image; give one, and <image> in the prompt.")
    device = model.lm_head.weight.device
    inputs = {key: tensor.to(device) for key, tensor in processor(prompt, images).items()}
    stops = sorted({*SHARES, *budgets})
    recorder = Beside([method(stop) for method in OTHERS.values() for stop in stops])
    model.read(**inputs, cache=model.new_cache(1, recorder))
    scores = recorder.scores[:, 0].cpu()  # [L, N]
    layers, length = scores.shape
    prefixes = priority(scores)  # [L, N + 1]
    protected = min(length, PrefixKV().num_sinks + 1)
    found = [search(prefixes, max(round(s * layers * length), layers * protected), protected) for s in stops]
    everything = torch.ones(1, length, dtype=torch.bool)
    own = [[retain(row[None], count[None], everything)[0] for row, count in zip(scores, counts)] for _, counts in found]
    choices = recorder.choices()
    methods = [{"name": "PrefixKV", "kept": [[bits(row) for row in rows] for rows in own]}]
    for number, other in enumerate(OTHERS):
        theirs = choices[number * len(stops) : (number + 1) * len(stops)]
        methods.append({"name": other, "kept": [[bits(row) for row in rows] for rows in theirs]})
    ids = inputs["input_ids"][0].tolist()
    places = [position for position, id in enumerate(ids) if id == model.config.image_token_id]
    image, columns, cells = drawn(inputs, processor)
    patches = [None if cell is None else places[cell] for cell in cells]
    text = [(position, piece(processor, id)) for position, id in enumerate(ids) if id != model.config.image_token_id]
    picture = io.BytesIO()
    image.save(picture, "PNG")

    def answer(compressor: PrefixKV | None) -> tuple[str, Generation]:
        made = model.generate(**inputs, max_new_tokens=max_new_tokens, compressor=compressor)
        return processor.decode(made.token_ids[0]).strip(), made

    full, made = answer(None)
    runs = []
    kinds: list[type[PrefixKV]] = [PrefixKV, *OTHERS.values()]
    for number, method in enumerate(kinds):
        for budget in budgets:
            short, compressed = answer(method(budget))
            left, right = words(full, short)
            used = compressed.cache_bytes
            runs.append({"method": number, "budget": budget, "left": left, "right": right, "bytes": used})
    at = torch.linspace(0, length, POINTS).round().long()
    curves = prefixes[:, at]
    return {
        "model": Path(name).name or name,
        "prompt": prompt,
        "image": "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode(),
        "columns": columns,
        "tiled": "image_sizes" in inputs,
        "patches": patches,
        "words": text,
        "importance": [[round(value, 5) for value in row] for row in scores.tolist()],
        "curves": [[round(value, 4) for value in row] for row in curves.tolist()],
        "budgets": stops,
        "start": stops.index(min(budgets)),
        "layer": int((found[stops.index(min(budgets))][1] - min(budgets) * length).abs().argmax()),
        "thresholds": [round(threshold, 5) for threshold, _ in found],
        "methods": methods,
        "full": {"text": full, "bytes": made.cache_bytes},
        "runs": runs,
    }


def piece(processor: Processor, id: int) -> str:
    """A token as it is shown: a leading space as such, a line break as ⏎."""
    text = processor.tokenizer.piece(id) or IMAGE_TOKEN
    return text.replace("<0x0A>", "⏎").replace("\n", "⏎").replace("▁", "␣" if text == "▁" else "")


def page(data: dict[str, Any]) -> str:
    """The HTML page. Texts of prompt and model are put in by the page's script as text, never as HTML."""
    template = (Path(__file__).parent / "explore.html").read_text(encoding="utf-8")
    embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace("{{data}}", embedded)


def bits(kept: Tensor) -> str:
    """Which tokens are kept, bool [N], as hexadecimal digits: the first token is the highest bit of the first digit."""
    text = "".join("1" if one else "0" for one in kept.tolist())
    return "".join(f"{int(text[at : at + 4].ljust(4, '0'), 2):x}" for at in range(0, len(text), 4))


def kept(data: dict[str, Any], layer: int, budget: int, method: int = 0) -> list[bool]:
    """Which tokens of the prompt a layer keeps at a stop of the budget."""
    digits = data["methods"][method]["kept"][budget][layer]
    return [bool(int(digits[j // 4], 16) >> (3 - j % 4) & 1) for j in range(len(data["importance"][0]))]


def counts(data: dict[str, Any], budget: int, method: int = 0) -> list[int]:
    """Tokens that each layer keeps at a stop of the budget."""
    return [sum(kept(data, layer, budget, method)) for layer in range(len(data["importance"]))]


def plot(data: dict[str, Any], suffix: str = ".png") -> bytes:
    """The same as a still picture, a file of the kind of `suffix`: patches, curves, kept shares. Needs matplotlib."""
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
        here = kept(data, layer, budget)
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
    for layer, (curve, colour) in enumerate(zip(data["curves"], colours)):
        left.plot([i / (POINTS - 1) for i in range(POINTS)], curve, color=colour, linewidth=1.3, label=f"layer {layer}")
    left.axhline(data["thresholds"][budget], color="black", linestyle="--", linewidth=1)
    left.annotate(f"p = {data['thresholds'][budget]:.3f}", (1, data["thresholds"][budget]), ha="right", va="bottom")
    left.set(
        xlabel="share of the keys, most important first", ylabel="share of the importance", xlim=(0, 1), ylim=(0, 1)
    )
    if layers <= 12:
        left.legend(fontsize=7, loc="lower right")
    length = len(data["importance"][0])
    right.bar(range(layers), [count / length for count in counts(data, budget)], color=colours)
    right.axhline(share, color="black", linestyle=":", linewidth=1)
    right.set(xlabel="layer", ylabel="share of the prompt kept")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format=suffix[1:])
    plt.close(figure)
    return picture.getvalue()
