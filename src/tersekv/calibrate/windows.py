"""What a model does in windows of a text, kept in files until tables are fitted to it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from jaxtyping import Float
from torch import Tensor

from tersekv.calibrate.measuring import SINK
from tersekv.calibrate.session import Session
from tersekv.eval.samples import RunDirectory
from tersekv.layout import BLOCK
from tersekv.ops.rope import turned
from tersekv.sealed import Sealed

WINDOW = Sealed("tersekv-window", 2, ("seconds",), "Delete it, and the window is read again.")
SIDES = ("k", "v")
TEST = 0.2  # of the windows, held out


@dataclass(frozen=True)
class Sample:
    """One window: by layer and side what a method read of it, without sink and last 64 tokens."""

    tensors: dict[str, Tensor]
    seconds: float = 0.0

    @property
    def layers(self) -> list[int]:
        return sorted({int(name.partition(".")[0]) for name in self.tensors})

    def values(self, layer: int, side: str) -> Tensor:
        """Keys or values, (1, h, n, d) in bf16."""
        return self.tensors[f"{layer}.{side}"]

    def beside(self, layer: int, side: str, what: str) -> Tensor:
        """What else was read."""
        return self.tensors[f"{layer}.{side}.{what}"]


def kept(x: Tensor) -> Tensor:
    """Tokens (in dimension 2) that a cache would have packed."""
    return x[:, :, SINK : x.shape[2] - BLOCK]


def before_rope(x: Float[Tensor, "1 h n d"], rope: tuple[float, ...] | None) -> Float[Tensor, "h n d"]:
    """Kept keys turned back by these frequencies, if any, or gradients of them: a rotation takes gradients with it."""
    kept = x[0].float()
    return kept if rope is None else turned(kept, torch.arange(SINK, SINK + kept.shape[1]), rope, back=True)


def gathered(
    session: Session, method: str, folder: Path, read: Callable[[Session, str], dict[str, Tensor]]
) -> tuple[RunDirectory, list[Sample]]:
    """The windows of a calibration; those that a former run has read are not read again."""
    about = {name: value for name, value in session.about.items() if name not in ("spec", "follow")}
    directory = RunDirectory.open(folder, {"calibrate": method} | about)
    items = session.subject.windows(session.settings.tokens, session.settings.windows)
    samples: list[Sample] = []
    for number, item in enumerate(items):
        path = folder / f"window.{item.replace('/', '.')}.safetensors"
        if not (directory.holds(method, item, ["window"]) and path.is_file()):
            session.stages(f"window {number + 1} of {len(items)}", number / len(items))
            start = perf_counter()
            tensors = {name: x.cpu() for name, x in read(session, item).items()}  # where they are fitted
            WINDOW.write(path, tensors, {"seconds": f"{perf_counter() - start:.1f}"})
            directory.add(method, item, {"window": {"file": path.name}})
        tensors, metadata = WINDOW.read(path)
        samples.append(Sample(tensors, float(metadata["seconds"])))
    return directory, samples


def divided(samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """For fitting, and held out; the same where there is but one."""
    train = samples[: max(1, round(len(samples) * (1 - TEST)))]
    return train, samples[len(train) :] or train


def bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).contiguous()
