"""The cache of one attention layer: its tiers, the policy that fills them, and attention over all of them."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tersekv.ops import attend_alone, attend_causal, merge
from tersekv.policy.base import Asked
from tersekv.ragged import take
from tersekv.spec import Spec
from tersekv.tiers import DenseTier

Padding = Int[np.ndarray, "b"]  # tokens at the left of a chunk that belong to no sequence


class Store:
    """Keys and values of one layer under one spec. A failed call leaves it unchanged."""

    def __init__(self, spec: Spec, b: int, h: int, d: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raises SpecError if a codec does not fit head dim `d`."""
        self.spec = spec
        self.tiers = spec.policy.tiers(spec.k, spec.v, DenseTier.empty(b, h, d, dtype, device))

    @property
    def lengths(self) -> Int[np.ndarray, "b"]:
        """Real tokens of each sequence, padding not counted."""
        return self.tiers.seen[:, 0]

    def append(
        self, k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"], padding: Padding, asked: Asked | None = None
    ) -> None:
        """Store new tokens; those that make a block due are encoded. `asked`: the queries that came with them."""
        start = np.broadcast_to(padding[:, None], k.shape[:2])
        count = k.shape[2] - start
        slots = np.arange(int(count.max(initial=0)))
        positions = (self.tiers.seen[..., None] + slots).astype(np.int32)
        placed = torch.from_numpy(positions).to(k.device)
        fresh = DenseTier(take(k, start, count), take(v, start, count), placed, count)
        self.tiers = self.spec.policy.place(self.tiers, fresh, asked)

    def extend(
        self,
        q: Float[Tensor, "b hq n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n d"],
        padding: Padding,
        scale: float,
        route: str = "fused",
    ) -> Float[Tensor, "b hq n d"]:
        """Attend from new tokens to all stored ones and causally to each other, then store them.

        With `prefill=packed` the chunk is taken in pieces that end where a block becomes due, so each token sees
        exactly what decoding token by token would show it; with `prefill=exact` a chunk sees itself undamaged.
        Routes: "fused" attends to packed tiers where they lie; "exact" does so in fp32 where kernels would compute in
        8-bit integers; "decoded" unpacks the whole history into one dense tier, slow, and the check on the others.
        """
        outputs = []
        for start, stop in self._pieces(k.shape[2]):
            now_q, now_k, now_v = (x[:, :, start:stop] for x in (q, k, v))
            pads = np.clip(padding - start, 0, stop - start)
            outputs.append(self._attend(now_q, now_k, now_v, pads, scale, route))
            self.append(now_k, now_v, pads, (now_q, scale))
        return torch.cat([out.to(q.dtype) for out in outputs], 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, pads: Padding, scale: float, route: str) -> Tensor:
        tiers = [self.decoded()] if route == "decoded" else self.tiers.all().values()
        stored = [tier.attend(q, scale, route == "exact") for tier in tiers if tier.lengths.any()]
        if not stored and not pads.any():
            return attend_alone(q, k, v, scale)
        return merge([*stored, attend_causal(q, k, v, torch.from_numpy(pads), scale)])[0]

    def _pieces(self, n: int) -> Iterator[tuple[int, int]]:
        start = 0
        while start < n:
            room = n if self.spec.prefill == "exact" else self.spec.policy.room(self.tiers)
            stop = min(start + room, n)
            yield start, stop
            start = stop

    def decoded(self) -> DenseTier:
        """Every stored token in the order of its position, unpacked."""
        parts = [tier.decoded() for tier in self.tiers.all().values()]
        whole = parts[0]
        for part in parts[1:]:
            whole = whole.append(part)
        counted = torch.from_numpy(np.arange(whole.k.shape[2]) < whole.lengths[..., None]).to(whole.k.device)
        order = torch.where(counted, whole.positions, torch.iinfo(torch.int32).max).argsort(-1)
        k, v = (x.gather(2, order[..., None].expand_as(x)) for x in (whole.k, whole.v))
        return DenseTier(k, v, whole.positions.gather(2, order), whole.lengths)

    def crop(self, lengths: Int[np.ndarray, "b"]) -> None:
        """Keep the first `lengths` real tokens of each sequence; see the policy for a block that is cut through."""
        self.tiers = self.spec.policy.crop(self.tiers, lengths)

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        """Sequences `rows`, in that order; a sequence may repeat."""
        self.tiers = self.tiers.select(rows)
