"""Codes whose error lies where queries do not look: error feedback along channels. The decoder does not know of it.

What queries see of an error e of a key is e A e', with A their second moments, and not |e|^2. So channels are coded
one after the other, and what a code is wrong by is made up for by the channels that follow, as well as A allows (GPTQ,
arXiv 2210.17323, section 3, where A belongs to the inputs of a layer; SQuat, arXiv 2503.24358, has it for keys).
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tersekv.ops import native_encoding as native
from tersekv.ops.cuda import feedback as cuda
from tersekv.ops.lookup import nearest

HALF_MAX = 65504.0
DAMPING = 0.2  # of the mean diagonal, added to it: queries that have not been seen


@runtime_checkable
class Coder(Protocol):
    """Codes `step` channels at a time, for which it looks at `ahead` more. A state goes from each step to the next."""

    step: int
    ahead: int

    def coded(
        self, w: Float[Tensor, "channels *lead"], state: Any
    ) -> tuple[UInt8[Tensor, "step *lead"], Float[Tensor, "step *lead"], Any]: ...


@dataclass(frozen=True)
class Nearest:
    """Each channel by itself: the nearest entry of a table. See `lookup.nearest`."""

    thresholds: Float[np.ndarray, "half"]
    table: Float[Tensor, "entries"]
    step = 1
    ahead = 0

    def coded(self, w: Tensor, state: None) -> tuple[Tensor, Tensor, None]:
        codes = nearest(w, self.thresholds)
        return codes, self.table[codes.int()], None


def prepared(moments: Float[Tensor, "*lead d d"], step: int) -> Float[Tensor, "*lead d d"]:
    """What `steered` needs of sums of q' q: A from the diagonal down, what errors pass on above it.

    In fp16, because it is kept. Rounding changes a little what an error is made up for by, and nothing that is decoded.
    """
    a = _damped(moments)
    return (a.tril() + _passed_on(a, step)).clamp(-HALF_MAX, HALF_MAX).half()


def steered(
    z: Float[Tensor, "*lead block d"], asked: Float[Tensor, "*#lead d d"], coder: Coder
) -> tuple[UInt8[Tensor, "*lead block d"], Float[Tensor, "*lead block"]]:
    """Codes of tokens of variance 1, and the factor t of their values c with which z A (t c)' = z A z'.

    `asked` is `prepared`. The factor is `rotated`'s unbiased scale, in the metric of the queries. Where it has none,
    because the values point away, t is 0 and so are the values that are decoded.
    """
    asked = asked.float()[(None,) * (z.ndim - asked.ndim)]
    a, passed = asked.tril() + asked.tril(-1).mT, asked.triu(1)
    kernels = next((k for k in (native, cuda) if isinstance(coder, Nearest) and k.steers(z)), None)
    if isinstance(coder, Nearest) and kernels is not None:
        codes = kernels.codes(z, passed, coder.thresholds, coder.table)
        values = coder.table.index_select(0, codes.int().flatten()).view(codes.shape)  # a third of the time of [codes]
    else:
        codes, values = _in_turn(z, passed, coder)
    seen = z @ a
    along = (seen * values).sum(-1)
    return codes, torch.where(along > 0, (seen * z).sum(-1) / along, 0)


def _in_turn(z: Tensor, passed: Tensor, coder: Coder) -> tuple[Tensor, Tensor]:
    passed = passed.movedim((-2, -1), (0, 1))[..., None]
    w, state = z.movedim(-1, 0).clone(), None
    codes, values = torch.empty_like(w, dtype=torch.uint8), torch.empty_like(w)
    for start in range(0, len(w), coder.step):
        now = slice(start, start + coder.step)
        codes[now], values[now], state = coder.coded(w[start : now.stop + coder.ahead], state)
        for i in range(start, now.stop):
            w[now.stop :] -= passed[i, now.stop :] * (w[i] - values[i])
    return codes.movedim(0, -1), values.movedim(0, -1)


def _damped(moments: Float[Tensor, "*lead d d"]) -> Float[Tensor, "*lead d d"]:
    """In units of the mean diagonal, in fp64."""
    mean = moments.double().diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    one = torch.eye(moments.shape[-1], dtype=torch.float64, device=moments.device)
    return torch.where(mean > 0, moments.double() / mean, 0) + DAMPING * one


def _passed_on(a: Float[Tensor, "*lead d d"], step: int) -> Float[Tensor, "*lead d d"]:
    """Row i: what an error of 1 in channel i, with those of its step, changes in each channel behind the step.

    With A^-1 = U' U and U upper triangular, U_ss^-1 U_sr for a step s and the rest r of the channels.
    """
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(a)), upper=True)
    if step == 1:
        return (upper / upper.diagonal(dim1=-2, dim2=-1)[..., None]).triu(1)
    passed = torch.zeros_like(a)
    for start in range(0, a.shape[-1], step):
        now, rest = slice(start, start + step), slice(start + step, None)
        passed[..., now, rest] = torch.linalg.solve_triangular(upper[..., now, now], upper[..., now, rest], upper=True)
    return passed
