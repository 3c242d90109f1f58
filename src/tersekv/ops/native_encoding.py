"""The C++ encoders: what they take, and how blocks reach them. The source is `native/encode*`."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tersekv.errors import InputError
from tersekv.layout import BLOCK, Layout
from tersekv.ops import native
from tersekv.ops.encoders import DenseEncoder, Encoder, TrellisEncoder, UniformEncoder
from tersekv.ops.planes import log8_edges
from tersekv.ops.recipe import Recipe
from tersekv.packed import Packed

ORDERS = ("linear", *native.ORDERS)


def _fits(d: int) -> bool:
    return native.missing() is None and d % 16 == 0 and 16 <= d <= native.MAX_HEAD_DIM


def writes(encoder: Encoder, layout: Layout, recipe: Recipe, x: Tensor) -> bool:
    """Whether `encode` can run: values in memory, and planes such as the kernels read."""
    whole = layout.block == BLOCK and _fits(layout.d) and native.refusal(layout, recipe) is None
    whole = whole and all(native.groups(layout, plane) == 1 for plane in layout.planes)
    return whole and layout.order in ORDERS and x.device.type == "cpu" and x.dtype in native.DTYPES


def encode(
    encoder: Encoder, x: Float[Tensor, "*lead block d"], layout: Layout, out: UInt8[Tensor, "*lead n"], isa: str = ""
) -> None:
    """Fills `out`, whose last dim holds a block and is contiguous; leading dims may be strided, as those of `x`."""
    x = x.detach() if x.stride(-1) == 1 else x.detach().contiguous()
    made = _encoder(encoder, layout)
    try:
        native._native.encode(made, native.array(x), native.array(out), isa, torch.get_num_threads())
    except ValueError as error:
        raise InputError(str(error)) from None


@lru_cache
def _encoder(encoder: Encoder, layout: Layout) -> Any:
    """The C++ encoder, made once for each layout."""
    planes = [native._plane(layout, p) for p in layout.planes if p.kind != "code" and not p.name.endswith("_step")]
    if isinstance(encoder, DenseEncoder):
        return native._native.dense_encoder((layout.d, 0, "linear", 0, layout.nbytes), planes)
    if isinstance(encoder, UniformEncoder):
        return native._native.uniform_encoder(_codes(layout), planes, encoder.symmetric)
    values, edges = log8_edges()
    scale = encoder.unbiased, encoder.factor, list(encoder.signs), edges.tolist(), values[1].item() / 2
    if isinstance(encoder, TrellisEncoder):
        trellis = list(encoder.recipe.odd), encoder.recipe.half
        return native._native.trellis_encoder(_codes(layout), planes, *trellis, *scale)
    table = list(encoder.thresholds), list(encoder.centroids)
    return native._native.table_encoder(_codes(layout), planes, *table, *scale)


def _codes(layout: Layout) -> tuple[int, int, str, int, int]:
    return layout.d, layout.code_bits, layout.order, layout.offsets["codes"], layout.nbytes


def repacks(packed: Packed, order: str) -> bool:
    """Whether `repack` can run: codes in memory, in a width that has another order."""
    layout = packed.layout
    known = (
        "codes" in layout
        and {layout.order, order} <= set(ORDERS)
        and layout.takes("simd_k")
        and layout.takes(order)
        and _fits(layout.d)
    )
    return known and packed.data.device.type == "cpu" and sum(p.kind == "code" for p in layout.planes) == 1


def repack(packed: Packed, order: str, isa: str = "") -> Packed:
    data = packed.data if packed.data.stride(-1) == 1 else packed.data.contiguous()
    out = torch.empty(data.shape, dtype=torch.uint8)
    native._native.repack(
        native.array(data), _codes(packed.layout), order, native.array(out), isa, torch.get_num_threads()
    )
    return Packed(packed.layout.ordered(order), out)


def steers(z: Tensor) -> bool:
    """Whether `codes` can run: blocks of values in memory."""
    block, d = z.shape[-2:]
    return z.device.type == "cpu" and z.dtype == torch.float32 and block == BLOCK and _fits(d)


def codes(
    z: Float[Tensor, "*lead block d"],
    passed: Float[Tensor, "*#lead d d"],
    thresholds: Float[np.ndarray, "t"],
    table: Float[Tensor, "entries"],
    isa: str = "",
) -> UInt8[Tensor, "*lead block d"]:
    """The codes of `feedback.steered`, bit for bit; `z` may be strided, a matrix of `passed` that of many blocks."""
    z = z.detach() if z.stride(-1) == 1 else z.detach().contiguous()
    out = torch.empty(z.shape, dtype=torch.uint8)
    tables = thresholds.tolist(), table.tolist()
    try:
        matrices = passed.detach().contiguous().expand(*z.shape[:-2], *passed.shape[-2:])
        native._native.steer(
            native.array(z), native.array(matrices), *tables, native.array(out), isa, torch.get_num_threads()
        )
    except (ValueError, RuntimeError) as error:  # the second one is that of expand
        raise InputError(str(error)) from None
    return out


def rotates(x: Tensor) -> bool:
    return x.device.type == "cpu" and _fits(x.shape[-1]) and not x.requires_grad


def rotate(x: Float[Tensor, "*lead d"], signs: Tensor, back: bool, isa: str = "") -> Float[Tensor, "*lead d"]:
    rows = x.float().contiguous()
    out = torch.empty_like(rows)
    arrays = native.array(rows), native.array(signs), back, native.array(out)
    native._native.rotate(*arrays, isa, torch.get_num_threads())
    return out
