"""The arithmetic that kernels know. A codec names one; a kernel never sees a codec.

dense   the stored values themselves
grid    (table[code] * scale + zero) * channel_scale + channel_zero, every factor but the table optional;
        first="channel": (table[code] * channel_scale + channel_zero) * scale + zero
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tersekv.ops.planes import read, read_codes
from tersekv.packed import Packed


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

    def values(self, packed: Packed) -> Float[Tensor, "*lead block d"]:
        """Decoded values in the codec's folded domain, fp32."""
        codes = read_codes(packed)
        table = torch.tensor(self.table, dtype=torch.float32, device=codes.device)
        x = table.index_select(0, codes.flatten().int()).view(codes.shape)
        steps = [("scale", "zero"), ("channel_scale", "channel_zero")]
        for scale, zero in steps if self.first == "token" else reversed(steps):
            x = _times(x, read(packed, scale))
            x = _plus(x, read(packed, zero))
        return x


Recipe = Dense | Grid


def _grouped(x: Tensor, coarse: Tensor) -> Tensor:
    """`x` seen as groups that share one element of the coarser plane: (*lead, rows, r, cols, c)."""
    rows, cols = coarse.shape[-2:]
    return x.unflatten(-1, (cols, -1)).unflatten(-3, (rows, -1))


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else (_grouped(x, factor) * factor[..., :, None, :, None]).view(x.shape)


def _plus(x: Tensor, term: Tensor | None) -> Tensor:
    return x if term is None else (_grouped(x, term) + term[..., :, None, :, None]).view(x.shape)
