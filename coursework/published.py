"""What a published evaluation does with a layer's scores, for the exercise `published`."""

from __future__ import annotations

import torch
from torch import Tensor


def compress(scores: Tensor, counts: Tensor, start: int = 1) -> tuple[Tensor, int]:
    """Which tokens each layer keeps of one prompt, and where the next token stands in the text.

    scores [L, N], larger for more important tokens; counts [L] >= start. Returns bool [L, N], with counts[l] of them
    True in layer l: the first `start` tokens, then the most important; and a position, counted from 0. Keys were
    rotated at their own places in the text, and stay rotated so.
    """
    scores = scores.clone()
    scores[:, :start] = torch.inf
    ranks = scores.argsort(descending=True).argsort()  # [L, N]: 0 for the most important
    return ranks < counts[:, None], scores.shape[1]
