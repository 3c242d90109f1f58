"""Attention over packed pages on a GPU: which kernel, of what shape, and its launch."""

from ctypes import Structure, c_float, c_int, c_void_p
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tersekv.layout import Layout
from tersekv.ops.cuda import source, walks
from tersekv.ops.cuda.compiler import Kernel, kernel
from tersekv.ops.cuda.shapes import Limits, Shape, choose
from tersekv.ops.pages import Pages, Partial
from tersekv.ops.recipe import Grid
from tersekv.ops.trellis import Trellis

LOG2E = 1.4426950408889634
Form = tuple[Layout, Layout, Grid, Grid | Trellis]  # of keys and values


class Arguments(Structure):
    """As in `attend.cu`."""

    _fields_ = (
        *(
            (name, c_void_p)
            for name in ("q", "pool", "table", "lengths", "out", "lse", "part_out", "part_sums", "arrived", "windows")
        ),
        *((name, c_int) for name in ("page_bytes", "rows", "blocks", "splits", "tiles")),
        ("scale", c_float),
    )


@lru_cache
def limits(device: int) -> Limits:
    facts = torch.cuda.get_device_properties(device)
    shared = facts.shared_memory_per_multiprocessor, facts.shared_memory_per_block_optin
    return Limits(facts.major, facts.multi_processor_count, *shared)


@lru_cache
def text(k: Layout, v: Layout, k_recipe: Grid, v_recipe: Grid | Trellis, how: Shape) -> str:
    sides = source.side("K", k, k_recipe) + source.side("V", v, v_recipe)
    return f'#include "planes.cuh"\n{sides}{how.constants()}{source.read("attend.cu")}'


@lru_cache
def _plan(pages: Form, sequences: int, blocks: int, rows: int, device: int) -> tuple[Kernel, Shape, int, int]:
    """The kernel, its shape, its tiles of query rows for each sequence and head, and its splits: made once a form."""
    gpu = limits(device)
    how, parts = choose(pages[0], pages[1], rows, gpu, sequences, blocks)
    tiles = -(-rows // how.heads)
    # Where each block is to have a multiprocessor of its own, two that share one take twice as long. Beside blocks
    # of other launches the GPU does place them so, unless there is no memory for two.
    alone = gpu.sm_bytes // 2 if sequences * tiles * parts <= gpu.processors else 0
    run = kernel(text(*pages, how), "attend", device, max(how.shared_bytes, min(alone, gpu.block_bytes)))
    return run, how, tiles, parts


@dataclass(frozen=True)
class Launch:
    """What a launch needs besides tensors. `results`: query rows of splits that wait to be joined."""

    run: Kernel
    grid: tuple[int, int, int]
    threads: int
    tiles: int
    results: int
    numbers: tuple[int, int, int, int, int]  # page bytes, rows, blocks, splits, tiles of a row


def launch(pages: Pages, q: Tensor) -> Launch:
    """Of attention from queries such as `q`; lengths are not looked at, so the device is not waited for."""
    b, hq, n, _ = q.shape
    h, blocks = pages.table.shape[1:]
    assert isinstance(pages.k_recipe, Grid) and isinstance(pages.v_recipe, Grid | Trellis)  # see `reads`
    form = pages.k_layout, pages.v_layout, pages.k_recipe, pages.v_recipe
    run, how, tiles, parts = _plan(form, b * h, blocks, hq // h * n, q.device.index)
    results = b * h * tiles * parts * how.heads if parts > 1 else 0
    numbers = (pages.pool.stride(0), hq // h * n, blocks, parts, tiles)
    return Launch(run, (b * h * tiles, parts, 1), how.threads, b * h * tiles, results, numbers)


def scratch(plan: Launch, q: Tensor) -> tuple[Tensor, Tensor]:
    """Room for outputs and log-sum-exps of splits."""
    d = q.shape[-1]
    room = torch.empty(plan.results * (d + 1), dtype=torch.float32, device=q.device)
    return room, room[plan.results * d :]


_counters: dict[tuple[int, int], Tensor] = {}


def _arrived(tiles: int, device: torch.device) -> Tensor:
    """Counters that are 0 between launches, one set for each stream; a graph that is being captured gets its own."""
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    key = device.index, torch.cuda.current_stream(device).cuda_stream
    if key not in _counters or len(_counters[key]) < tiles:
        _counters[key] = torch.zeros(2 * tiles, dtype=torch.int32, device=device)
    return _counters[key]


def attend_pages(
    q: Tensor, pages: Pages, scale: float, arrived: Tensor | None = None, overlap: bool = False
) -> Partial:
    """As `ops.attention.attend_pages`, in 8-bit integers. One launch, no host sync.

    `arrived`: the caller's own counters, int32 zeros, two for each query head and 16 new tokens; they are left 0.
    `overlap`: the launch may begin before the one that writes `q` has ended; see `Kernel`.
    """
    plan = launch(pages, q)
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    q, table, lengths = q.float().contiguous(), pages.table.contiguous(), pages.lengths.contiguous()
    counters = _arrived(plan.tiles, q.device) if arrived is None else arrived
    tensors = (q, pages.pool, table, lengths, out, lse, *scratch(plan, q), counters)
    trellis = isinstance(pages.v_recipe, Trellis)
    windows = walks.on_device(pages.v_recipe, q.device.index).data_ptr() if trellis else 0
    arguments = Arguments(*(x.data_ptr() for x in tensors), windows, *plan.numbers, scale * LOG2E)
    plan.run(plan.grid, plan.threads, arguments, overlap)
    return out, lse
