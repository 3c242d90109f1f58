"""Encoding and rotation on a GPU: what the kernels take, and how blocks reach them."""

from ctypes import Structure, c_longlong, c_void_p
from functools import lru_cache
from math import sqrt

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tersekv.layout import BLOCK, Layout
from tersekv.ops.cuda import source
from tersekv.ops.cuda.attending import HEAD_DIMS, limits, refusal
from tersekv.ops.cuda.compiler import kernel, missing
from tersekv.ops.encoders import DenseEncoder, Encoder, TableEncoder, UniformEncoder
from tersekv.ops.planes import log8_edges
from tersekv.ops.recipe import Recipe

KINDS = {torch.float32: "FP32", torch.float16: "FP16", torch.bfloat16: "BF16"}
EXACT = ("--fmad=false",)  # the reference rounds every product


class Encoding(Structure):
    """The arguments of `encode.cu`."""

    _fields_ = (("x", c_void_p), ("tables", c_void_p), ("out", c_void_p), ("stride", c_longlong))


class Rotation(Structure):
    """The arguments of `rotate.cu`."""

    _fields_ = (("x", c_void_p), ("signs", c_void_p), ("y", c_void_p), ("rows", c_longlong))


def writes(encoder: Encoder, layout: Layout, recipe: Recipe, x: Tensor) -> bool:
    """Whether `encode` can run: values on a GPU, and an order that the kernels read."""
    if x.device.type != "cuda" or missing() or isinstance(encoder, DenseEncoder):
        return False
    known = layout.order in ("mma_k", "mma_v") and layout.block == BLOCK and x.dtype in KINDS
    return known and refusal(layout, recipe) is None and shared_bytes(layout) <= limits(x.device.index).block_bytes


def encode(encoder: Encoder, x: Float[Tensor, "*lead block d"], layout: Layout, out: UInt8[Tensor, "*lead n"]) -> None:
    """Fills `out`, of which one leading dim may be strided, the last one not."""
    blocks, pages = x.detach().reshape(-1, BLOCK, layout.d).contiguous(), out.view(-1, out.shape[-1])
    if not len(blocks):
        return
    device = x.device.index
    run = kernel(text(encoder, layout, KINDS[x.dtype]), "encode", device, shared_bytes(layout), EXACT)
    arguments = Encoding(
        blocks.data_ptr(), tables(encoder, layout, device).data_ptr(), pages.data_ptr(), pages.stride(0)
    )
    run((len(blocks), 1, 1), 256, arguments)


@lru_cache
def tables(encoder: Encoder, layout: Layout, device: int) -> Float[Tensor, "n"]:
    """Signs, thresholds, centroids and the edges of the logarithmic scale, as the kernel reads them."""
    if not isinstance(encoder, TableEncoder):
        return torch.zeros(1, device=f"cuda:{device}")
    signs = encoder.signs or (1.0,) * layout.d
    parts = [np.array(x, dtype=np.float32) for x in (signs, encoder.thresholds, encoder.centroids)]
    return torch.from_numpy(np.concatenate([*parts, log8_edges()[1]])).to(f"cuda:{device}")


def shared_bytes(layout: Layout) -> int:
    """`sizeof(Shared)` in encode.cu."""
    d, levels = layout.d, 2**layout.code_bits
    codes = BLOCK * (d + 4) if layout.order == "mma_k" else d * (BLOCK + 4)
    return 4 * (BLOCK * (d // 16 * 20 + 16) + 2 * d + levels // 2 + levels + 8 + 3 * BLOCK) + codes


@lru_cache
def text(encoder: Encoder, layout: Layout, kind: str) -> str:
    integers, floats = _constants(encoder, layout)
    integers |= {"D": layout.d, "KEYS": int(layout.order == "mma_k")}
    floats |= {"SIZE_ROOT": layout.d**-0.5, "LOG8_FLOOR": log8_edges()[0][1].item() / 2}
    lines = [f"constexpr int {name} = {value};" for name, value in integers.items()]
    lines += [f"constexpr float {name} = {source.number(np.float32(value).item())};" for name, value in floats.items()]
    side = source.side("S", layout)
    return "\n".join(
        ['#include "planes.cuh"', side, f"constexpr int INPUT = {kind};", *lines, source.read("encode.cu")]
    )


def _constants(encoder: Encoder, layout: Layout) -> tuple[dict[str, int], dict[str, float]]:
    integers = {"METHOD": 0, "UNBIASED": 0, "ROTATED": 0, "SYMMETRIC": 0, "LOW": 0, "HIGH": 0}
    floats = {"ROOT_D": sqrt(layout.d), "FACTOR": 1.0, "INVERSE_TOP": 1.0}
    if isinstance(encoder, TableEncoder):
        integers |= {"UNBIASED": int(encoder.unbiased), "ROTATED": int(bool(encoder.signs))}
        return integers, floats | {"FACTOR": encoder.factor}
    assert isinstance(encoder, UniformEncoder)  # for the type checker: see `writes`
    bits, method = layout.code_bits, 2 if "channel_scale" in layout else 1
    top = 2 ** (bits - 1) - 1 if encoder.symmetric else 2**bits - 1
    low = -top - 1 if encoder.symmetric else 0
    integers |= {"METHOD": method, "SYMMETRIC": int(encoder.symmetric), "LOW": low, "HIGH": top}
    return integers, floats | {"INVERSE_TOP": 1 / top}


def rotates(x: Tensor) -> bool:
    fits = x.shape[-1] in HEAD_DIMS and x.dtype in KINDS and not x.requires_grad
    return x.device.type == "cuda" and fits and missing() is None


def rotate(x: Float[Tensor, "*lead d"], signs: Tensor, back: bool) -> Float[Tensor, "*lead d"]:
    rows, d = x.contiguous(), x.shape[-1]
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    count = rows.numel() // d
    if count:
        run = kernel(rotation_text(d, KINDS[x.dtype], back), "rotate", x.device.index, 0, EXACT)
        run((-(-count // 8), 1, 1), 256, Rotation(rows.data_ptr(), signs.data_ptr(), out.data_ptr(), count))
    return out


@lru_cache
def rotation_text(d: int, kind: str, back: bool) -> str:
    root = source.number(np.float32(d**-0.5).item())
    constants = f"constexpr int D = {d}, INPUT = {kind}, BACK = {int(back)};\nconstexpr float SIZE_ROOT = {root};\n"
    return f'#include "planes.cuh"\n{constants}{source.read("rotate.cu")}'
