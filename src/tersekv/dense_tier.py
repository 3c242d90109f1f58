"""Tokens of one layer in the model's own precision. Immutable: an operation returns a new tier."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tersekv.ops import Partial, attend_dense, dense_part
from tersekv.ragged import Lengths, gather, join, take


@dataclass(frozen=True)
class DenseTier:
    """Tokens in the model's own precision; the first `lengths` of each row count."""

    k: Float[Tensor, "b h t d"]
    v: Float[Tensor, "b h t d"]
    positions: Int[Tensor, "b h t"]
    lengths: Lengths

    rounded: ClassVar[bool] = False  # whether its tokens are read as they came

    @staticmethod
    def empty(b: int, h: int, d: int, dtype: torch.dtype, device: torch.device) -> "DenseTier":
        x = torch.empty(b, h, 0, d, dtype=dtype, device=device)
        positions = torch.empty(b, h, 0, dtype=torch.int32, device=device)
        return DenseTier(x, x, positions, np.zeros((b, h), dtype=np.int64))

    def tensors(self) -> dict[str, Tensor]:
        return {"k": self.k, "v": self.v, "positions": self.positions}

    def take(self, start: Lengths, count: Lengths) -> "DenseTier":
        return self._changed(lambda x: take(x, start, count), count)

    def append(self, other: "DenseTier") -> "DenseTier":
        joined = {n: join(x, self.lengths, other.tensors()[n], other.lengths) for n, x in self.tensors().items()}
        return replace(self, **joined, lengths=self.lengths + other.lengths)

    def where(self, mask: Bool[Tensor, "b h t"]) -> "DenseTier":
        """The tokens that the mask chooses, in their order; it chooses none beyond the lengths."""
        count = mask.sum(-1).cpu().numpy()
        order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)[..., : int(count.max(initial=0))]
        return self._changed(lambda x: gather(x, order), count)

    def sorted(self) -> "DenseTier":
        """In the order of positions."""
        counted = torch.from_numpy(np.arange(self.k.shape[2]) < self.lengths[..., None]).to(self.k.device)
        order = torch.where(counted, self.positions, torch.iinfo(torch.int32).max).argsort(-1)
        return self._changed(lambda x: gather(x, order), self.lengths)

    def select(self, rows: Int[Tensor, "rows"]) -> "DenseTier":
        return self._changed(lambda x: x.index_select(0, rows), self.lengths[rows.cpu().numpy()])

    def below(self, length: Int[np.ndarray, "b 1"]) -> "DenseTier":
        """The tokens at positions below `length`; positions ascend within a row."""
        counted = np.arange(self.positions.shape[2]) < self.lengths[..., None]
        kept = (counted & (self.positions.cpu().numpy() < length[..., None])).sum(-1)
        return self.take(np.zeros_like(kept), kept).owned()

    def owned(self) -> "DenseTier":
        """The same with storage of its own, so that no view keeps a longer tensor alive."""
        return self._changed(torch.clone, self.lengths)

    def _changed(self, change: Callable[[Tensor], Tensor], lengths: Lengths) -> "DenseTier":
        return replace(self, **{name: change(x) for name, x in self.tensors().items()}, lengths=lengths)

    def attend(self, q: Float[Tensor, "b hq n d"], scale: float, exact: bool = False) -> Partial:
        """In fp32, whether `exact` or not."""
        return attend_dense(q, self.k, self.v, torch.from_numpy(self.lengths), scale)

    @cached_property
    def part(self) -> Any:
        """What native code attends to, made once; None where it cannot."""
        return dense_part(self.k, self.v, self.lengths)

    def decoded(self) -> "DenseTier":
        return self
