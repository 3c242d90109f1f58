"""`tersekv calibrate vq`: codebooks for the keys and values of a model, by weighted k-means (AnTKV, arXiv 2506.19505).

Books are by layer, side, KV head and place of the sub-vector. A token's weight is what an error of it does to the
output, of a mean query behind it: `ops.anchors`, the factors of the paper's theorem. `weights=none` is the control.
Keys before RoPE are turned back by the model's own frequencies.
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

from tersekv.calibrate.kmeans import distortion, kmeans, nearest
from tersekv.calibrate.session import Session, Settings
from tersekv.calibrate.windows import SIDES, Sample, before_rope, bf16, divided, gathered, kept
from tersekv.codec import check_choice
from tersekv.codecs.books import Books
from tersekv.errors import InputError
from tersekv.hf.capture import Seen, observed
from tersekv.hf.rope import frequencies
from tersekv.ops.anchors import causal_scores
from tersekv.sealed import Sealed
from tersekv.spec import parse
from tersekv.terminal import Stages

PART = Sealed("tersekv-codebooks-part", 2, ("seconds",), "Delete it, and the layer is fitted again.")
WEIGHTS = ("anchors", "none")
SCORE = {"k": "key", "v": "column"}  # the factor of an error of a key, and of a value


@dataclass(frozen=True)
class Shape:
    """Of the books: options of the codec, and how they are fitted."""

    dim: int = 8
    index: int = 8
    stages: int = 1
    rope: str = "after"
    weights: str = "anchors"
    rounds: int = 12

    def __post_init__(self) -> None:
        check_choice("rope", self.rope, ("after", "before"))
        check_choice("weights", self.weights, WEIGHTS)
        if self.dim < 1 or not 1 <= self.index <= 8 or self.stages not in (1, 2) or self.rounds < 1:
            raise InputError(
                f"--dim {self.dim} --index {self.index} --stages {self.stages} --rounds {self.rounds}. Allowed: a dim "
                "that divides the head dim, an index of 1 to 8 bits, 1 or 2 stages, at least 1 round."
            )

    def options(self, side: str) -> dict[str, Any]:
        """Of the codec: indices and nothing else, as in the paper."""
        rope = {"rope": self.rope} if side == "k" else {}
        return {"dim": self.dim, "index": self.index, "stages": self.stages, "mean": "none", "scale": "none"} | rope

    def __str__(self) -> str:
        return f"{self.dim}.{self.index}.{self.stages}.{self.rope}.{self.weights}.{self.rounds}"


@dataclass(frozen=True)
class FittedBooks:
    """Where the books are, and the share of the variance that they lose on windows that they were not fitted to."""

    path: str
    spec: str
    nbytes: int
    lost: dict[str, dict[str, float]]  # by side: of all tokens alike, and weighted

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Group:
        heads = ("all tokens alike", "weighted by what errors do")
        table = Table("side", *(Column(x, justify="right") for x in heads), title="lost on held-out windows")
        for side, lost in self.lost.items():
            table.add_row(side, *(f"{x:.4f}" for x in lost.values()))
        return Group(table, f"written: {self.path}, {self.nbytes:,} bytes of books; use it: {self.spec}")


def calibrate(settings: Settings, shape: Shape, folder: Path, out: Path, stages: Stages) -> FittedBooks:
    """Raises InputError for a dim that does not divide the head dim, or fewer tokens than entries; ModelError where
    keys before RoPE are asked for and the model's frequencies are not known.
    """
    session = Session.open(settings, stages)
    rope = frequencies(session.subject.model) if shape.rope == "before" else {}
    directory, samples = gathered(session, "vq", folder, read)
    train, test = divided(samples)
    _check(shape, train)
    seconds = sum(sample.seconds for sample in samples)
    tensors: dict[str, Tensor] = {}
    layers = train[0].layers
    for number, layer in enumerate(layers):
        path, item = folder / f"{shape}.{layer}.safetensors", f"layer {layer}"
        if not (directory.holds("vq", item, [str(shape)]) and path.is_file()):
            stages(f"fitting layer {layer}", number / len(layers))
            start = perf_counter()
            books, lost = fit_layer(shape, layer, train, test, settings.seed, rope.get(layer), settings.device)
            PART.write(path, books, {"seconds": f"{perf_counter() - start:.1f}"})
            directory.add("vq", item, {str(shape): lost})
        books, metadata = PART.read(path)
        tensors |= books
        if rope:
            tensors[f"{layer}.rope"] = torch.tensor(rope[layer], dtype=torch.float64)
        seconds += float(metadata["seconds"])
    found = [directory.samples["vq", f"layer {layer}", str(shape)] for layer in layers]
    lost = {side: {kind: sum(x[side][kind] for x in found) / len(found) for kind in found[0][side]} for side in SIDES}
    options = {side: shape.options(side) for side in SIDES}
    about = directory.manifest | {"codecs": options, "fit": asdict(shape), "lost": lost, "seconds": seconds}
    Books("", about, tensors).save(out)
    return FittedBooks(str(out), _spec(shape, out), sum(x.nbytes for x in tensors.values()), lost)


def read(session: Session, item: str) -> dict[str, Tensor]:
    """Keys, values, and what an error of each token would do to the outputs of the queries that see it."""
    found: dict[str, Tensor] = {}

    def look(seen: Seen) -> None:
        behind = torch.arange(seen.k.shape[2], 0, -1, device=seen.k.device)  # queries that see each token, its own too
        for side, x in (("k", seen.k), ("v", seen.v)):
            weights = causal_scores(seen.q, seen.k, seen.v, seen.scale, SCORE[side]) / behind
            found[f"{seen.layer}.{side}"] = bf16(kept(x))
            found[f"{seen.layer}.{side}.weights"] = kept(weights).contiguous()

    model = session.subject.model
    with observed(model, look):
        model(input_ids=session.subject.window(item), use_cache=False, logits_to_keep=1)
    return found


def _spec(shape: Shape, out: Path) -> str:
    words = ",".join(f"{name}={value}" for name, value in shape.options("k").items())
    return str(parse(f"vq:{words},books={out}"))


def _check(shape: Shape, train: list[Sample]) -> None:
    _, _, n, d = train[0].values(train[0].layers[0], "k").shape
    if d % shape.dim:
        raise InputError(f"--dim {shape.dim} does not divide the head dim {d}.")
    if n * len(train) < 2**shape.index:
        raise InputError(f"{n * len(train)} tokens are fewer than {2**shape.index} entries. Ask for more windows.")


def fit_layer(
    shape: Shape,
    layer: int,
    train: list[Sample],
    test: list[Sample],
    seed: int,
    rope: tuple[float, ...] | None = None,
    device: str = "cpu",
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """Books of both sides, and what they lose of the variance of `test`: of all tokens alike, and weighted."""
    books: dict[str, Tensor] = {}
    lost: dict[str, dict[str, float]] = {}
    for side in SIDES:
        back = rope if side == "k" else None
        x, w = (part.to(device) for part in _problems(shape, layer, side, train, back))
        y, y_w = (part.to(device) for part in _problems(shape, layer, side, test, back))
        variance, weighted = _spread(y, torch.ones_like(y_w)), _spread(y, y_w)
        for stage in range(shape.stages):
            given = w if shape.weights == "anchors" else torch.ones_like(w)
            table = kmeans(x, given, 2**shape.index, shape.rounds, seed + stage).half()
            heads = train[0].values(layer, side).shape[1]
            books[f"{layer}.{side}.{stage}"] = table.unflatten(0, (heads, -1)).contiguous().cpu()
            x, y = (part - nearest(part, table.float()) for part in (x, y))
        zero = torch.zeros(len(y), 1, shape.dim, device=device)
        lost[side] = {
            "alike": float(distortion(y, torch.ones_like(y_w), zero).sum() / variance),
            "weighted": float(distortion(y, y_w, zero).sum() / weighted),
        }
    return books, lost


def _problems(
    shape: Shape, layer: int, side: str, samples: list[Sample], rope: tuple[float, ...] | None
) -> tuple[Float[Tensor, "p n dim"], Float[Tensor, "p n"]]:
    """Sub-vectors by KV head and place, and the weights of their tokens."""
    whole = torch.cat([before_rope(sample.values(layer, side), rope) for sample in samples], 1)
    x = whole.unflatten(-1, (-1, shape.dim))
    w = torch.cat([sample.beside(layer, side, "weights")[0] for sample in samples], 1)
    h, n, places, _ = x.shape
    return x.transpose(1, 2).flatten(0, 1).contiguous(), w[:, None].expand(h, places, n).flatten(0, 1).contiguous()


def _spread(x: Tensor, w: Tensor) -> Tensor:
    mean = (x * w[..., None]).sum(1, keepdim=True) / w.sum(1)[:, None, None]
    return distortion(x, w, mean).sum()
