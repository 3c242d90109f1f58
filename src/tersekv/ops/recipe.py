"""The arithmetic that kernels know. A codec names one; a kernel never sees a codec.

dense   the stored values themselves
grid    (table[code] * scale + zero) * channel_scale + channel_zero, every factor but the table optional;
        first="channel": (table[code] * channel_scale + channel_zero) * scale + zero
joined  the values of several recipes, each over planes of its own, side by side
grids   as grid, but channels have codes of several widths: a plane and a table for each

A method may bring a recipe of its own; only the reference reads it.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tersekv.ops.planes import read, read_codes
from tersekv.packed import Packed


@runtime_checkable
class Recipe(Protocol):
    """Frozen and hashable: kernels keep what they made of it."""

    @property
    def name(self) -> str: ...

    def values(self, packed: Packed) -> Float[Tensor, "*lead block folded"]:
        """Decoded values in the codec's folded domain, fp32, from planes in the linear order."""
        ...


@dataclass(frozen=True)
class Dense:
    """Plane "values" holds fp16, bf16 or fp32."""

    name = "dense"

    def values(self, packed: Packed) -> Float[Tensor, "*lead block d"]:
        values = read(packed, "values")
        assert values is not None  # for the type checker: the `none` codec declares the plane
        return values


@dataclass(frozen=True)
class Grid:
    """Plane "codes" indexes `table`; a uniform quantiser's table is an arithmetic series."""

    table: tuple[float, ...]
    first: str = "token"  # whose scale and zero are applied to the table before the other's

    @property
    def name(self) -> str:
        return "grid" if self.first == "token" else "grid, channels first"

    def values(self, packed: Packed) -> Float[Tensor, "*lead block folded"]:
        codes = read_codes(packed)
        table = torch.tensor(self.table, dtype=torch.float32, device=codes.device)
        x = table.index_select(0, codes.flatten().int()).view(codes.shape)
        steps = [("scale", "zero"), ("channel_scale", "channel_zero")]
        for scale, zero in steps if self.first == "token" else reversed(steps):
            x = _times(x, read(packed, scale))
            x = _plus(x, read(packed, zero))
        return x


@dataclass(frozen=True)
class Grids:
    """`parts`: plane of codes, channels, table. Channels of one entry have no plane. Scale and zero as in `grid`."""

    parts: tuple[tuple[str, int, tuple[float, ...]], ...]
    name = "grid of several widths"

    def values(self, packed: Packed) -> Float[Tensor, "*lead block d"]:
        shape = (*packed.data.shape[:-1], packed.layout.block)
        found: list[Tensor] = []
        for name, channels, table in self.parts:
            entries = torch.tensor(table, dtype=torch.float32, device=packed.data.device)
            coded = name in packed.layout
            found.append(entries[read_codes(packed, name).int()] if coded else entries.expand(*shape, channels))
        x = _times(torch.cat(found, -1), read(packed, "scale"))
        return _plus(x, read(packed, "channel_zero"))


@dataclass(frozen=True)
class Joined:
    """`parts`: prefix of the planes, recipe. The folded domain is as wide as theirs together."""

    parts: tuple[tuple[str, Recipe], ...]

    @property
    def name(self) -> str:
        return " + ".join(recipe.name for _, recipe in self.parts)

    def values(self, packed: Packed) -> Float[Tensor, "*lead block folded"]:
        return torch.cat([recipe.values(packed.part(prefix)) for prefix, recipe in self.parts], -1)


def _grouped(x: Tensor, coarse: Tensor) -> Tensor:
    """`x` seen as groups that share one element of the coarser plane: (*lead, rows, r, cols, c)."""
    rows, cols = coarse.shape[-2:]
    return x.unflatten(-1, (cols, -1)).unflatten(-3, (rows, -1))


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else (_grouped(x, factor) * factor[..., :, None, :, None]).view(x.shape)


def _plus(x: Tensor, term: Tensor | None) -> Tensor:
    return x if term is None else (_grouped(x, term) + term[..., :, None, :, None]).view(x.shape)
