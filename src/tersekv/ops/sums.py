"""Sums whose order is part of the format, so that scales and means come out alike in every backend."""

from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

LANES = 16


def channel_sum(x: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead"]:
    """Sum over channels: 16 lanes are filled in turn, then halved 16, 8, 4, 2, 1. No fused multiply-add.

    This is what a 512-bit register does by itself, and costs narrower ones nothing.
    """
    d = x.shape[-1]
    if d % LANES:
        x = torch.nn.functional.pad(x, (0, -d % LANES))
    lanes = x[..., :LANES].contiguous()
    for start in range(LANES, x.shape[-1], LANES):
        lanes = lanes + x[..., start : start + LANES]
    return _halved(lanes, -1)


def token_sum(x: Float[Tensor, "*lead block d"]) -> Float[Tensor, "*lead d"]:
    """Sum over the tokens of a block, whose number is a power of two: first half plus second half, and again."""
    return _halved(x, -2)


def products(
    x: Float[Tensor, "*lead n dim"], rows: Float[Tensor, "*#lead entries dim"]
) -> Float[Tensor, "*lead n entries"]:
    """Inner products, summed over channels in their order, without fused multiply-add."""
    total = torch.zeros(*x.shape[:-1], rows.shape[-2], device=x.device)
    term = torch.empty_like(total)
    for j in range(x.shape[-1]):
        total += torch.mul(x[..., j, None], rows[..., None, :, j], out=term)
    return total


def root(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The correctly rounded fp32 square root, by way of fp64: torch's own is an ulp off on some processors."""
    return x.double().sqrt().float()


def unit_scale(norm: Float[Tensor, "*lead"], d: int) -> Float[Tensor, "*lead"]:
    """sqrt(d) / norm in one IEEE division, 0 where the norm is 0: brings a vector's values to variance 1.

    The numerator is a tensor, because torch turns scalar / tensor into a reciprocal and a product.
    """
    return torch.where(norm > 0, torch.full_like(norm, sqrt(d)) / norm, 0)


def _halved(x: Tensor, dim: int) -> Tensor:
    while x.shape[dim] > 1:
        half = x.shape[dim] // 2
        x = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
    return x.squeeze(dim)
