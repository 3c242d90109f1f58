"""The tiers of one layer: dense tokens and packed pages. Immutable: an operation returns a new tier.

Immutability is what makes rollback exact and beam search cheap: an older state is an older object, and sequences
share pages. Lengths live on the host as NumPy arrays (b, h), because the host decides what is appended where.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Int
from torch import Tensor

from tersekv.dense_tier import DenseTier
from tersekv.packed_tier import PackedTier
from tersekv.ragged import Lengths


@dataclass(frozen=True)
class Evicted:
    """Tokens that a policy gave up: how many of each row, and a position that all of them are below."""

    count: Lengths
    below: Lengths

    @staticmethod
    def none(like: Lengths) -> "Evicted":
        return Evicted(np.zeros_like(like), np.zeros_like(like))

    def more(self, count: Lengths, below: Lengths) -> "Evicted":
        return Evicted(self.count + count, np.where(count > 0, np.maximum(self.below, below), self.below))

    def select(self, rows: Int[Tensor, "rows"]) -> "Evicted":
        index = rows.cpu().numpy()
        return Evicted(self.count[index], self.below[index])


@dataclass(frozen=True)
class Tiers:
    """All tokens of one layer, by tier name; attention does not care which tier, or which order, a token is in."""

    dense: dict[str, DenseTier]
    packed: dict[str, PackedTier]
    evicted: Evicted

    def all(self) -> dict[str, DenseTier | PackedTier]:
        """The tiers whose tokens are attended to: together every token once."""
        return self.held()

    def held(self) -> dict[str, DenseTier | PackedTier]:
        """All tiers, copies of tokens that another one holds too among them."""
        return {**self.dense, **self.packed}

    def tensors(self) -> dict[str, Tensor]:
        """What is held beside the tiers, which count theirs themselves; on the host."""
        return {}

    def statistics(self) -> dict[str, int]:
        """What a policy counted, over all rows."""
        return {}

    def decoded(self) -> list[DenseTier]:
        """Every tier unpacked, with the positions of its tokens."""
        return [tier.decoded() for tier in self.all().values()]

    @cached_property
    def seen(self) -> Lengths:
        """Tokens that came, held or not: the position of the next one."""
        return sum((tier.lengths for tier in self.all().values()), start=self.evicted.count)

    def select(self, rows: Int[Tensor, "rows"]) -> "Tiers":
        dense = {name: tier.select(rows) for name, tier in self.dense.items()}
        packed = {name: tier.select(rows) for name, tier in self.packed.items()}
        return replace(self, dense=dense, packed=packed, evicted=self.evicted.select(rows))
