"""New tokens of a layer that its policy has not been given yet, and a decoding step in one native call."""

from threading import Lock

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tersekv import ops
from tersekv.accounting import storage_bytes
from tersekv.dense_tier import DenseTier
from tersekv.policy.base import Policy
from tersekv.tiers import Tiers

ROOM = 16  # tokens: few enough to hold, many enough that a change of tiers is paid once in a while


class Tail:
    """Room behind the tiers, the same number of tokens in every row, written in place.

    What is written is never changed, so that a layer's state is its tiers, its tail, and how many tokens of the tail
    are its own. Only who holds all that is written may write on. For anybody else, such as a cache that was rolled
    back while a copy went on, something is in the way.
    """

    def __init__(self, tiers: Tiers, room: int, q: Tensor | None = None) -> None:
        """`q`: queries such as those that must be kept with the tokens, because the policy asks for them."""
        like = tiers.dense["recent"].k
        b, h, _, d = like.shape
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside of it
            self.k, self.v = (torch.empty(b, h, room, d, dtype=like.dtype, device=like.device) for _ in range(2))
            self.q = None if q is None else q.new_empty(b, q.shape[1], room, d)
        self.tiers, self.room, self.written, self.lock = tiers, room, 0, Lock()
        self.parts = [tier.part for tier in tiers.all().values()]
        self.native = ops.tail(self.k, self.v)

    @staticmethod
    def behind(tiers: Tiers, policy: Policy, q: Tensor) -> "Tail | None":
        """A tail for queries such as `q`, or None where native code cannot do their steps, or no token may wait."""
        asking = policy.asking(tiers)
        if not ops.few_on_processor(q) or (asking and not policy.decodes_as_window):
            return None
        if any(tier.part is None for tier in tiers.all().values()):
            return None
        return Tail(tiers, min(policy.room(tiers), ROOM), q if asking else None)

    def full(self, count: int) -> bool:
        return count == self.room

    def settled(self, policy: Policy, count: int) -> Tiers:
        """The tiers after the first `count` tokens, which the policy is given now."""
        asked = None if self.q is None else (self.q[:, :, :count], self.scale)
        return policy.place(self.tiers, self.tokens(count), asked) if count else self.tiers

    def planes(self) -> dict[str, int]:
        """Bytes that are held beside the tiers'."""
        return {name: storage_bytes(x) for name, x in (("k", self.k), ("v", self.v), ("q", self.q)) if x is not None}

    def claim(self, held: int, more: int) -> bool:
        """Whether the holder of the first `held` tokens may write `more`; from then on nobody else may."""
        with self.lock:
            mine = self.written == held and held + more <= self.room
            if mine:
                self.written += more
        return mine

    def step(
        self,
        q: Float[Tensor, "b hq n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n d"],
        held: int,
        scale: float,
        exact: bool,
    ) -> Float[Tensor, "b hq n d"] | None:
        """Write tokens that were claimed, and attend to all tokens, causally to the new ones. See `ops.step`."""
        out = ops.step(q, k, v, self.parts, self.native, held, scale, exact)
        if self.q is not None and out is not None:
            self.q[:, :, held : held + q.shape[2]], self.scale = q, scale
        return out

    def tokens(self, count: int) -> DenseTier:
        """The first `count`, as a policy takes them."""
        seen = self.tiers.seen
        positions = torch.from_numpy((seen[..., None] + np.arange(count)).astype(np.int32)).to(self.k.device)
        return DenseTier(self.k[:, :, :count], self.v[:, :, :count], positions, np.full_like(seen, count))
