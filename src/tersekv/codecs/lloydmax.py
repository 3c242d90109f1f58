"""`lloydmax`: norm, sqrt(d), fixed Lloyd-Max table for N(0,1): the ManthanQuant method, without rotation.

Differs from the original: the norm is fp16 by default instead of fp32 (50 instead of 52 bytes at d = 128 and
3 bits: 5.12x); a zero vector is exact instead of divided by 1e-8; bits 1 to 8 instead of 3. `tersekv.edge` is
the same method in NumPy alone, with the same bytes.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tersekv.codebook import lloyd_max, table
from tersekv.codec import Codec, check_bits, check_choice
from tersekv.layout import Layout, codes_and_scale
from tersekv.ops.encoders import TableEncoder
from tersekv.ops.lookup import nearest
from tersekv.ops.planes import pack_codes, to_bytes
from tersekv.ops.recipe import Grid
from tersekv.ops.sums import channel_sum, root, unit_scale
from tersekv.packed import Packed


@dataclass(frozen=True)
class LloydMax(Codec):
    """`norm` is the kind in which a token's norm is stored: fp32 or fp16."""

    bits: int = 3
    norm: str = "fp16"

    def __post_init__(self) -> None:
        check_bits(self.bits, 1, 8)
        check_choice("norm", self.norm, ("fp16", "fp32"))

    def layout(self, d: int) -> Layout:
        return Layout(d, codes_and_scale(d, self.bits, self.norm))

    def recipe(self, d: int) -> Grid:
        return Grid(tuple((table(self.bits) / np.float32(sqrt(d))).tolist()))

    def encoder(self, d: int) -> TableEncoder:
        return TableEncoder(tuple(lloyd_max(self.bits)[1].tolist()), tuple(table(self.bits).tolist()))

    def encode(self, x: Float[Tensor, "*lead block d"]) -> Packed:
        x, d = x.float(), x.shape[-1]
        norm = root(channel_sum(x * x))
        _, thresholds = lloyd_max(self.bits)
        codes = nearest(x * unit_scale(norm, d)[..., None], thresholds)
        planes = {"codes": pack_codes(codes.flatten(-2), self.bits), "scale": to_bytes(norm, self.norm)}
        return Packed.assemble(self.layout(d), planes)
