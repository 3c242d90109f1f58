"""`wholesequence`: for evaluation only: nothing is packed, each read rounds a copy with ranges of all tokens so far.

The form in which nd-kv-quant (software; no paper) is published: ranges of the whole sequence. A token that comes later
may change what every earlier one is read as, so there is nothing to store, and no byte is saved. It is here to measure
what a block's own ranges cost `direction` or gain: see docs/methods/direction.md.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tersekv.codec import Codec
from tersekv.dense_tier import DenseTier
from tersekv.layout import BLOCK
from tersekv.ops import Partial
from tersekv.policy.base import Asked
from tersekv.policy.window import Window
from tersekv.tiers import Evicted, Tiers


@dataclass(frozen=True)
class RoundedTier(DenseTier):
    """Dense tokens that are read as their codecs make them, of all tokens of the tier together."""

    codecs: tuple[Codec, Codec]

    rounded: ClassVar = True

    @cached_property
    def _read(self) -> DenseTier:
        counted = torch.from_numpy(np.arange(self.k.shape[2]) < self.lengths[..., None]).to(self.k.device)
        sides = zip(self.codecs, (self.k, self.v), strict=True)
        k, v = (codec.rounded(x, counted).to(x.dtype) for codec, x in sides)
        return DenseTier(k, v, self.positions, self.lengths)

    def decoded(self) -> DenseTier:
        return self._read

    def attend(self, q: Float[Tensor, "b hq n d"], scale: float, exact: bool = False) -> Partial:
        return self._read.attend(q, scale, exact)

    @cached_property
    def part(self) -> Any:
        """None: native code would attend to the tokens themselves."""
        return None


@dataclass(frozen=True)
class WholeSequence(Window):
    """As the window, in blocks of 64 too, but what leaves it stays dense. Codecs: `direction` with codebook=channel."""

    evaluation_only: ClassVar = True

    def tiers(self, k: Codec, v: Codec, empty: DenseTier) -> Tiers:
        """Raises SpecError for a codec that has no such form."""
        for codec in (k, v):
            codec.rounded(empty.k, torch.ones(empty.k.shape[:3], dtype=torch.bool, device=empty.k.device))
        rounded = RoundedTier(empty.k, empty.v, empty.positions, empty.lengths, (k, v))
        return Tiers({"sink": empty, "recent": empty, "rounded": rounded}, {}, Evicted.none(empty.lengths))

    def place(self, tiers: Tiers, fresh: DenseTier, asked: Asked | None = None) -> Tiers:
        tiers = self._filled(tiers, fresh)
        recent = tiers.dense["recent"]
        due = np.maximum(recent.lengths - self.recent, 0) // BLOCK * BLOCK
        if not due.any():
            return tiers
        rounded = tiers.dense["rounded"].append(recent.take(np.zeros_like(due), due))
        recent = recent.take(due, recent.lengths - due).owned()
        return replace(tiers, dense=tiers.dense | {"recent": recent, "rounded": rounded})

    def room(self, tiers: Tiers) -> int:
        to_sink = np.maximum(self.sink - tiers.seen, 0)
        return int((to_sink + self.recent + BLOCK - tiers.dense["recent"].lengths).min())

    def crop(self, tiers: Tiers, length: Int[np.ndarray, "b"]) -> Tiers:
        return replace(tiers, dense={name: tier.below(length[:, None]) for name, tier in tiers.dense.items()})

    def blocks(self, held: int, block: int) -> int:
        return 0
