"""Weighted k-means, many problems of one size at a time."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

VALUES = 2**20  # distances held at a time: they stay in a cache until the least is found


def kmeans(
    x: Float[Tensor, "p n dim"], weights: Float[Tensor, "p n"], entries: int, rounds: int, seed: int
) -> Float[Tensor, "p entries dim"]:
    """Centroids that make sum_j w_j |x_j - c(x_j)|^2 small, of each of `p` problems (Lloyd 1982, with weights).

    Begins with points drawn in proportion to their weights; an entry that nobody chooses moves to the point that is
    worst off. `n` must be at least `entries`. On a GPU sums are added in no fixed order: two runs differ by rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(weights.double().clamp(min=1e-30).cpu(), entries, generator=generator)
    table = _rows(x, drawn.to(x.device)).clone()
    for _ in range(rounds):
        chosen = assigned(x, table)
        mass = torch.zeros(*table.shape[:2], device=x.device).scatter_add_(1, chosen, weights)
        spread = chosen[..., None].expand_as(x)
        total = torch.zeros_like(table).scatter_add_(1, spread, x * weights[..., None])
        table = torch.where(mass[..., None] > 0, total / mass[..., None].clamp(min=1e-30), table)
        _refill(x, weights, table, chosen, mass)
    return table


def assigned(x: Float[Tensor, "p n dim"], table: Float[Tensor, "p entries dim"]) -> Int[Tensor, "p n"]:
    """The nearest entry of each point."""
    less, across = table.square().sum(-1)[:, None] / -2, table.mT
    step = max(1, VALUES // (table.shape[0] * table.shape[1]))
    return torch.cat([torch.baddbmm(less, some, across).argmax(-1) for some in x.split(step, 1)], 1)


def nearest(x: Float[Tensor, "p n dim"], table: Float[Tensor, "p entries dim"]) -> Float[Tensor, "p n dim"]:
    return _rows(table, assigned(x, table))


def distortion(x: Tensor, weights: Tensor, table: Tensor) -> Float[Tensor, "p"]:
    """Weighted mean of |x - c(x)|^2."""
    left = (x - nearest(x, table)).square().sum(-1)
    return (left * weights).sum(-1) / weights.sum(-1)


def _refill(x: Tensor, weights: Tensor, table: Tensor, chosen: Tensor, mass: Tensor) -> None:
    """In place: entries without points become the points that cost most."""
    empty = mass <= 0
    most = int(empty.sum(-1).max())
    if not most:
        return
    cost = (x - _rows(table, chosen)).square().sum(-1) * weights
    worst = cost.topk(most, -1).indices
    for problem in torch.nonzero(empty.any(-1))[:, 0].tolist():
        gone = torch.nonzero(empty[problem])[:, 0]
        table[problem, gone] = x[problem, worst[problem, : len(gone)]]


def _rows(x: Float[Tensor, "p n dim"], index: Int[Tensor, "p m"]) -> Float[Tensor, "p m dim"]:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
