"""Levels of precision for many tokens, or layers, under one budget."""

import numpy as np
from jaxtyping import Float, Int

ROUNDS = 40  # halvings of the price's interval


def allocate(
    utility: Float[np.ndarray, "rows n levels"], cost: Int[np.ndarray, "levels"], budget: int
) -> Int[np.ndarray, "rows n"]:
    """The level of each item: a row's utilities sum to much, its costs to at most `budget`, and to no less than fits.

    Lagrangian: each item takes the level with the best utility less price times cost; the price is halved in on, then
    what is left is spent on the best next steps. `cost` ascends, and `budget` pays for the cheapest level everywhere.
    """
    spread = np.ptp(utility, axis=(1, 2))
    low, high = np.zeros(len(utility)), spread + 1e-300
    for _ in range(ROUNDS):
        price = (low + high) / 2
        fits = cost[_best(utility, cost, price)].sum(-1) <= budget
        low, high = np.where(fits, low, price), np.where(fits, price, high)
    chosen = _best(utility, cost, high)
    for row, levels in enumerate(chosen):
        _spend(utility[row], cost, levels, budget)
    return chosen


def _best(utility: np.ndarray, cost: np.ndarray, price: np.ndarray) -> np.ndarray:
    return (utility - price[:, None, None] * cost).argmax(-1)


def _spend(utility: np.ndarray, cost: np.ndarray, levels: np.ndarray, budget: int) -> None:
    """Raise levels in place, one step at a time, the one that gains most for its cost first."""
    items, left = np.arange(len(levels)), budget - cost[levels].sum()
    while True:
        above = np.minimum(levels + 1, len(cost) - 1)
        step = cost[above] - cost[levels]
        possible = (step > 0) & (step <= left)
        if not possible.any():
            return
        gain = (utility[items, above] - utility[items, levels]) / np.maximum(step, 1)
        best = np.where(possible, gain, -np.inf).argmax()
        left -= step[best]
        levels[best] += 1
