"""`twoaxis`: rotation, tokens and channels brought to equal variance in turn, then uniform rounding (KVarN-like).

KVarN (arXiv 2606.03458) normalises the standard deviation of a tile of rotated values along both axes before it rounds.
The factors of the axis that shares a range are part of that range's scale; those of the other axis are stored beside:
with `axis=channel`, for keys, a factor a token outside of a scale and a zero a channel, recipe `grid, channels first`;
with `axis=token`, for values, a factor a channel, which the recipe `grid` takes into the query.

Differs from the original, of which the arithmetic but no paper was at hand: a block of 64 tokens is the tile; root mean
squares, because deviations can vanish, and after 16 rounds of them nothing finite was left; three rounds instead of 16,
since one is as good. Factors are fp16, and codes are taken against the stored ones. Which axis shares a range was not
at hand either: see docs/methods/twoaxis.md.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersekv.codec import Codec, check_bits, check_choice
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
    """`axis`: what shares a range, a channel's tokens or a token's channels. `rounds` of normalisation; 0 is none."""

    bits: int = 4
    axis: str = "token"
    rounds: int = 3
    seed: int = 0

    side_defaults: ClassVar = {"k": {"axis": "channel"}}

    def __post_init__(self) -> None:
        check_bits(self.bits, 2, 8)
        check_choice("axis", self.axis, ("token", "channel"))
        if not 0 <= self.rounds <= 16:
            raise SpecError(f"rounds={self.rounds} is out of range. Allowed: 0 to 16.")

    @property
    def grid(self) -> IntN:
        """What rounds values whose other axis has equal variance."""
        return IntN(self.bits, axis=self.axis)

    @property
    def rotation(self) -> int:
        return self.seed

    def layout(self, d: int) -> Layout:
        by_channel = self.axis == "channel"
        beside = Plane("scale", BLOCK, 1, 16, "fp16") if by_channel else Plane("channel_scale", 1, d, 16, "fp16")
        return Layout(d, (*self.grid.layout(d).planes, beside))

    def recipe(self, d: int) -> Grid:
        table = self.grid.recipe(d).table
        return Grid(table, first="channel") if self.axis == "channel" else Grid(table)

    def encode(self, x: Float[Tensor, "*lead block d"]) -> Packed:
        y = rotate(x, self.seed)
        tokens, channels = self._factors(y)
        by_channel = self.axis == "channel"
        factor = stored(tokens if by_channel else channels, "fp16")
        packed = self.grid.encode(y * _inverse(factor, -1 if by_channel else -2))
        planes = {plane.name: packed.plane(plane.name) for plane in packed.layout.planes}
        name = "scale" if by_channel else "channel_scale"
        return Packed.assemble(self.layout(x.shape[-1]), planes | {name: to_bytes(factor, "fp16")})

    def _factors(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """What divides each token, (*lead, block), and each channel, (*lead, d): root mean squares over the other."""
        tokens, channels = torch.ones_like(y[..., 0]), torch.ones_like(y[..., 0, :])
        for _ in range(self.rounds):
            even = y * _inverse(channels, -2)
            norm = root(channel_sum(even * even))
            tokens = norm * root(torch.full_like(norm, 1 / y.shape[-1]))
            even = even * unit_scale(norm, y.shape[-1])[..., None]
            channels = root(token_sum(even * even) * (1 / BLOCK))
        return tokens, channels


def _inverse(factor: Tensor, dim: int) -> Tensor:
    return torch.where(factor > 0, 1 / factor, 0).unsqueeze(dim)
