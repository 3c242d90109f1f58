"""What the rounding of the CUDA kernels may change: derived, element by element. The exact part is `native_truth`.

A query row has two 8-bit digits, 127 * 254 steps to its largest channel; table entries are on `levels`; weights have
255 steps to the largest of the tokens that share a step, which is rounded up by less than 2^-7.
"""

import torch
from native_cases import Case, Side
from native_truth import EPS, Tokens, Truth, blocks_of, by_rows, tokens
from torch import Tensor

from tersekv.ops.cuda.levels import levels, listed
from tersekv.ops.planes import read_codes
from tersekv.ops.recipe import Dense, Grid
from tersekv.ops.trellis import Trellis

QUERY = 0.51 / (127 * 254)
WEIGHT = 0.51 * (1 + 2**-7) / 255


def near(side: Side) -> tuple[Tensor, Tensor]:
    """Table entries on the levels that the kernels multiply, and the part of them that rounded weights multiply."""
    if isinstance(side.recipe, Trellis):  # its entries are levels
        return side.table()
    assert isinstance(side.recipe, Grid)
    found, codes = levels(side.recipe.table), read_codes(side.packed).int()
    steps = found.step * torch.tensor(found.level, dtype=torch.float64)
    return (steps + found.middle)[codes], (steps + found.centre)[codes]


def of_row(case: Case, q: Tensor, pages: slice, length: int) -> tuple[Tensor, ...]:
    """Output, log-sum-exp and their bounds of query rows (rows, d) over one row of the page table."""
    k, v = (tokens(side, pages, length) for side in (case.k, case.v))
    (k_near, _), (v_near, v_centred) = ([x[pages].flatten(0, 1)[:length] for x in near(s)] for s in (case.k, case.v))
    scores = case.scale * q @ k.values.T
    lse, p = scores.logsumexp(-1), scores.softmax(-1)
    out = p @ v.values
    off = score_bound(q, k, k_near, case.scale).amax(-1, keepdim=True) + 2**-19
    spread = (p[:, :, None] * (v.values - out[:, None]).abs()).sum(1)
    moved = torch.expm1(2 * off) * spread
    rounded = (length + 64) * EPS * (p @ v.magnitude) + weight_bound(p, v, v_near, v_centred)
    return out, lse, moved + torch.exp(2 * off) * rounded, off[:, 0] + (8 + length / 16) * EPS * (1 + lse.abs())


def score_bound(q: Tensor, k: Tokens, k_near: Tensor, scale: float) -> Tensor:
    """Of each score (rows, t): fp32 sums, the steps of queries and those of the table."""
    folded = q[:, None] * k.channel_scale
    step = folded.abs().amax(-1) * QUERY
    zeros = (k.channel_zero / k.channel_scale * (k.scale if k.channels_first else 1)).abs()
    reach = (k_near * k.scale + k.zero).abs().sum(-1) + zeros.sum(-1)
    by_table = (folded.abs() * (k.t - k_near).abs()).sum(-1) * k.scale.T
    return scale * (step * reach + by_table + (q.shape[-1] + 16) * EPS * (q.abs() @ k.magnitude.T))


def weight_bound(p: Tensor, v: Tokens, v_near: Tensor, v_centred: Tensor) -> Tensor:
    """Of each output (rows, d): half a step of the largest weight of each block, and the steps of the table."""
    w = p * v.scale.T
    centred = (v_centred.abs() * v.channel_scale.abs()).T
    return (blocks_of(w).amax(-1) * WEIGHT) @ blocks_of(centred).sum(-1).T + w @ (
        (v.t - v_near).abs() * v.channel_scale.abs()
    )


def truth(case: Case) -> Truth:
    return by_rows(case, of_row)


BFLOAT = 2**-9  # relative: half a step of bf16
ROUNDED_GAIN = 2**-14  # relative: the step of a token, kept to 15 significant bits
BIAS = 2**15 + 2**7  # bytes become floats by way of a number this large, in units of a table's step


def unpacked_off(side: Side, t: Tokens, pages: slice, length: int) -> Tensor:
    """How far a value (t, d) in shared memory may be from the exact one, from the table's steps and bf16's."""
    if isinstance(side.recipe, Dense):  # copied, and bf16 before
        return torch.zeros_like(t.values)
    off = (t.values.abs() + 2 * EPS * t.magnitude) * BFLOAT
    if isinstance(side.recipe, Grid) and not listed(side.recipe.table):
        found = levels(side.recipe.table)
        near_t = near(side)[0][pages].flatten(0, 1)[:length]
        reach = (t.t - near_t).abs() + ROUNDED_GAIN * near_t.abs() + EPS * BIAS * found.step
        off = off + reach * (t.scale * t.channel_scale).abs()
        off = off + (ROUNDED_GAIN * (t.channel_zero * t.scale).abs() if t.channels_first else 0)
    return off + 4 * EPS * t.magnitude


def of_chunk_row(case: Case, q: Tensor, pages: slice, length: int) -> tuple[Tensor, ...]:
    """As `of_row`, of the kernel for many query rows: bf16 queries, keys, weights and values, fp32 sums."""
    k, v = (tokens(side, pages, length) for side in (case.k, case.v))
    k_off, v_off = (unpacked_off(side, t, pages, length) for side, t in ((case.k, k), (case.v, v)))
    scores = case.scale * q @ k.values.T
    lse, p = scores.logsumexp(-1), scores.softmax(-1)
    out = p @ v.values
    by_query = (BFLOAT + 4 * EPS) * (k.values.abs() + k_off) + (q.shape[-1] + 16) * EPS * k.magnitude
    off = (case.scale * q.abs() @ (k_off + by_query).T).amax(-1, keepdim=True) + 2**-19
    spread = (p[:, :, None] * (v.values - out[:, None]).abs()).sum(1)
    moved = torch.expm1(2 * off) * spread
    rounded = (length + 64) * EPS * (p @ v.magnitude) + p @ (v_off + 1.01 * BFLOAT * (v.values.abs() + v_off))
    return out, lse, moved + torch.exp(2 * off) * rounded, off[:, 0] + (8 + length / 16) * EPS * (1 + lse.abs())


def chunk_truth(case: Case) -> Truth:
    return by_rows(case, of_chunk_row)
