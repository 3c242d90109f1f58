"""`outliers`: two TurboQuant instances, one with more bits for the strongest channels of a block.

arXiv 2504.19874, section 4.3: one channel in four gets a bit more, which the paper counts as 2.5 bits and which is
2.25. Each set of channels is rotated by itself, so a strong channel cannot spill over the others.

Differs from the paper: the set is that of a block and is stored (a byte a channel of it); the paper does not say how
its channels are found (`by`). Sets differ from block to block, so no rotation can be folded into the query.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tersekv.codec import Codec, check_bits, check_choice
from tersekv.codecs.turboquant import TurboQuant
from tersekv.errors import SpecError
from tersekv.layout import Layout, Plane
from tersekv.ops.planes import from_bytes, to_bytes
from tersekv.ops.recipe import Recipe
from tersekv.ops.sums import token_sum
from tersekv.packed import Packed

STRENGTHS: dict[str, Callable[[Tensor], Tensor]] = {  # of each channel of a block: (*lead, block, d) to (*lead, d)
    "energy": lambda x: token_sum(x * x),
    "peak": lambda x: x.abs().amax(-2),
    "order": lambda x: torch.zeros_like(x[..., 0, :]),
}


@dataclass(frozen=True)
class SplitRecipe:
    """Channels listed in the plane `channels` by one codec, the others, in ascending order, by another."""

    parts: tuple[tuple[str, Codec, int], ...]  # prefix of planes, codec, channels
    name = "split"

    def values(self, packed: Packed) -> Float[Tensor, "*lead block d"]:
        strong, others = (codec.decode(packed.part(prefix, d)) for prefix, codec, d in self.parts)
        channels = _all_channels(from_bytes(packed.plane("channels"), "index").long(), packed.layout.d)
        both = torch.cat((strong, others), -1)
        return torch.empty_like(both).scatter_(-1, channels[..., None, :].expand(both.shape), both)


def _all_channels(strong: Tensor, d: int) -> Tensor:
    """The listed channels and then the others, ascending: (*lead, d)."""
    listed = torch.zeros(*strong.shape[:-1], d, dtype=torch.int8, device=strong.device).scatter_(-1, strong, 1)
    return torch.cat((strong, listed.argsort(dim=-1, stable=True)[..., : d - strong.shape[-1]]), -1)


@dataclass(frozen=True)
class Outliers(Codec):
    """`more` bits than `bits` for a quarter of the channels: of most energy, of the highest peak, or the first ones.

    by=order, the first ones whatever they hold, is the control of the other two.
    """

    bits: int = 2
    more: int = 1
    by: str = "energy"
    seed: int = 0

    def __post_init__(self) -> None:
        check_bits(self.bits, 1, 8)
        if not 1 <= self.more <= 8 - self.bits:
            raise SpecError(f"more={self.more} is out of range with bits={self.bits}. Allowed: 1 to {8 - self.bits}.")
        check_choice("by", self.by, tuple(STRENGTHS))

    def _parts(self, d: int) -> tuple[tuple[str, TurboQuant, int], ...]:
        count = d // 32 * 8
        if not count or d > 256:
            raise SpecError(f"head_dim {d}: outliers takes 32 to 256 channels, listed in a byte each. Use turboquant.")
        strong, others = (TurboQuant(bits, seed=self.seed) for bits in (self.bits + self.more, self.bits))
        return ("strong_", strong, count), ("other_", others, d - count)

    def layout(self, d: int) -> Layout:
        parts = self._parts(d)
        planes = [Plane("channels", 1, parts[0][2], 8, "index")]
        for prefix, codec, width in parts:
            planes += [replace(plane, name=prefix + plane.name) for plane in codec.layout(width).planes]
        return Layout(d, tuple(planes))

    def recipe(self, d: int) -> Recipe:
        return SplitRecipe(self._parts(d))

    def encode(self, x: Float[Tensor, "*lead block d"]) -> Packed:
        x, d = x.float(), x.shape[-1]
        parts = self._parts(d)
        strongest = STRENGTHS[self.by](x).argsort(dim=-1, descending=True, stable=True)[..., : parts[0][2]]
        channels = _all_channels(strongest.sort(-1).values, d)
        ordered = x.gather(-1, channels[..., None, :].expand(x.shape))
        planes = {"channels": to_bytes(channels[..., : parts[0][2]], "index")}
        for (prefix, codec, _), some in zip(parts, ordered.split([p[2] for p in parts], -1), strict=True):
            packed = codec.encode(some)
            planes |= {prefix + plane.name: packed.plane(plane.name) for plane in packed.layout.planes}
        return Packed.assemble(self.layout(d), planes)
