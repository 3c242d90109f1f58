"""Which part of its attention a query gives to stored blocks, from log-sum-exps alone: no kernel shows its weights."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tersekv.dense_tier import DenseTier
from tersekv.ops import attend_pages
from tersekv.packed_tier import PackedTier
from tersekv.ragged import Lengths

BLOCKS = 256  # blocks at a time, so that no long history has all its partial outputs at once
Observed = tuple[Float[Tensor, "b h g m d"], float, Int[Tensor, "b h m"]]


def observed(q: Float[Tensor, "b hq n d"], scale: float, seen: Lengths, fresh: Lengths, most: int) -> Observed:
    """The last `most` queries by KV head, with the softmax scale and their positions; -1 where a query is padding.

    `seen`: tokens of each row, of which the last `fresh` came with the queries.
    """
    m = min(most, q.shape[2])
    at = seen[..., None] - m + np.arange(m)
    at = np.where(at >= (seen - fresh)[..., None], at, -1)
    return q[:, :, -m:].float().unflatten(1, (seen.shape[1], -1)), scale, torch.from_numpy(at).to(q.device)


def dense_scores(tier: DenseTier, asked: Observed) -> Float[Tensor, "b h g m t"]:
    """Scores of dense tokens, -inf for those that a query cannot see yet."""
    q, scale, at = asked
    scores = torch.einsum("bhgmd,bhtd->bhgmt", q, tier.k.float()) * scale
    counted = torch.arange(tier.k.shape[2], device=q.device) < torch.from_numpy(tier.lengths).to(q.device)[..., None]
    visible = counted[:, :, None] & (tier.positions[:, :, None] <= at[..., None])
    return scores.masked_fill(~visible[:, :, None], -torch.inf)


def block_lses(tier: PackedTier, asked: Observed) -> Float[Tensor, "b h g m blocks"]:
    """Log-sum-exp over each packed block: attention to one block at a time, each as a sequence of its own."""
    q, scale, _ = asked
    b, h, g, m, _ = q.shape
    blocks, folded = tier.table.shape[2], tier.folded(q.flatten(1, 2))
    parts = [torch.empty(b, h, g, m, 0, device=q.device)]
    for first in range(0, blocks, BLOCKS):
        table = tier.table[..., first : first + BLOCKS].transpose(1, 2)
        n = table.shape[1]
        alone = table.reshape(b * n, h, 1)
        lengths = torch.where(alone[..., 0] >= 0, tier.block, 0).long()
        pages = replace(tier.pages, table=alone.contiguous(), lengths=lengths)
        lse = attend_pages(folded.repeat_interleave(n, 0), pages, scale)[1]
        parts.append(lse.view(b, n, h, g, m).movedim(1, -1).float())
    return torch.cat(parts, -1)


def blocks_of(scores: Float[Tensor, "b h g m t"], block: int) -> Float[Tensor, "b h g m blocks"]:
    """Log-sum-exp over each block of a dense tier of whole blocks."""
    return scores.unflatten(-1, (-1, block)).logsumexp(-1) if scores.shape[-1] else scores
