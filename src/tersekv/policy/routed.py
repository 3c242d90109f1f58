"""A policy that sends each token to one of several tiers once it leaves the recent window, and its tiers."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from tersekv.dense_tier import DenseTier
from tersekv.errors import SpecError
from tersekv.layout import BLOCK
from tersekv.policy.window import Window
from tersekv.ragged import join
from tersekv.tiers import Tiers

CODES = 4  # in a byte: a route has 2 bits


@dataclass(frozen=True)
class RoutedWindow(Window):
    """Every 64 tokens that leave the recent window are judged by what it tells.

    `shuffle=SEED`, not 0, deals the same tiers to tokens drawn at random: the control.
    """

    shuffle: int = 0

    asks: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shuffle < 0:
            raise SpecError(f"shuffle={self.shuffle} is no seed. Give a positive number, or 0 for no shuffling.")
        if self.recent < 1:
            raise SpecError("recent=0: this policy decides by what recent tokens tell. Give at least 1.")

    def room(self, tiers: Tiers) -> int:
        """As many as a decoding step by step would take before 64 tokens are due; 1 where they already are."""
        missing = np.maximum(self.sink - tiers.seen, 0)
        return max(int((missing + self.recent + BLOCK - tiers.dense["recent"].lengths).min()), 1)

    def crop(self, tiers: Tiers, length: Int[np.ndarray, "b"]) -> Tiers:
        """As the window's: of blocks that are cut through, the kept tokens become dense for good."""
        return routed(tiers).below(length[:, None])


@dataclass(frozen=True)
class NotedTier(DenseTier):
    """With each token, what its policy will need to know when it decides."""

    note: Float[Tensor, "b h t w"]

    @staticmethod
    def of(tier: DenseTier, note: Tensor) -> "NotedTier":
        return NotedTier(tier.k, tier.v, tier.positions, tier.lengths, note)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"note": self.note}

    def append(self, other: DenseTier) -> DenseTier:
        """To an empty tier, which does not know the width of a note yet, any can be appended."""
        return super().append(other) if self.k.shape[2] else other

    def plain(self) -> DenseTier:
        return DenseTier(self.k, self.v, self.positions, self.lengths)


@dataclass(frozen=True)
class RoutedTiers(Tiers):
    """`routes` names the tier of every position that has left the recent tier, in the order of `names`, 2 bits each.

    A packed tier holds the position of the first token of each block; those of the others follow from the routes.
    """

    names: tuple[str, ...]
    budget: float  # what a token may cost on average, as the policy counts it
    routes: Tensor  # uint8 (b, h, bytes), on the host

    def tensors(self) -> dict[str, Tensor]:
        return {"routes": self.routes}

    def select(self, rows: Int[Tensor, "rows"]) -> Tiers:
        return replace(routed(super().select(rows)), routes=self.routes.index_select(0, rows.cpu()))

    def levels(self) -> UInt8[np.ndarray, "b h t"]:
        """The route of each position; what lies beyond a row's own is nothing."""
        codes = self.routes.numpy()[..., None] >> (2 * np.arange(CODES, dtype=np.uint8)) & 3
        return codes.reshape(*codes.shape[:2], -1)

    def more(self, levels: Int[np.ndarray, "b h n"], count: Int[np.ndarray, "b h"]) -> "RoutedTiers":
        """With the routes of the next `count` positions. The recent tier must still hold their tokens."""
        first = self.seen - self.dense["recent"].lengths
        old = torch.from_numpy(self.levels())[..., : int(first.max(initial=0))]
        missing = max(int(first.max(initial=0)) - old.shape[2], 0)  # the sink has no routes
        old = torch.nn.functional.pad(old, (0, missing))
        return self.with_levels(join(old, first, torch.from_numpy(levels.astype(np.uint8)), count).numpy())

    def with_levels(self, levels: np.ndarray) -> "RoutedTiers":
        levels = np.pad(levels, [(0, 0), (0, 0), (0, -levels.shape[2] % CODES)])
        codes = levels.reshape(*levels.shape[:2], -1, CODES) << (2 * np.arange(CODES, dtype=np.uint8))
        return replace(self, routes=torch.from_numpy(codes.sum(-1, dtype=np.uint8)))

    def with_more(self, name: str, wait: str, tokens: DenseTier) -> "RoutedTiers":
        """Tokens for a packed tier: they wait in the dense tier `wait` until they are whole blocks."""
        tier, waiting = self.packed[name], self.dense[wait].append(tokens)
        whole = waiting.lengths // tier.block * tier.block
        if whole.any():
            tier = tier.append(waiting.take(np.zeros_like(whole), whole))
            waiting = waiting.take(whole, waiting.lengths - whole).owned()
        return replace(self, dense=self.dense | {wait: waiting}, packed=self.packed | {name: tier})

    def below(self, length: Int[np.ndarray, "b 1"]) -> "RoutedTiers":
        """The tokens at positions below `length`; those of a block that is cut through join the sink tier."""
        dense, packed = {name: tier.below(length) for name, tier in self.dense.items()}, dict(self.packed)
        for name, tier in self.packed.items():
            if not tier.lengths.any():
                continue
            whole = self.unpacked(name)
            ends = whole.positions[..., tier.block - 1 :: tier.block].cpu().numpy()
            kept = (tier.filled().cpu().numpy() & (ends < length[..., None])).sum(-1) * tier.block
            if (kept < tier.lengths).any():
                cut = whole.take(kept, np.minimum(tier.lengths - kept, tier.block)).below(length)
                dense["sink"], packed[name] = dense["sink"].append(cut), tier.keep(kept)
        levels = self.levels()[..., : int(length.max(initial=0))]
        return replace(self.with_levels(levels), dense=dense | {"sink": dense["sink"].sorted()}, packed=packed)

    def decoded(self) -> list[DenseTier]:
        return [*self.dense.values(), *map(self.unpacked, self.packed)]

    def unpacked(self, name: str) -> DenseTier:
        """A packed tier's tokens, with the positions that they came from."""
        tier = self.packed[name]
        positions = np.zeros((*tier.table.shape, tier.block), dtype=np.int32)
        mine, starts = self.levels() == self.names.index(name), tier.starts.cpu().numpy()
        for row in np.ndindex(tier.lengths.shape):
            there = np.flatnonzero(mine[row])
            for block in range(tier.lengths[row] // tier.block):
                first = np.searchsorted(there, starts[row][block])
                positions[row][block] = there[first : first + tier.block]
        flat = torch.from_numpy(positions).flatten(2).to(tier.pool.device)
        return replace(tier.decoded(), positions=flat)


def noted(tier: DenseTier) -> NotedTier:
    """What a method that every dense tier has made of a noted one."""
    assert isinstance(tier, NotedTier)
    return tier


def routed(tiers: Tiers) -> RoutedTiers:
    """As `noted`, of tiers."""
    assert isinstance(tiers, RoutedTiers)
    return tiers
