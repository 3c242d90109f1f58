"""A decoding step of a layer on a GPU: three launches, always the same ones, whatever the lengths are."""

from ctypes import Structure, c_float, c_int, c_longlong, c_void_p
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tersekv.ops.cuda import source
from tersekv.ops.cuda.attending import LOG2E, attend_pages
from tersekv.ops.cuda.compiler import kernel
from tersekv.ops.cuda.encoding import EXACT, KINDS
from tersekv.ops.cuda.reading import integers, reads
from tersekv.ops.pages import Pages

MOST = 16  # new tokens
ROWS = (1, 2, 4)  # query rows of a block of the last launch


class Storing(Structure):
    """The arguments of `store.cu`."""

    _fields_ = (
        *(
            (name, c_void_p)
            for name in ("q", "k", "v", "before", "folded", "ring_k", "ring_v", "ring_q", "next", "bad")
        ),
        *((name, c_longlong * 3) for name in ("q_strides", "k_strides", "v_strides")),
        *((name, c_int) for name in ("heads", "group", "n", "slots", "each_row")),
    )


class Finishing(Structure):
    """The arguments of `finish.cu`."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "sink_k", "sink_v", "sinks", "ring_k", "ring_v", "packed", "next")),
        *((name, c_void_p) for name in ("part", "part_lse", "after", "out")),
        ("q_strides", c_longlong * 3),
        *((name, c_int) for name in ("heads", "group", "n", "sink_slots", "slots")),
        ("scale", c_float),
    )


@dataclass(frozen=True)
class StepTokens:
    """Dense tokens of a layer in memory that stays where it is; token i of a row lies in slot i % slots of its ring."""

    sink_k: Float[Tensor, "b h sinks d"]
    sink_v: Float[Tensor, "b h sinks d"]
    sinks: Int[Tensor, "b h"]
    ring_k: Float[Tensor, "b h slots d"]
    ring_v: Float[Tensor, "b h slots d"]
    next: Int[Tensor, "b h"]  # int32: the number of the next token, counted from the first one that was packed
    bad: Int[Tensor, "1"]  # int32: 1 once a token was not finite
    arrived: Int[Tensor, "counters"]  # int32: see `attending.attend_pages`
    ring_q: Float[Tensor, "b h slots group d"] | None = None  # where queries wait that are asked for later


def queries_step(q: Tensor) -> bool:
    """Whether `step` takes such queries: few new tokens, in a precision that the kernels read."""
    return q.device.type == "cuda" and q.shape[2] <= MOST and q.dtype in KINDS


def pages_step(pages: Pages) -> bool:
    """Whether `step` reads such pages."""
    return reads(pages) and integers(pages)


def step(
    q: Float[Tensor, "b hq n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    pages: Pages,
    dense: StepTokens,
    multipliers: tuple[Tensor | None, Tensor | None],
    scale: float,
) -> Float[Tensor, "b hq n d"]:
    """Stores new tokens in the ring, and attends to all of them, causally to the new ones. No host sync.

    `multipliers`: see `ops.multipliers`. The output lies in memory as (b, n, hq, d). Each launch begins while
    the one before it ends, where the GPU can do that.
    """
    b, hq, n, d = q.shape
    h, slots = dense.ring_k.shape[1:3]
    group, device = hq // h, q.device.index
    q, k, v = (x if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 else x.contiguous() for x in (q, k, v))
    folded = torch.empty(b, hq, n, d, dtype=torch.float32, device=q.device)
    before, after = multipliers
    first = kernel(storing_text(d, KINDS[q.dtype], before is not None), "store", device, 0, EXACT)
    each_row = 0 if before is None or len(before) == 1 else d
    rings = dense.ring_k, dense.ring_v, dense.ring_q
    pointers = (q, k, v, before, folded, *rings, dense.next, dense.bad)
    first((b * h, 1, 1), 256, Storing(*map(_at, pointers), *map(_strides, (q, k, v)), h, group, n, slots, each_row))
    part, lse = attend_pages(folded, pages, scale, dense.arrived, overlap=True)
    out = torch.empty(b, n, hq, d, dtype=q.dtype, device=q.device)
    rows = next((count for count in ROWS if count >= group * n), ROWS[-1])
    last = kernel(finishing_text(d, KINDS[q.dtype], rows, after is not None), "finish", device)
    pointers = (q, dense.sink_k, dense.sink_v, dense.sinks, dense.ring_k, dense.ring_v, pages.lengths, dense.next)
    arguments = Finishing(
        *map(_at, (*pointers, part, lse, after, out)),
        _strides(q), h, group, n, dense.sink_k.shape[2], slots, scale * LOG2E,
    )  # fmt: skip
    last((-(-group * n // rows), b * h, 1), 256, arguments, overlap=True)
    return out.transpose(1, 2)


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _strides(x: Tensor) -> object:
    return (c_longlong * 3)(*(x.element_size() * stride for stride in x.stride()[:3]))


@lru_cache
def storing_text(d: int, kind: str, rotated: bool) -> str:
    return f'#include "planes.cuh"\n{_constants(d, kind, rotated)}{source.read("store.cu")}'


@lru_cache
def finishing_text(d: int, kind: str, rows: int, rotated: bool) -> str:
    constants = f"constexpr int ROWS = {rows};\n{_constants(d, kind, rotated)}"
    return f'#include "planes.cuh"\n{constants}{source.read("finish.cu")}'


def _constants(d: int, kind: str, rotated: bool) -> str:
    root = source.number(np.float32(d**-0.5).item())
    return f"constexpr int D = {d}, KIND = {kind}, ROTATED = {int(rotated)};\nconstexpr float SIZE_ROOT = {root};\n"
