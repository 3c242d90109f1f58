"""Encoding and rotation on a GPU: what the kernels take, and how blocks reach them."""

from ctypes import Structure, c_int, c_longlong, c_void_p
from functools import lru_cache
from math import sqrt

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tersekv.layout import BLOCK, Layout
from tersekv.ops.cuda import source, walks
from tersekv.ops.cuda.attending import limits
from tersekv.ops.cuda.compiler import kernel, missing
from tersekv.ops.cuda.reading import HEAD_DIMS, ORDERS, TRELLIS_ORDER, refusal
from tersekv.ops.encoders import DenseEncoder, Encoder, TableEncoder, TrellisEncoder, UniformEncoder
from tersekv.ops.planes import log8_edges
from tersekv.ops.recipe import Recipe
from tersekv.ops.trellis import STATES

KINDS = {torch.float32: "FP32", torch.float16: "FP16", torch.bfloat16: "BF16"}
EXACT = ("--fmad=false",)  # the reference rounds every product
SOURCES = {TableEncoder: "encode_table.cu", UniformEncoder: "encode_uniform.cu", TrellisEncoder: "encode_trellis.cu"}


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
    orders = (TRELLIS_ORDER,) if isinstance(encoder, TrellisEncoder) else tuple(ORDERS.values())
    known = layout.order in orders and layout.block == BLOCK and x.dtype in KINDS
    gpu, side = limits(x.device.index), layout.order[-1]
    fits = shared_bytes(encoder, layout, tokens_at_once(layout, gpu.block_bytes)) <= gpu.block_bytes
    return known and fits and refusal(layout, recipe, side) is None


