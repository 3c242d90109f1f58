"""`qjl`: signs of Gaussian projections and a norm; unbiased scores without a scale or a zero for a group (QJL).

arXiv 2406.03482, algorithm 1. Attention stays among the projections, where a key is a row of 1-bit codes: the query is
projected once, not rounded, and the scores are those of the recipe `grid`. With `bits=1` the kernels read it.

Differs from the paper: all channels are sketched alike, where it keeps the 8 strongest channels of 32 tokens in a
sketch of their own; the rows of S are not made orthogonal. Its values are `v=kivi:bits=2`.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tersekv import sketch
from tersekv.codec import Codec, check_bits
from tersekv.layout import BLOCK, Layout, Plane, check_head_dim
from tersekv.ops.planes import pack_codes, to_bytes
from tersekv.ops.recipe import Grid
from tersekv.ops.sums import channel_sum, root
from tersekv.packed import Packed


@dataclass(frozen=True)
class QJL(Codec):
    """`bits` signs for each channel: m = bits * d projections."""

    bits: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_bits(self.bits, 1, 8)

    def layout(self, d: int) -> Layout:
        check_head_dim(d)
        return Layout(d, (Plane("codes", BLOCK, self.bits * d, 1), Plane("scale", BLOCK, 1, 16, "fp16")))

    def recipe(self, d: int) -> Grid:
        return sketch.recipe(self.bits * d)

    def encode(self, x: Float[Tensor, "*lead block d"]) -> Packed:
        x, d = x.float(), x.shape[-1]
        codes = sketch.sign_codes(x, self.bits * d, self.seed)
        norm = root(channel_sum(x * x))
        return Packed.assemble(
            self.layout(d), {"codes": pack_codes(codes.flatten(-2), 1), "scale": to_bytes(norm, "fp16")}
        )

    def fold_query(self, q: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead m"]:
        return sketch.project(q, self.bits * q.shape[-1], self.seed)

    def unfold_output(self, o: Float[Tensor, "*lead m"]) -> Float[Tensor, "*lead d"]:
        return sketch.unproject(o, o.shape[-1] // self.bits, self.seed)
