"""Rotary positions (RoFormer, arXiv 2104.09864), turned on and back by those who store keys before them.

Channels i and i + r / 2 of the first r are a pair, as in Llama, Qwen and Gemma.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tersekv.layout import Plane
from tersekv.ops.planes import read, to_bytes
from tersekv.ops.recipe import Recipe
from tersekv.packed import Packed

POSITION = Plane("position", 1, 1, 32, "fp32")  # of a block's first token
UNKNOWN = "Keys before RoPE can be encoded where their positions are known, in a cache. Use that."


def turned(
    x: Float[Tensor, "*lead n d"], positions: Int[Tensor, "*#lead n"], frequencies: tuple[float, ...], back: bool
) -> Float[Tensor, "*lead n d"]:
    """Keys at their positions, or with `back` what they were before; each frequency in radians a token, for a pair.

    Angles in fp64: in fp32 one far into a text would be off by more than a code.
    """
    angles = positions[..., None].double() * torch.tensor(frequencies, dtype=torch.float64, device=x.device)
    cos, sin = angles.cos().float(), angles.sin().float() * (-1 if back else 1)
    half = len(frequencies)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def positions_of(starts: Int[Tensor, "*lead"], block: int) -> Int[Tensor, "*lead block"]:
    """Of the tokens of blocks that begin there."""
    return starts[..., None] + torch.arange(block, dtype=starts.dtype, device=starts.device)


def before(
    x: Float[Tensor, "*lead block d"], starts: Int[Tensor, "*lead"], frequencies: tuple[float, ...]
) -> tuple[Float[Tensor, "*lead block d"], dict[str, Tensor]]:
    """Blocks of keys that begin at `starts` as they were before RoPE, and what their pages store of it."""
    back = turned(x.float(), positions_of(starts, x.shape[-2]), frequencies, back=True)
    return back, {POSITION.name: to_bytes(starts.float()[..., None], POSITION.kind)}


@dataclass(frozen=True)
class Turned:
    """What a recipe says, at the position of each token: the plane "position" holds that of the block's first."""

    base: Recipe
    frequencies: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"{self.base.name}, before RoPE"

    def values(self, packed: Packed) -> Float[Tensor, "*lead block d"]:
        first = read(packed, POSITION.name)
        assert first is not None  # for the type checker: the layout declares it
        positions = positions_of(first[..., 0, 0].int(), packed.layout.block)
        return turned(self.base.values(packed), positions, self.frequencies, back=False)
