"""Keys, values and what their errors would do, of windows of a text, kept in files until books are fitted to them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tersekv.calibrate.measuring import SINK
from tersekv.calibrate.session import Session
from tersekv.eval.samples import RunDirectory
from tersekv.hf.capture import Seen, observed
from tersekv.layout import BLOCK
from tersekv.ops.anchors import causal_scores
from tersekv.sealed import Sealed

WINDOW = Sealed("tersekv-window", 1, (), "Delete it, and the window is read again.")
SIDES = ("k", "v")
SCORE = {"k": "key", "v": "column"}  # the factor of an error of a key, and of a value


@dataclass(frozen=True)
class Sample:
    """One window: by layer and side (1, h, n, d) in bf16 and weights (1, h, n), without sink and last 64 tokens."""

    tensors: dict[str, Tensor]

    @property
    def layers(self) -> list[int]:
        return sorted({int(name.partition(".")[0]) for name in self.tensors})

    def values(self, layer: int, side: str) -> Tensor:
        return self.tensors[f"{layer}.{side}"]

    def weights(self, layer: int, side: str) -> Tensor:
        return self.tensors[f"{layer}.{side}.weights"]


def gathered(session: Session, folder: Path) -> tuple[RunDirectory, list[Sample]]:
    """The windows of a calibration; those that a former run has read are not read again."""
    about = {name: value for name, value in session.about.items() if name not in ("spec", "follow")}
    directory = RunDirectory.open(folder, {"calibrate": "vq"} | about)
    items = session.subject.windows(session.settings.tokens, session.settings.windows)
    samples: list[Sample] = []
    for number, item in enumerate(items):
        path = folder / f"window.{item.replace('/', '.')}.safetensors"
        if not (directory.holds("vq", item, ["window"]) and path.is_file()):
            session.stages(f"window {number + 1} of {len(items)}", number / len(items))
            WINDOW.write(path, _read(session, item), {})
            directory.add("vq", item, {"window": {"file": path.name}})
        samples.append(Sample(WINDOW.read(path)[0]))
    return directory, samples


def _read(session: Session, item: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def look(seen: Seen) -> None:
        n = seen.k.shape[2]
        kept = slice(SINK, n - BLOCK)
        behind = torch.arange(n, 0, -1)  # queries that see each token, its own among them
        for side, x in (("k", seen.k), ("v", seen.v)):
            weights = causal_scores(seen.q, seen.k, seen.v, seen.scale, SCORE[side]) / behind
            found[f"{seen.layer}.{side}"] = x[:, :, kept].to(torch.bfloat16).contiguous()
            found[f"{seen.layer}.{side}.weights"] = weights[:, :, kept].contiguous()

    model = session.subject.model
    with observed(model, look):
        model(input_ids=session.subject.window(item), use_cache=False, logits_to_keep=1)
    return found
