"""Checks of prompts and settings. They stand in a file of their own so that the model is short to read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # the model imports this file
    from minillava.config import LlavaConfig, TextConfig
    from minillava.model import Compressor, KVCache


class LlavaError(ValueError):
    """Input that cannot be used. The message says what was found, what was expected, and what to do."""


def require(condition: object, sentence: str) -> None:
    """Raises LlavaError(sentence) if the condition is false."""
    if not condition:
        raise LlavaError(sentence)


def wrong_value(name: str, value: object, expected: str) -> LlavaError:
    """The error for a value in config.json that cannot be used."""
    return LlavaError(f"config.json has {name} = {value!r:.99}; expected {expected}.")


def require_value(condition: object, name: str, value: object, expected: str) -> None:
    """Raises `wrong_value` if the condition is false."""
    if not condition:
        raise wrong_value(name, value, expected)


def check_room(config: TextConfig, tokens: int, room: int) -> None:
    """Raises LlavaError unless a text of `tokens` tokens and `room` more ones fits into the model's positions."""
    if type(room) is not int or room < 0:
        raise LlavaError(f"The room for new tokens (max_new_tokens) is {room!r}; expected a whole number, 0 or more.")
    if tokens + room > config.max_position_embeddings:
        raise LlavaError(
            f"{tokens} tokens and room for {room} more exceed the model's {config.max_position_embeddings} positions; "
            "shorten the text or ask for fewer."
        )


def check_cache(config: TextConfig, tokens: int, room: int, compressor: Compressor | None) -> None:
    """Raises LlavaError unless a cache of `tokens` tokens can have `room` for more, and compress with this."""
    check_room(config, tokens, room)
    if isinstance(compressor, type):
        raise LlavaError(f"The compressor is the class {compressor.__name__}; give an object, {compressor.__name__}().")


def check_prompt(config: TextConfig, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Raises LlavaError for token ids that cannot be read; returns which of them are not padding, bool [B, N]."""
    shape = list(input_ids.shape)
    if len(shape) != 2 or 0 in shape or input_ids.dtype not in (torch.int64, torch.int32):
        raise LlavaError(
            f"input_ids are {input_ids.dtype} {shape}; expected int64 [B, N], at least one token in each row."
        )
    ids = input_ids.flatten().tolist()
    if min(ids) < 0 or max(ids) >= config.vocab_size:
        raise LlavaError(f"input_ids hold ids outside the vocabulary; expected 0 to {config.vocab_size - 1}.")
    check_room(config, shape[1], 0)
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    mask = f"attention_mask is {attention_mask.dtype} {list(attention_mask.shape)}"
    require(attention_mask.shape == input_ids.shape, f"{mask}; expected {shape}, as input_ids are.")
    present = attention_mask == 1  # [B, N]
    require((present | (attention_mask == 0)).all(), f"{mask}; expected 1 for a token and 0 for padding only.")
    return present


def check_read(
    config: TextConfig,
    cache: KVCache,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pixel_values: Tensor | None = None,
) -> Tensor:
    """Raises LlavaError for a block that this cache cannot take; returns which tokens are not padding, bool [B, N]."""
    present = check_prompt(config, input_ids, attention_mask)
    same_sizes = cache.config is config or cache.config == config
    require(same_sizes, "The cache was made for a model of other sizes; call this model's new_cache.")
    batch, count = input_ids.shape
    if not cache.key:
        left = present[:, -1].all() and (present.long().diff(dim=-1) >= 0).all()  # at least one token in each prompt
        require(left, "attention_mask has padding in or after the prompt; pad prompts on the left to generate.")
        check_room(config, count, cache.room)
        return present
    texts = len(cache.lengths)
    require(batch == texts, f"input_ids have {batch} rows and the cache holds {texts} texts; give each text a row.")
    whole = attention_mask is None or present.all()
    require(whole, "attention_mask has padding in a further turn; the turns of a batch must be equally long.")
    with_prompt = pixel_values is None or (cache.kept == cache.prompt_lengths).all()
    require(with_prompt, "A compressed cache takes images only with its prompt; start a new cache for this image.")
    if count > cache.room:
        raise LlavaError(
            f"The turn has {count} tokens and the cache has room for {cache.room}; "
            f"call cache.reserve({count - cache.room}) first."
        )
    return present


def check_logits(logits: Tensor) -> Tensor:
    """The logits [B, V] themselves; raises LlavaError if a number is NaN or infinite."""
    total = logits.sum(dtype=torch.float32).item()  # one pass: each NaN and infinity reaches the sum
    require(math.isfinite(total), "The logits hold NaN or infinity; check the weights, or choose a wider dtype.")
    return logits


def check_no_training(x: Tensor, training: bool) -> None:
    """Raises LlavaError where a layer that has no gradients is being trained, or x [..., in] needs one through it."""
    trained = torch.is_grad_enabled() and (training or x.requires_grad)
    require(not trained, "Weights in 8 bits cannot be trained; load the model in float32 or bfloat16 for that.")


def check_images(
    config: LlavaConfig, is_image: Tensor, pixel_values: Tensor | None, image_sizes: Tensor | None
) -> None:
    """Raises LlavaError unless the images make as many tokens as the prompts have places for, where is_image [B, N]."""
    found = int(is_image.sum())
    if pixel_values is not None:
        shape, side = list(pixel_values.shape), config.vision.image_size
        usable = len(shape) == 4 and shape[1:] == [3, side, side]
        require(usable, f"pixel_values are {shape}; expected [I, 3, {side}, {side}]: images, or tiles of all images.")
    rows = 0 if pixel_values is None else len(pixel_values)  # images, or tiles of LLaVA-NeXT
    images, expected = rows, rows * config.num_image_tokens
    if config.image_grid_pinpoints and rows:
        require(image_sizes is not None, "pixel_values are tiles of LLaVA-NeXT; give image_sizes, too.")
        assert image_sizes is not None  # for mypy
        usable = image_sizes.dim() == 2 and image_sizes.shape[1] == 2 and not image_sizes.is_floating_point()
        usable = usable and bool((image_sizes > 0).all())
        sizes = image_sizes.tolist()
        require(usable, f"image_sizes are {sizes!s:.99}; expected [I, 2]: each image's height and width.")
        tilings = [config.tiling(size) for size in sizes]
        images, expected = len(tilings), sum(tiling.tokens for tiling in tilings)
        tiles = sum(tiling.tiles for tiling in tilings)
        require(rows == tiles, f"pixel_values are {rows} tiles; pictures of these image_sizes have {tiles}.")
    require(found == expected, f"input_ids hold {found} image tokens, but {images} images make {expected}.")


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raises LlavaError for settings that `sample` cannot use."""
    sane = temperature >= 0 and isinstance(top_k, int) and top_k >= 0 and 0 < top_p <= 1
    require(
        sane,
        f"temperature {temperature}, top_k {top_k} or top_p {top_p} is out of range; expected 0 or more, a "
        "whole number from 0, and a number above 0 and up to 1.",
    )
