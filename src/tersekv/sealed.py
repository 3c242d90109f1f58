"""Safetensors files that say what they are and carry a hash of all that is in them: caches, controllers, codebooks."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tersekv.errors import CacheFileError


@dataclass(frozen=True)
class Sealed:
    """A kind of file. `keys`: of its metadata, besides format and version. `instead`: what to do without a good one."""

    format: str
    version: int
    keys: tuple[str, ...]
    instead: str

    def write(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """The file appears whole or not at all. Raises CacheFileError where it cannot be written."""
        metadata = {"format": self.format, "version": str(self.version)} | metadata
        metadata["sha256"] = self._digest(tensors, metadata)
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(_unshared(tensors), partial, metadata)
            partial.replace(path)
        except (SafetensorError, OSError) as error:
            raise CacheFileError(
                f"{path} cannot be written: {error}. Nothing was changed; give another folder."
            ) from error
        finally:
            if partial.is_file():
                partial.unlink()

    def read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors, views of the mapped file, and metadata. Raises CacheFileError unless both are what was written."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise CacheFileError(f"{path} cannot be read: {error}. {self.instead}") from error
        if metadata.get("format") != self.format:
            raise CacheFileError(f"{path} is not a {self.format.replace('-', ' ')}. {self.instead}")
        if metadata.get("version") != str(self.version):
            said = metadata.get("version")
            raise CacheFileError(f"{path} has version {said}; this tersekv reads {self.version}. {self.instead}")
        if not {"sha256", *self.keys} <= metadata.keys() or self._digest(tensors, metadata) != metadata["sha256"]:
            raise CacheFileError(
                f"{path} is damaged: its content does not have the hash it was saved with. {self.instead}"
            )
        return tensors, metadata

    def _digest(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
        digest = hashlib.sha256()
        for key in ("format", "version", *self.keys):
            digest.update(metadata[key].encode() + b"\0")
        for name in sorted(tensors):
            x = tensors[name]
            digest.update(f"{name}{x.dtype}{tuple(x.shape)}".encode())
            digest.update(x.contiguous().view(torch.uint8).numpy().data if x.numel() else b"")
        return digest.hexdigest()


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views copied, as safetensors wants it; what owns its memory, such as pages, is written from where it lies."""
    owners: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, x in tensors.items():
        memory = x.untyped_storage()
        alone = memory.nbytes() == x.nbytes and memory.data_ptr() not in owners
        own[name] = x if alone else x.clone()
        owners.add(memory.data_ptr())
    return own
