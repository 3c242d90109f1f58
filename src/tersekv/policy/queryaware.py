"""`queryaware`: as `window`, but keys are encoded for the queries that read them; the pages are read as always.

A key's code may be wrong where no query looks. Each KV head sums q' q over the queries of the first `observe` tokens,
and the keys of a block are encoded with what was summed when it left the recent window: see `ops.feedback`. Before that
keys are balanced with queries: when the first block of a row is due, each channel gets a factor for good, by which the
packed tier multiplies keys and divides queries: see `ops.balance`. Decoding, kernels and page bytes do not change. Only
the first `observe` tokens must come with their queries.

Differs from GPTQ (arXiv 2210.17323) and SQuat (arXiv 2503.24358): channels of a rotated key without its block mean; the
token scale is unbiased in the metric of the queries; queries as they come, no calibration. docs/methods/queryaware.md.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tersekv.codec import Codec
from tersekv.dense_tier import DenseTier
from tersekv.errors import SpecError
from tersekv.layout import BLOCK
from tersekv.ops.balance import balanced
from tersekv.packed_tier import PackedTier
from tersekv.policy.base import Asked
from tersekv.policy.window import Window
from tersekv.ragged import Lengths, take
from tersekv.tiers import Evicted, Tiers

# Queries are rounded to a grid, so that sums of their products in fp64 are whole numbers below 2^53 and the same in any
# order and chunking: 21 bits each with sign, and up to 2^13 of them.
GRID, LIMIT, MOST = 2.0**-10, 2.0**10, 2**13


@dataclass(frozen=True)
class QueryTiers(Tiers):
    """The window's tiers. The sums are with the packed tier, which encodes for them."""

    counted: Tensor  # int64 (b, h), on the host: tokens whose queries were summed
    balanced: Tensor  # bool (b, h), on the host: whether the row has its factors

    def tensors(self) -> dict[str, Tensor]:
        return {"counted": self.counted, "balanced": self.balanced}

    def select(self, rows: Int[Tensor, "rows"]) -> "QueryTiers":
        mine = {name: x.index_select(0, rows.cpu()) for name, x in self.tensors().items()}
        return replace(query_tiers(super().select(rows)), **mine)


def query_tiers(tiers: Tiers) -> QueryTiers:
    assert isinstance(tiers, QueryTiers)  # what the policy made
    return tiers


def _sums(tiers: QueryTiers) -> Float[Tensor, "b h d d"]:
    """Sums of q' q in fp64, in units of the grid squared."""
    sums = tiers.packed["packed"].asked
    assert sums is not None  # the policy made it
    return sums


