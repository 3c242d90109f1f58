"""Sub-vectors looked up in tables: the recipe `vq` and the search that encodes it.

A token's `d` values are `d / dim` sub-vectors of `dim` values, each stored as the index of an entry (product code).
With two stages a second entry is added to the first. Sub-vectors may share a table or have one each, by KV head and
place; in the second case the dimension before the blocks is that of all KV heads.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tersekv.ops.planes import read, read_codes
from tersekv.ops.sums import products
from tersekv.packed import Packed

PLANES = ("codes", "codes2")
ROWS = 2048  # sub-vectors at a time: their scores fit in a cache
BEAM = 4  # entries of the first stage that the second is tried on


@dataclass(frozen=True)
class Tables:
    """Entries of each stage, fp16 (heads, places, entries, dim); one head and place if all share. Equal by digest."""

    digest: str
    stages: tuple[Float[Tensor, "heads places entries dim"], ...] = field(compare=False, repr=False)

    @property
    def dim(self) -> int:
        return self.stages[0].shape[-1]

    @property
    def places(self) -> int:
        return self.stages[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.stages)

    def search(self, z: Float[Tensor, "*lead block d"]) -> tuple[UInt8[Tensor, "*lead block places"], ...]:
        """Codes of each stage: the entry nearest to a sub-vector, then that nearest to what is left; see `BEAM`."""
        groups = self._grouped(z.unflatten(-1, (-1, self.dim)))
        tables = [x.to(z.device).float().flatten(0, 1) for x in self.stages]
        rows = [_searched(some, tables) for some in groups.split(ROWS, 1)] if groups.shape[1] else []
        codes = torch.cat(rows, 1) if rows else groups.new_empty(*groups.shape[:2], len(tables), dtype=torch.uint8)
        shape = (*z.shape[:-1], z.shape[-1] // self.dim)
        return tuple(self._ungrouped(codes[..., stage], shape) for stage in range(len(tables)))

    def values(self, codes: tuple[UInt8[Tensor, "*lead block places"], ...]) -> Float[Tensor, "*lead block d"]:
        total: Tensor | None = None
        for table, index in zip(self.stages, codes, strict=True):
            entries = self._entries(table.to(index.device).float(), index.long())
            total = entries if total is None else total + entries
        assert total is not None  # for the type checker: there is a first stage
        return total.flatten(-2)

    def _entries(self, table: Tensor, index: Tensor) -> Tensor:
        heads, places = table.shape[:2]
        if heads == places == 1:
            return table[0, 0, index]
        head = torch.arange(heads, device=table.device).view(-1, 1, 1, 1)
        return table[head, torch.arange(places, device=table.device), index]

    def _grouped(self, x: Float[Tensor, "*lead block places dim"]) -> Float[Tensor, "groups n dim"]:
        """Sub-vectors by the table that they are looked up in."""
        if self.stages[0].shape[:2].numel() == 1:
            return x.reshape(1, -1, x.shape[-1])
        whole = x.reshape(-1, *x.shape[-5:])  # (lead, heads, blocks, block, places, dim)
        return whole.permute(1, 4, 0, 2, 3, 5).reshape(whole.shape[1] * whole.shape[4], -1, whole.shape[5])

    def _ungrouped(self, codes: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.stages[0].shape[:2].numel() == 1:
            return codes.reshape(shape)
        heads, blocks, block, places = shape[-4:]
        whole = codes.reshape(heads, places, -1, blocks, block)
        return whole.permute(2, 0, 3, 4, 1).reshape(shape)


@dataclass(frozen=True)
class VectorLookup:
    """Planes "codes" and, of two stages, "codes2" index `tables`; then a scale a token and a zero a channel, if any."""

    tables: Tables
    name = "vq"

    def values(self, packed: Packed) -> Float[Tensor, "*lead block d"]:
        x = self.tables.values(tuple(read_codes(packed, name) for name in PLANES if name in packed.layout))
        scale, zero = read(packed, "scale"), read(packed, "channel_zero")
        x = x if scale is None else x * scale
        return x if zero is None else x + zero


def _searched(z: Float[Tensor, "groups n dim"], tables: list[Tensor]) -> UInt8[Tensor, "groups n stages"]:
    """A score is half of what entries take from the squared length: <z, a + b> - |a + b|^2 / 2."""
    found = _scores(z, tables[0])
    score, first = found.max(-1)  # the first of equals, as torch promises
    if len(tables) == 1:
        return first[..., None].to(torch.uint8)
    also, shared = _scores(z, tables[1]), products(tables[0], tables[1])
    best = torch.full_like(score, -torch.inf)
    codes = torch.zeros(*score.shape, 2, dtype=torch.uint8, device=z.device)
    for _ in range(BEAM):
        of_first = shared.gather(1, first[..., None].expand(-1, -1, shared.shape[-1]))
        more, second = (also - of_first).max(-1)
        total = score + more
        codes = torch.where((total > best)[..., None], torch.stack((first, second), -1).to(torch.uint8), codes)
        best = torch.maximum(total, best)
        found.scatter_(-1, first[..., None], -torch.inf)
        score, first = found.max(-1)
    return codes


def _scores(z: Float[Tensor, "groups n dim"], table: Float[Tensor, "groups e dim"]) -> Float[Tensor, "groups n e"]:
    """<z, c> - |c|^2 / 2."""
    half = torch.zeros(*table.shape[:2], device=z.device)
    for j in range(table.shape[-1]):
        half -= 0.5 * (table[..., j] * table[..., j])
    return products(z, table).add_(half[:, None])
