"""The small network of "Don't Waste Bits!" (arXiv 2604.04722): four numbers of a token in, a level of precision out.

4 -> 128 -> 128 -> 4, ReLU, softmax over 2, 4, 8 and 16 bits: 17,668 weights. The logarithms of its probabilities are
what a level is worth to a token, of which `policy.allocate` makes the most under a budget.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tersekv.errors import CacheFileError

FORMAT, VERSION = "tersekv-controller", "1"
FEATURES, HIDDEN, LEVELS = ("entropy", "rarity", "variance", "confidence"), 128, 4


def network() -> nn.Sequential:
    first, second = nn.Linear(len(FEATURES), HIDDEN), nn.Linear(HIDDEN, HIDDEN)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(HIDDEN, LEVELS))


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
        net = network()
        net.load_state_dict({name: self.tensors[name].cpu() for name in net.state_dict()})
        return net.to(x.device)(x).log_softmax(-1)

    def to(self, device: torch.device) -> "Controller":
        return Controller({name: x.to(device) for name, x in self.tensors.items()}, self.about)

    def save(self, path: Path) -> None:
        """The file appears whole or not at all."""
        about = {"format": FORMAT, "version": VERSION, "about": json.dumps(self.about)}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        save_file(self.tensors, partial, about | {"sha256": _digest(self.tensors, about)})
        partial.replace(path)

    @staticmethod
    def load(path: str | Path, fingerprint: str) -> "Controller":
        """Raises CacheFileError for a file that is damaged, foreign, or was trained on another model."""
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise CacheFileError(
                f'router={path} cannot be read: {error}. Give "attention", or a file of `tersekv calibrate adaptive`.'
            ) from error
        if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
            raise CacheFileError(f"{path} is no controller of version {VERSION}. Make one: tersekv calibrate adaptive.")
        said = about.pop("sha256", "")
        if _digest(tensors, about) != said:
            raise CacheFileError(f"{path} is damaged: its content does not have the hash it was saved with.")
        found = Controller(tensors, json.loads(about["about"]))
        if found.about["fingerprint"] != fingerprint:
            raise CacheFileError(
                f"{path} was trained on another model ({found.about['model']['name']}), and what a token is worth is a "
                "model's own. Train one for this: tersekv calibrate adaptive MODEL --text FILE."
            )
        return found


def rarity(ids: Int[Tensor, "b n"], counts: Int[Tensor, "vocabulary"]) -> Float[Tensor, "b n"]:
    """-log[(c(x) + 1) / (N + V + 1)], V the tokens that occur; in nats."""
    total = counts.sum() + (counts > 0).sum() + 1
    return total.double().log().float() - (counts[ids] + 1).float().log()


def _digest(tensors: dict[str, Tensor], about: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].dtype}{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