@dataclass(frozen=True)
class QueryAware(Window):
    """Keys are encoded for the queries of the first `observe` tokens."""

    observe: int = 512

    decodes_as_window: ClassVar = True
    asks: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.observe <= MOST:
            raise SpecError(f"observe={self.observe} is out of range. Allowed: 1 to {MOST} tokens.")

    def tiers(self, k: Codec, v: Codec, empty: DenseTier) -> QueryTiers:
        if not k.encodes_for_queries:
            raise SpecError(f"policy=queryaware: keys need a codec such as rotated or trellis, not {type(k).__name__}.")
        b, h, _, d = empty.k.shape
        none = torch.zeros(b, h, d, d, dtype=torch.float64, device=empty.k.device)
        packed = replace(PackedTier.empty(k, v, empty), asked=none, factors=torch.ones(b, h, d, device=empty.k.device))
        dense, counted = {"sink": empty, "recent": empty}, torch.zeros(b, h, dtype=torch.int64)
        return QueryTiers(dense, {"packed": packed}, Evicted.none(empty.lengths), counted, counted.bool())

    def asking(self, tiers: Tiers) -> bool:
        """Until queries were summed, and every row has its factors."""
        counted, balanced = (
            x.numpy() for x in query_tiers(tiers).tensors().values()
        )  # quicker than torch's, each step
        return bool(counted.min(initial=self.observe) < self.observe or not balanced.all())

    def place(self, tiers: Tiers, fresh: DenseTier, asked: Asked | None = None) -> Tiers:
        """As the window's. A block is encoded for what was asked up to the token that made it due."""
        filled = query_tiers(self._filled(tiers, fresh))
        if self.asking(filled):
            filled = self._observed(filled, fresh, asked)
        due = np.maximum(filled.dense["recent"].lengths - self.recent, 0) // BLOCK * BLOCK
        return self._packed(filled, due) if due.any() else filled

    def _observed(self, tiers: QueryTiers, fresh: DenseTier, asked: Asked | None) -> QueryTiers:
        """With the queries of fresh tokens, and with the blocks packed that became due before the last of them.

        A host that shows no queries has none summed: blocks are then encoded as `window` does it.
        """
        queries, recent = self._queries(fresh, asked), tiers.dense["recent"].lengths
        summed, taken, known = np.zeros_like(recent), np.zeros_like(recent), list[Tensor]()
        while self.asking(tiers):
            later = recent - taken - (self.recent + BLOCK)  # tokens that came after the next block was due
            due = later >= 0
            until = np.where(due, np.maximum(fresh.lengths - later, summed), summed if due.any() else fresh.lengths)
            tiers, summed = self._summed(tiers, queries, summed, until), until
            if not due.any():
                break
            tiers, taken = self._balanced(tiers, due, taken), taken + due * BLOCK
            known.append(self._asked(tiers))
        tiers = self._packed(tiers, taken, torch.stack(known, 2)) if known else tiers
        if self.asking(tiers):
            return tiers
        return replace(tiers, packed={"packed": replace(tiers.packed["packed"], asked=self._asked(tiers))})

    def _queries(self, fresh: DenseTier, asked: Asked | None) -> Float[Tensor, "b h seen g d"]:
        """The queries of each row's tokens, in units of the grid."""
        if asked is None:
            return fresh.k[..., None, :].double() * 0
        own = asked[0].unflatten(1, (fresh.k.shape[1], -1)).transpose(2, 3)
        own = take(own, own.shape[2] - fresh.lengths, np.minimum(fresh.lengths, self.observe))
        return (own.float().nan_to_num().clamp(-LIMIT, LIMIT) / GRID).round().double()

    def _summed(self, tiers: QueryTiers, queries: Tensor, start: Lengths, stop: Lengths) -> QueryTiers:
        """With the queries of fresh tokens start..stop, as far as `observe` allows."""
        counted = tiers.counted.numpy()
        count = np.minimum(stop - start, self.observe - counted)
        if not count.any():
            return tiers
        mine = take(queries, start, count)
        outside = torch.from_numpy(np.arange(mine.shape[2]) >= count[..., None]).to(mine.device)
        mine = mine.masked_fill(outside[..., None, None], 0).flatten(2, 3)
        packed = replace(tiers.packed["packed"], asked=_sums(tiers) + mine.mT @ mine)
        return replace(tiers, counted=torch.from_numpy(counted + count), packed={"packed": packed})

    def _balanced(self, tiers: QueryTiers, due: np.ndarray, taken: Lengths) -> QueryTiers:
        """With factors of the rows whose first block is due, from the keys that came up to now."""
        first = due & ~tiers.balanced.numpy()
        if not first.any():
            return tiers
        whole = (self.recent + BLOCK) // BLOCK * BLOCK
        keys = tiers.dense["recent"].take(taken, np.where(first, whole, 0)).k.unflatten(2, (-1, BLOCK))
        packed = tiers.packed["packed"]
        factors = balanced(_sums(tiers).diagonal(dim1=-2, dim2=-1), keys)
        assert packed.factors is not None  # the policy made them
        chosen = torch.from_numpy(first).to(keys.device)[..., None]
        packed = replace(packed, factors=torch.where(chosen, factors, packed.factors))
        return replace(tiers, balanced=tiers.balanced | torch.from_numpy(first), packed={"packed": packed})

    def _asked(self, tiers: QueryTiers) -> Float[Tensor, "b h d d"]:
        """What encoders need of the sums: of queries as attention to the pages uses them."""
        packed = tiers.packed["packed"]
        assert packed.factors is not None  # the policy made them
        sums = (_sums(tiers) / (packed.factors[..., None] * packed.factors[..., None, :])).float()
        return packed.k.asked(packed.k.fold_query(packed.k.fold_query(sums).mT).double())

    def _packed(self, tiers: QueryTiers, due: Lengths, asked: Tensor | None = None) -> QueryTiers:
        recent, packed = tiers.dense["recent"], tiers.packed["packed"]
        packed = packed.append(recent.take(np.zeros_like(due), due), asked)
        recent = recent.take(due, recent.lengths - due).owned()
        return replace(tiers, dense=tiers.dense | {"recent": recent}, packed={"packed": packed})

    def beside(self, d: int) -> int:
        return 2 * d * d + 4 * d
