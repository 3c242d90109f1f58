"""`kvquant`: a non-uniform table, keys per channel and values per token, with the farthest values kept apart (KVQuant).

arXiv 2401.18079: quantisers per channel for keys and per token for values (3.1), levels that are not equally far (3.3),
and about 1 % of each vector in 16 bits beside them (3.4), so that a range is not stretched by few. Of each vector, 64
tokens of a channel or `d` channels of a token, `outliers` values get an index and a correction.

Differs from the paper: keys are rounded after RoPE and not before it, see the method's page; the table is Lloyd-Max for
a normal density, not weighted k-means on calibration text; scale and zero are a vector's deviation and mean (there its
range; the paper's Q-Norm restores the same two). Its first token in 16 bits is the policy's, `sink=1`.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tersekv.codebook import lloyd_max, table
from tersekv.codec import Codec, check_bits, check_choice
from tersekv.errors import SpecError
from tersekv.layout import BLOCK, Layout, Plane, check_head_dim
from tersekv.ops.lookup import nearest
from tersekv.ops.planes import pack_codes, read, stored, to_bytes
from tersekv.ops.recipe import Grid, Recipe
from tersekv.ops.sums import channel_sum, root
from tersekv.packed import Packed


@dataclass(frozen=True)
class Corrected:
    """A grid, plus the plane `correction` at the places listed in `at`, of a token or of a channel."""

    grid: Grid
    axis: str
    name = "grid with outliers"

    def values(self, packed: Packed) -> Float[Tensor, "*lead block d"]:
        x, at, correction = self.grid.values(packed), read(packed, "at"), read(packed, "correction")
        assert at is not None and correction is not None  # for the type checker: the layout declares both
        return x.scatter_add_(-2 if self.axis == "channel" else -1, at.long(), correction)


@dataclass(frozen=True)
class KVQuant(Codec):
    """`outliers` of each vector are kept apart; 0: none, and the recipe is the plain grid."""

    bits: int = 3
    axis: str = "token"
    outliers: int = 1

    side_defaults: ClassVar = {"k": {"axis": "channel"}}

    def __post_init__(self) -> None:
        check_bits(self.bits, 1, 8)
        check_choice("axis", self.axis, ("token", "channel"))
        if not 0 <= self.outliers <= 8:
            raise SpecError(f"outliers={self.outliers} is out of range. Allowed: 0 to 8 of a vector.")

    def layout(self, d: int) -> Layout:
        check_head_dim(d)
        if self.outliers and self.axis == "token" and d > 256:
            raise SpecError(f"head_dim {d}: an outlier's channel is stored in a byte, up to 256. Use outliers=0.")
        channel = self.axis == "channel"
        shape, apart = ((1, d), (self.outliers, d)) if channel else ((BLOCK, 1), (BLOCK, self.outliers))
        prefix = "channel_" if channel else ""
        planes = [Plane("codes", BLOCK, d, self.bits)]
        planes += [Plane(prefix + name, *shape, 16, "fp16") for name in ("scale", "zero")]
        if self.outliers:
            planes += [Plane("at", *apart, 8, "index"), Plane("correction", *apart, 16, "fp16")]
        return Layout(d, tuple(planes))

    def recipe(self, d: int) -> Recipe:
        grid = Grid(tuple(table(self.bits).tolist()))
        return Corrected(grid, self.axis) if self.outliers else grid

    def encode(self, x: Float[Tensor, "*lead block d"]) -> Packed:
        across = (lambda y: y.mT) if self.axis == "channel" else (lambda y: y)
        vectors, layout = across(x.float()).contiguous(), self.layout(x.shape[-1])
        at = self._outliers(vectors)
        zero, scale = _moments(vectors, at)
        codes = nearest((vectors - zero) * torch.where(scale > 0, 1 / scale, 0), lloyd_max(self.bits)[1])
        decoded = torch.from_numpy(table(self.bits)).to(x.device)[codes.int()] * scale + zero
        correction = (vectors - decoded).gather(-1, at)
        values = (scale, zero, at, correction)
        planes = {"codes": pack_codes(across(codes).flatten(-2), self.bits)}
        for plane, content in zip(layout.planes[1:], values, strict=False):
            planes[plane.name] = to_bytes(across(content).flatten(-2), plane.kind)
        return Packed.assemble(layout, planes)

    def _outliers(self, vectors: Tensor) -> Tensor:
        """Indices of the values farthest from their vector's mean, (*lead, vectors, outliers)."""
        n = vectors.shape[-1]
        far = (vectors - channel_sum(vectors)[..., None] * np.float32(1 / n).item()).abs()
        return far.argsort(dim=-1, descending=True, stable=True)[..., : self.outliers]


def _moments(vectors: Tensor, without: Tensor) -> tuple[Tensor, Tensor]:
    """Stored mean and deviation of each vector without the values at some indices: (*lead, vectors, 1) each."""
    share = np.float32(1 / (vectors.shape[-1] - without.shape[-1])).item()
    zero = stored(channel_sum(vectors.scatter(-1, without, 0))[..., None] * share, "fp16")
    centred = (vectors - zero).scatter(-1, without, 0)
    return zero, stored(root(channel_sum(centred * centred)[..., None] * share), "fp16")
