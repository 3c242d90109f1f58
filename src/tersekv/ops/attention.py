"""Attention over dense and packed tokens: the fp32 specification that every kernel is tested against.

Each function returns the output and its log-sum-exp, so that parts computed apart (tiers, tiles, splits) are joined
by `merge`. Query heads share KV heads in groups of g = hq / h; lengths are ragged for each sequence and KV head.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tersekv.ops.pages import Pages, Partial

TILE_QUERIES = 256


def attend_dense(
    q: Float[Tensor, "b hq n d"],
    k: Float[Tensor, "b h t d"],
    v: Float[Tensor, "b h t e"],
    lengths: Int[Tensor, "b h"],
    scale: float,
    visible: Bool[Tensor, "b n t"] | None = None,
) -> Partial:
    """softmax(q k^T * scale) v over the first `lengths` tokens, where `visible` allows; fp32 throughout.

    Keys and values may have another width each, as some codecs fold them.
    A query that sees nothing gives output 0 and log-sum-exp -inf. What lies beyond `lengths` is never used, be it NaN.
    """
    b, hq, n, d = q.shape
    h, t = k.shape[1:3]
    mask = (torch.arange(t, device=q.device) < lengths[..., None].to(q.device))[:, :, None, None]
    v = torch.where(mask[:, :, 0, 0, :, None], v.float(), 0)
    if visible is not None:
        mask = mask & visible[:, None, None]
    q, k = q.float().view(b, h, hq // h, n, d), k.float()
    scores = torch.matmul(q.flatten(2, 3), k.mT).view(b, h, hq // h, n, t) * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0, lse)[..., None])
    out = torch.matmul(weights.flatten(2, 3), v).view(b, hq, n, v.shape[-1])
    return out, lse.view(b, hq, n)


def attend_causal(
    q: Float[Tensor, "b hq n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    padding: Int[Tensor, "b"],
    scale: float,
) -> Partial:
    """Attention of new tokens among themselves; the first `padding` of each sequence are seen by nobody."""
    n = q.shape[2]
    parts = []
    for start in range(0, n, TILE_QUERIES):
        stop = min(start + TILE_QUERIES, n)
        keys, queries = torch.arange(stop, device=q.device), torch.arange(start, stop, device=q.device)
        visible = (keys <= queries[:, None]) & (keys >= padding.to(q.device)[:, None, None])
        lengths = torch.full(k.shape[:2], stop)
        tile = (q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop])
        parts.append(attend_dense(*tile, lengths, scale, visible))
    return torch.cat([o for o, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def attend_alone(
    q: Float[Tensor, "b hq n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"], scale: float
) -> Float[Tensor, "b hq n d"]:
    """Causal attention of a first chunk: nothing is stored yet, so the host's own kernel does, and exactly as dense."""
    return sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def weight_variance(
    lse: Float[Tensor, "b hq n"], doubled: Float[Tensor, "b hq n"], count: Int[Tensor, "b n"]
) -> Float[Tensor, "b n"]:
    """Variance of each query's attention weights over the `count` tokens it sees, mean over heads.

    From two log-sum-exps, one of them at twice the scale, because sum_j a_j^2 = exp(lse(2 s) - 2 lse(s)): no kernel has
    to show its weights. NaN for a query that sees nothing.
    """
    squares = torch.exp(doubled - 2 * lse)
    return (squares / count[:, None] - 1 / count[:, None].square()).mean(1)


def attend_pages(q: Float[Tensor, "b hq n d"], pages: Pages, scale: float) -> Partial:
    """Attention of folded queries over packed pages, in the values' folded domain."""
    return merge(attend_dense(q, k, v, lengths, scale) for k, v, lengths in pages.tiles())


def merge(parts: Iterable[Partial]) -> Partial:
    """Join attention over disjoint token sets: outputs weighted by their share of the total exponential mass."""
    iterator = iter(parts)
    out, lse = next(iterator)
    for o, part in iterator:
        total = torch.logaddexp(lse, part)
        finite = torch.where(total == -torch.inf, 0, total)
        out = out * torch.exp(lse - finite)[..., None] + o * torch.exp(part - finite)[..., None]
        lse = total
    return out, lse
