"""`streaming`: the first tokens and the newest `keep`; everything between is given up (StreamingLLM).

arXiv 2309.17453: without the first tokens, which much attention goes to whatever they say, a model breaks as soon as
the window moves past them. Any codec: of the kept tokens, the last `recent` are dense and the others packed.

Differs from the paper: tokens keep the positions at which they came, where it counts positions within the cache; so a
text must still end where the model's own context does. Tokens leave in whole blocks.
"""

from dataclasses import dataclass, replace

import numpy as np

from tersekv.dense_tier import DenseTier
from tersekv.errors import SpecError
from tersekv.policy.base import Asked
from tersekv.policy.window import Window
from tersekv.tiers import Tiers


@dataclass(frozen=True)
class Streaming(Window):
    """Beside the sink, hold at least the last `keep` tokens and at most a block more than are due."""

    keep: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep < self.recent:
            raise SpecError(f"keep={self.keep} is less than recent={self.recent}, which are kept dense. Give more.")

    def place(self, tiers: Tiers, fresh: DenseTier, asked: Asked | None = None) -> Tiers:
        tiers = super().place(tiers, fresh)
        packed, recent = tiers.packed["packed"], tiers.dense["recent"]
        over = np.maximum(packed.lengths + recent.lengths - self.keep, 0) // packed.block * packed.block
        over = np.minimum(over, packed.lengths)
        if not over.any():
            return tiers
        last = np.maximum(over // packed.block - 1, 0)[..., None]
        below = np.take_along_axis(packed.starts.cpu().numpy(), last, -1)[..., 0].astype(np.int64) + packed.block
        left = {"packed": packed.without_first(over)}
        return replace(tiers, packed=left, evicted=tiers.evicted.more(over, below))

    def room(self, tiers: Tiers) -> int:
        """Until a block is packed or leaves: tokens that wait meanwhile change neither."""
        packed, recent = tiers.packed["packed"], tiers.dense["recent"]
        to_keep = self.keep + packed.block - packed.lengths - recent.lengths
        return min(super().room(tiers), int((np.maximum(self.sink - tiers.seen, 0) + to_keep).min()))

    def held(self, tokens: int) -> int:
        return min(tokens, self.sink + self.keep)
