"""`window`: the first tokens and the newest ones stay dense, everything between is packed in whole blocks.

Attention sinks (StreamingLLM, arXiv 2309.17453) and a recent window (KIVI, arXiv 2402.02750) are worth as much as
the codec at 4 bits and below; both are held in the model's precision and counted.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from tersekv.codec import Codec
from tersekv.dense_tier import DenseTier
from tersekv.errors import InputError, SpecError
from tersekv.packed_tier import PackedTier
from tersekv.policy.base import Asked, Policy
from tersekv.tiers import Evicted, Tiers


@dataclass(frozen=True)
class Window(Policy):
    """Keep the first `sink` and at least the last `recent` tokens dense."""

    sink: int = 4
    recent: int = 64

    decodes_as_window: ClassVar = True

    def __post_init__(self) -> None:
        for name in ("sink", "recent"):
            if getattr(self, name) < 0:
                raise SpecError(f"{name}={getattr(self, name)} is negative. Give a number of tokens, 0 or more.")

    def tiers(self, k: Codec, v: Codec, empty: DenseTier) -> Tiers:
        packed = PackedTier.empty(k, v, empty)
        return Tiers({"sink": empty, "recent": empty}, {"packed": packed}, Evicted.none(empty.lengths))

    def place(self, tiers: Tiers, fresh: DenseTier, asked: Asked | None = None) -> Tiers:
        """New tokens fill the sink, then the recent tier; its oldest whole blocks are packed."""
        tiers = self._filled(tiers, fresh)
        recent, packed = tiers.dense["recent"], tiers.packed["packed"]
        due = np.maximum(recent.lengths - self.recent, 0) // packed.block * packed.block
        if not due.any():
            return tiers
        packed = packed.append(recent.take(np.zeros_like(due), due))
        recent = recent.take(due, recent.lengths - due).owned()
        return replace(tiers, dense=tiers.dense | {"recent": recent}, packed={"packed": packed})

    def _filled(self, tiers: Tiers, fresh: DenseTier) -> Tiers:
        sink, recent = tiers.dense["sink"], tiers.dense["recent"]
        missing = np.clip(self.sink - tiers.seen, 0, fresh.lengths)
        if missing.any():
            sink = sink.append(fresh.take(np.zeros_like(missing), missing))
            fresh = fresh.take(missing, fresh.lengths - missing)
        return replace(tiers, dense=tiers.dense | {"sink": sink, "recent": recent.append(fresh)})

    def room(self, tiers: Tiers) -> int:
        to_sink = np.maximum(self.sink - tiers.seen, 0)
        to_recent = self.recent + tiers.packed["packed"].block - tiers.dense["recent"].lengths
        return int((to_sink + to_recent).min())

    def crop(self, tiers: Tiers, length: Int[np.ndarray, "b"]) -> Tiers:
        """A block that is cut through becomes dense for good: its kept tokens move to the sink tier, so nothing is
        ever encoded twice. Raises InputError where evicted tokens would belong to what is kept.
        """
        length = length[:, None]
        if (gone := length < tiers.evicted.below).any():
            kept = np.broadcast_to(length, gone.shape)[gone].min()
            raise InputError(
                f"A cache cannot return to its first {kept} tokens: some below position "
                f"{tiers.evicted.below[gone].max()} were evicted. Prefill again, or use policy=window."
            )
        sink, recent = tiers.dense["sink"].below(length), tiers.dense["recent"].below(length)
        packed = tiers.packed["packed"]
        whole = packed.tokens_below(length)
        if (whole < packed.lengths).any():
            cut = packed.decoded().take(whole, np.minimum(packed.lengths - whole, packed.block))
            sink, packed = sink.append(cut.below(length)), packed.keep(whole)
        return replace(tiers, dense={"sink": sink, "recent": recent}, packed={"packed": packed})

    def blocks(self, held: int, block: int) -> int:
        return max(held - self.sink - self.recent, 0) // block
