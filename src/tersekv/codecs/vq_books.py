"""Tables of `vq`: the universal ones, and files that `tersekv calibrate vq` fitted to a model."""

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from tersekv.errors import CacheFileError, SpecError
from tersekv.ops.vq import Tables
from tersekv.sealed import Sealed

FILE = Sealed(
    "tersekv-codebooks", 1, ("about",), 'Give books=universal, or a file of "tersekv calibrate vq MODEL --text FILE".'
)
UNIVERSAL = Path(__file__).with_name("vq.safetensors")  # made by tests/make_vq.py, part of the format


@dataclass(frozen=True)
class Books:
    """`about`: provenance and the options of the codec that the tables are for; `tensors` by layer, side and stage."""

    digest: str
    about: dict[str, Any] = field(compare=False)
    tensors: dict[str, Tensor] = field(compare=False)

    @staticmethod
    def load(path: str | Path) -> "Books":
        """Read once as long as it does not change. Raises CacheFileError for a file that is damaged or foreign."""
        try:
            state = Path(path).stat()
        except OSError as error:
            raise CacheFileError(f"{path} cannot be read: {error}. {FILE.instead}") from error
        return _loaded(Path(path), state.st_mtime_ns, state.st_size)

    def save(self, path: Path) -> None:
        """Raises CacheFileError where it cannot be written."""
        FILE.write(path, self.tensors, {"about": json.dumps(self.about)})

    def tables(self, name: str, stages: int) -> Tables:
        """Raises SpecError where there are none of that name and so many stages."""
        names = [f"{name}.{stage}" for stage in range(stages)]
        if names[-1] not in self.tensors:
            raise SpecError(f"There is no table {names[-1]}. Allowed: {', '.join(sorted(self.tensors))}.")
        return Tables(f"{self.digest} {name} {stages}", tuple(self.tensors[x] for x in names))


@lru_cache(8)
def _loaded(path: Path, modified: int, size: int) -> Books:
    tensors, metadata = FILE.read(path)
    return Books(metadata["sha256"], json.loads(metadata["about"]), {name: x.clone() for name, x in tensors.items()})
