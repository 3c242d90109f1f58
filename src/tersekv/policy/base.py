"""What a policy is. A new one is one frozen dataclass in `policy/` and one line in `spec.POLICIES`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from tersekv.codec import Codec
from tersekv.dense_tier import DenseTier
from tersekv.tiers import Tiers

Asked = tuple[Float[Tensor, "b hq n d"], float]  # queries of new tokens, and the softmax scale


@dataclass(frozen=True)
class Policy(ABC):
    """Which token goes to which tier, and when. The fields are the configuration."""

    prefills: ClassVar[tuple[str, ...]] = ("exact", "packed")  # see `spec.Spec`
    # Whether decoding is the window's: new tokens wait in "recent", and its oldest whole blocks are packed. Not
    # inherited: a policy that places tokens otherwise than its parent must not be taken for it.
    decodes_as_window: ClassVar[bool] = False
    asks: ClassVar[bool] = False  # whether `place` needs the queries of every token
    evaluation_only: ClassVar[bool] = False  # whether nothing is packed, so that no byte is saved

    def __init_subclass__(cls) -> None:
        cls.decodes_as_window = cls.__dict__.get("decodes_as_window", False)

    @abstractmethod
    def tiers(self, k: Codec, v: Codec, empty: DenseTier) -> Tiers:
        """The tiers of a layer that has seen no token."""

    @abstractmethod
    def place(self, tiers: Tiers, fresh: DenseTier, asked: Asked | None = None) -> Tiers:
        """The tiers with new tokens. `asked` is what came with them, or None where the host shows no queries.

        The newest n of a row's tokens belong to the last n queries, whatever its padding.
        """

    @property
    def calibration_seconds(self) -> float | None:
        """How long it took to fit what the policy reads of a file, where that says it."""
        return None

    def asking(self, tiers: Tiers) -> bool:
        """As `asks`, for the tokens that come next to these tiers."""
        return self.asks

    @abstractmethod
    def room(self, tiers: Tiers) -> int:
        """How many tokens every sequence can take before a block of one of them is packed or evicted; at least 1."""

    @abstractmethod
    def crop(self, tiers: Tiers, length: Int[np.ndarray, "b"]) -> Tiers:
        """Keep the tokens at positions below `length`."""

    @abstractmethod
    def blocks(self, held: int, block: int) -> int:
        """How many whole blocks of `held` tokens are packed."""

    def beside(self, d: int) -> int:
        """Bytes of each KV head that are held beside tokens, whatever the context."""
        return 0

    def held(self, tokens: int) -> int:
        """How many of `tokens` are held; all of them, unless the policy evicts."""
        return tokens
