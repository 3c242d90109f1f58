"""Signs of random projections: what is left of a vector when only sign(S x) is kept (QJL, arXiv 2406.03482).

For Gaussian rows s of S, E[sign(<s, x>) <s, q>] = sqrt(2/pi) <x, q> / |x|, so sqrt(pi/2)/m |x| <sign(S x), S q> is an
unbiased estimate of <x, q>, of variance (pi/2 |x|^2 |q|^2 - <x, q>^2) / m for m rows (lemma 3.2 there).
"""

from functools import lru_cache
from math import pi, sqrt
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tersekv.ops.recipe import Grid
from tersekv.rotation import random_words


@lru_cache
def matrix(m: int, d: int, seed: int) -> np.ndarray:
    """S, (m, d) fp32, rounded to steps of 2^-8, so that no library's logarithm decides about a bit."""
    normal = NormalDist()
    entries = [normal.inv_cdf(((word >> 11) + 0.5) * 2.0**-53) for word in random_words(m * d, seed)]
    return (np.round(np.array(entries) * 256) / 256).astype(np.float32).reshape(m, d)


def sign_codes(x: Float[Tensor, "*lead d"], m: int, seed: int) -> UInt8[Tensor, "*lead m"]:
    """1 where S x is not negative.

    In fp64, where the products are exact (24 and 11 bits) and so, nearly always, is their sum: a sign must not depend
    on the order in which a backend adds up.
    """
    return (x.double() @ _rows(x, m, seed).double().mT >= 0).to(torch.uint8)


def _rows(x: Tensor, m: int, seed: int) -> Tensor:
    return torch.from_numpy(matrix(m, x.shape[-1], seed)).to(x.device)


def project(q: Float[Tensor, "*lead d"], m: int, seed: int) -> Float[Tensor, "*lead m"]:
    return q.float() @ _rows(q, m, seed).mT


def unproject(o: Float[Tensor, "*lead m"], d: int, seed: int) -> Float[Tensor, "*lead d"]:
    """In fp64, where the sum of decoded signs, multiples of one number, is exact in whatever order it is taken."""
    return (o.double() @ torch.from_numpy(matrix(o.shape[-1], d, seed)).to(o.device).double()).float()


def recipe(m: int) -> Grid:
    """Codes to numbers: -+ sqrt(pi/2)/m, to be scaled by the length of what was sketched."""
    return Grid((-sqrt(pi / 2) / m, sqrt(pi / 2) / m))
