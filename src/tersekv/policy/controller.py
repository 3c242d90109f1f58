"""The small network of "Don't Waste Bits!" (arXiv 2604.04722): four numbers of a token in, a level of precision out.

4 -> 128 -> 128 -> 4, ReLU, softmax over 2, 4, 8 and 16 bits: 17,668 weights. The logarithms of its probabilities are
what a level is worth to a token, of which `policy.allocate` makes the most under a budget.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from tersekv.errors import CacheFileError
from tersekv.sealed import Sealed

FILE = Sealed(
    "tersekv-controller",
    1,
    ("about",),
    'Give router=attention, or a file of "tersekv calibrate adaptive MODEL --text FILE".',
)
FEATURES, HIDDEN, LEVELS = ("entropy", "rarity", "variance", "confidence"), 128, 4


def network() -> nn.Sequential:
    first, second = nn.Linear(len(FEATURES), HIDDEN), nn.Linear(HIDDEN, HIDDEN)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(HIDDEN, LEVELS))


@cache
def _blank() -> nn.Sequential:
    """Whose weights are given with each call."""
    with torch.device("meta"):
        return network()


@dataclass(frozen=True)
class Controller:
    """`about` is its provenance: model, text, seeds, versions; `tensors` weights, scales of features and `counts`."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]

    @property
    def counts(self) -> Int[Tensor, "vocabulary"]:
        """How often each token stood in the calibration text: rarity is minus the log of its share."""
        return self.tensors["counts"]

    @torch.inference_mode()
    def utility(self, features: Float[Tensor, "b n 4"]) -> Float[Tensor, "b n 4"]:
        x = ((features - self.tensors["mean"]) / self.tensors["deviation"]).nan_to_num()
        net = _blank()
        return functional_call(net, {name: self.tensors[name] for name in net.state_dict()}, x).log_softmax(-1)

    def to(self, device: torch.device) -> "Controller":
        return Controller({name: x.to(device) for name, x in self.tensors.items()}, self.about)

    def save(self, path: Path) -> None:
        """Raises CacheFileError where it cannot be written."""
        FILE.write(path, self.tensors, {"about": json.dumps(self.about)})

    @staticmethod
    def load(path: str | Path, fingerprint: str | None = None) -> "Controller":
        """For the model of this fingerprint, or of any for a look at it. Raises CacheFileError for a file that is
        damaged, foreign, or was trained on another model."""
        tensors, about = FILE.read(Path(path))
        found = Controller(tensors, json.loads(about["about"]))
        if fingerprint not in (None, found.about["fingerprint"]):
            raise CacheFileError(
                f"{path} was trained on another model ({found.about['model']['name']}), and what a token is worth is a "
                "model's own. Train one for this: tersekv calibrate adaptive MODEL --text FILE."
            )
        return found


def rarity(ids: Int[Tensor, "b n"], counts: Int[Tensor, "vocabulary"]) -> Float[Tensor, "b n"]:
    """-log[(c(x) + 1) / (N + V + 1)], V the tokens that occur; in nats."""
    total = counts.sum() + (counts > 0).sum() + 1
    return total.double().log().float() - (counts[ids] + 1).float().log()
