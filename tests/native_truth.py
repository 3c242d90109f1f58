"""Attention in fp64 over the pages of a case, and what rounding may change: derived, row by row.

Notation as in the kernels: a value is (t * scale + zero) * channel_scale + channel_zero, or channels first, t a table
entry; on the int8 route t is moved to the nearest of 128 levels, a query to 255 steps, and the weights of a block to
255 steps. Channels with a scale of their own in each token have queries and weights of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from native_cases import Case, Side
from torch import Tensor

EPS = float(torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class Truth:
    """Output and log-sum-exp, and the largest error of each element that the route's rounding explains."""

    out: Tensor
    lse: Tensor
    out_bound: Tensor
    lse_bound: Tensor


@dataclass(frozen=True)
class Tokens:
    """The numbers of one row's tokens, in fp64: (t, d), or (t, 1) for those of whole tokens."""

    t: Tensor
    size: Tensor  # magnitude of what is summed up to t
    near: Tensor  # t on the 128 levels
    scale: Tensor
    zero: Tensor
    channel_scale: Tensor
    channel_zero: Tensor
    channels_first: bool
    channels_each: int
    middle: float

    @property
    def values(self) -> Tensor:
        if self.channels_first:
            return (self.t * self.channel_scale + self.channel_zero) * self.scale + self.zero
        return (self.t * self.scale + self.zero) * self.channel_scale + self.channel_zero

    @property
    def reach(self) -> Tensor:
        """What a rounding is multiplied by: t or, where a side is centred, its distance from the table's middle."""
        return torch.maximum(self.near.abs(), (self.near - self.middle).abs())

    @property
    def magnitude(self) -> Tensor:
        """The sum of the terms' magnitudes: what a rounding is relative to."""
        if self.channels_first:
            parts = (self.size * self.channel_scale).abs() + self.channel_zero.abs()
            return parts * self.scale.abs() + self.zero.abs()
        parts = (self.size * self.scale).abs() + self.zero.abs()
        return parts * self.channel_scale.abs() + self.channel_zero.abs()


def tokens(side: Side, pages: slice, length: int) -> Tokens:
    t, near = side.table()
    others = [("scale", 1.0), ("zero", 0.0), ("channel_scale", 1.0), ("channel_zero", 0.0)]
    numbers = [t, side.size(), near, *(side.numbers(name, otherwise) for name, otherwise in others)]
    cut = [x.expand(len(t), 64, -1)[pages].flatten(0, 1)[:length] for x in numbers]
    return Tokens(*cut, side.channels_first, side.channels_each, side.middle)


def blocks_of(x: Tensor) -> Tensor:
    """(..., t) as (..., blocks, 64), filled up with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 64)).unflatten(-1, (-1, 64))


def score_bound(q: Tensor, k: Tokens, scale: float, int8: bool) -> Tensor:
    """Of each score (rows, t): a sum of d products in fp32, and the steps of queries and of the table."""
    bound = (q.shape[-1] + 16) * EPS * scale * (q.abs() @ k.magnitude.T)
    if not int8:
        return bound
    folded = q[:, None] * k.channel_scale  # (rows, t, d)
    half_step = folded.abs().unflatten(-1, (-1, k.channels_each)).amax(-1).repeat_interleave(k.channels_each, -1) / 254
    by_query = half_step * k.reach
    by_table = folded.abs() * (k.t - k.near).abs()
    return bound + scale * (k.scale.abs() * (by_query + by_table)).sum(-1)


def weight_bound(p: Tensor, v: Tokens) -> Tensor:
    """Of each output (rows, d): half a step of each block's largest weight, and the steps of the table."""
    w = p[..., None] * v.scale.abs()  # (rows, t, d or 1)
    half_step = blocks_of(w.mT).amax(-1) / 254  # (rows, d or 1, blocks)
    reach = blocks_of((v.reach * v.channel_scale.abs()).T).sum(-1)  # (d, blocks)
    return (half_step * reach).sum(-1) + (w * ((v.t - v.near).abs() * v.channel_scale.abs())).sum(-2)


def of_row(case: Case, q: Tensor, pages: slice, length: int, exact: bool) -> tuple[Tensor, ...]:
    """Output, log-sum-exp and their bounds of query rows (rows, d) over one row of the page table."""
    k, v = (tokens(side, pages, length) for side in (case.k, case.v))
    scores = case.scale * q @ k.values.T
    lse, p = scores.logsumexp(-1), scores.softmax(-1)
    out = p @ v.values
    off = score_bound(q, k, case.scale, case.k.int8 and not exact).amax(-1, keepdim=True) + 2**-21
    spread = (p[:, :, None] * (v.values - out[:, None]).abs()).sum(1)
    moved = torch.expm1(2 * off) * spread  # weights are off by at most a factor exp(2 off), and still sum to 1
    rounded = (length + 64) * EPS * (p @ v.magnitude)
    if case.v.int8 and not exact:
        rounded = rounded + weight_bound(p, v)
    return out, lse, moved + torch.exp(2 * off) * rounded, off[:, 0] + (8 + length / 16) * EPS * (1 + lse.abs())


def truth(case: Case, exact: bool) -> Truth:
    return by_rows(case, partial(of_row, exact=exact))


def by_rows(case: Case, row_of: Callable[[Case, Tensor, slice, int], tuple[Tensor, ...]]) -> Truth:
    """`row_of` gives output, log-sum-exp and their bounds for one row of the page table."""
    b, hq, n, d = case.q.shape
    count = case.linear.lengths
    h = count.shape[1]
    out, lse = torch.zeros(b, h, hq // h * n, d).double(), torch.full((b, h, hq // h * n), -torch.inf).double()
    bounds = torch.zeros_like(out), torch.zeros_like(lse)
    q, at = case.q.double().view(b, h, -1, d), 0
    for i, j in torch.cartesian_prod(torch.arange(b), torch.arange(h)).view(-1, 2).tolist():
        length = int(count[i, j])
        pages = slice(at, at + -(-length // 64))
        at = pages.stop
        if length:
            row = row_of(case, q[i, j], pages, length)
            out[i, j], lse[i, j], bounds[0][i, j], bounds[1][i, j] = row
    shape = b, hq, n
    return Truth(out.view(*shape, d), lse.view(shape), bounds[0].view(*shape, d), bounds[1].view(shape))


def compare(got: tuple[Tensor, Tensor], right: Truth, what: str) -> None:
    """Raise unless every element lies within its bound, naming the worst one."""
    for x, y, bound in ((got[0], right.out, right.out_bound), (got[1], right.lse, right.lse_bound)):
        assert torch.equal(torch.isfinite(x), torch.isfinite(y)), f"{what}: not finite, or finite where nothing is seen"
        error = torch.where(torch.isfinite(y), (x.double() - y).abs(), 0)
        worst = (error - bound).flatten().argmax()
        index = tuple(int(i) for i in torch.unravel_index(worst, error.shape))
        assert error[index] <= bound[index], f"{what}: off by {error[index]:.3g} at {index}, allowed {bound[index]:.3g}"
