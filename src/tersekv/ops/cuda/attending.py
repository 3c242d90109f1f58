"""Attention over packed pages on a GPU: which kernel, of what shape, and its launch."""

from ctypes import Structure, c_float, c_int, c_void_p
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tersekv.layout import Layout
from tersekv.ops.cuda import source, walks
from tersekv.ops.cuda.compiler import Kernel, kernel
from tersekv.ops.cuda.reading import TRELLIS_ORDER
from tersekv.ops.pages import Pages, Partial
from tersekv.ops.recipe import Grid
from tersekv.ops.trellis import Trellis

LOG2E = 1.4426950408889634
# Threads of a block and blocks of a multiprocessor, best first; beyond Hopper the first would need too many registers.
SHAPES = ((256, 2), (128, 3), (256, 1), (128, 1), (64, 1))
SMALL_SHAPE = (128, 4)  # where all blocks run at once in it, and in the first of SHAPES they would not
WIDE_SHAPES = ((256, 1), (128, 1), (64, 1))  # where a thread needs more than 128 registers
LARGE_SHAPES = ((512, 1), *WIDE_SHAPES)  # where a table in shared memory leaves no room for two blocks
LARGE = 2**15  # bytes of such a table
# Up to so many bits a page is copied in one piece, for fewer instructions. A warp's ring has one slot more than are
# under way at a time: a page, or two of its sides. More only make copies wait for each other, and some SMs for long.
IN_ONE_PIECE = 3
MOST_SLOTS = 12
Form = tuple[Layout, Layout, Grid, Grid | Trellis]  # of keys and values
OVERHEAD, WAVE = 1, 4  # what a block costs besides its pages, and blocks that wait for others, in pages of a warp


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


@dataclass(frozen=True)
class Shape:
    """Of a launch. `groups`: of columns of a matrix instruction; each holds 8 / groups query rows.

    `pieces`: in which a page is copied, whole or keys and values each.
    """

    d: int
    groups: int
    threads: int
    blocks: int
    pieces: int
    slots: int
    shared_bytes: int

    def constants(self) -> str:
        return (
            f"constexpr int D = {self.d}, GROUPS = {self.groups}, THREADS = {self.threads}, "
            f"BLOCKS_PER_SM = {self.blocks}, PIECES = {self.pieces}, SLOTS = {self.slots};\n"
        )


@dataclass(frozen=True)
class Limits:
    """Of a GPU: major compute capability, multiprocessors, bytes of shared memory of one of them and of a block."""

    major: int
    processors: int
    sm_bytes: int
    block_bytes: int


@lru_cache
def shape(k: Layout, v: Layout, rows: int, gpu: Limits, sequences: int = 1) -> Shape:
    """The first shape whose rings fit, with the fewest slots that can hold the sums of warps at the end.

    `sequences`: times KV heads. What is left for a second turn would run on half of the warps.
    """
    groups = 4 if rows <= 2 else 2 if rows <= 4 else 1
    heads, d, sides = 8 // groups, k.d, (k.nbytes, v.nbytes)
    pieces = 1 if max(k.code_bits, v.code_bits) <= IN_ONE_PIECE else 2
    slot = sum(sides) if pieces == 1 else max(sides)
    by_page = "channel_scale" in k or ("channel_zero" in k and k.plane("channel_zero").kind != "int8")
    wide = d > 128 or groups == 1 or by_page or "channel_scale" in v or "channel_zero" in v
    on_each = sequences * -(-rows // heads) / gpu.processors
    small = SHAPES[0][1] < on_each <= SMALL_SHAPE[1] and gpu.major <= 9
    windows = walks.table_bytes(v.code_bits) if v.order == TRELLIS_ORDER else 0
    shapes = WIDE_SHAPES if wide else (SMALL_SHAPE, *SHAPES) if small else SHAPES[gpu.major > 9 :]
    shapes = LARGE_SHAPES if windows > LARGE and not wide else shapes
    for threads, blocks in shapes:
        warps = threads // 32
        zeros = 16 if groups == 1 else d // 32 * heads * 64
        queries = -(-(d // 32 * heads * 64 + zeros + 12 * heads) // 16) * 16
        sizes = 256 if any(p.name == "scale" and p.kind == "log8" for p in (*k.planes, *v.planes)) else 1
        shared = queries * (warps if by_page else 1) + 4 * (heads * d if by_page else 1) + 4 * sizes
        sums = warps * d * 32 + heads * warps * groups * 12  # `Sums` in join.cuh
        slots = next(count for count in range(pieces + 1, MOST_SLOTS + 1) if warps * count * slot >= sums)
        total = warps * slots * (slot + 8) + shared + 16 + (windows + warps * heads * 64 + 16 if windows else 0)
        if total <= min(gpu.sm_bytes // blocks - 1024, gpu.block_bytes):
            return Shape(d, groups, threads, blocks, pieces, slots, total)
    raise ValueError(f"{gpu.block_bytes} bytes of shared memory hold no {pieces + 1} slots of {slot} bytes.")


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
def splits(tiles: int, blocks: int, how: Shape, processors: int) -> int:
    """Into how many parts each row of pages is cut, known without the lengths.

    What counts is the multiprocessor with most pages. One block on each serves memory as well as all that fit.
    """
    at_once, warps = processors * how.blocks, how.threads // 32

    def cost(count: int) -> int:
        fullest, waves = (-(-tiles * count // units) for units in (processors, at_once))
        return fullest * (-(-blocks // (count * warps)) + OVERHEAD) + WAVE * waves

    return min(range(1, max(1, min(blocks // warps, at_once)) + 1), key=cost)


@lru_cache
def _plan(pages: Form, sequences: int, blocks: int, rows: int, device: int) -> tuple[Kernel, Shape, int, int]:
    """The kernel, its shape, its tiles of query rows for each sequence and head, and its splits: made once a form."""
    gpu = limits(device)
    how = shape(pages[0], pages[1], rows, gpu, sequences)
    tiles = -(-rows // (8 // how.groups))
    parts = splits(sequences * tiles, blocks, how, gpu.processors)
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
    results = b * h * tiles * parts * (8 // how.groups) if parts > 1 else 0
    numbers = (pages.pool.stride(0), hq // h * n, blocks, parts, tiles)
    return Launch(run, (b * h * tiles * parts, 1, 1), how.threads, b * h * tiles, results, numbers)


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
