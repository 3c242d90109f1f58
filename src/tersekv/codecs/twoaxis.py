"""`twoaxis`: rotation, then tokens and channels brought to equal variance in turn, then uniform rounding (KVarN).

KVarN (software, a vLLM port and a llama.cpp fork) normalises the variance of a tile of rotated values along both axes
before it rounds. A channel's factor is stored for the block, and the recipe `grid` takes it into the query; a token's
factor and zero come with its range.

Differs from what is known of the original, whose description is not public in full: a block of 64 tokens is the tile;
three rounds; keys and values alike. Factors are fp16, and codes are taken against the stored ones.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tersekv.codec import Codec, check_bits
from tersekv.codecs.intn import IntN
from tersekv.errors import SpecError
from tersekv.layout import BLOCK, Layout, Plane
from tersekv.ops.planes import stored, to_bytes
from tersekv.ops.recipe import Grid
from tersekv.ops.sums import channel_sum, root, token_sum, unit_scale
from tersekv.packed import Packed
from tersekv.rotation import rotate


@dataclass(frozen=True)
class TwoAxis(Codec):
    """`rounds` of normalisation; 0 is a rotated `intn`."""

    bits: int = 4
    rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_bits(self.bits, 2, 8)
        if not 0 <= self.rounds <= 16:
            raise SpecError(f"rounds={self.rounds} is out of range. Allowed: 0 to 16.")

    @property
    def tokens(self) -> IntN:
        """What rounds a token whose channels have equal variance."""
        return IntN(self.bits)

    @property
    def rotation(self) -> int:
        return self.seed

    def layout(self, d: int) -> Layout:
        return Layout(d, (*self.tokens.layout(d).planes, Plane("channel_scale", 1, d, 16, "fp16")))

    def recipe(self, d: int) -> Grid:
        return self.tokens.recipe(d)

    def encode(self, x: Float[Tensor, "*lead block d"]) -> Packed:
        y = rotate(x, self.seed)
        factor = stored(self._channel_factors(y), "fp16")
        packed = self.tokens.encode(y * _inverse(factor))
        planes = {plane.name: packed.plane(plane.name) for plane in packed.layout.planes}
        return Packed.assemble(self.layout(x.shape[-1]), planes | {"channel_scale": to_bytes(factor, "fp16")})

    def _channel_factors(self, y: Tensor) -> Tensor:
        """What divides each channel, (*lead, d): its root mean square once each token was divided by its own."""
        factor = torch.ones_like(y[..., 0, :])
        for _ in range(self.rounds):
            even = y * _inverse(factor)
            even = y * unit_scale(root(channel_sum(even * even)), y.shape[-1])[..., None]
            factor = root(token_sum(even * even) * (1 / BLOCK))
        return factor


def _inverse(factor: Tensor) -> Tensor:
    return torch.where(factor > 0, 1 / factor, 0)[..., None, :]
