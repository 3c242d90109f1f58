"""Training of the controller on measured tokens, and what it is worth on others: docs/methods/adaptive.md."""

from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from tersekv.errors import InputError
from tersekv.layout import BLOCK
from tersekv.policy.adaptive import BITS
from tersekv.policy.allocate import allocate
from tersekv.policy.controller import network

TEST, EPOCHS, BATCH, RATE, DECAY = 0.2, 100, 128, 1e-3, 1e-3
SHUFFLES = 50


@dataclass(frozen=True)
class Weights:
    """Of cost and quality in the objective beside the label's 1: the paper's beta and gamma, which it leaves open."""

    cost: float = 0.1
    quality: float = 1.0

    def __post_init__(self) -> None:
        if not all(np.isfinite(x) and x >= 0 for x in (self.cost, self.quality)):
            raise InputError(
                f"cost={self.cost:g} and quality={self.quality:g}: a weight must be 0 or more, and finite."
            )


DEFAULT_WEIGHTS = Weights()


@dataclass(frozen=True)
class Outcome:
    """Counts of labels by bits, and mean KL a held-out token by who places the bits; sums of single tokens' costs."""

    trained_on: int
    tested_on: int
    labels: dict[int, int]
    held_out: dict[str, float]
    epoch: int


def train(
    features: Float[Tensor, "n 4"],
    loss: Float[Tensor, "n levels"],
    average: float,
    seed: int,
    terms: Weights = DEFAULT_WEIGHTS,
) -> tuple[dict[str, Tensor], Outcome]:
    """Weights and feature scales, of the epoch that was best on the held-out fifth. `loss` in nats, by level.

    Raises InputError for fewer tokens than two blocks can be held out of.
    """
    if (n := len(features)) * TEST < BLOCK:
        raise InputError(f"{n} measured tokens are too few: at least {round(BLOCK / TEST)}. Ask for more windows.")
    labels = torch.from_numpy(allocate(-loss.numpy()[None], np.array(BITS), round(average * n))[0])
    test = _stratified(labels, seed)
    kept = torch.ones(n, dtype=torch.bool)
    kept[test] = False
    mean, deviation = features[kept].mean(0), features[kept].std(0).clamp(min=1e-6)
    x, quality = (features - mean) / deviation, _quality(loss)
    torch.manual_seed(seed)
    net = network()
    optimiser = torch.optim.Adam(net.parameters(), RATE, weight_decay=DECAY)
    best, chosen, epoch = torch.inf, deepcopy(net.state_dict()), 0
    for number in range(EPOCHS):
        for batch in torch.nonzero(kept)[:, 0][torch.randperm(int(kept.sum()))].split(BATCH):
            optimiser.zero_grad()
            _objective(net(x[batch]), labels[batch], quality[batch], terms).backward()
            optimiser.step()
        with torch.no_grad():
            now = float(_objective(net(x[test]), labels[test], quality[test], terms))
        if now < best:
            best, chosen, epoch = now, deepcopy(net.state_dict()), number
    net.load_state_dict(chosen)
    with torch.no_grad():
        utility = net(x[test]).log_softmax(-1).double()
    counts = {bits: int((labels == level).sum()) for level, bits in enumerate(BITS)}
    outcome = Outcome(n - len(test), len(test), counts, _held_out(utility, loss[test], average, seed), epoch)
    return chosen | {"mean": mean, "deviation": deviation}, outcome


def _stratified(labels: Int[Tensor, "n"], seed: int) -> Int[Tensor, "m"]:
    """A fifth of each label, in their order."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    parts = [order[labels[order] == level] for level in range(len(BITS))]
    return torch.cat([part[: round(TEST * len(part))] for part in parts]).sort().values


def _quality(loss: Float[Tensor, "n levels"]) -> Float[Tensor, "n levels"]:
    """1 where nothing is lost, 0 from the 95th percentile of the loss at the fewest bits on."""
    return (1 - loss / loss[:, 0].quantile(0.95).clamp(min=1e-30)).clamp(min=0).float()


def _objective(
    logits: Float[Tensor, "n levels"], labels: Int[Tensor, "n"], quality: Tensor, terms: Weights
) -> Float[Tensor, ""]:
    """CE + beta sum p c + gamma (1 - sum p q), the cost c of a level being its bits in sixteenths."""
    p, cost = logits.softmax(-1), torch.tensor(BITS) / BITS[-1]
    by_label = cross_entropy(logits, labels)
    return by_label + terms.cost * (p * cost).sum(-1).mean() + terms.quality * (1 - (p * quality).sum(-1).mean())


def _held_out(utility: Tensor, loss: Tensor, average: float, seed: int) -> dict[str, float]:
    """Mean loss a token: groups of a block share a budget, as they do in a cache."""
    whole = len(loss) // BLOCK * BLOCK
    order = np.random.default_rng(seed).permutation(len(loss))[:whole]
    utility, loss = (x[order].unflatten(0, (-1, BLOCK)) for x in (utility, loss))
    cost, budget = np.array(BITS), round(average * BLOCK)

    def mean(levels: np.ndarray) -> float:
        return float(loss.gather(-1, torch.from_numpy(levels)[..., None]).mean())

    mine, ideal = (allocate(x.numpy(), cost, budget) for x in (utility, -loss))
    draw = np.random.default_rng(seed)
    return {
        "the controller": mean(mine),
        "the same bits, drawn at random": float(np.mean([mean(draw.permuted(mine, axis=1)) for _ in range(SHUFFLES)])),
        "who knows what will be measured": mean(ideal),
    }
