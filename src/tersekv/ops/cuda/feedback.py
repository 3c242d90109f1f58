"""Error feedback along channels on a GPU, in one launch instead of ten for each channel."""

from ctypes import Structure, c_void_p
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tersekv.layout import BLOCK
from tersekv.ops.cuda import source
from tersekv.ops.cuda.compiler import kernel, missing
from tersekv.ops.cuda.encoding import EXACT
from tersekv.ops.cuda.reading import HEAD_DIMS


class Steering(Structure):
    """The arguments of `feedback.cu`."""

    _fields_ = tuple((name, c_void_p) for name in ("z", "passed", "matrix", "tables", "codes"))


def steers(z: Tensor) -> bool:
    """Whether `codes` can run: blocks of values on a GPU."""
    block, d = z.shape[-2:]
    return z.device.type == "cuda" and block == BLOCK and d in HEAD_DIMS and missing() is None


def codes(
    z: Float[Tensor, "*lead block d"],
    passed: Float[Tensor, "*#lead d d"],
    thresholds: Float[np.ndarray, "t"],
    table: Float[Tensor, "entries"],
) -> UInt8[Tensor, "*lead block d"]:
    """The codes of `feedback.steered`, bit for bit; every matrix of `passed` may be that of many blocks."""
    d, half, z, matrices = z.shape[-1], len(thresholds) + 1, z.contiguous(), passed.flatten(0, -3).contiguous()
    index = torch.arange(len(matrices), device=z.device).view(passed.shape[:-2]).expand(z.shape[:-2]).contiguous()
    tables = torch.cat((torch.from_numpy(thresholds).to(z.device), table[half:]))
    out = torch.empty(z.shape, dtype=torch.uint8, device=z.device)
    if out.numel():
        run = kernel(text(d, half), "steer", z.device.index, d * (BLOCK + 1) * 4, EXACT)
        run((index.numel(), 1, 1), 256, Steering(*(x.data_ptr() for x in (z, matrices, index, tables, out))))
    return out


@lru_cache
def text(d: int, half: int) -> str:
    return f"constexpr int D = {d}, HALF = {half};\n{source.read('feedback.cu')}"
