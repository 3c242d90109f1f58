"""Attention of very many query rows on a GPU: some thousand tokens at a time are unpacked, and cuDNN attends to them.

`chunk.cu` unpacks a page anew for every 128 query rows. Where these are many it is quicker to do so once, into memory
that the next tokens use again.
"""

from ctypes import Structure, c_int, c_longlong, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from tersekv.layout import BLOCK, Layout
from tersekv.ops.cuda import attending, joining, source
from tersekv.ops.cuda.compiler import Kernel, kernel
from tersekv.ops.cuda.reading import form
from tersekv.ops.pages import Pages, Partial

# How many times as long as this route `chunk.cu` takes for rows that fill the GPU, by head dim (H100, 32,768 tokens).
GAIN = {64: 1.77, 128: 1.95, 256: 4.46}
TILE_ROWS = 128  # query rows that a multiprocessor works on; cuDNN does not share out the tokens of one tile
TILE_BYTES = 2**27  # of unpacked keys and values, of one layer: with 8 KV heads of 128 channels, 32,768 tokens
MOST_WAITING = 4  # partial results that are held until they are joined


class Arguments(Structure):
    """As in `unpack_pages.cu`."""

    _fields_ = (
        *((name, c_void_p) for name in ("pool", "table", "k", "v")),
        ("page_bytes", c_longlong),
        *((name, c_int) for name in ("blocks", "first", "pages")),
    )


def pays(rows: int, pages: Pages) -> bool:
    """Measured on Hopper alone. cuDNN is not told of lengths, so every row must hold all of its blocks."""
    gpu, (b, h, blocks) = attending.limits(pages.pool.device.index), pages.table.shape
    cudnn = torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled()
    if gpu.major != 9 or not cudnn or not pages.full or not blocks or pages.k_layout.d not in GAIN:
        return False
    tiles = b * h * -(-rows // TILE_ROWS)
    return -(-tiles // gpu.processors) * gpu.processors < GAIN[pages.k_layout.d] * tiles


@lru_cache
def text(k: Layout, v: Layout, k_recipe: source.Read, v_recipe: source.Read) -> str:
    sides = source.dequantising(k, v, k_recipe, v_recipe)
    return f"{sides}constexpr int D = {k.d};\n{source.read('unpack_pages.cu')}"


@lru_cache
def _kernel(k: Layout, v: Layout, k_recipe: source.Read, v_recipe: source.Read, device: int) -> Kernel:
    shared = 2 * 128 * k.d + k.nbytes + v.nbytes + 4 * 512 + 2 * 1024 + 16
    return kernel(text(k, v, k_recipe, v_recipe), "unpack_pages", device, shared)


def unpack(pages: Pages, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Keys and values (b, h, t, d) of `count` blocks from `first` on, in the codes' domain, in bf16."""
    b, h, blocks = pages.table.shape
    device = pages.pool.device
    run = _kernel(*form(pages), device.index)
    k, v = torch.empty(2, b, h, count * BLOCK, pages.k_layout.d, dtype=torch.bfloat16, device=device)
    table = pages.table.contiguous()
    pointers = (x.data_ptr() for x in (pages.pool, table, k, v))
    run((count, b * h, 1), 128, Arguments(*pointers, pages.pool.stride(0), blocks, first, count))
    return k, v


def attend_pages(q: Tensor, pages: Pages, scale: float) -> Partial:
    """As `ops.attention.attend_pages`, of full rows, in bf16. No host sync."""
    (b, h, blocks), d = pages.table.shape, q.shape[-1]
    grouped = q.to(torch.bfloat16).reshape(b, h, -1, d)  # a query group reads the same keys: rows of one query
    step = max(1, TILE_BYTES // (b * h * BLOCK * d * 4))
    parts: list[Partial] = []
    for first in range(0, blocks, step):
        k, v = unpack(pages, first, min(step, blocks - first))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(grouped, k, v, None, True, scale=scale)
        parts.append((out.reshape(q.shape), lse.reshape(q.shape[:-1])))
        if len(parts) == MOST_WAITING:
            parts = [joining.merge(parts)]
    out, lse = joining.merge(parts)
    return out.float(), lse
