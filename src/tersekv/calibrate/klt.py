"""`tersekv calibrate klt`: for each layer, side and KV head the matrix of codec `klt`, from two covariances.

With C the covariance of keys within a block (of values: their second moments) and M that of what errors are seen by,
let C^(1/2) M C^(1/2) = V diag(l) V'. Along V' C^(-1/2) keys are uncorrelated and so are errors to whoever sees them;
with channels scaled by l^(1/4) both are alike in size, sqrt(l), and a quantiser of one width costs (sum sqrt(l))^2,
the least that any linear map can reach. Channels are sorted by l, and each group of them is rotated and scaled to
variance 1. M is the sum of g g' over gradients g (Fisher information), or of q' q over queries.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Group
from rich.table import Column, Table
from torch import Tensor

from tersekv.calibrate import gradients
from tersekv.calibrate.comparing import blocks, compared
from tersekv.calibrate.session import Session, Settings
from tersekv.calibrate.windows import SIDES, Sample, divided, gathered
from tersekv.codec import check_choice
from tersekv.codecs.books import Books
from tersekv.errors import InputError
from tersekv.rotation import rotate
from tersekv.spec import parse
from tersekv.terminal import Stages

WEIGHTS = ("fisher", "queries")
DAMPING = {"seen": 0.05, "coded": 0.005}  # of the mean diagonal, added to it: what few windows did not show
SHOWN = (2, 3)  # bits at which held-out errors are shown


@dataclass(frozen=True)
class FittedTransform:
    """Where the matrices are; by side and bits the held-out error, in Fisher information, over that of `rotated`."""

    path: str
    spec: str
    nbytes: int
    seconds: float
    error: dict[str, dict[int, float]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Group:
        heads = (f"{bits} bits" for bits in SHOWN)
        table = Table("side", *(Column(x, justify="right") for x in heads), title="error seen, rotated = 1, held out")
        for side, error in self.error.items():
            table.add_row(side, *(f"{x:.3f}" for x in error.values()))
        words = f"written: {self.path}, {self.nbytes:,} bytes of matrices, {self.seconds:.0f} s; use it: {self.spec}"
        return Group(table, words)


def calibrate(
    settings: Settings, groups: int, weights: str, folder: Path, out: Path, stages: Stages
) -> FittedTransform:
    """Raises InputError for groups that do not divide the head dim."""
    check_choice("weights", weights, WEIGHTS)
    session = Session.open(settings, stages)
    directory, samples = gathered(session, gradients.METHOD, folder, gradients.read)
    train, test = divided(samples)
    start, d = perf_counter(), samples[0].values(samples[0].layers[0], "k").shape[-1]
    if groups < 1 or d % groups:
        raise InputError(f"--groups {groups} does not divide the head dim {d}.")
    tensors: dict[str, Tensor] = {}
    for number, layer in enumerate(train[0].layers):
        stages(f"fitting layer {layer}", number / len(train[0].layers))
        for side in SIDES:
            matrix, costs = fitted(*moments(train, layer, side, weights), groups)
            tensors |= {f"{layer}.{side}.forward": matrix, f"{layer}.{side}.costs": costs}
    seconds = sum(sample.seconds for sample in samples) + perf_counter() - start
    about = directory.manifest | {"calibrate": "klt", "codecs": {side: {"groups": groups} for side in SIDES}}
    Books("", about | {"weights": weights, "damping": DAMPING, "seconds": seconds}, tensors).save(out)
    options = f"groups={groups},books={out}"
    error = {side: {bits: _error(test, side, bits, options, stages) for bits in SHOWN} for side in SIDES}
    nbytes = sum(x.nbytes for x in tensors.values())
    return FittedTransform(str(out), str(parse(f"klt:bits=2,{options}")), nbytes, seconds, error)


def moments(samples: list[Sample], layer: int, side: str, weights: str) -> tuple[Tensor, Tensor]:
    """C and M of each head, in fp64. Values have no queries: without gradients all errors of theirs are alike."""
    h, d = samples[0].values(layer, side).shape[1::2]
    coded, seen = torch.zeros(2, h, d, d, dtype=torch.float64)
    for sample in samples:
        x = blocks(sample.values(layer, side)).double()
        x = (x - x.mean(2, keepdim=True) if side == "k" else x).flatten(1, 2)
        coded += x.mT @ x / len(samples) / x.shape[1]
        g = sample.beside(layer, side, "gradient")[0].double()
        if weights == "fisher":
            seen += g.mT @ g
        else:
            seen += sample.beside(layer, side, "queries")[0].double() if side == "k" else torch.eye(d)
    return coded, seen


def fitted(
    coded: Float[Tensor, "h d d"], seen: Float[Tensor, "h d d"], groups: int
) -> tuple[Float[Tensor, "h d d"], Float[Tensor, "h groups"]]:
    """The matrix in fp16, and what an error of variance 1 in each group costs."""
    coded, seen = _damped(coded, DAMPING["coded"]), _damped(seen, DAMPING["seen"])
    half, other = _power(coded, 0.5), _power(coded, -0.5)
    values, vectors = torch.linalg.eigh(half @ seen @ half)
    values, vectors = values.flip(-1).clamp(min=1e-300), vectors.flip(-1)
    rows = (vectors.mT @ other).unflatten(1, (groups, -1))
    spread = values.sqrt().unflatten(1, (groups, -1))  # the variance of each channel, and its visibility
    rows = rows * (spread / spread.mean(-1, keepdim=True)).sqrt()[..., None]
    matrix = rotate(rows.mT.contiguous(), 0).mT.flatten(1, 2).half().contiguous()
    inverse = torch.linalg.inv(matrix.double())
    costs = (inverse.mT @ seen @ inverse).diagonal(dim1=-2, dim2=-1).unflatten(-1, (groups, -1)).sum(-1)
    return matrix, costs.float()


def _error(samples: list[Sample], side: str, bits: int, options: str, stages: Stages) -> float:
    spec, plain = parse(f"klt:bits={bits},{options}"), parse(f"rotated:bits={bits}")
    return compared(samples, side, lambda layer: getattr(spec.at(layer), side), getattr(plain, side), stages)


def _damped(moment: Tensor, share: float) -> Tensor:
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-30)
    return moment + share * mean * torch.eye(moment.shape[-1], dtype=moment.dtype)


def _power(symmetric: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return (vectors * values.pow(exponent)[..., None, :]) @ vectors.mT
