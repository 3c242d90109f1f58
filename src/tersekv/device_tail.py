"""The tokens of a layer on a GPU in memory with room, so that decoding steps are always the same three launches.

Where tiers are values that a step replaces, here new tokens wait in a ring of dense tokens, and whole blocks of it are
packed into pages that were there from the start. What launches read of lengths is in device memory, so one CUDA graph
serves all steps until the room is used up.
"""

from dataclasses import replace
from math import ceil

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tersekv import ops
from tersekv.accounting import storage_bytes
from tersekv.dense_tier import DenseTier
from tersekv.errors import CacheError, InputError
from tersekv.ops import new_pool
from tersekv.ops.balance import multiplied
from tersekv.packed_tier import PackedTier
from tersekv.policy.base import Policy
from tersekv.policy.window import Window
from tersekv.ragged import Lengths, gather, take
from tersekv.tiers import Tiers

COUNTERS = 2  # of a query head, for up to 16 new tokens: see `ops.cuda.attending.attend_pages`


class DeviceTail:
    """As `tail.Tail`: who holds all that is written may write on. What it held before a block was packed is gone."""

    def __init__(self, tiers: Tiers, policy: Window, room: int, n: int, group: int) -> None:
        """`room`: tokens more than `tiers` has, `n` at a time. `tiers` need not be kept."""
        sink, recent, packed = tiers.dense["sink"], tiers.dense["recent"], tiers.packed["packed"]
        self.policy, self.block, self.was = policy, packed.block, packed.lengths.copy()
        self.more = ceil(room / self.block)  # blocks that every row can still take
        self.packed, self.start = packed.lengths.copy(), packed.lengths + recent.lengths
        self.offset = tiers.seen - self.start  # a token's position is its number + offset
        self.written = self.held_since = 0
        waiting = policy.recent + self.block - 1  # tokens of a row of which no block is due, at most
        slots = ceil((waiting + n) / self.block) * self.block
        self.widest = slots - waiting  # tokens of a step
        # As counts of tokens written, so that a step asks for no row's length: where the first block is due, and the
        # room is used up.
        self.due_at = self._due_at()
        self.last = int((self.was + self.more * self.block + waiting - self.start).min())
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside of it
            self.tiers = self._moved(tiers, slots)
            device, (b, h, _, d) = packed.pool.device, recent.k.shape
            self.pages = self.tiers.packed["packed"].pages
            now = self.tiers.dense
            self.dense = ops.StepTokens(
                sink_k=now["sink"].k,
                sink_v=now["sink"].v,
                sinks=torch.from_numpy(sink.lengths).to(device),
                ring_k=now["recent"].k,
                ring_v=now["recent"].v,
                next=torch.from_numpy(self.start.astype(np.int32)).to(device),
                bad=torch.zeros(1, dtype=torch.int32, device=device),
                arrived=torch.zeros(COUNTERS * b * h * group, dtype=torch.int32, device=device),
            )
        self.multipliers = ops.multipliers(packed.k.rotation, packed.v.rotation, d, device, packed.factors)

    def _moved(self, tiers: Tiers, slots: int) -> Tiers:
        """The tiers in memory with room. Of the ring they only tell how long it was."""
        sink, recent, packed = tiers.dense["sink"], tiers.dense["recent"], tiers.packed["packed"]
        rows, old = packed.lengths.size, packed.lengths // self.block
        pool = new_pool(len(packed.pool) + self.more * rows, packed.pool.shape[1], packed.pool.device)
        pool[: len(packed.pool)] = packed.pool
        table, starts = self._tables(packed, old)
        b, h, _, d = recent.k.shape
        k, v = (torch.empty(b, h, slots, d, dtype=recent.k.dtype, device=recent.k.device) for _ in range(2))
        positions = torch.zeros(b, h, slots, dtype=torch.int32, device=recent.k.device)
        whole = DenseTier(k, v, positions, recent.lengths)
        for length in np.unique(packed.lengths):  # rows of one length have their tokens in the same slots
            row = torch.from_numpy((packed.lengths == length).all(1)).to(k.device)
            at = (int(length) + np.arange(recent.k.shape[2])) % slots
            index = torch.from_numpy(at).to(k.device)
            for to, x in ((k, recent.k), (v, recent.v)):
                to[row] = to[row].index_copy(2, index, x[row])
        grown = replace(packed, pool=pool, table=table, starts=starts, whole=True)
        return replace(tiers, dense={"sink": sink.owned(), "recent": whole}, packed={"packed": grown})

    def _tables(self, packed: PackedTier, old: np.ndarray) -> tuple[Tensor, Tensor]:
        """Page numbers and first positions of all blocks, those to come included."""
        rows, first = packed.lengths.size, len(packed.pool)
        slot = np.arange(int(old.max(initial=0)) + self.more)
        later = slot - old[..., None]  # of blocks to come: which one of the row's
        row = np.arange(rows).reshape(*old.shape, 1)
        page = np.where((later >= 0) & (later < self.more), first + later * rows + row, -1)
        start = self.offset[..., None] + slot * self.block
        table, starts = (torch.from_numpy(x.astype(np.int32)).to(packed.table.device) for x in (page, start))
        held = torch.from_numpy(later < 0).to(table.device)[..., : packed.table.shape[2]]
        for to, x in ((table, packed.table), (starts, packed.starts)):
            to[..., : x.shape[2]] = torch.where(held, x, to[..., : x.shape[2]])
        return table, starts

    def takes(self, held: int, more: int) -> bool:
        """Whether the holder of the first `held` tokens may write `more`. Blocks that are due are packed before.

        Raises InputError if one of the tokens that wait is not finite.
        """
        if self.written != held:
            return False
        if held >= self.due_at:
            self.pack()
        return more <= self.widest and held + more <= self.last

    def claim(self, held: int, more: int) -> bool:
        """As `takes`, and writes them: from then on nobody else may."""
        mine = self.takes(held, more)
        if mine:
            self.wrote(more)
        return mine

    def wrote(self, more: int) -> None:
        """Count tokens that a launch, or a graph that is replayed, writes."""
        self.written += more

    def step(
        self, q: Float[Tensor, "b hq n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"], scale: float
    ) -> Float[Tensor, "b hq n d"]:
        """Write tokens that were claimed, and attend to all tokens, causally to the new ones."""
        return ops.step_on_device(q, k, v, self.pages, self.dense, self.multipliers, scale)

    def due(self) -> np.ndarray:
        """Rows (b, h) whose oldest block in the ring is to be packed."""
        return self.start + self.written - self.packed - self.policy.recent >= self.block

    def _due_at(self) -> int:
        return int((self.packed + self.policy.recent + self.block - self.start).min())

    def pack(self) -> None:
        """Encode the blocks that are due. The only look at the device is whether all tokens are finite."""
        while (due := self.due()).any():
            self._check_finite()
            self._encode(due)
            self._packed(due * self.block)

    def _check_finite(self) -> None:
        if int(self.dense.bad):
            raise InputError(
                "Keys or values of a decoding step are not finite; on a GPU that is noticed when their block is "
                "packed. Look for an overflow in the model (fp16?) and begin again with cache.reset()."
            )

    def _packed(self, more: Lengths) -> None:
        """So many tokens more of each row are in pages."""
        lengths = self.pages.lengths
        lengths.add_(torch.from_numpy(more).to(lengths.device))
        self.packed = self.packed + more
        self.held_since, self.due_at = self.written, self._due_at()

    def _encode(self, due: np.ndarray) -> None:
        tier, d = self.tiers.packed["packed"], self.dense.ring_k.shape[-1]
        split, rows, flat = tier.layouts[0].nbytes, due.size, due.ravel()
        block, page = self.packed.ravel() // self.block, (self.packed - self.was).ravel() // self.block
        page = len(tier.pool) - self.more * rows + page * rows + np.arange(rows)
        slot = block % (self.dense.ring_k.shape[2] // self.block)
        alike = flat.all() and (slot == slot[0]).all() and (np.diff(page) == 1).all()
        asked, factors = (None if x is None else x.flatten(0, 1) for x in (tier.asked, tier.factors))
        for codec, ring, layout, at, known, by in (
            (tier.k, self.dense.ring_k, tier.layouts[0], slice(None, split), asked, factors),
            (tier.v, self.dense.ring_v, tier.layouts[1], slice(split, None), None, None),
        ):
            blocks = ring.view(rows, -1, self.block, d)
            if alike:  # as it is while all sequences have the same length: no copies of indices to the device
                out = tier.pool[int(page[0]) : int(page[0]) + rows, at]
                ops.encode(codec, multiplied(blocks[:, int(slot[0])], by), layout, out, known)
                continue
            some, slots, pages = (
                torch.from_numpy(x).to(ring.device) for x in (flat.nonzero()[0], slot[flat], page[flat])
            )
            known, by = (None if x is None else x[some] for x in (known, by))
            tier.pool[pages, at] = ops.encode(codec, multiplied(blocks[some, slots], by), layout, asked=known).data

    def settled(self, policy: Policy, count: int) -> Tiers:
        """Tiers of their own, of the first `count` tokens. Raises CacheError if these are not all held any more."""
        if count < self.held_since:
            raise CacheError(
                f"A decoding step of {self.held_since - count} tokens ago cannot be returned to: its block was packed "
                "since. Use cache.copy() to keep a state."
            )
        if count == self.written:
            self.pack()
        return self._held(count)

    def _held(self, count: int) -> Tiers:
        """Tiers of their own, of the first `count` tokens and all pages."""
        recent = self._written(self.packed, self.start + count)
        return replace(self.tiers, dense={**self.tiers.dense, "recent": recent}, packed={"packed": self._pages()})

    def _numbers(self, first: Lengths, stop: Lengths) -> Int[np.ndarray, "b h n"]:
        """Of the tokens first..stop of each row; beyond the row's last one they go on."""
        return first[..., None] + np.arange(int((stop - first).max(initial=0)))

    def _slots(self, number: Int[np.ndarray, "b h n"]) -> Int[Tensor, "b h n"]:
        slots, device = self.dense.ring_k.shape[2], self.dense.ring_k.device
        return torch.from_numpy(number % slots).to(device)

    def _written(self, first: Lengths, stop: Lengths) -> DenseTier:
        """Tokens first..stop of each row, out of the ring."""
        number = self._numbers(first, stop)
        k, v = (gather(x, self._slots(number)) for x in (self.dense.ring_k, self.dense.ring_v))
        positions = torch.from_numpy((number + self.offset[..., None]).astype(np.int32)).to(k.device)
        return DenseTier(k, v, positions, stop - first)

    def _pages(self) -> PackedTier:
        """The pages in use, without the room."""
        tier, blocks = self.tiers.packed["packed"], int(self.packed.max(initial=0)) // self.block
        grown = (self.packed - self.was) // self.block
        used = len(tier.pool) - (self.more - int(grown.max(initial=0))) * self.packed.size
        table, starts = (
            take(x, np.zeros_like(self.packed), np.full_like(self.packed, blocks)) for x in (tier.table, tier.starts)
        )
        whole = bool((grown == grown.max(initial=0)).all())
        cut = replace(tier, pool=tier.pool[:used].clone(), starts=starts.clone(), lengths=self.packed, whole=whole)
        cut = replace(cut, table=table)
        return replace(cut, table=torch.where(cut.filled(), table, -1))

    def planes(self) -> dict[str, int]:
        """Bytes that are held beside the tiers'."""
        names = ("sinks", "next", "bad", "arrived", "ring_q")
        return {name: storage_bytes(x) for name in names if (x := getattr(self.dense, name)) is not None}