def encode(encoder: Encoder, x: Float[Tensor, "*lead block d"], layout: Layout, out: UInt8[Tensor, "*lead n"]) -> None:
    """Fills `out`, of which one leading dim may be strided, the last one not."""
    blocks, pages = x.detach().reshape(-1, BLOCK, layout.d).contiguous(), out.view(-1, out.shape[-1])
    if not len(blocks):
        return
    device, gpu = x.device.index, limits(x.device.index)
    at_once = tokens_at_once(layout, gpu.block_bytes)
    used = shared_bytes(encoder, layout, at_once)
    run = kernel(text(encoder, layout, KINDS[x.dtype], at_once), "encode", device, used, EXACT)
    pointers = blocks.data_ptr(), tables(encoder, layout, device).data_ptr(), pages.data_ptr()
    arguments = Encoding(*pointers, pages.stride(0), gpu.processors * (gpu.sm_bytes // (used + 1024)))
    trellis = isinstance(encoder, TrellisEncoder)
    threads = 4 * at_once if trellis else BLOCK if isinstance(encoder, TableEncoder) else 256
    run((len(blocks), 1, 1), threads, arguments)


@lru_cache
def tables(encoder: Encoder, layout: Layout, device: int) -> Float[Tensor, "n"]:
    """Thresholds, sizes and the edges of the logarithmic scale, as the kernel reads them; `Tables` of a trellis."""
    if isinstance(encoder, TrellisEncoder):
        first = np.concatenate([log8_edges()[1], np.zeros(2, np.float32), np.array(encoder.recipe.table, np.float32)])
        units = walks.units(encoder.recipe).view(np.float32)
        return torch.from_numpy(np.concatenate([first, units])).to(f"cuda:{device}")
    if not isinstance(encoder, TableEncoder):
        return torch.zeros(1, device=f"cuda:{device}")
    parts = [np.array(x, dtype=np.float32) for x in (encoder.thresholds, _sizes(encoder))]
    return torch.from_numpy(np.concatenate([*parts, log8_edges()[1]])).to(f"cuda:{device}")


def _sizes(encoder: TableEncoder) -> tuple[float, ...]:
    """The entries that are not negative, ascending."""
    return encoder.centroids[len(encoder.centroids) // 2 :]


def tokens_at_once(layout: Layout, block_bytes: int) -> int:
    """Of a block, for the walk through a trellis: as many as fit."""
    return 32 if _walk_bytes(layout, 32) <= block_bytes else 16


def _walk_bytes(layout: Layout, at_once: int) -> int:
    """Rows of tokens, forks, costs that threads exchange, constants of the states."""
    rows = -(-_rows_bytes(layout) // 16) * 16
    states = (walks.steps(layout.code_bits) + 1) * STATES
    return rows + 4 * (at_once * (4 * layout.d + 1 + 84) + states + BLOCK)


def _rows_bytes(layout: Layout) -> int:
    """`sizeof(Tokens)`."""
    return 4 * (BLOCK * (layout.d + 4) + (layout.d if "channel_zero" in layout else 1) + 2)


def shared_bytes(encoder: Encoder, layout: Layout, at_once: int) -> int:
    """`sizeof(Shared)` of the kernel."""
    d = layout.d
    if isinstance(encoder, TrellisEncoder):
        return _walk_bytes(layout, at_once)
    if isinstance(encoder, TableEncoder):
        return _rows_bytes(layout)
    codes = BLOCK * (d + 4) if layout.order == "mma_k" else d * (BLOCK + 4)
    return 4 * (BLOCK * (d // 16 * 20 + 16) + 2 * d) + codes


@lru_cache
def text(encoder: Encoder, layout: Layout, kind: str, at_once: int = 32) -> str:
    """`at_once`: tokens whose walk through a trellis is looked for at a time."""
    integers, floats = _constants(encoder, layout)
    integers |= {"D": layout.d, "KEYS": int(layout.order == "mma_k")}
    integers |= {"AT_ONCE": at_once} if isinstance(encoder, TrellisEncoder) else {}
    lines = [f"constexpr int {name} = {value};" for name, value in integers.items()]
    floats |= {"LOG8_FLOOR": log8_edges()[0][1].item() / 2}
    lines += [f"constexpr float {name} = {_number(value)};" for name, value in floats.items()]
    lines += _table(encoder) if isinstance(encoder, TableEncoder | TrellisEncoder) else []
    side, name = source.side("S", layout), SOURCES[type(encoder)]
    return "\n".join(['#include "planes.cuh"', side, f"constexpr int INPUT = {kind};", *lines, source.read(name)])


def _number(x: float) -> str:
    return source.number(np.float32(x).item())


def _constants(encoder: Encoder, layout: Layout) -> tuple[dict[str, int], dict[str, float]]:
    if isinstance(encoder, TableEncoder | TrellisEncoder):
        integers = {"UNBIASED": int(encoder.unbiased), "ROTATED": int(bool(encoder.signs))}
        floats = {"ROOT_D": sqrt(layout.d), "SIZE_ROOT": layout.d**-0.5, "FACTOR": encoder.factor}
        return integers, floats | ({"PER_UNIT": 2 / encoder.recipe.half} if isinstance(encoder, TrellisEncoder) else {})
    assert isinstance(encoder, UniformEncoder)  # for the type checker: see `writes`
    top = 2 ** (layout.code_bits - 1) - 1 if encoder.symmetric else 2**layout.code_bits - 1
    integers = {"BY_CHANNEL": int("channel_scale" in layout), "SYMMETRIC": int(encoder.symmetric)}
    return integers | {"LOW": -top - 1 if encoder.symmetric else 0, "HIGH": top}, {"INVERSE_TOP": 1 / top}


def _table(encoder: TableEncoder | TrellisEncoder) -> list[str]:
    """What the compiler shall know: which signs are negative, and a table of up to 16 entries."""
    bits = np.packbits(np.array(encoder.signs or (1.0,) * 32) < 0, bitorder="little").view("<u4").tolist()
    lists = {"bool minus": ("u32", [f"{word:#x}u" for word in bits], "x[i / 32] >> i % 32 & 1")}
    if isinstance(encoder, TableEncoder):
        few = len(encoder.centroids) <= 16
        lists |= {
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
