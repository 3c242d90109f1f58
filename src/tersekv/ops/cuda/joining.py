"""Attention over dense tokens and the merge of parts, on a GPU."""

from ctypes import Structure, c_float, c_int, c_longlong, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from tersekv.ops.cuda import source
from tersekv.ops.cuda.compiler import kernel, missing
from tersekv.ops.cuda.encoding import KINDS
from tersekv.ops.cuda.reading import HEAD_DIMS
from tersekv.ops.pages import Partial

FLASH = (torch.bfloat16, torch.float16)
MOST_PARTS = 8  # as in merge.cu
ROWS = (1, 2, 4, 8)  # query rows of a block


class Dense(Structure):
    """The arguments of `dense.cu`."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "lengths", "padding", "out", "lse")),
        ("k_strides", c_longlong * 3),
        ("v_strides", c_longlong * 3),
        *((name, c_int) for name in ("heads", "rows", "n", "t")),
        ("scale", c_float),
    )


class Parts(Structure):
    """The arguments of `merge.cu`."""

    _fields_ = (
        ("out", c_void_p * MOST_PARTS),
        ("lse", c_void_p * MOST_PARTS),
        ("whole", c_void_p),
        ("whole_lse", c_void_p),
        ("rows", c_longlong),
        ("count", c_int),
        ("d", c_int),
    )


def reads(q: Tensor, k: Tensor) -> bool:
    """Whether `attend_dense` can run."""
    fits = q.shape[-1] in HEAD_DIMS and q.dtype in KINDS and k.dtype in KINDS
    return q.device.type == "cuda" and fits and missing() is None


def attend_dense(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, padding: Tensor | None, causal: bool
) -> Partial:
    """Of tokens `padding` to `lengths` of each sequence; `causal`: the last n are the queries' own. In fp32."""
    b, hq, n, d = q.shape
    h, t = k.shape[1:3]
    rows, device = hq // h * n, q.device
    per_block = next((count for count in ROWS if count >= rows), ROWS[-1])
    run = kernel(
        dense_text(d, KINDS[q.dtype], KINDS[k.dtype], per_block, causal),
        "attend_dense",
        device.index,
        _bytes(d, per_block),
    )
    out = torch.empty(q.shape, dtype=torch.float32, device=device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=device)
    q, k, v = q.contiguous(), _aligned(k), _aligned(v)
    lengths, padding = (x if x is None else x.to(device).contiguous() for x in (lengths, padding))
    pointers = (x.data_ptr() if x is not None else None for x in (q, k, v, lengths, padding, out, lse))
    strides = ((c_longlong * 3)(*(x.element_size() * x.stride(i) for i in range(3))) for x in (k, v))
    run((-(-rows // per_block), b * h, 1), 256, Dense(*pointers, *strides, h, rows, n, t, scale))
    return out, lse


def flashes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend_causal` can run: all in one 16-bit precision."""
    fits = q.shape[-1] == v.shape[-1] and q.shape[-1] in HEAD_DIMS and q.shape[2] == k.shape[2]
    return q.device.type == "cuda" and q.dtype in FLASH and q.dtype == k.dtype == v.dtype and fits and not missing()


def attend_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
    """Of new tokens among themselves, by PyTorch's FlashAttention: its public function hides the log-sum-exp."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    return out, lse


def _aligned(x: Tensor) -> Tensor:
    """The kernel reads 16 bytes at a time."""
    size = x.element_size()
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(size * s % 16 == 0 for s in x.stride()[:-1])
    return x if fits else x.contiguous()


def _bytes(d: int, rows: int) -> int:
    """`sizeof(Shared)` in dense.cu."""
    return 4 * rows * (d + 256 + 256 // d * d + 3)


@lru_cache
def dense_text(d: int, q: str, kv: str, rows: int, causal: bool) -> str:
    constants = (
        f"constexpr int D = {d}, Q_KIND = {q}, KV_KIND = {kv}, ROWS = {rows};\nconstexpr bool CAUSAL = {int(causal)};\n"
    )
    return f'#include "planes.cuh"\n{constants}{source.read("dense.cu")}'


def joins(parts: list[Partial]) -> bool:
    """Whether `merge` can run."""
    return parts[0][0].device.type == "cuda" and len(parts) > 1 and missing() is None


def merge(parts: list[Partial]) -> Partial:
    """One launch for up to eight parts; of more, eight at a time, and then of what comes out."""
    while len(parts) > 1:
        groups = [parts[i : i + MOST_PARTS] for i in range(0, len(parts), MOST_PARTS)]
        parts = [_merge(group) if len(group) > 1 else group[0] for group in groups]
    return parts[0]


def _merge(parts: list[Partial]) -> Partial:
    outs, lses = ([x.float().contiguous() for x in xs] for xs in zip(*parts, strict=True))
    whole, whole_lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    run = kernel(source.read("merge.cu"), "merge", whole.device.index)
    arrays = ((c_void_p * MOST_PARTS)(*(x.data_ptr() for x in xs)) for xs in (outs, lses))
    rows = whole_lse.numel()
    arguments = Parts(*arrays, whole.data_ptr(), whole_lse.data_ptr(), rows, len(parts), whole.shape[-1])
    if rows:
        run((-(-rows // 8), 1, 1), 256, arguments)
    return whole, whole_lse
