"""Hot, cold and parked blocks of one layer, and the moves between them. Immutable, as all tiers."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tersekv.dense_tier import DenseTier
from tersekv.layout import BLOCK
from tersekv.packed_tier import PackedTier
from tersekv.ragged import take
from tersekv.tiers import Tiers

COUNTED = ("hot hits", "cold hits", "promoted", "demoted", "demoted to a parked page")
Rows = Int[np.ndarray, "b h _"]


@dataclass(frozen=True)
class HotColdTiers(Tiers):
    """`parked` holds the pages of promoted blocks, whose tokens are attended to in the hot tier."""

    used: Tensor  # int32 (b, h, hot blocks), on the host: position of the last query that used the block
    noticed: Tensor  # int32 (b, h, cold blocks), on the host: the same since moves were last made, or -1
    counts: Tensor  # int64 (b, h, len(COUNTED)), on the host: blocks, since the row began

    def all(self) -> dict[str, DenseTier | PackedTier]:
        return {name: tier for name, tier in self.held().items() if name != "parked"}

    def tensors(self) -> dict[str, Tensor]:
        return {"used": self.used, "noticed": self.noticed, "counts": self.counts}

    def statistics(self) -> dict[str, int]:
        return dict(zip(COUNTED, self.counts.sum((0, 1)).tolist(), strict=True))

    def select(self, rows: Int[Tensor, "rows"]) -> Tiers:
        index = rows.cpu()
        changed = {name: x.index_select(0, index) for name, x in self.tensors().items()}
        return replace(hot_and_cold(super().select(rows)), **changed)

    def counted(self, **more: np.ndarray) -> "HotColdTiers":
        """`more`: blocks of each row (b, h), by the name of what is counted, underscores for spaces."""
        zero = np.zeros(self.counts.shape[:2], dtype=np.int64)
        added = np.stack([more.get(name.replace(" ", "_"), zero) for name in COUNTED], -1)
        return replace(self, counts=self.counts + torch.from_numpy(added))

    def touched(self, hot: Rows, cold: Rows) -> "HotColdTiers":
        """`hot`, `cold`: position of the last query that used each block, -1 for none."""
        used = torch.from_numpy(np.maximum(self.used.numpy(), hot).astype(np.int32))
        noticed = torch.from_numpy(np.maximum(self.noticed.numpy(), cold).astype(np.int32))
        return replace(self, used=used, noticed=noticed).counted(
            hot_hits=(hot >= 0).sum(-1), cold_hits=(cold >= 0).sum(-1)
        )

    def ranked(self, leaving: DenseTier, recent: int, promote: bool, capacity: int) -> "HotColdTiers":
        """The `capacity` blocks of each row whose last use is nearest are hot: of hot, leaving and used cold blocks.

        Of equals the later block stays. A block's use as a recent one ends when `recent` tokens have followed it.
        Rows that no block leaves keep what they have, so that moves do not depend on how a text was cut.
        """
        rows = leaving.lengths[..., None] > 0
        cold = np.where(rows & promote, self.noticed.numpy(), -1)
        hot = self.dense["hot"]
        starts = [_starts(hot), _starts(leaving), self.packed["cold"].starts.cpu().numpy()]
        uses = [np.where(starts[0] >= 0, self.used.numpy(), -1)]
        uses += [np.where(starts[1] >= 0, starts[1] + BLOCK - 1 + recent, -1), cold]
        use, start = np.concatenate(uses, -1).astype(np.int64), np.concatenate(starts, -1)
        key = np.where(use >= 0, (use << 32) + start, -1)
        best = np.argsort(-key, axis=-1, kind="stable")[..., :capacity]
        stays = np.zeros(key.shape, dtype=bool)
        np.put_along_axis(stays, best, True, -1)
        stays = np.where(rows, stays & (key >= 0), start >= 0)
        parts = np.split(stays, np.cumsum([u.shape[-1] for u in uses])[:-1], axis=-1)
        parts[2] = parts[2] & rows
        return self._moved(leaving, parts, uses, starts)

    def _moved(
        self, leaving: DenseTier, stays: list[np.ndarray], uses: list[Rows], starts: list[Rows]
    ) -> "HotColdTiers":
        hot, cold, parked = self.dense["hot"], self.packed["cold"], self.packed["parked"]
        same = _same(starts[0], parked)
        back = same.any(-1) & ~stays[0]  # demoted blocks whose page is still there
        demoted = (starts[0] >= 0) & ~stays[0] & ~back, (starts[1] >= 0) & ~stays[1]
        promoted = cold.where(stays[2])
        returned = np.any(same & back[..., None], axis=-2)
        encoded = hot.where(_tokens(demoted[0], hot)).append(leaving.where(_tokens(demoted[1], leaving))).sorted()
        left = (starts[2] >= 0) & cold.filled().cpu().numpy() & ~stays[2]
        now_cold = cold.where(left).joined(parked.where(returned)).append(encoded)
        stay_parked = parked.filled().cpu().numpy() & ~returned
        now_hot = hot.where(_tokens(stays[0], hot)).append(leaving.where(_tokens(stays[1], leaving)))
        now_hot = now_hot.append(promoted.decoded()).sorted()
        counts = {"promoted": stays[2].sum(-1), "demoted": demoted[0].sum(-1) + demoted[1].sum(-1)}
        tiers = self.counted(**counts, demoted_to_a_parked_page=back.sum(-1))
        packed = {"cold": now_cold, "parked": parked.where(stay_parked).joined(promoted)}
        # Rows in which blocks moved have dealt with what they noticed; in the others cold blocks are where they were.
        moved = torch.from_numpy(leaving.lengths[..., None] > 0)
        noticed = torch.full(now_cold.table.shape, -1, dtype=torch.int32)
        both = min(noticed.shape[2], self.noticed.shape[2])
        noticed[..., :both] = torch.where(moved, -1, self.noticed[..., :both])
        used, dense = _aligned(now_hot, starts, uses), tiers.dense | {"hot": now_hot}
        return replace(tiers, dense=dense, packed=packed, used=used, noticed=noticed)

    def below(self, length: Int[np.ndarray, "b 1"]) -> "HotColdTiers":
        """The tokens at positions below `length`; those of a block that is cut through join the sink tier."""
        dense = {name: self.dense[name].below(length) for name in ("sink", "recent", "hot")}
        cold, parked = self.packed["cold"], self.packed["parked"]
        whole = [_ends(tier) <= length[..., None] for tier in (cold, parked)]
        begun = cold.filled().cpu().numpy() & ~whole[0] & (cold.starts.cpu().numpy() < length[..., None])
        inside = dense["hot"].lengths // BLOCK * BLOCK
        cut = dense["hot"].take(inside, dense["hot"].lengths - inside).append(cold.where(begun).decoded().below(length))
        dense["sink"] = dense["sink"].append(cut).sorted()
        dense["hot"] = dense["hot"].take(np.zeros_like(inside), inside).owned()
        packed = {
            "cold": cold.where(cold.filled().cpu().numpy() & whole[0]),
            "parked": parked.where(parked.filled().cpu().numpy() & whole[1]),
        }
        used = take(self.used, np.zeros_like(inside), inside // BLOCK)
        noticed = torch.full(packed["cold"].table.shape, -1, dtype=torch.int32)
        return replace(self, dense=dense, packed=packed, used=used, noticed=noticed)


def hot_and_cold(tiers: Tiers) -> HotColdTiers:
    """What a method that all tiers have made of these."""
    assert isinstance(tiers, HotColdTiers)
    return tiers


def _starts(tier: DenseTier) -> Rows:
    """Position of the first token of each whole block of a row, -1 beyond its last one."""
    starts = tier.positions[:, :, ::BLOCK].cpu().numpy()
    return np.where(np.arange(starts.shape[2]) * BLOCK < tier.lengths[..., None], starts, -1)


def _ends(tier: PackedTier) -> Rows:
    return tier.starts.cpu().numpy().astype(np.int64) + BLOCK


def _tokens(blocks: Bool[np.ndarray, "b h _"], tier: DenseTier) -> Bool[Tensor, "b h t"]:
    return torch.from_numpy(blocks.repeat(BLOCK, -1)).to(tier.k.device)


def _same(starts: Rows, tier: PackedTier) -> Bool[np.ndarray, "b h _ _"]:
    """Whether each start is that of each block of the tier."""
    mine = np.where(tier.filled().cpu().numpy(), tier.starts.cpu().numpy(), -2)
    return starts[..., :, None] == mine[..., None, :]


def _aligned(hot: DenseTier, starts: list[Rows], uses: list[Rows]) -> Tensor:
    """The last use of each block of the new hot tier."""
    now, before, use = _starts(hot), np.concatenate(starts, -1), np.concatenate(uses, -1)
    match = (now[..., :, None] == before[..., None, :]) & (use[..., None, :] >= 0)
    return torch.from_numpy(np.where(match, use[..., None, :], 0).max(-1, initial=0).astype(np.int32))
