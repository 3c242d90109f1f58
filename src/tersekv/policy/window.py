"""`window`: the first tokens and the newest ones stay dense, everything between is packed in whole blocks.

Attention sinks (StreamingLLM, arXiv 2309.17453) and a recent window (KIVI, arXiv 2402.02750) are worth as much as
the codec at 4 bits and below; both are held in the model's precision and counted.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from tersekv.codec import Codec
from tersekv.errors import SpecError
from tersekv.tiers import DenseTier, PackedTier, Tiers


@dataclass(frozen=True)
class Window:
    """Keep the first `sink` and at least the last `recent` tokens dense."""

    sink: int = 4
    recent: int = 64

    def __post_init__(self) -> None:
        for name in ("sink", "recent"):
            if getattr(self, name) < 0:
                raise SpecError(f"{name}={getattr(self, name)} is negative. Give a number of tokens, 0 or more.")

    def tiers(self, k: Codec, v: Codec, empty: DenseTier) -> Tiers:
        """The tiers of a layer that has seen no token."""
        return Tiers({"sink": empty, "recent": empty}, {"packed": PackedTier.empty(k, v, empty)})

    def place(self, tiers: Tiers, fresh: DenseTier) -> Tiers:
        """New tokens fill the sink, then the recent tier; its oldest whole blocks are packed."""
        sink, recent, packed = tiers.dense["sink"], tiers.dense["recent"], tiers.packed["packed"]
        missing = np.clip(self.sink - tiers.seen, 0, fresh.lengths)
        if missing.any():
            sink = sink.append(fresh.take(np.zeros_like(missing), missing))
            fresh = fresh.take(missing, fresh.lengths - missing)
        recent = recent.append(fresh)
        due = np.maximum(recent.lengths - self.recent, 0) // packed.block * packed.block
        if due.any():
            packed = packed.append(recent.take(np.zeros_like(due), due))
            recent = recent.take(due, recent.lengths - due).owned()
        return Tiers({"sink": sink, "recent": recent}, {"packed": packed})

    def room(self, tiers: Tiers) -> int:
        """How many tokens every sequence can take before a block is due in one of them; at least 1."""
        to_sink = np.maximum(self.sink - tiers.seen, 0)
        to_recent = self.recent + tiers.packed["packed"].block - tiers.dense["recent"].lengths
        return int((to_sink + to_recent).min())

    def crop(self, tiers: Tiers, length: Int[np.ndarray, "b"]) -> Tiers:
        """Keep the tokens at positions below `length`. A block that is cut through becomes dense for good: its kept
        tokens move to the sink tier, so nothing is ever encoded twice.
        """
        length = length[:, None]
        sink, recent = tiers.dense["sink"].below(length), tiers.dense["recent"].below(length)
        packed = tiers.packed["packed"]
        whole = packed.tokens_below(length)
        if (whole < packed.lengths).any():
            cut = packed.decoded().take(whole, np.minimum(packed.lengths - whole, packed.block))
            sink, packed = sink.append(cut.below(length)), packed.keep(whole)
        return Tiers({"sink": sink, "recent": recent}, {"packed": packed})
