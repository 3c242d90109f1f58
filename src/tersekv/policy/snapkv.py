"""`snapkv`: of a prompt, each KV head holds the tokens that its last queries attend to (SnapKV).

arXiv 2404.14469, section 4: the queries of the prompt's last `observe` tokens vote with their attention, votes are
averaged over `pool` neighbours, and the best of each head are kept, with the observing tokens. Any codec packs them.

Differs from the paper: query heads that share a KV head vote together; the first `sink` tokens are always kept. The
prompt is the first chunk, so it must come in one piece and be seen whole: `prefill=exact`.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool1d

from tersekv.dense_tier import DenseTier
from tersekv.errors import InputError, SpecError
from tersekv.policy.base import Asked
from tersekv.policy.window import Window
from tersekv.ragged import gather
from tersekv.tiers import Tiers


@dataclass(frozen=True)
class SnapKV(Window):
    """Of a longer prompt, hold `keep` tokens a head, sink and observing tokens among them."""

    keep: int = 1024
    observe: int = 32
    pool: int = 7

    prefills: ClassVar = ("exact",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.observe < 1 or self.keep < self.sink + self.observe:
            raise SpecError(
                f"keep={self.keep} must hold sink={self.sink} and observe={self.observe} tokens, at least one of these."
            )
        if self.pool < 1 or self.pool % 2 == 0:
            raise SpecError(f"pool={self.pool} must be an odd number of neighbours, such as 7; 1 is none.")

    def place(self, tiers: Tiers, fresh: DenseTier, asked: Asked | None = None) -> Tiers:
        if tiers.seen.any() or (fresh.lengths <= self.keep).all():
            return super().place(tiers, fresh)
        if asked is None:
            raise InputError("policy=snapkv needs the prompt's queries. Run inside `with tersekv.attached(model):`.")
        kept = self._selected(fresh, *asked)
        gone = fresh.lengths - kept.lengths
        tiers = super().place(tiers, kept)
        return replace(tiers, evicted=tiers.evicted.more(gone, fresh.lengths))

    def _selected(self, fresh: DenseTier, q: Tensor, scale: float) -> DenseTier:
        """The kept tokens of each row, in their order."""
        at, length = torch.arange(fresh.k.shape[2], device=q.device), torch.from_numpy(fresh.lengths).to(q.device)
        votes = self._votes(fresh, q, scale)
        always = (at < self.sink) | (at >= length[..., None] - self.observe)
        votes = votes.masked_fill(always, torch.inf).masked_fill(at >= length[..., None], -torch.inf)
        chosen = votes.argsort(dim=-1, descending=True, stable=True)[..., : self.keep].sort(-1).values
        kept = {name: gather(x, chosen) for name, x in fresh.tensors().items()}
        return DenseTier(**kept, lengths=np.minimum(fresh.lengths, self.keep))

    def _votes(self, fresh: DenseTier, q: Tensor, scale: float) -> Float[Tensor, "b h t"]:
        """Attention that the last queries give to each token, over the query heads that share it."""
        b, h, t, d = fresh.k.shape
        q = q[:, :, -self.observe :].float().reshape(b, h, -1, d)
        scores = q @ fresh.k.float().mT * scale
        heads = scores.shape[2] // min(self.observe, scores.shape[2])
        length = torch.from_numpy(fresh.lengths).to(q.device)[..., None, None]
        own = length - self.observe + torch.arange(self.observe, device=q.device).repeat(heads)[:, None]
        scores = scores.masked_fill(torch.arange(t, device=q.device) > own, -torch.inf)
        votes = scores.softmax(-1).sum(2)
        return avg_pool1d(votes, self.pool, stride=1, padding=self.pool // 2, count_include_pad=False)
