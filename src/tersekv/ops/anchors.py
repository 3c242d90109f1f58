"""What an error in a token's key or value does to attention outputs: the scores by which anchor tokens are chosen.

AnTKV (arXiv 2506.19505), theorem 3.1, to first order, with attention weights A, outputs o and one query row i each:

    column   sum_i A_ij                                     an error of value j, its size aside
    value    sum_i A_ij |v_j|_1                             the same, if errors grow with values
    key      sum_i A_ij |v_j - o_i|_1 |q_i|_2 scale         an error of key j: V^T (diag(A_i) - A_i^T A_i) e_j is
                                                            A_ij (v_j - o_i), and the error moves its logit by q_i
Only log-sum-exps and outputs are needed, so tokens are scored in tiles after any FlashAttention-like pass.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tersekv.ops.attention import attend_causal
from tersekv.ops.pages import Partial

SCORES = ("column", "value", "key")
TILE_QUERIES = 256


def anchor_scores(
    q: Float[Tensor, "b hq n d"],
    k: Float[Tensor, "b h t d"],
    v: Float[Tensor, "b h t d"],
    attended: Partial,
    scale: float,
    visible: Bool[Tensor, "b n t"],
    score: str,
) -> Float[Tensor, "b h t"]:
    """Scores of tokens from `n` queries, summed over the query heads of their KV head.

    `attended`: output and log-sum-exp of each query over all that it sees, these tokens among it. `visible`: which
    queries count for which tokens.
    """
    h, (out, lse) = k.shape[1], attended
    rows, out, lse = (x.float().unflatten(1, (h, -1)).flatten(2, 3) for x in (q, out, lse))
    seen = visible.repeat(1, q.shape[1] // h, 1)[:, None]
    weights = torch.exp((rows @ k.float().mT * scale - lse[..., None]).masked_fill(~seen, -torch.inf))
    if score == "key":
        weights = weights * torch.cdist(out, v.float(), p=1) * (rows.norm(dim=-1) * scale)[..., None]
    total = weights.sum(-2)
    return total * v.float().abs().sum(-1) if score == "value" else total


def causal_scores(
    q: Float[Tensor, "b hq t d"], k: Float[Tensor, "b h t d"], v: Float[Tensor, "b h t d"], scale: float, score: str
) -> Float[Tensor, "b h t"]:
    """Scores of all tokens of a text from all queries, each seeing itself and what came before; no (t, t) matrix."""
    none = torch.zeros(len(q), dtype=torch.int64)
    out, lse = attend_causal(q, k, v, none, scale)
    total = torch.zeros(k.shape[:3], device=k.device)
    for start in range(0, q.shape[2], TILE_QUERIES):
        stop = min(start + TILE_QUERIES, q.shape[2])
        at, keys = torch.arange(start, stop, device=k.device), torch.arange(stop, device=k.device)
        visible = (keys <= at[:, None]).expand(len(q), -1, -1)
        tile = slice(start, stop)
        attended = out[:, :, tile], lse[:, :, tile]
        total[..., :stop] += anchor_scores(
            q[:, :, tile], k[:, :, :stop], v[:, :, :stop], attended, scale, visible, score
        )
    return total
