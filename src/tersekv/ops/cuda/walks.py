"""Tables of a trellis for the CUDA kernels: levels of successive values by their window (`trellis.cuh`), and costs."""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from tersekv.ops.trellis import STATE_BITS, STATES, Trellis


def each(bits: int) -> int:
    """Values of a look-up."""
    return 4 if bits <= 2 else 2


def table_bytes(bits: int) -> int:
    return each(bits) << STATE_BITS + (each(bits) - 1) * bits


def table(recipe: Trellis) -> np.ndarray:
    """(windows, each) int8: the oldest bit of a window is its highest."""
    levels = np.array([*recipe.odd, *(-u for u in recipe.odd)], dtype=np.int8)
    count, bits = each(recipe.bits), recipe.bits
    window = np.arange(table_bytes(bits) // count)[:, None]
    return levels[(window >> bits * np.arange(count - 1, -1, -1)) % STATES]


@lru_cache
def on_device(recipe: Trellis, device: int) -> UInt8[Tensor, "n"]:
    return torch.from_numpy(table(recipe).view(np.uint8).ravel()).to(f"cuda:{device}")


def steps(bits: int) -> int:
    """Values between two exchanges of the encoder: see `encode_trellis.cu`."""
    return 4 // bits if bits <= 2 else 1


def units(recipe: Trellis) -> np.ndarray:
    """2^bits times the odd number of a state, int32, by the value since an exchange, its register and its thread."""
    bits, found = recipe.bits, []
    register, thread = np.indices((16, 16))
    for step in range(steps(bits)):
        made, left = bits * step, 4 - bits - bits * step
        new, rest = register >> left, register % 2**left  # codes since the exchange, and bits of before
        found.append(rest << 4 + made + bits | thread << made + bits | new)
    odd = np.array([*recipe.odd, *(-u for u in recipe.odd)], dtype=np.int32)
    return (odd[np.stack(found)] << bits).ravel()
