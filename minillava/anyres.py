"""LLaVA-NeXT: one picture as several tiles, so that small print stays readable.

    the picture ──resize, pad──> the grid that fits it best ──cut──> tiles of R x R pixels, row by row
              └──resize────────> the overview: the whole picture in one tile, which comes first

The vision tower sees every tile by itself. `pack` puts the tiles' features together again: the overview's patches
first, then the grid's patches row by row over all tiles. Rows and columns that show only padding are cut off, and a
learnt vector, `image_newline`, ends every row. So the number of tokens depends on the picture's shape, and `fit` knows
it before the model runs.

Sizes are (height, width), as in `image_sizes` and `image_grid_pinpoints`. Numbers agree with `transformers`
(LlavaNextImageProcessorPil, LlavaNextModel.pack_image_features).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Tiling:
    """How one picture is cut into tiles, and which patches of the grid show the picture."""

    rows: int  # of tiles in the grid
    columns: int
    side: int  # patches a side of a tile
    top: int  # rows of patches that are cut off above, and as many below
    left: int  # columns of patches that are cut off on the left, and as many on the right

    @property
    def tiles(self) -> int:
        """Tiles of the grid, and the overview."""
        return self.rows * self.columns + 1

    @property
    def height(self) -> int:
        """Rows of patches that stay."""
        return self.rows * self.side - 2 * self.top

    @property
    def width(self) -> int:
        """Columns of patches that stay."""
        return self.columns * self.side - 2 * self.left

    @property
    def tokens(self) -> int:
        """Tokens of the picture: the overview's patches, and the rows that stay with a newline each."""
        return self.side**2 + self.height * (self.width + 1)

    @property
    def newlines(self) -> list[int]:
        """Which of the tokens end a row."""
        return [self.side**2 + (row + 1) * (self.width + 1) - 1 for row in range(self.height)]


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The grid, in pixels, that shows most of the picture's pixels; among equals the one with the least padding."""

    def quality(grid: Size) -> tuple[int, int]:
        scale = min(grid[1] / size[1], grid[0] / size[0])
        shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        padding = grid[0] * grid[1] - shown
        return shown, -padding

    return max(pinpoints, key=quality)


def fit(size: Size, pinpoints: Sequence[Size], tile: int, side: int) -> Tiling:
    """The tiling of a picture: tiles of `tile` pixels and `side` patches a side."""
    grid = best_resolution(size, pinpoints)
    rows, columns = grid[0] // tile, grid[1] // tile
    height, width = rows * side, columns * side  # of the grid, in patches
    top = left = 0
    # What comes after the point is cut off. Before it come seven places of rounding: 3 * (24 / 3) may be 23.9999999999.
    if size[1] / size[0] > width / height:
        top = (height - int(round(size[0] * (width / size[1]), 7))) // 2
    else:
        left = (width - int(round(size[1] * (height / size[0]), 7))) // 2
    return Tiling(rows, columns, side, top, left)


def cut(image: Image.Image, pinpoints: Sequence[Size], tile: int, overview: Size, resample: int) -> list[Image.Image]:
    """The overview, resized without regard to the picture's shape, and the tiles of its grid: RGB pictures.

    `transformers` rounds up here, where a picture is resized, and down where rows are counted; so does this file.
    """
    filter, (width, height) = Image.Resampling(resample), image.size
    grid = best_resolution((height, width), pinpoints)
    if grid[1] / width < grid[0] / height:
        inner = (grid[1], min(math.ceil(height * (grid[1] / width)), grid[0]))
    else:
        inner = (min(math.ceil(width * (grid[0] / height)), grid[1]), grid[0])
    whole = Image.new("RGB", (grid[1], grid[0]))  # black
    whole.paste(image.resize(inner, filter), ((grid[1] - inner[0]) // 2, (grid[0] - inner[1]) // 2))
    corners = [(left, top) for top in range(0, grid[0], tile) for left in range(0, grid[1], tile)]
    tiles = [whole.crop((left, top, left + tile, top + tile)) for left, top in corners]
    return [image.resize((overview[1], overview[0]), filter), *tiles]


def pack(features: Tensor, tilings: Sequence[Tiling], newline: Tensor) -> Tensor:
    """Features of all tiles [sum of tiles, P, D] and the newline [D] -> [sum of tokens, D], picture after picture."""
    packed = []
    for tiling, tiles in zip(tilings, features.split([tiling.tiles for tiling in tilings])):
        overview, grid = tiles[0], tiles[1:]  # [P, D], [rows * columns, P, D]
        grid = grid.unflatten(1, (tiling.side, -1)).unflatten(0, (tiling.rows, -1))  # [rows, columns, side, side, D]
        # First by row of tiles, then by row of patches in them: each row of patches runs over all tiles side by side.
        whole = grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # [rows * side, columns * side, D]
        shown = whole[tiling.top : tiling.top + tiling.height, tiling.left : tiling.left + tiling.width]
        ends = newline.to(shown.dtype).expand(tiling.height, 1, -1)  # [height, 1, D]
        packed += [overview, torch.cat([shown, ends], dim=1).flatten(0, 1)]
    return torch.cat(packed)
