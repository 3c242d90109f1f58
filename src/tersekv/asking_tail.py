"""A device's tail while the policy still wants to know what the queries were: they wait in a ring, too."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from tersekv import ops
from tersekv.device_tail import DeviceTail
from tersekv.policy.base import Asked
from tersekv.policy.window import Window
from tersekv.ragged import Lengths, gather
from tersekv.tiers import Tiers


class AskingTail(DeviceTail):
    """When a block is due, the policy places the tokens as if they had come one by one, with their queries; what it
    made of them is copied to where launches look. Once it asks no more, blocks are packed as everywhere.
    """

    def __init__(self, tiers: Tiers, policy: Window, room: int, n: int, group: int) -> None:
        super().__init__(tiers, policy, room, n, group)
        ring, self.scale = self.dense.ring_k, 1.0
        b, h, slots, d = ring.shape
        with torch.inference_mode(False):
            asked = torch.empty(b, h, slots, group, d, dtype=ring.dtype, device=ring.device)
            self.multipliers = tuple(None if x is None else x.clone() for x in self.multipliers)
        self.dense = replace(self.dense, ring_q=asked)

    def step(
        self, q: Float[Tensor, "b hq n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"], scale: float
    ) -> Float[Tensor, "b hq n d"]:
        self.scale = scale
        return super().step(q, k, v, scale)

    def pack(self) -> None:
        if not self.policy.asking(self.tiers):
            return super().pack()
        if self.due().any():
            self._check_finite()
            self._adopt(self._given(self.written))
        return None

    def _held(self, count: int) -> Tiers:
        return self._given(count) if self.policy.asking(self.tiers) else super()._held(count)

    def _given(self, count: int) -> Tiers:
        """Tiers of their own, after the policy was given the first `count` tokens. It has those of the last packing."""
        given = self.held_since
        before, first, stop = super()._held(given), self.start + given, self.start + count
        if count == given:
            return before
        return self.policy.place(before, self._written(first, stop), self._queries(first, stop))

    def _queries(self, first: Lengths, stop: Lengths) -> Asked:
        assert self.dense.ring_q is not None  # made above
        found = gather(self.dense.ring_q, self._slots(self._numbers(first, stop)))  # (b, h, n, group, d)
        return found.transpose(2, 3).flatten(1, 2), self.scale

    def _adopt(self, tiers: Tiers) -> None:
        """New pages go to the places that the table has for them, factors to where queries meet them."""
        mine, new = self.tiers.packed["packed"], tiers.packed["packed"]
        count = new.table.shape[2]
        later = new.filled() & ~replace(new, lengths=self.packed).filled()
        mine.pool[mine.table[:, :, :count][later].long()] = new.pool[new.table[later].long()]
        self.tiers = replace(
            tiers, dense=self.tiers.dense, packed={"packed": replace(mine, asked=new.asked, factors=new.factors)}
        )
        rotations = mine.k.rotation, mine.v.rotation
        for to, x in zip(
            self.multipliers, ops.multipliers(*rotations, mine.d, mine.pool.device, new.factors), strict=True
        ):
            if to is not None and x is not None:
                to.copy_(x)
        self._packed(new.lengths - self.packed)
