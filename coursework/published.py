"""How an evaluation cuts a prompt by the scores of its tokens, for the exercise `published`."""

from __future__ import annotations

import torch
from torch import Tensor


def compress(scores: Tensor, counts: Tensor, start: int = 1) -> Tensor:
    """Which tokens each layer keeps of one prompt: bool [L, N], with counts[l] of them True in layer l.

    scores [L, N], float32, the larger the more important; start <= counts[l] <= N. The first `start` tokens are among
    the kept ones. The most important of the others fill the rest.
    """
    scores = scores.clone()
    scores[:, :start] = torch.inf
    ranks = scores.argsort(descending=True).argsort()  # [L, N]: 0 for the most important
    return ranks < counts[:, None]
