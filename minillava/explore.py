"""A page of what a model looks at in a picture, and what is kept of it: `python -m minillava.explore page.html`.

It is one file without network: the patches that the question leads to, those that every method keeps by layer and
budget, the answers side by side, a patch's importance in every layer, and the curves whose threshold sets the sizes.
"""

from __future__ import annotations

import argparse
import base64
import difflib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
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
from minillava.compressors import METHODS, Recorder, SnapKV
from minillava.files import write_file
from minillava.model import Llava
from minillava.processor import IMAGE_TOKEN, Processor
from minillava.terminal import encode
from prefixkv import PrefixKV, attention_weights, priority, search

SHARES = tuple(step / 20 for step in range(1, 21))  # stops of the budget's slider
ANSWERED = (0.05, 0.1, 0.2, 0.5)  # budgets at which methods answer
POINTS = 101  # of every curve


class Beside(Recorder):
    """Keeps everything, as a Recorder. Notes where the last token looks, and asks methods what they would keep."""

    def __init__(self, methods: Sequence[str], budgets: Sequence[float]):
        self.methods = [[METHODS[name](budget) for budget in budgets] for name in methods]
        self.found: list[list[list[Tensor]]] = [[] for _ in methods]  # of each method, by layer: scores by budget
        self.looks: list[Tensor] = []  # of each layer, the last token's attention, mean over heads: [N]

    def begin(self, present: Tensor, image: Tensor, layers: int) -> None:
        super().begin(present, image, layers)
        for method in itertools.chain(*self.methods):
            method.begin(present, image, layers)

    def score(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        own = super().score(layer, query, key, value)
        self.looks.append(attention_weights(query[:, :, -1:], key, None).mean((0, 1, 2)))
        for methods, found in zip(self.methods, self.found):
            if type(methods[0]).score is PrefixKV.score:  # slow: of every key by every query
                found.append([own])
            else:  # only SnapKV's window depends on the budget
                asked = methods if isinstance(methods[0], SnapKV) else methods[:1]
                found.append([method.score(layer, query, key, value) for method in asked])
        return own

    def choices(self) -> Iterator[list[Tensor]]:
        """What each layer keeps of the prompt, bool [N]: by the first method at each budget, then by the next."""
        for methods, found in zip(self.methods, self.found):
            for number, method in enumerate(methods):
                vars(method).update(
                    vars(methods[0]) | {"budget": method.budget}
                )  # at each budget, what the first one's `score` has noted
                scores = [by_budget[number % len(by_budget)] for by_budget in found]
                sizes = method.allocate(torch.stack(scores))
                yield [method.choose(layer, *pair)[0] for layer, pair in enumerate(zip(scores, sizes))]


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
        cells = [cell if cell >= 0 else None for cell in range(surplus, surplus + side**2)]
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
def collect(model: Llava, processor: Processor, prompt: str, images: Sequence[Image.Image], budgets: Sequence[float],
            name: str = "", methods: Sequence[str] = ("prefixkv",)) -> dict[str, Any]:  # fmt: skip
    """What the page shows, without the answers, in plain Python values; of several images the first is shown.

    Raises LlavaError for a prompt without an image.
    """
    if not images:
        raise LlavaError("There is nothing to explore without an image; give one, and <image> in the prompt.")
    inputs = encode(model, processor, prompt, images)
    stops = sorted({*SHARES, *budgets})
    recorder = Beside(methods, stops)
    terminal.read(model, inputs, model.new_cache(1, recorder))
    scores, looks = recorder.scores[:, 0].cpu(), torch.stack(recorder.looks).cpu()  # [L, N] each
    layers, length = scores.shape
    prefixes = priority(scores)  # [L, N + 1]
    thresholds = [search(prefixes, *PrefixKV(stop).limits(layers, length))[0] for stop in stops]
    shown: list[dict[str, Any]] = [{"name": method, "kept": []} for method in methods]
    with terminal.progress_bar("choosing", "budget", len(methods) * len(stops)) as bar:
        for number, rows in enumerate(recorder.choices()):
            shown[number // len(stops)]["kept"].append([bits(row) for row in rows])
            bar.update()
    ids = inputs["input_ids"][0].tolist()
    places = [position for position, id in enumerate(ids) if id == model.config.image_token_id]
    image, columns, cells = drawn(inputs, processor)
    text = [(position, piece(processor, id)) for position, id in enumerate(ids) if id != model.config.image_token_id]
    at = torch.linspace(0, length, POINTS).round().long()
    return {
        "model": Path(name).name or name,
        "prompt": prompt,
        "image": "data:image/png;base64," + base64.b64encode(terminal.png(image)).decode(),
        "columns": columns,
        "tiled": "image_sizes" in inputs,
        "patches": [None if cell is None else places[cell] for cell in cells],
        "words": text,
        "looks": rounded(looks, 5),
        "importance": rounded(scores, 5),
        "curves": rounded(prefixes[:, at], 4),
        "budgets": stops,
        "start": stops.index(min(budgets, key=lambda budget: abs(budget - 0.2))),
        "thresholds": [round(threshold, 5) for threshold in thresholds],
        "methods": shown,
        "layer": int(looks[:, places].topk(min(10, len(places))).values.sum(-1).argmax()),  # which looks most sharply
    }


def answers(model: Llava, processor: Processor, prompt: str, images: Sequence[Image.Image], budgets: Sequence[float],
            max_new_tokens: int = 128, methods: Sequence[str] = ("prefixkv",)) -> dict[str, Any]:  # fmt: skip
    """The rest of what the page shows: the full cache's answer, and beside it that of every method at every budget."""
    inputs = encode(model, processor, prompt, images)
    full: dict[str, Any] = {}
    runs: list[dict[str, Any]] = []
    with terminal.progress_bar("answering", "answer", len(methods) * len(budgets) + 1) as bar:
        for number, budget in [(-1, 1.0), *itertools.product(range(len(methods)), budgets)]:  # -1 for the full cache
            method = METHODS[methods[number]](budget) if number >= 0 else None
            bar.set_description(f"answering: {f'{methods[number]} {budget:.0%}' if method else 'full cache'}")
            result = model.generate(**inputs, max_new_tokens=max_new_tokens, compressor=method)
            text, size = processor.decode(result.token_ids[0]).strip(), result.cache_bytes
            if method:
                left, right = words(full["text"], text)
                runs.append({"method": number, "budget": budget, "left": left, "right": right, "bytes": size})
            else:
                full = {"text": text, "bytes": size}
            bar.update()
    return {"full": full, "runs": runs}


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
    text = "".join(str(int(one)) for one in kept.tolist())
    return "".join(f"{int(text[at : at + 4].ljust(4, '0'), 2):x}" for at in range(0, len(text), 4))


def rounded(table: Tensor, digits: int) -> list[list[float]]:
    """The rows of a table, with so many digits after the point."""
    return [[round(value, digits) for value in row] for row in table.tolist()]


def main(arguments: list[str] | None = None) -> int:
    """Exit codes as in `run_command`."""
    parser = argparse.ArgumentParser(prog="python -m minillava.explore", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=terminal.output_file, metavar="OUT", help="file for the page (HTML)")
    terminal.add_picture_options(parser)
    terminal.add_model_options(parser)
    parser.add_argument("--budget", action="append", type=terminal.parse_budget, metavar="SHARE",
                        help="share of the cache for answers; repeatable (default: 5%%, 10%%, 20%%, 50%%)")  # fmt: skip
    parser.add_argument(
        "--method", action="append", choices=METHODS, metavar="NAME", help="method to show; repeatable (default: all)"
    )
    parser.add_argument("--max-new-tokens", type=terminal.whole_number(1), default=128, metavar="N",
                        help="longest answer, in tokens (default: 128)")  # fmt: skip
    args = parser.parse_args(arguments)

    def work() -> None:
        start = time.perf_counter()
        budgets, methods = (
            args.budget or ANSWERED,
            args.method or [*reversed(METHODS)],
        )  # cover, the last, is shown first
        _, images = terminal.pictures(args.image, args.scene)
        model, processor = terminal.load_shown(args)
        prompt = terminal.prompt_of(processor, args.prompt, len(images))
        data = collect(model, processor, prompt, images, budgets, args.model, methods)
        data |= answers(model, processor, prompt, images, budgets, args.max_new_tokens, methods)
        write_file(args.out, page(data).encode())
        print(f"{args.out}, with {len(data['runs']) + 1} answers, in {time.perf_counter() - start:.0f} s.")

    return run_command("minillava.explore", work)


if __name__ == "__main__":
    sys.exit(main())
