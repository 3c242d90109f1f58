"""`hotcold`: the blocks used last stay dense (hot), all others are packed (cold); attention reads both.

The two tiers that manthanquant-x86 plans for vLLM, working: keyed by layer, KV head and block, full blocks only. A
block is used by a query that gives it at least `use` percent of its attention, in any of the query heads of its KV
head; and until it leaves the recent tier. The `hot` tokens hold the blocks whose last use is nearest (LRU); blocks
move when one leaves the recent tier.

Differs from it: attention reads cold pages where they lie, so `promote=yes` gains no quality, a promoted block being
what decoding gives; its page stays parked, so that demoting it again encodes nothing. See docs/methods/hotcold.md.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Int

from tersekv.codec import Codec
from tersekv.dense_tier import DenseTier
from tersekv.errors import InputError, SpecError
from tersekv.layout import BLOCK
from tersekv.packed_tier import PackedTier
from tersekv.policy.base import Asked
from tersekv.policy.hotcold_tiers import COUNTED, HotColdTiers, hot_and_cold
from tersekv.policy.shares import block_lses, blocks_of, dense_scores, observed
from tersekv.policy.window import Window
from tersekv.ragged import Lengths
from tersekv.tiers import Evicted, Tiers

OBSERVE = 64  # the last queries of a chunk say what it used: all of them, where a chunk ends with a block


@dataclass(frozen=True)
class HotCold(Window):
    """`hot`: dense tokens beside sink and recent ones, a multiple of 64. `promote`: cold blocks may come back."""

    hot: int = 256
    use: int = 10
    promote: bool = False

    asks: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hot < 0 or self.hot % BLOCK:
            raise SpecError(f"hot={self.hot} must be whole blocks of {BLOCK} tokens, such as {BLOCK} or {4 * BLOCK}.")
        if not 1 <= self.use <= 100:
            raise SpecError(f"use={self.use} is no share of attention in percent. Allowed: 1 to 100.")

    def tiers(self, k: Codec, v: Codec, empty: DenseTier) -> HotColdTiers:
        cold, rows = PackedTier.empty(k, v, empty), empty.lengths.shape
        dense = {"sink": empty, "recent": empty, "hot": empty}
        used, counts = torch.zeros(*rows, 0, dtype=torch.int32), torch.zeros(*rows, len(COUNTED), dtype=torch.int64)
        return HotColdTiers(dense, {"cold": cold, "parked": cold}, Evicted.none(empty.lengths), used, used, counts)

    def place(self, tiers: Tiers, fresh: DenseTier, asked: Asked | None = None) -> Tiers:
        """New tokens fill the sink, then the recent tier; blocks that leave it compete with hot and with used ones."""
        if asked is None:
            raise InputError("policy=hotcold needs the queries of all tokens. Run in `with tersekv.attached(model):`.")
        filled = hot_and_cold(self._filled(tiers, fresh))
        filled = filled.touched(*self._used(filled, asked, fresh.lengths))
        recent = filled.dense["recent"]
        due = np.maximum(recent.lengths - self.recent, 0) // BLOCK * BLOCK
        if not due.any():
            return filled
        leaving = recent.take(np.zeros_like(due), due)
        left = replace(filled, dense=filled.dense | {"recent": recent.take(due, recent.lengths - due).owned()})
        return left.ranked(leaving, self.recent, self.promote, self.hot // BLOCK)

    def _used(self, tiers: HotColdTiers, asked: Asked, fresh: Lengths) -> tuple[np.ndarray, np.ndarray]:
        """Position of the last observed query that used each hot and each cold block; -1: none did."""
        hot, cold = tiers.dense["hot"], tiers.packed["cold"]
        seen = observed(*asked, tiers.seen, fresh, OBSERVE)
        hot_lse, cold_lse = blocks_of(dense_scores(hot, seen), BLOCK), block_lses(cold, seen)
        others = [dense_scores(tiers.dense[name], seen) for name in ("sink", "recent")]
        total = torch.cat([hot_lse, cold_lse, *others], -1).logsumexp(-1, keepdim=True)
        used = ((torch.cat([hot_lse, cold_lse], -1) - total).exp() * 100 >= self.use).any(2)
        last = torch.where(used, seen[2][..., None], -1).amax(2).cpu().numpy()
        return last[..., : hot_lse.shape[-1]], last[..., hot_lse.shape[-1] :]

    def room(self, tiers: Tiers) -> int:
        to_sink = np.maximum(self.sink - tiers.seen, 0)
        return max(int((to_sink + self.recent + BLOCK - tiers.dense["recent"].lengths).min()), 1)

    def crop(self, tiers: Tiers, length: Int[np.ndarray, "b"]) -> Tiers:
        """As the window's: kept tokens of a block that is cut through are dense for good, as decoded if it was cold."""
        return hot_and_cold(tiers).below(length[:, None])

    def blocks(self, held: int, block: int) -> int:
        return max(super().blocks(held, block) - self.hot // block, 0)
