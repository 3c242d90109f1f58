"""Moving tokens between tensors whose rows, one for each (sequence, KV head), hold different numbers of them."""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

Lengths = Int[np.ndarray, "b h"]


def take(x: Tensor, start: Lengths, count: Lengths) -> Tensor:
    """Tokens start..start+count of each (sequence, head) of `x` (b, h, t, ...), left-aligned to the longest count."""
    longest = int(count.max(initial=0))
    if (start == start.flat[0]).all() and (count == longest).all():
        return x[:, :, start.flat[0] : start.flat[0] + longest]
    index = start[..., None] + np.minimum(np.arange(longest), np.maximum(count[..., None] - 1, 0))
    return gather(x, torch.from_numpy(np.minimum(index, max(x.shape[2] - 1, 0))).to(x.device))


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` (b, h, n) of `x` (b, h, t, ...)."""
    return x.gather(2, index.view(*index.shape, *[1] * (x.ndim - 3)).expand(*index.shape, *x.shape[3:]))


def join(a: Tensor, a_count: Lengths, b: Tensor, b_count: Lengths) -> Tensor:
    """The first `a_count` tokens of `a` followed by the first `b_count` of `b`, for each (sequence, head)."""
    both = torch.cat((a, b), 2)
    if (a_count == a.shape[2]).all() and (b_count == b.shape[2]).all():
        return both
    total = a_count + b_count
    slot = np.broadcast_to(np.arange(int(total.max())), (*total.shape, int(total.max())))
    slot = np.where(slot < a_count[..., None], slot, slot - a_count[..., None] + a.shape[2])
    return gather(both, torch.from_numpy(np.minimum(slot, both.shape[2] - 1)).to(a.device))
