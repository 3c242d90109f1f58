"""`polar`: rotated values as angles, four levels deep, and one radius for every 16 of them (PolarQuant).

arXiv 2502.02617, algorithm 1: neighbouring values become (radius, angle), neighbouring radii again, and so on. After a
rotation the angle of level l >= 2 has density sin(2a)^(2^(l-1) - 1) on 0 to pi/2 and the first is uniform on the
circle, so codebooks are fixed, and nothing is stored beside the angles but the last radius. An angle moves no length:
that of 16 values is kept whatever the bits.

Differs from the paper: the rotation is a signed Hadamard; codebooks are Lloyd-Max for the density and not k-means.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import pi

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tersekv.codec import Codec, check_bits
from tersekv.errors import SpecError
from tersekv.layout import BLOCK, Layout, Plane
from tersekv.ops.planes import from_bytes, pack_codes, to_bytes, unpack_codes
from tersekv.ops.recipe import Recipe
from tersekv.ops.sums import root
from tersekv.packed import Packed
from tersekv.rotation import rotate

GROUP, LEVELS = 16, 4
PLANES = ("codes", "codes2", "codes3", "codes4")


@lru_cache
def angles(level: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Centroids of a level's angles, ascending, and the edges between them, in radians; fp64."""
    count = 2**bits
    if level == 1:
        return (np.arange(count) + 0.5) * 2 * pi / count, np.arange(1, count) * 2 * pi / count
    grid = (np.arange(2**14) + 0.5) * pi / 2**15
    mass = np.sin(2 * grid) ** (2 ** (level - 1) - 1)
    centroids = (np.arange(count) + 0.5) * pi / 2 / count
    for _ in range(300):
        edges = (centroids[1:] + centroids[:-1]) / 2
        cell = np.searchsorted(edges, grid)
        centroids = np.bincount(cell, mass * grid, count) / np.bincount(cell, mass, count)
    return centroids, (centroids[1:] + centroids[:-1]) / 2


@dataclass(frozen=True)
class PolarRecipe:
    """Angles of each level to values: radius times cosines and sines down the tree."""

    bits: tuple[int, ...]
    name = "polar"

    def values(self, packed: Packed) -> Float[Tensor, "*lead block d"]:
        radius = from_bytes(packed.plane("scale"), "fp16")
        for level in range(LEVELS, 0, -1):
            bits = self.bits[level - 1]
            codes = unpack_codes(packed.plane(PLANES[level - 1]), bits)
            at = torch.from_numpy(angles(level, bits)[0]).to(codes.device)[codes.int()]
            radius = torch.stack((radius * at.cos().float(), radius * at.sin().float()), -1).flatten(-2)
        return radius.unflatten(-1, (BLOCK, packed.layout.d))


@dataclass(frozen=True)
class Polar(Codec):
    """`bits` of an angle of the first level; those of the other three have two fewer."""

    bits: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_bits(self.bits, 3, 6)

    @property
    def level_bits(self) -> tuple[int, ...]:
        return (self.bits, *(LEVELS - 1) * (self.bits - 2,))

    @property
    def rotation(self) -> int:
        return self.seed

    def layout(self, d: int) -> Layout:
        if d % GROUP:
            raise SpecError(f"head_dim {d}: polar needs a multiple of {GROUP}. Use rotated, which takes it.")
        widths = [d >> level for level in range(1, LEVELS + 1)]
        codes = (Plane(*row) for row in zip(PLANES, (BLOCK,) * LEVELS, widths, self.level_bits, strict=True))
        return Layout(d, (*codes, Plane("scale", BLOCK, d // GROUP, 16, "fp16")))

    def recipe(self, d: int) -> Recipe:
        return PolarRecipe(self.level_bits)

    def encode(self, x: Float[Tensor, "*lead block d"]) -> Packed:
        y, planes = rotate(x, self.seed).flatten(-2), {}
        for level, bits in enumerate(self.level_bits, start=1):
            a, b = y[..., ::2], y[..., 1::2]
            planes[PLANES[level - 1]] = pack_codes(
                _whole(a, b, bits) if level == 1 else _upper(a, b, level, bits), bits
            )
            y = root(a * a + b * b)
        return Packed.assemble(self.layout(x.shape[-1]), planes | {"scale": to_bytes(y, "fp16")})


def _upper(a: Tensor, b: Tensor, level: int, bits: int) -> Tensor:
    """How many edges the angle of (a, b), both positive, exceeds: compared by products, since `atan2` differs."""
    edges = angles(level, bits)[1]
    over = [b * np.float32(np.cos(e)).item() > a * np.float32(np.sin(e)).item() for e in edges]
    return torch.stack(over).sum(0).to(torch.uint8)


def _whole(a: Tensor, b: Tensor, bits: int) -> Tensor:
    """The sector of the whole circle: quarters by sign, each turned onto the first."""
    per_quarter = 2 ** (bits - 2)
    quarter = torch.where(b >= 0, torch.where(a > 0, 0, 1), torch.where(a < 0, 2, 3))
    turned_a = torch.where(quarter % 2 == 0, a.abs(), b.abs())
    turned_b = torch.where(quarter % 2 == 0, b.abs(), a.abs())
    edges = [i * pi / 2 / per_quarter for i in range(1, per_quarter)]
    over = [turned_b * np.float32(np.cos(e)).item() > turned_a * np.float32(np.sin(e)).item() for e in edges]
    inside = sum((o.int() for o in over), start=torch.zeros_like(quarter))
    return (quarter * per_quarter + inside).to(torch.uint8)
