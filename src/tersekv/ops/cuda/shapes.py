"""The shape of a launch of attention: threads of a block, blocks of a multiprocessor, and parts of a row of pages."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from tersekv.layout import Layout
from tersekv.ops.cuda import walks
from tersekv.ops.cuda.reading import TRELLIS_ORDER

# Threads of a block and blocks of a multiprocessor; of two that cost the same, the first. With 512 threads each has 128
# registers, which is too few where WIDE is said below.
SHAPES = ((256, 2), (512, 1), (128, 4), (256, 1), (128, 1), (64, 1))
WIDE = 256  # threads of a multiprocessor where one of them needs more than 128 registers
# Up to so many bits a page is copied in one piece, for fewer instructions. A warp's ring has one slot more than are
# under way at a time: a page, or two of its sides. More only make copies wait for each other, and some SMs for long.
IN_ONE_PIECE = 3
MOST_SLOTS = 12
# What `cost` knows, in bytes that a multiprocessor could have read: on an H200, 32 KB a microsecond.
UNDER_WAY = 40_000  # with fewer bytes asked for at a time it waits for memory
TURN = 60_000  # blocks that wait for others: their beginning and end
JOIN, PART = 80_000, 4_000  # of parts of a row, and of each


@dataclass(frozen=True)
class Shape:
    """`heads`: query rows of a tile, 4 or 8. `pieces`: in which a page is copied, whole or keys and values each."""

    d: int
    heads: int
    threads: int
    blocks: int
    pieces: int
    slots: int
    shared_bytes: int

    def constants(self) -> str:
        return (
            f"constexpr int D = {self.d}, HEADS = {self.heads}, THREADS = {self.threads}, "
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
def choose(k: Layout, v: Layout, rows: int, gpu: Limits, sequences: int, blocks: int) -> tuple[Shape, int]:
    """The cheapest shape that fits, and into how many parts each row of `blocks` pages is cut. Lengths are not known.

    `rows`: of queries, for each of `sequences` (times KV heads). Raises ValueError where no shape fits.
    """
    candidates = [
        (how, parts)
        for how in fitting(k, v, rows, gpu)
        for parts in range(1, max(1, min(blocks * 32 // how.threads, gpu.processors * how.blocks)) + 1)
    ]
    if not candidates:
        raise ValueError(f"{gpu.block_bytes} bytes of shared memory hold no pages of {k.nbytes + v.nbytes} bytes.")
    tiles, page = sequences * -(-rows // candidates[0][0].heads), k.nbytes + v.nbytes
    return min(candidates, key=lambda one: cost(*one, tiles, blocks, page, gpu.processors))


def cost(how: Shape, parts: int, tiles: int, blocks: int, page: int, processors: int) -> int:
    """Of the multiprocessor with most pages. Bytes count as those of a warp that has most, for all warps beside it.

    The first blocks are spread evenly. Those that wait for others go where some of these end, often two to one
    multiprocessor while others have none, so that what is left for a last turn takes as long as a full one.
    """
    units, warps = tiles * parts, how.threads // 32
    turns = -(-units // (processors * how.blocks))
    at_once = how.blocks if turns > 1 else -(-units // processors)
    pages = -(-blocks // (parts * warps))
    read = turns * max(at_once * warps * page, UNDER_WAY) * pages
    return read + TURN * (turns - 1) + (JOIN + PART * parts if parts > 1 else 0)


def fitting(k: Layout, v: Layout, rows: int, gpu: Limits) -> Iterator[Shape]:
    """The shapes whose rings fit, each with the fewest slots that can hold the sums of warps at the end."""
    heads, d, sides = 4 if rows <= 4 else 8, k.d, (k.nbytes, v.nbytes)
    pieces = 1 if max(k.code_bits, v.code_bits) <= IN_ONE_PIECE else 2
    slot = sum(sides) if pieces == 1 else max(sides)
    by_page = "channel_scale" in k or ("channel_zero" in k and k.plane("channel_zero").kind != "int8")
    wide = d > 128 or by_page or "channel_scale" in v or "channel_zero" in v
    wide = wide or (heads == 8 and (max(k.code_bits, v.code_bits) > 2 or v.order == TRELLIS_ORDER))
    windows = walks.table_bytes(v.code_bits) if v.order == TRELLIS_ORDER else 0
    sizes = 256 if any(p.name == "scale" and p.kind == "log8" for p in (*k.planes, *v.planes)) else 1
    for threads, blocks in SHAPES:
        warps, queries = threads // 32, 2 * d * heads + 12 * heads
        shared = queries * (warps if by_page else 1) + 4 * (heads * d if by_page else 4) + 4 * sizes
        sums = warps * heads * (4 * d + 12)  # `Sums` in join.cuh
        slots = next(count for count in range(pieces + 1, MOST_SLOTS + 1) if warps * count * slot >= sums)
        total = warps * slots * (slot + 8) + shared + 16 + (windows + warps * heads * 64 + 16 if windows else 0)
        if total <= min(gpu.sm_bytes // blocks - 1024, gpu.block_bytes) and threads * blocks <= (WIDE if wide else 512):
            yield Shape(d, heads, threads, blocks, pieces, slots, total)
