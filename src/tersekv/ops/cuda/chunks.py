"""Attention of many query rows over packed pages on a GPU, and which kernel attends from how many."""

from ctypes import Structure, c_float, c_int, c_longlong, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from tersekv.layout import Layout
from tersekv.ops.cuda import attending, joining, source, unpacked
from tersekv.ops.cuda.attending import LOG2E, Limits
from tersekv.ops.cuda.compiler import Kernel, kernel
from tersekv.ops.cuda.reading import CHUNK_HEAD_DIMS, Form, form, integers
from tersekv.ops.pages import Pages, Partial

FEW_ROWS = 24  # query rows for each KV head up to which `attend.cu`, eight at a time, is faster (measured)
SLOTS = (6, 4, 2)  # sides of pages that are unpacked ahead, keys and values in turn
RAW_PAGES = (3, 2)  # pages that are under way: two where bf16 leaves no room for three
MOST_SPLITS = joining.MOST_PARTS**2  # joined in two launches
OVERHEAD = 4  # what a block costs besides its pages, in pages


class Arguments(Structure):
    """As in `chunk.cu`."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "pool", "table", "lengths", "out", "lse")),
        ("page_bytes", c_longlong),
        *((name, c_int) for name in ("rows", "blocks", "splits", "tiles", "sequences")),
        ("scale", c_float),
    )


@dataclass(frozen=True)
class Shape:
    """Of a launch: `groups` of 128 threads multiply 64 query rows each, `unpackers` unpack `raw` pages into `slots`.

    A page is multiplied in `parts`. `registers` of a thread of each kind, where the GPU lets them differ; 0: as given.
    """

    d: int
    groups: int
    unpackers: int
    parts: int
    registers: tuple[int, int]
    raw: int
    slots: int
    shared_bytes: int

    @property
    def rows(self) -> int:
        return 64 * self.groups

    @property
    def threads(self) -> int:
        return 128 * (self.groups + self.unpackers)

    def constants(self) -> str:
        multiply, unpack = self.registers
        return (
            f"constexpr int D = {self.d}, GROUPS = {self.groups}, UNPACKERS = {self.unpackers}, PARTS = {self.parts}, "
            f"RAW = {self.raw}, SLOTS = {self.slots}, REGISTERS = {multiply}, UNPACKER_REGISTERS = {unpack};\n"
        )


@lru_cache
def shape(k: Layout, v: Layout, rows: int, gpu: Limits) -> Shape:
    """As many slots as fit. At head dim 256 a thread's registers hold 64 query rows' sums and half a page."""
    d = k.d
    groups, parts = (1, 2) if d > 128 else (1 if rows <= 64 else 2, 1)
    unpackers = 2 if gpu.major == 9 and d <= 128 else 1
    registers = (168, 88) if unpackers == groups == 2 else (0, 0)
    lists = sum(1024 if "codes" in side else 4 for side in (k, v))
    rest = 1024 + (4 if "codes" in v else 1) * 512 + lists + 16
    for raw, slots in product(RAW_PAGES, SLOTS):
        total = slots * (128 * d + 16) + raw * (k.nbytes + v.nbytes) + rest
        if total <= gpu.block_bytes:
            return Shape(d, groups, unpackers, parts, registers, raw, slots, total)
    raise ValueError(f"{gpu.block_bytes} bytes of shared memory hold no two sides of 64 tokens of head dim {d}.")


@lru_cache
def text(k: Layout, v: Layout, k_recipe: source.Read, v_recipe: source.Read, how: Shape) -> str:
    return source.dequantising(k, v, k_recipe, v_recipe) + how.constants() + source.read("chunk.cu")


@lru_cache
def splits(tiles: int, blocks: int, processors: int) -> int:
    """Into how many parts each row of pages is cut: fewest waves of fewest pages. Known without the lengths."""

    def cost(count: int) -> int:
        joins = 0 if count == 1 else 1 if count <= joining.MOST_PARTS else 2
        return -(-tiles * count // processors) * (-(-blocks // count) + OVERHEAD) + OVERHEAD * joins

    return min(range(1, max(1, min(blocks, MOST_SPLITS)) + 1), key=cost)


@lru_cache
def _plan(pages: Form, sequences: int, blocks: int, rows: int, device: int) -> tuple[Kernel, Shape, int, int]:
    """The kernel, its shape, its tiles of query rows for each sequence and head, and its splits: made once a form."""
    gpu = attending.limits(device)
    how = shape(pages[0], pages[1], rows, gpu)
    tiles = -(-rows // how.rows)
    run = kernel(text(*pages, how), "attend_chunk", device, how.shared_bytes)
    return run, how, tiles, splits(sequences * tiles, blocks, gpu.processors)


def attend_pages(q: Tensor, pages: Pages, scale: float) -> Partial:
    """As `ops.attention.attend_pages`: few query rows in 8-bit integers, many, or unequal 8-bit steps, in bf16.

    Very many leave the products to cuDNN.
    """
    rows = q.shape[1] // pages.table.shape[1] * q.shape[2]
    d = pages.k_layout.d
    hopper = attending.limits(q.device.index).major == 9  # elsewhere 256 channels need more registers than there are
    fits = d in CHUNK_HEAD_DIMS or (d == 256 and hopper)
    if (rows <= FEW_ROWS or not fits) and integers(pages):
        return attending.attend_pages(q, pages, scale)
    return (unpacked.attend_pages if unpacked.pays(rows, pages) else attend_chunk)(q, pages, scale)


def attend_chunk(q: Tensor, pages: Pages, scale: float) -> Partial:
    """Each page is unpacked once for up to 128 query rows, and multiplied in bf16. No host sync."""
    b, hq, n, d = q.shape
    h, blocks = pages.table.shape[1:]
    rows, device = hq // h * n, q.device
    run, how, tiles, parts = _plan(form(pages), b * h, blocks, rows, device.index)
    out = torch.empty(parts, b, hq, n, d, dtype=torch.float32, device=device)
    lse = torch.empty(parts, b, hq, n, dtype=torch.float32, device=device)
    q, table, lengths = q.float().contiguous(), pages.table.contiguous(), pages.lengths.contiguous()
    pointers = (x.data_ptr() for x in (q, pages.pool, table, lengths, out, lse))
    numbers = (pages.pool.stride(0), rows, blocks, parts, tiles, b * h, scale * LOG2E)
    if rows and b:
        run((b * h * tiles * parts, 1, 1), how.threads, Arguments(*pointers, *numbers))
    return joining.merge(list(zip(out, lse, strict=True)))
