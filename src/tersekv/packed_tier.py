"""Tokens of one layer in packed pages. Immutable: an operation returns a new tier, which may share the pages."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tersekv.codec import Codec
from tersekv.dense_tier import DenseTier
from tersekv.errors import SpecError
from tersekv.layout import Layout
from tersekv.ops import (
    Pages,
    Partial,
    attend_pages,
    encode,
    new_pool,
    page_layouts,
    pages_part,
    repack,
)
from tersekv.ops.balance import multiplied
from tersekv.packed import Packed
from tersekv.ragged import Lengths, gather, join, take


@lru_cache
def _layouts(k: Codec, v: Codec, d: int, device: torch.device) -> tuple[Layout, Layout]:
    keys, values = page_layouts({"k": (k.layout(d), k.recipe(d)), "v": (v.layout(d), v.recipe(d))}, device)
    return keys, values


@dataclass(frozen=True)
class PackedTier:
    """Pages of whole blocks, K planes then V planes; `table` says which page holds which block of which row."""

    k: Codec
    v: Codec
    d: int
    dtype: torch.dtype
    pool: Tensor  # uint8 (pages, page bytes)
    table: Tensor  # int32 (b, h, blocks), -1 where a row has no such block
    starts: Tensor  # int32 (b, h, blocks): position of a block's first token; its tokens are consecutive
    lengths: Lengths
    whole: bool = True  # every page has a row that refers to it
    # (b, h, d): keys are multiplied by them before they are encoded, queries divided; see `ops.balance`
    factors: Tensor | None = None
    # (b, h, d, d): what keys are encoded for from now on, made of second moments of queries, or until then their sums
    asked: Tensor | None = None
    rounded: ClassVar[bool] = True

    @staticmethod
    def empty(k: Codec, v: Codec, like: DenseTier) -> "PackedTier":
        """Raises SpecError for a codec that cannot encode blocks."""
        for codec in (k, v):
            codec.check_blocks()
        b, h, _, d = like.k.shape
        page = sum(layout.nbytes for layout in _layouts(k, v, d, like.k.device))
        pool = torch.empty(0, page, dtype=torch.uint8, device=like.k.device)
        table = torch.empty(b, h, 0, dtype=torch.int32, device=like.k.device)
        return PackedTier(k, v, d, like.k.dtype, pool, table, table, np.zeros((b, h), dtype=np.int64))

    @property
    def layouts(self) -> tuple[Layout, Layout]:
        """Of keys and values, in the storage order of the kernels on this device."""
        return _layouts(self.k, self.v, self.d, self.pool.device)

    @property
    def block(self) -> int:
        return self.layouts[0].block

    def tensors(self) -> dict[str, Tensor]:
        return {"pool": self.pool, "table": self.table, "starts": self.starts} | self._beside()

    def _beside(self) -> dict[str, Tensor]:
        """What is known of each row beside its tokens."""
        return {name: x for name in ("factors", "asked") if (x := getattr(self, name)) is not None}

    def append(self, tokens: DenseTier, asked: Tensor | None = None) -> "PackedTier":
        """Encode whole blocks and add their pages. Each row of `tokens` holds a multiple of the block.

        `asked` (b, h, blocks, d, d): for each block, instead of the tier's.
        """
        tier, count = self.compacted(), tokens.lengths // self.block
        first, blocks = len(tier.pool), tokens.k.shape[2] // self.block
        filled = torch.from_numpy(np.arange(blocks) < count[..., None]).to(self.pool.device)
        ids = torch.full(filled.shape, -1, dtype=torch.int32, device=filled.device)
        ids[filled] = torch.arange(first, first + int(count.sum()), dtype=torch.int32, device=filled.device)
        starts = tokens.positions[:, :, :: self.block]
        if self.k.positional:
            self._check_consecutive(tokens.positions.unflatten(2, (-1, self.block)), filled)
        old = tier.lengths // self.block
        grown = replace(
            tier,
            pool=tier._with_pages(tokens, starts, filled, int(count.sum()), asked),
            table=join(tier.table, old, ids, count),
            starts=join(tier.starts, old, starts, count),
            lengths=tier.lengths + tokens.lengths,
        )
        return replace(grown, table=torch.where(grown.filled(), grown.table, -1))

    def _check_consecutive(self, positions: Int[Tensor, "b h blocks block"], filled: Tensor) -> None:
        """Raises SpecError where a policy took tokens from between those of a block."""
        gaps = (positions - positions[..., :1] != torch.arange(self.block, device=positions.device)).any(-1) & filled
        if gaps.any():
            raise SpecError(
                f"{self.k} stores keys before RoPE, in blocks of consecutive tokens, and this policy takes some out of "
                "a block. Use policy=window, or rope=after."
            )

    def _with_pages(
        self, tokens: DenseTier, starts: Tensor, filled: Tensor, count: int, asked: Tensor | None
    ) -> Tensor:
        """The pool and `count` more pages, which are encoded where they stay."""
        old, split = len(self.pool), self.layouts[0].nbytes
        pool = new_pool(old + count, self.pool.shape[1], self.pool.device)
        pool[:old] = self.pool
        pages = pool[old:, :split], pool[old:, split:]
        if asked is None and self.asked is not None:
            asked = self.asked[:, :, None]
        keys = multiplied(tokens.k, self.factors)
        sides = zip((self.k, self.v), (keys, tokens.v), self.layouts, pages, (asked, None), strict=True)
        for codec, x, layout, out, known in sides:
            blocks, places = x.unflatten(2, (-1, self.block)), starts
            if codec.fitted is not None and count != filled.numel():  # which needs every head to know which is which
                out.copy_(encode(codec, blocks, layout, starts=starts).data[filled])
                continue
            if count != filled.numel():
                blocks = blocks[filled]
                known = None if known is None else known.expand(*filled.shape, -1, -1)[filled]
                places = starts[filled]
            encode(codec, blocks, layout, out.unflatten(0, blocks.shape[:-2]), known, places)
        return pool

    def compacted(self) -> "PackedTier":
        """Without the pages that no row refers to any more (after beam search or a crop)."""
        if self.whole:
            return self
        filled = self.filled()
        used = torch.unique(self.table[filled])
        if len(used) == len(self.pool):
            return replace(self, whole=True)
        renumbered = torch.searchsorted(used, self.table.contiguous()).to(torch.int32)
        return replace(self, pool=self.pool[used.long()], table=torch.where(filled, renumbered, -1), whole=True)

    def filled(self) -> Tensor:
        blocks = np.arange(self.table.shape[2]) * self.block < self.lengths[..., None]
        return torch.from_numpy(blocks).to(self.table.device)

    def select(self, rows: Int[Tensor, "rows"]) -> "PackedTier":
        """Sequences may repeat: their pages are shared, not copied."""
        table, starts = self.table.index_select(0, rows), self.starts.index_select(0, rows)
        beside = {
            name: x.index_select(0, rows) for name in ("factors", "asked") if (x := getattr(self, name)) is not None
        }
        lengths = self.lengths[rows.cpu().numpy()]
        return replace(self, table=table, starts=starts, lengths=lengths, whole=False, **beside)

    def tokens_below(self, length: Int[np.ndarray, "b 1"]) -> Lengths:
        """How many tokens of each row lie in blocks that end at or before position `length`."""
        ends = self.starts.cpu().numpy().astype(np.int64) + self.block
        return (self.filled().cpu().numpy() & (ends <= length[..., None])).sum(-1) * self.block

    def keep(self, lengths: Lengths) -> "PackedTier":
        """Only the first `lengths` tokens (whole blocks) of each row; the other pages are freed."""
        blocks = int(lengths.max(initial=0)) // self.block
        table, starts = self.table[..., :blocks], self.starts[..., :blocks]
        return replace(self, table=table, starts=starts, lengths=lengths, whole=False).compacted()

    def without_first(self, lengths: Lengths) -> "PackedTier":
        """Without the oldest `lengths` tokens (whole blocks) of each row, whose pages are freed."""
        first, left = lengths // self.block, self.lengths - lengths
        table, starts = (take(x, first, left // self.block) for x in (self.table, self.starts))
        cut = replace(self, table=table, starts=starts, lengths=left, whole=False)
        return replace(cut, table=torch.where(cut.filled(), table, -1)).compacted()

    def where(self, mask: Bool[np.ndarray, "b h blocks"]) -> "PackedTier":
        """The blocks that the mask chooses, in their order, none beyond the lengths. Other pages are freed."""
        count = mask.sum(-1)
        order = np.argsort(~mask, axis=-1, kind="stable")[..., : int(count.max(initial=0))]
        index = torch.from_numpy(order).to(self.pool.device)
        table, starts = gather(self.table, index), gather(self.starts, index)
        cut = replace(self, table=table, starts=starts, lengths=count * self.block, whole=False)
        return replace(cut, table=torch.where(cut.filled(), table, -1)).compacted()

    def joined(self, other: "PackedTier") -> "PackedTier":
        """With the blocks of another tier of the same codecs, whose pages are copied as they are."""
        pool = new_pool(len(self.pool) + len(other.pool), self.pool.shape[1], self.pool.device)
        pool[: len(self.pool)], pool[len(self.pool) :] = self.pool, other.pool
        counts = self.lengths // self.block, other.lengths // self.block
        table = join(self.table, counts[0], other.table + len(self.pool), counts[1])
        starts = join(self.starts, counts[0], other.starts, counts[1])
        both = replace(self, pool=pool, table=table, starts=starts, lengths=self.lengths + other.lengths)
        return replace(both, table=torch.where(both.filled(), table, -1), whole=self.whole and other.whole)

    @cached_property
    def pages(self) -> Pages:
        lengths = torch.from_numpy(self.lengths).to(self.pool.device)
        recipes = self.k.recipe(self.d), self.v.recipe(self.d)
        full = bool((self.lengths == self.table.shape[2] * self.block).all())
        return Pages(self.pool, self.table, lengths, *self.layouts, *recipes, full)

    @cached_property
    def part(self) -> Any:
        """As of a dense tier; None also where a codec folds queries in a way that only its own methods know."""
        if not (self.k.folds_by_rotation and self.v.folds_by_rotation):
            return None
        return pages_part(self.pages, self.k.rotation, self.v.rotation, self.factors)

    def attend(self, q: Float[Tensor, "b hq n d"], scale: float, exact: bool = False) -> Partial:
        out, lse = attend_pages(self.folded(q), self.pages, scale, exact)
        return self.v.unfold_output(out), lse

    def folded(self, q: Float[Tensor, "b hq n d"]) -> Float[Tensor, "b hq n folded"]:
        """Queries in the domain of the keys' codes."""
        if self.factors is not None:
            q = q / self.factors.repeat_interleave(q.shape[1] // self.factors.shape[1], 1)[:, :, None]
        return self.k.fold_query(q.float())

    def linear_pool(self) -> Tensor:
        """The pages with their codes in the linear order, as files hold them."""
        return self._reordered(self.layouts, ("linear", "linear"), self.pool)

    def pool_of(self, linear: Tensor) -> Tensor:
        """Inverse of `linear_pool` for the device that this tier is on."""
        plain = self.k.layout(self.d), self.v.layout(self.d)
        orders = [layout.order for layout in self.layouts]
        return self._reordered(plain, orders, linear)

    def _reordered(self, layouts: tuple[Layout, Layout], orders: Sequence[str], pool: Tensor) -> Tensor:
        split = layouts[0].nbytes
        sides = zip(layouts, orders, (pool[:, :split], pool[:, split:]), strict=True)
        return torch.cat([repack(Packed(layout, data), order).data for layout, order, data in sides], -1)

    def decoded(self) -> DenseTier:
        """All tokens unpacked to the model's precision: the slow route, and what a crop through a block needs."""
        k_layout, v_layout = self.layouts
        data = self.pool[self.table.clamp(min=0).long()]
        k = self.k.decode(Packed(k_layout, data[..., : k_layout.nbytes])).flatten(2, 3)
        if self.factors is not None:
            k = k / self.factors[:, :, None]
        v = self.v.decode(Packed(v_layout, data[..., k_layout.nbytes :])).flatten(2, 3)
        offsets = torch.arange(self.block, dtype=torch.int32, device=self.pool.device)
        positions = (self.starts[..., None] + offsets).flatten(2, 3)
        return DenseTier(k.to(self.dtype), v.to(self.dtype), positions, self.lengths)
