"""One factor a channel: keys are multiplied by it and queries divided, so products stay and codes lose less.

Codes of a rotated key have an error that is as large in every channel, in proportion to the key. Without error feedback
queries see least of it with f^2 = rms(q) / rms(k) (Cauchy-Schwarz), which is SmoothQuant's migration (arXiv 2211.10438,
equation 4) and QServe's SmoothAttention (arXiv 2405.04532, section 4.2). With all of it (`ops.feedback`) the sizes of
queries multiply the same for any f, and f = 1 / rms(k) is best. Feedback is damped; what lies half-way between the two,
in octaves, did best on three models together: docs/methods/queryaware.md.
"""

import torch
from jaxtyping import Float
from torch import Tensor

LEAST = 2.0**-20  # of a mean square, beside the mean over channels
MOST = 8  # octaves


def balanced(
    queries: Float[Tensor, "*lead d"], keys: Float[Tensor, "*lead blocks block d"]
) -> Float[Tensor, "*lead d"]:
    """Factors of keys, in fp32: f^2 = rms(q)^(1/2) / rms(k)^(3/2), with a geometric mean of about 1.

    From sums of squares of queries, in any unit, and from blocks of keys, of which codes do not see the mean. Powers of
    two, so that products are exact, and the last bit of a sum decides nothing. All 1 where there are no queries, or
    where keys do not differ.
    """
    spread = keys.double().nan_to_num().var(-2, correction=0).mean(-2)
    octaves = _octaves(queries.double()) / 4 - _octaves(spread) * 3 / 4
    known = (queries.sum(-1, keepdim=True) > 0) & (spread.sum(-1, keepdim=True) > 0)
    octaves = (octaves - octaves.mean(-1, keepdim=True)).round().clamp(-MOST, MOST)
    return torch.where(known, octaves, 0).exp2().float()


def multiplied(
    keys: Float[Tensor, "*lead t d"], factors: Float[Tensor, "*lead d"] | None
) -> Float[Tensor, "*lead t d"]:
    """Keys times their factors in fp32; as they are where there are no factors."""
    return keys if factors is None else keys.float() * factors[..., None, :]


def _octaves(squares: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
    """Logarithms of the roots, without zeros, which have none, and alike in the two channels of a pair.

    RoPE turns channels i and i + d/2 into each other as positions grow: at 8,192 tokens factors of their own, from the
    first tokens, are worse than none. A model that pairs other channels gets coarser factors by this, not wrong ones.
    """
    pairs = squares.unflatten(-1, (2, -1)).mean(-2).tile(2)
    mean = pairs.mean(-1, keepdim=True)
    return (pairs.maximum(LEAST * mean) + (mean == 0)).log2() / 2
