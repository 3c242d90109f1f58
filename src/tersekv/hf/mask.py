"""Attention masks: a packed layer needs the padding alone, so a causal mask is written out only for other layers."""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AttentionMaskInterface

from tersekv.errors import InputError
from tersekv.store import Padding, Store


class ChunkMask:
    """The mask of a forward pass, not written yet; `tokens` is the host's own 2D mask (b, stored + new), if any."""

    def __init__(self, former: str, arguments: dict[str, Any]) -> None:
        self.former, self.arguments = former, arguments
        self.tokens: Tensor | None = arguments["attention_mask"]

    @cached_property
    def dense(self) -> Any:
        """As the attention that the model had before wants it."""
        return AttentionMaskInterface()[self.former](**self.arguments)


class Shown:
    """What a 2D mask (b, stored + n) shows of stored tokens and of `n` new ones. The device is looked at once."""

    def __init__(self, mask: Tensor | None, n: int) -> None:
        self.mask, self.n = mask, n

    @cached_property
    def _counts(self) -> Int[np.ndarray, "b counts"] | None:
        """How many stored tokens, and then which new ones."""
        if self.mask is None:
            return None
        mask = self.mask.bool()
        return torch.cat((mask[:, : -self.n].sum(-1, keepdim=True), mask[:, -self.n :]), 1).cpu().numpy()

    @cached_property
    def padding(self) -> Padding:
        """Tokens at the left of the chunk that the host masks out, for each sequence; None if it masks out none."""
        if self._counts is None:
            return None
        fresh = self._counts[:, 1:].astype(bool)
        padding = self.n - fresh.sum(-1)
        if not (fresh == (np.arange(self.n) >= padding[:, None])).all():
            raise InputError(
                "The attention mask hides tokens in the middle or at the right of the new ones. A packed cache takes "
                'left padding only: use tokenizer.padding_side = "left".'
            )
        return padding if padding.any() else None

    def check(self, held: Store) -> None:
        """Raise InputError if the mask hides other stored tokens than those that were padding when they came."""
        if self._counts is not None and not np.array_equal(self._counts[:, 0], held.lengths):
            raise InputError(
                f"The attention mask shows {self._counts[:, 0].tolist()} stored tokens, but the cache holds "
                f"{held.lengths.tolist()}. "
                "Pass the mask of the whole conversation, unchanged for the part already seen."
            )
