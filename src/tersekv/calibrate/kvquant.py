"""`tersekv calibrate kvquant`: levels of a model's keys, by channel, and values, by layer (KVQuant, arXiv 2401.18079).

k-means in one dimension, each value weighted by the square of the gradient of the loss with respect to it, which is the
diagonal of Fisher information (equation 2 of the paper); `weights=none` is the control. What is stored apart, the
`outliers` of each vector, does not count. Keys before RoPE are turned back by the model's own frequencies.
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
from tersekv.calibrate.comparing import compared
from tersekv.calibrate.kmeans import kmeans
from tersekv.calibrate.session import Session, Settings
from tersekv.calibrate.windows import SIDES, Sample, before_rope, divided, gathered
from tersekv.codec import check_choice
from tersekv.codecs.books import Books
from tersekv.codecs.kvquant import KVQuant, farthest, moments
from tersekv.errors import InputError
from tersekv.hf.rope import frequencies
from tersekv.layout import BLOCK
from tersekv.spec import parse
from tersekv.terminal import Stages

WEIGHTS = ("fisher", "none")
MOST = 2**18  # values of a layer that its levels are fitted to


@dataclass(frozen=True)
class Shape:
    """Of the tables: options of the codec, and how they are fitted."""

    bits: int = 3
    outliers: int = 1
    rope: str = "before"
    weights: str = "fisher"
    rounds: int = 25

    def __post_init__(self) -> None:
        check_choice("weights", self.weights, WEIGHTS)
        KVQuant(self.bits, outliers=self.outliers)  # raises for what the codec does not take
        check_choice("rope", self.rope, ("before", "after"))
        if self.rounds < 1:
            raise InputError(f"--rounds {self.rounds}. Give at least 1.")

    def options(self, side: str) -> dict[str, Any]:
        axis = "channel" if side == "k" else "token"
        rope = {"rope": self.rope} if side == "k" else {}
        return {"bits": self.bits, "outliers": self.outliers, "axis": axis} | rope


@dataclass(frozen=True)
class FittedLevels:
    """Where the tables are; by side the held-out error, in Fisher information, over that without calibration."""

    path: str
    spec: str
    nbytes: int
    seconds: float
    error: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Group:
        table = Table("side", Column("error seen", justify="right"), title="without calibration = 1, held out")
        for side, error in self.error.items():
            table.add_row(side, f"{error:.3f}")
        words = f"written: {self.path}, {self.nbytes:,} bytes of tables, {self.seconds:.0f} s; use it: {self.spec}"
        return Group(table, words)


def calibrate(settings: Settings, shape: Shape, folder: Path, out: Path, stages: Stages) -> FittedLevels:
    """Raises ModelError where keys before RoPE are asked for and the model's frequencies are not known."""
    session = Session.open(settings, stages)
    rope = frequencies(session.subject.model) if shape.rope == "before" else {}
    directory, samples = gathered(session, gradients.METHOD, folder, gradients.read)
    (train, test), start = divided(samples), perf_counter()
    tensors: dict[str, Tensor] = {}
    for number, layer in enumerate(layers := train[0].layers):
        stages(f"fitting layer {layer}", number / len(layers))
        tensors[f"{layer}.k.0"] = key_levels(shape, train, layer, rope.get(layer), settings.seed)
        tensors[f"{layer}.v.0"] = value_levels(shape, train, layer, settings.seed)
        if rope:
            tensors[f"{layer}.rope"] = torch.tensor(rope[layer], dtype=torch.float64)
    seconds = sum(sample.seconds for sample in samples) + perf_counter() - start
    made = {"calibrate": "kvquant", "codecs": {side: shape.options(side) for side in SIDES}, "fit": asdict(shape)}
    Books("", directory.manifest | made | {"seconds": seconds}, tensors).save(out)
    spec, plain = (
        parse(f"kvquant:bits={shape.bits},outliers={shape.outliers}{more}")
        for more in (f",rope={shape.rope},books={out}", "")
    )
    error = {s: compared(test, s, lambda n, s=s: getattr(spec.at(n), s), getattr(plain, s), stages) for s in SIDES}
    return FittedLevels(str(out), str(spec), sum(x.nbytes for x in tensors.values()), seconds, error)


def key_levels(
    shape: Shape, samples: list[Sample], layer: int, rope: tuple[float, ...] | None, seed: int
) -> Float[Tensor, "h d entries 1"]:
    """One set of levels for a layer, at the mean and deviation of each channel."""
    x = torch.cat([before_rope(s.values(layer, "k"), rope) for s in samples], 1).mT
    g = torch.cat([before_rope(s.beside(layer, "k", "gradient"), rope) for s in samples], 1).mT
    apart = farthest(x, x.shape[-1] * shape.outliers // BLOCK)
    zero, scale = moments(x, apart)
    levels = _levels(shape, (x - zero) / scale.clamp(min=1e-30), g * scale, apart, seed)
    return (levels * scale + zero).half()[..., None].contiguous()


def value_levels(shape: Shape, samples: list[Sample], layer: int, seed: int) -> Float[Tensor, "1 1 entries 1"]:
    """Of tokens brought to mean 0 and deviation 1, as they are stored."""
    x = torch.cat([s.values(layer, "v")[0].float() for s in samples], 1)
    g = torch.cat([s.beside(layer, "v", "gradient")[0].float() for s in samples], 1)
    apart = farthest(x, shape.outliers)
    zero, scale = moments(x, apart)
    levels = _levels(shape, (x - zero) / scale.clamp(min=1e-30), g * scale, apart, seed)
    return levels.half()[None, None, :, None].contiguous()


def _levels(
    shape: Shape, z: Float[Tensor, "*lead n"], g: Float[Tensor, "*lead n"], apart: Tensor, seed: int
) -> Float[Tensor, "entries"]:
    """Ascending. `g`: gradients with respect to `z`, so that an error counts as much as it does before scaling."""
    w = (g.square() if shape.weights == "fisher" else torch.ones_like(z)).scatter(-1, apart, 0.0)
    step = -(-z.numel() // MOST)
    some = [x.flatten()[None, ::step].contiguous() for x in (z, w)]
    return kmeans(some[0][..., None], some[1], 2**shape.bits, shape.rounds, seed).flatten().sort().values
