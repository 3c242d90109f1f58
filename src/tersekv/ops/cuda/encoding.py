"""Encoding and rotation on a GPU: what the kernels take, and how blocks reach them."""

from ctypes import Structure, c_int, c_longlong, c_void_p
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
    """As in `blocks.cuh`."""

    _fields_ = (("x", c_void_p), ("tables", c_void_p), ("out", c_void_p), ("stride", c_longlong), ("ahead", c_int))


class Rotation(Structure):
    """The arguments of `rotate.cu`."""

    _fields_ = (("x", c_void_p), ("signs", c_void_p), ("y", c_void_p), ("rows", c_longlong))


def writes(encoder: Encoder, layout: Layout, recipe: Recipe, x: Tensor) -> bool:
    """Whether `encode` can run: values on a GPU, and an order that the kernels read."""
    if x.device.type != "cuda" or missing() or isinstance(encoder, DenseEncoder):
        return False
    known = layout.order in ("mma_k", "mma_v") and layout.block == BLOCK and x.dtype in KINDS
    fits = shared_bytes(encoder, layout) <= limits(x.device.index).block_bytes
    return known and fits and refusal(layout, recipe) is None


def encode(encoder: Encoder, x: Float[Tensor, "*lead block d"], layout: Layout, out: UInt8[Tensor, "*lead n"]) -> None:
    """Fills `out`, of which one leading dim may be strided, the last one not."""
    blocks, pages = x.detach().reshape(-1, BLOCK, layout.d).contiguous(), out.view(-1, out.shape[-1])
    if not len(blocks):
        return
    device, used = x.device.index, shared_bytes(encoder, layout)
    run, gpu = kernel(text(encoder, layout, KINDS[x.dtype]), "encode", device, used, EXACT), limits(device)
    pointers = blocks.data_ptr(), tables(encoder, layout, device).data_ptr(), pages.data_ptr()
    arguments = Encoding(*pointers, pages.stride(0), gpu.processors * (gpu.sm_bytes // (used + 1024)))
    run((len(blocks), 1, 1), BLOCK if isinstance(encoder, TableEncoder) else 256, arguments)


@lru_cache
def tables(encoder: Encoder, layout: Layout, device: int) -> Float[Tensor, "n"]:
    """Thresholds, sizes and the edges of the logarithmic scale, as the kernel reads them."""
    if not isinstance(encoder, TableEncoder):
        return torch.zeros(1, device=f"cuda:{device}")
    parts = [np.array(x, dtype=np.float32) for x in (encoder.thresholds, _sizes(encoder))]
    return torch.from_numpy(np.concatenate([*parts, log8_edges()[1]])).to(f"cuda:{device}")


def _sizes(encoder: TableEncoder) -> tuple[float, ...]:
    """The entries that are not negative, ascending."""
    return encoder.centroids[len(encoder.centroids) // 2 :]


def shared_bytes(encoder: Encoder, layout: Layout) -> int:
    """`sizeof(Shared)` of the kernel."""
    d = layout.d
    if isinstance(encoder, TableEncoder):
        return 4 * (BLOCK * (d + 4) + d + 2)
    codes = BLOCK * (d + 4) if layout.order == "mma_k" else d * (BLOCK + 4)
    return 4 * (BLOCK * (d // 16 * 20 + 16) + 2 * d) + codes


@lru_cache
def text(encoder: Encoder, layout: Layout, kind: str) -> str:
    table = isinstance(encoder, TableEncoder)
    integers, floats = _constants(encoder, layout)
    integers |= {"D": layout.d, "KEYS": int(layout.order == "mma_k")}
    lines = [f"constexpr int {name} = {value};" for name, value in integers.items()]
    floats |= {"LOG8_FLOOR": log8_edges()[0][1].item() / 2}
    lines += [f"constexpr float {name} = {_number(value)};" for name, value in floats.items()]
    lines += _table(encoder) if table else []
    side, name = source.side("S", layout), "encode_table.cu" if table else "encode_uniform.cu"
    return "\n".join(['#include "planes.cuh"', side, f"constexpr int INPUT = {kind};", *lines, source.read(name)])


def _number(x: float) -> str:
    return source.number(np.float32(x).item())


def _constants(encoder: Encoder, layout: Layout) -> tuple[dict[str, int], dict[str, float]]:
    if isinstance(encoder, TableEncoder):
        integers = {"UNBIASED": int(encoder.unbiased), "ROTATED": int(bool(encoder.signs))}
        return integers, {"ROOT_D": sqrt(layout.d), "SIZE_ROOT": layout.d**-0.5, "FACTOR": encoder.factor}
    assert isinstance(encoder, UniformEncoder)  # for the type checker: see `writes`
    top = 2 ** (layout.code_bits - 1) - 1 if encoder.symmetric else 2**layout.code_bits - 1
    integers = {"BY_CHANNEL": int("channel_scale" in layout), "SYMMETRIC": int(encoder.symmetric)}
    return integers | {"LOW": -top - 1 if encoder.symmetric else 0, "HIGH": top}, {"INVERSE_TOP": 1 / top}


def _table(encoder: TableEncoder) -> list[str]:
    """What the compiler shall know: which signs are negative, and a table of up to 16 entries."""
    bits = np.packbits(np.array(encoder.signs or (1.0,) * 32) < 0, bitorder="little").view("<u4").tolist()
    few = len(encoder.centroids) <= 16
    lists = {
        "bool minus": ("u32", [f"{word:#x}u" for word in bits], "x[i / 32] >> i % 32 & 1"),
        "float threshold_of": ("float", [*map(_number, encoder.thresholds), "0.f"] if few else ["0.f"], "x[i]"),
        "float size_of": ("float", list(map(_number, _sizes(encoder))) if few else ["0.f"], "x[i]"),
    }
    return [
        f"INLINE {name}(int i) {{ const {kind} x[] = {{{', '.join(words)}}}; return {value}; }}"
        for name, (kind, words, value) in lists.items()
    ]


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
