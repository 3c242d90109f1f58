"""Packed tokens as kernels see them."""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float, Int, UInt8
from torch import Tensor

from tersekv.layout import Layout
from tersekv.ops.recipe import Recipe
from tersekv.packed import Packed, repack

TILE_VALUES = 2**22  # decoded at a time (16 MiB for each of K and V), so no call holds a dense copy of a history

Partial = tuple[Float[Tensor, "b hq n e"], Float[Tensor, "b hq n"]]


@dataclass(frozen=True)
class Pages:
    """Packed tokens as kernels see them: page bytes, which page holds which block, how many tokens count."""

    pool: UInt8[Tensor, "pages bytes"]
    table: Int[Tensor, "b h blocks"]
    lengths: Int[Tensor, "b h"]
    k_layout: Layout
    v_layout: Layout
    k_recipe: Recipe
    v_recipe: Recipe
    full: bool = False  # the host knows that every row holds all tokens of all blocks of the table

    def tiles(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Decoded (k, v, lengths left) of some blocks at a time, folded domain, fp32."""
        block, split = self.k_layout.block, self.k_layout.nbytes
        b, h, blocks = self.table.shape
        step = max(1, TILE_VALUES // (b * h * block * self.k_layout.d))
        for start in range(0, blocks, step):
            index = self.table[..., start : start + step].clamp(min=0).long()
            data = self.pool[index]
            sides = Packed(self.k_layout, data[..., :split]), Packed(self.v_layout, data[..., split:])
            k, v = (repack(side, "linear") for side in sides)
            k, v = self.k_recipe.values(k).flatten(2, 3), self.v_recipe.values(v).flatten(2, 3)
            yield k, v, self.lengths - start * block
