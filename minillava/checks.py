"""Checks of prompts and settings. They stand in a file of their own so that the model is short to read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # the model imports this file
    from minillava.config import LlavaConfig, TextConfig


class LlavaError(ValueError):
    """Input that cannot be used. The message says what was found, what was expected, and what to do."""


def require(condition: object, sentence: str) -> None:
    """Raises LlavaError(sentence) if the condition is false."""
    if not condition:
        raise LlavaError(sentence)


def check_prompt(config: TextConfig, input_ids: Tensor, attention_mask: Tensor | None, new_tokens: int = 0) -> Tensor:
    """Raises LlavaError for a prompt that cannot be read; returns which tokens are no padding, bool [B, N]."""
    shape, vocabulary = list(input_ids.shape), config.vocab_size
    usable = len(shape) == 2 and 0 not in shape and input_ids.dtype in (torch.int64, torch.int32)
    require(usable, f"input_ids are {input_ids.dtype} {shape}; expected int64 [B, N], one prompt or more.")
    known = ((input_ids >= 0) & (input_ids < vocabulary)).all()
    require(known, f"input_ids hold ids outside the vocabulary; expected 0 to {vocabulary - 1}.")
    whole = isinstance(new_tokens, int) and new_tokens >= 0
    require(whole, f"max_new_tokens is {new_tokens}; expected a whole number, 0 or more.")
    limit = config.max_position_embeddings
    require(
        shape[1] + new_tokens <= limit,
        f"{shape[1]} prompt tokens and {new_tokens} new ones exceed the model's {limit} positions; "
        "shorten the prompt or ask for fewer.",
    )
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    mask = f"attention_mask is {attention_mask.dtype} {list(attention_mask.shape)}"
    require(attention_mask.shape == input_ids.shape, f"{mask}; expected {shape}, as input_ids are.")
    present = attention_mask == 1  # [B, N]
    require((present | (attention_mask == 0)).all(), f"{mask}; expected 1 for a token and 0 for padding alone.")
    return present


def check_images(config: LlavaConfig, found: int, pixel_values: Tensor | None, image_sizes: Tensor | None) -> None:
    """Raises LlavaError unless the images make as many tokens as the prompts have places for: `found`."""
    if pixel_values is not None:
        shape = list(pixel_values.shape)
        require(len(shape) == 4, f"pixel_values are {shape}; expected [I, 3, R, R]: images, or tiles of all images.")
    rows = 0 if pixel_values is None else len(pixel_values)  # images, or tiles of LLaVA-NeXT
    if not config.image_grid_pinpoints or rows == 0:
        expected = rows * config.num_image_tokens
        require(found == expected, f"input_ids hold {found} image tokens, but {rows} images make {expected}.")
        return
    require(image_sizes is not None, "pixel_values are tiles of LLaVA-NeXT; give image_sizes, too.")
    assert image_sizes is not None
    usable = image_sizes.dim() == 2 and image_sizes.shape[1] == 2 and not image_sizes.is_floating_point()
    usable = usable and bool((image_sizes > 0).all())
    require(usable, f"image_sizes are {image_sizes.tolist()!s:.99}; expected [I, 2]: each image's height and width.")
    tilings = [config.tiling(size) for size in image_sizes.tolist()]
    expected, tiles = sum(tiling.tokens for tiling in tilings), sum(tiling.tiles for tiling in tilings)
    require(rows == tiles, f"pixel_values are {rows} tiles; pictures of these image_sizes have {tiles}.")
    images = len(tilings)
    require(found == expected, f"input_ids hold {found} image tokens, but {images} images make {expected}.")


def require_left_padding(present: Tensor) -> None:
    """Raises LlavaError if a prompt has padding in it or behind it, or no token: present is bool [B, N]."""
    left = present[:, -1].all() and (present.long().diff(dim=-1) >= 0).all()
    require(left, "attention_mask has padding in or after the prompt; pad prompts on the left to generate.")


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raises LlavaError for settings that `sample` cannot use."""
    sane = temperature >= 0 and top_k >= 0 and 0 < top_p <= 1
    require(sane, f"temperature {temperature}, top_k {top_k} or top_p {top_p} is out of range: >= 0, >= 0, 0 to 1.")
