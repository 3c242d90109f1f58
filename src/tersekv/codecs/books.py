"""Tables that a codec looks up: the universal ones of `vq`, and files that `tersekv calibrate` fitted to a model."""

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from tersekv.codec import Fitted
from tersekv.errors import CacheFileError, SpecError
from tersekv.ops.vq import Tables
from tersekv.sealed import Sealed

FILE = Sealed(
    "tersekv-codebooks", 1, ("about",), 'Give a file that "tersekv calibrate METHOD MODEL --text FILE" wrote.'
)
FIRST = -1  # the layer of a codec that was not told which one it packs
UNIVERSAL = Path(__file__).with_name("vq.safetensors")  # made by tests/make_vq.py, part of the format


@dataclass(frozen=True)
class Books:
    """`about`: provenance and the options of the codec that the tables are for; `tensors` by layer and side."""

    digest: str
    about: dict[str, Any] = field(compare=False)
    tensors: dict[str, Tensor] = field(compare=False)

    @staticmethod
    def load(path: str | Path, method: str = "METHOD") -> "Books":
        """Read once as long as it does not change. Raises CacheFileError for a file that is damaged or foreign."""
        try:
            state = Path(path).stat()
        except OSError as error:
            instead = FILE.instead.replace("METHOD", method)
            raise CacheFileError(f"{path} cannot be read: {error}. {instead}") from error
        return _loaded(Path(path), state.st_mtime_ns, state.st_size)

    @staticmethod
    def of(path: str, method: str, side: str, options: dict[str, Any]) -> "Books":
        """Those of a codec that has these options; SpecError where they are another's, or were made for others."""
        books = Books.load(path, method)
        if (made := books.about["calibrate"]) != method:
            raise SpecError(f"{path} was made by tersekv calibrate {made}, not {method}. {FILE.instead}")
        for option, value in books.about["codecs"][side].items():
            if options[option] != value:
                raise SpecError(f"{path} was made for {option}={value}, not {options[option]}.")
        return books

    def save(self, path: Path) -> None:
        """Raises CacheFileError where it cannot be written."""
        FILE.write(path, self.tensors, {"about": json.dumps(self.about)})

    def tensor(self, name: str) -> Tensor:
        """Raises SpecError where there is none of that name."""
        if name not in self.tensors:
            raise SpecError(f"There is no table {name}. Allowed: {', '.join(sorted(self.tensors))}.")
        return self.tensors[name]

    def layer(self, number: int) -> int:
        """That layer, and for FIRST the first that has tables: a model's first layer need not be one that is packed."""
        return number if number != FIRST else min(int(name.partition(".")[0]) for name in self.tensors)

    def frequencies(self, layer: int) -> tuple[float, ...]:
        """By which the keys of a layer are turned, see `ops.rope`."""
        return tuple(self.tensor(f"{self.layer(layer)}.rope").tolist())

    def tables(self, name: str, stages: int) -> Tables:
        """As `tensor`, for so many stages."""
        found = tuple(self.tensor(f"{name}.{stage}") for stage in range(stages))
        return Tables(f"{self.digest} {name} {stages}", found)

    def fitted(self, name: str, nbytes: int) -> Fitted:
        """What a codec says of the tables of a layer and side, which hold so many bytes."""
        about = self.about
        model = about["model"]["name"]
        return Fitted(about["fingerprint"], model, f"{self.digest} {name}", nbytes, about.get("seconds"))


@lru_cache(8)
def _loaded(path: Path, modified: int, size: int) -> Books:
    tensors, metadata = FILE.read(path)
    return Books(metadata["sha256"], json.loads(metadata["about"]), {name: x.clone() for name, x in tensors.items()})
