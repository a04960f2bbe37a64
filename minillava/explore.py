"""A page that shows what PrefixKV keeps of an image and its prompt: `python -m minillava.explore page.html`.

It is one file without network: patches by layer, budget and method, importance and rank of a patch in every
layer, the layers' curves with the threshold that cuts them, kept shares, and the answers side by side.
"""

from __future__ import annotations

import argparse
import base64
import difflib
import io
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minillava.command import end_quietly, run_command  # isort: skip

if __name__ == "__main__":
    end_quietly()

import torch
from PIL import Image
from torch import Tensor

from minillava import terminal
from minillava.checks import LlavaError
from minillava.compressors import H2O, Cover, Recorder, SnapKV
from minillava.model import Llava
from minillava.processor import IMAGE_TOKEN, Processor
from prefixkv import PrefixKV, priority, search

SHARES = tuple(step / 20 for step in range(1, 21))  # stops of the budget's slider
POINTS = 101  # of every curve
SHOWN: dict[str, type[PrefixKV]] = {"PrefixKV": PrefixKV, "cover": Cover, "H2O": H2O, "SnapKV": SnapKV}


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
        own = super().score(layer, query, key, value)
        for other, found in zip(self.others, self.found):  # the slow score, of every key by every query, is made once
            found.append(own if type(other).score is PrefixKV.score else other.score(layer, query, key, value))
        return own

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
    budgets: Sequence[float],
    name: str = "",
) -> dict[str, Any]:
    """What page and picture show, without the answers, in plain Python values; of several images the first is shown.

    Raises LlavaError for a prompt without an image.
    """
    if not images:
        raise LlavaError("There is nothing to explore without an image; give one, and <image> in the prompt.")
    inputs = encode(model, processor, prompt, images)
    stops = sorted({*SHARES, *budgets})
    recorder = Beside([method(stop) for method in SHOWN.values() for stop in stops])
    terminal.read(model, inputs, model.new_cache(1, recorder))
    scores = recorder.scores[:, 0].cpu()  # [L, N]
    layers, length = scores.shape
    prefixes = priority(scores)  # [L, N + 1]
    thresholds = [search(prefixes, *PrefixKV(stop).limits(layers, length))[0] for stop in stops]
    choices = iter(recorder.choices())
    methods = [
        {"name": method, "kept": [[bits(row) for row in rows] for rows in itertools.islice(choices, len(stops))]}
        for method in SHOWN
    ]
    ids = inputs["input_ids"][0].tolist()
    places = [position for position, id in enumerate(ids) if id == model.config.image_token_id]
    image, columns, cells = drawn(inputs, processor)
    text = [(position, piece(processor, id)) for position, id in enumerate(ids) if id != model.config.image_token_id]
    picture = io.BytesIO()
    image.save(picture, "PNG")
    at = torch.linspace(0, length, POINTS).round().long()
    data: dict[str, Any] = {
        "model": Path(name).name or name,
        "prompt": prompt,
        "image": "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode(),
        "columns": columns,
        "tiled": "image_sizes" in inputs,
        "patches": [None if cell is None else places[cell] for cell in cells],
        "words": text,
        "importance": [[round(value, 5) for value in row] for row in scores.tolist()],
        "curves": [[round(value, 4) for value in row] for row in prefixes[:, at].tolist()],
        "budgets": stops,
        "start": stops.index(min(budgets)),
        "thresholds": [round(threshold, 5) for threshold in thresholds],
        "methods": methods,
    }
    kept = torch.tensor(counts(data, data["start"]))
    return data | {"layer": int((kept - min(budgets) * length).abs().argmax())}


def answers(
    model: Llava,
    processor: Processor,
    prompt: str,
    images: Sequence[Image.Image],
    budgets: Sequence[float],
    max_new_tokens: int = 128,
) -> dict[str, Any]:
    """The rest of what the page shows: the full cache's answer, and beside it that of every method at every budget."""
    inputs = encode(model, processor, prompt, images)
    runs = [(number, budget) for number in range(len(SHOWN)) for budget in budgets]
    compressors = [None, *(list(SHOWN.values())[number](budget) for number, budget in runs)]
    found = []
    with terminal.progress_bar("answering", "answer", len(compressors)) as bar:
        for compressor in compressors:
            made = model.generate(**inputs, max_new_tokens=max_new_tokens, compressor=compressor)
            found.append((processor.decode(made.token_ids[0]).strip(), made.cache_bytes))
            bar.update()
    (full, used), *others = found
    shown = []
    for (number, budget), (text, size) in zip(runs, others):
        left, right = words(full, text)
        shown.append({"method": number, "budget": budget, "left": left, "right": right, "bytes": size})
    return {"full": {"text": full, "bytes": used}, "runs": shown}


def encode(model: Llava, processor: Processor, prompt: str, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """The model's inputs, on its device."""
    device = model.lm_head.weight.device
    return {name: tensor.to(device) for name, tensor in processor(prompt, images).items()}


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


def main(arguments: list[str] | None = None) -> int:
    """Exit codes as in `run_command`."""
    parser = argparse.ArgumentParser(prog="python -m minillava.explore", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=terminal.output_file, metavar="OUT", help="file for the page (HTML)")
    terminal.add_picture_options(parser)
    terminal.add_model_options(parser)
    parser.add_argument("--budget", action="append", type=terminal.parse_budget, metavar="SHARE",
                        help="share of the cache for answers, like 20%%; repeatable (default: 50%%, 20%%)")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=terminal.whole_number(1), default=128, metavar="N",
                        help="longest answer, in tokens (default: 128)")  # fmt: skip
    args = parser.parse_args(arguments)

    def work() -> None:
        from weights import write_file  # it stands on minillava, not the other way round

        start, budgets = time.perf_counter(), args.budget or [0.5, 0.2]
        _, images = terminal.pictures(args.image, args.scene)
        model, processor = terminal.load_shown(args)
        prompt = terminal.prompt_of(processor, args.prompt, len(images))
        data = collect(model, processor, prompt, images, budgets, args.model)
        data |= answers(model, processor, prompt, images, budgets, args.max_new_tokens)
        write_file(args.out, page(data).encode())
        print(f"{args.out}, with {len(data['runs']) + 1} answers, in {time.perf_counter() - start:.0f} s.")

    return run_command("minillava.explore", work)


if __name__ == "__main__":
    sys.exit(main())
