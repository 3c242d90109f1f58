"""Signed Hadamard rotation: y = H D x, with D fixed random signs. The butterfly order is part of the format.

Every stage adds and subtracts in fp32 in one fixed order, so all backends that keep the order produce the same bits.
Head dims that are no power of two are rotated block by block (80 = 5 x 16, 96 = 3 x 32, 112 = 7 x 16).
"""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def hadamard_size(d: int) -> int:
    """The largest power of two that divides `d`: the size of each Hadamard block."""
    return d & -d


def random_words(n: int, seed: int) -> list[int]:
    """`n` 64-bit words of the splitmix64 sequence of `seed`: the same on every platform and library."""
    mask, state, out = 2**64 - 1, seed & (2**64 - 1), []
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


@lru_cache
def signs(d: int, seed: int) -> np.ndarray:
    return np.array([1.0 - 2.0 * (word & 1) for word in random_words(d, seed)], dtype=np.float32)


def _hadamard(x: Tensor) -> Tensor:
    """Orthonormal block Hadamard over the last dim: strides 1, 2, 4, ..., then one multiplication."""
    d = x.shape[-1]
    size, stride = hadamard_size(d), 1
    while stride < size:
        pairs = x.view(*x.shape[:-1], d // (2 * stride), 2, stride)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), dim=-2).view(*x.shape[:-1], d)
        stride *= 2
    return x * np.float32(size**-0.5).item()


def rotate(x: Float[Tensor, "*lead d"], seed: int) -> Float[Tensor, "*lead d"]:
    d = torch.from_numpy(signs(x.shape[-1], seed)).to(x.device)
    return _hadamard(x.float().contiguous() * d)


def unrotate(y: Float[Tensor, "*lead d"], seed: int) -> Float[Tensor, "*lead d"]:
    d = torch.from_numpy(signs(y.shape[-1], seed)).to(y.device)
    return _hadamard(y.float().contiguous()) * d
