"""`anchors`: the tokens whose errors would count most stay dense, all others are packed, by any codec (AnTKV).

arXiv 2506.19505: about 1 % of all tokens, by an anchor score that is taken when a token leaves the recent window:
`ops.anchors`. A token's score is what the `recent` queries behind its 64 say, so it needs no later pass, and any
chunking gives the same anchors. `shuffle=SEED`, not 0, makes as many tokens of the same 64 anchors, drawn at random:
the control.

Differs from the paper: a prompt is no special case, whose anchors would be the best of all its tokens: each 64 tokens
get what 1 % of all so far allows. See docs/methods/anchors.md.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tersekv.codec import Codec, check_choice
from tersekv.dense_tier import DenseTier
from tersekv.errors import InputError, SpecError
from tersekv.layout import BLOCK
from tersekv.ops import merge
from tersekv.ops.anchors import SCORES, anchor_scores
from tersekv.ops.attention import attend_dense
from tersekv.ops.pages import Partial
from tersekv.packed_tier import PackedTier
from tersekv.policy.base import Asked
from tersekv.policy.routed import NotedTier, RoutedTiers, RoutedWindow, noted, routed
from tersekv.tiers import Evicted, Tiers

PACKED, ANCHORS, WAIT = "packed", "anchors", "wait"
DECIDED = (PACKED, ANCHORS, WAIT)  # tiers of tokens that have left the recent window


@dataclass(frozen=True)
class Anchors(RoutedWindow):
    """`permille`: anchors of a thousand tokens. `score`: column, value or key."""

    permille: int = 10
    score: str = "column"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("score", self.score, SCORES)
        if not 0 <= self.permille <= 1000:
            raise SpecError(f"permille={self.permille}: anchors of a thousand tokens. Allowed: 0 to 1000.")

    def tiers(self, k: Codec, v: Codec, empty: DenseTier) -> RoutedTiers:
        b, h = empty.lengths.shape
        recent = NotedTier.of(empty, empty.k.new_zeros(b, h, 0, 1, dtype=torch.float32))
        dense = {"sink": empty, "recent": recent, WAIT: empty, ANCHORS: empty}
        packed, none = {PACKED: PackedTier.empty(k, v, empty)}, Evicted.none(empty.lengths)
        routes = torch.zeros(b, h, 0, dtype=torch.uint8)
        return RoutedTiers(dense, packed, none, (PACKED, ANCHORS), self.permille / 1000, routes)

    def place(self, tiers: Tiers, fresh: DenseTier, asked: Asked | None = None) -> Tiers:
        """In pieces that end where 64 tokens are due, so that queries see what decoding would show them."""
        if asked is None:
            raise InputError("policy=anchors needs the queries of all tokens. Run in `with tersekv.attached(model):`.")
        q, scale = asked
        start, pads = 0, q.shape[2] - fresh.lengths
        while start < q.shape[2]:
            stop = min(start + self.room(tiers), q.shape[2])
            first, last = np.maximum(start - pads, 0), np.maximum(stop - pads, 0)
            tiers = self._taken(routed(tiers), fresh.take(first, last - first), q[:, :, start:stop], scale)
            start = stop
        return tiers

    def _taken(self, tiers: RoutedTiers, fresh: DenseTier, q: Tensor, scale: float) -> RoutedTiers:
        blank = torch.zeros(*fresh.k.shape[:3], 1, device=fresh.k.device)
        filled = routed(self._filled(tiers, NotedTier.of(fresh, blank)))
        recent, n = noted(filled.dense["recent"]), q.shape[2]
        at = filled.seen[:, :1] - n + np.arange(n)
        at = torch.from_numpy(np.where(at >= (filled.seen - fresh.lengths)[:, :1], at, -1)).to(q.device)
        visible = _judged(recent, at)
        if visible.any():
            attended = _attended(filled, q, scale, at)
            added = anchor_scores(q, recent.k, recent.v, attended, scale, visible, self.score)
            recent = replace(recent, note=recent.note + added[..., None])
            filled = replace(filled, dense=filled.dense | {"recent": recent})
        return self._packed(filled)

    def _packed(self, tiers: RoutedTiers) -> RoutedTiers:
        """Tokens that are older than the recent window become anchors, or wait until they are a block of others."""
        recent = noted(tiers.dense["recent"])
        due = np.maximum(recent.lengths - self.recent, 0) // BLOCK * BLOCK
        if not due.any():
            return tiers
        leaving, held = noted(recent.take(np.zeros_like(due), due)), tiers.held()
        decided = sum((held[name].lengths for name in DECIDED), start=due)
        allowed = decided * self.permille // 1000 - held[ANCHORS].lengths
        chosen = self._chosen(leaving, allowed)
        tiers = tiers.more(chosen.astype(np.int64), due)
        dense = tiers.dense | {"recent": recent.take(due, recent.lengths - due).owned()}
        anchors, others = (
            leaving.plain().where(torch.from_numpy(mask & _counted(leaving)).to(recent.k.device))
            for mask in (chosen, ~chosen)
        )
        dense[ANCHORS] = dense[ANCHORS].append(anchors)
        return replace(tiers, dense=dense).with_more(PACKED, WAIT, others)

    def _chosen(self, leaving: NotedTier, allowed: Int[np.ndarray, "b h"]) -> Bool[np.ndarray, "b h t"]:
        """The `allowed` tokens with the highest scores, of equals the older ones; or as many others."""
        scores = np.where(_counted(leaving), leaving.note[..., 0].double().cpu().numpy(), -np.inf)
        if self.shuffle:
            starts = leaving.positions[..., 0].tolist()
            for row in np.ndindex(allowed.shape):
                drawn = np.random.default_rng((self.shuffle, starts[row[0]][row[1]], row[1])).random(scores.shape[2])
                scores[row] = np.where(np.isfinite(scores[row]), drawn, -np.inf)
        rank = np.argsort(np.argsort(-scores, axis=-1, kind="stable"), axis=-1, kind="stable")
        return (rank < allowed[..., None]) & _counted(leaving)

    def blocks(self, held: int, block: int) -> int:
        left = max(held - self.sink - self.recent, 0) // BLOCK * BLOCK
        return (left - left * self.permille // 1000) // block


def _counted(tier: DenseTier) -> Bool[np.ndarray, "b h t"]:
    return np.arange(tier.k.shape[2]) < tier.lengths[..., None]


def _judged(recent: NotedTier, at: Int[Tensor, "b n"]) -> Bool[Tensor, "b n t"]:
    """Which queries count for which recent tokens: those behind all 64 with which a token will leave."""
    t, own = recent.k.shape[2], recent.positions[:, 0]
    last = torch.arange(t, device=own.device) // BLOCK * BLOCK + BLOCK - 1
    whole = last < torch.from_numpy(recent.lengths[:, :1]).to(own.device)
    ends = own.gather(1, last.clamp(max=max(t - 1, 0)).expand(len(own), -1)) if t else own
    return (whole & (ends >= 0))[:, None] & (ends[:, None] < at[..., None])


def _attended(tiers: RoutedTiers, q: Tensor, scale: float, at: Int[Tensor, "b n"]) -> Partial:
    """Of each new query over all that it sees; queries at -1 see nothing that counts."""
    parts = [tiers.held()[name].attend(q, scale, True) for name in DECIDED if tiers.held()[name].lengths.any()]
    for tier in (tiers.dense["sink"], tiers.dense["recent"]):
        visible = tier.positions[:, 0][:, None] <= at[..., None]
        parts.append(attend_dense(q, tier.k, tier.v, torch.from_numpy(tier.lengths), scale, visible))
    return merge(parts)
