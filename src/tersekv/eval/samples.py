"""A run directory: a manifest that is there before the first sample, and one line for each sample.

Every line carries its own checksum, so damage is noticed wherever it is. A kill can tear the last line: it has no line
end yet, is cut off when the run goes on, and its sample is measured again. Of two processes with one directory the
second to write stops before it does.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from tersekv.errors import RecordError

Key = tuple[str, str, str]  # depth, item, spec
MANIFEST, SAMPLES = "manifest.json", "samples.jsonl"
FIELDS = {"depth", "item", "spec", "values"}
MAY_DIFFER = {"date"}  # a run may go on on another day, not with other code, versions or devices


@dataclass
class RunDirectory:
    folder: Path
    manifest: dict[str, Any]
    samples: dict[Key, dict[str, Any]] = field(default_factory=dict)
    size: int = 0  # bytes of the lines that this process knows

    @staticmethod
    def open(folder: Path, manifest: dict[str, Any]) -> "RunDirectory":
        """Start a run or go on with it. Raises RecordError if the folder holds another run or a damaged line."""
        manifest = json.loads(json.dumps(manifest))  # as it will be read back
        path = folder / MANIFEST
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            former = read_manifest(folder)
            _check_same(former, manifest, folder)
            samples = read_samples(folder)
            return RunDirectory(folder, former, samples, _cut_torn_line(folder / SAMPLES))
        if (folder / SAMPLES).exists():
            raise RecordError(f"{folder} holds samples but no {MANIFEST}. Give another folder with --dir.")
        _write_whole(path, json.dumps(manifest, indent=1) + "\n")
        return RunDirectory(folder, manifest)

    def holds(self, depth: str, item: str, specs: Iterable[str]) -> bool:
        return all((depth, item, spec) in self.samples for spec in specs)

    def add(self, depth: str, item: str, by_spec: dict[str, dict[str, Any]]) -> None:
        """Append what is not there yet, and wait until it is on the disk. Raises RecordError if others wrote there."""
        fresh = {(depth, item, spec): values for spec, values in by_spec.items()}
        fresh = {key: values for key, values in fresh.items() if key not in self.samples}
        with (self.folder / SAMPLES).open("ab") as file:
            if file.tell() != self.size:
                raise RecordError(
                    f"{self.folder} is written to by another process as well, so this one stops; nothing is lost or "
                    "there twice. Wait for the other, or stop it and run the command again."
                )
            file.writelines(line(key, values).encode() for key, values in fresh.items())
            self.size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        self.samples |= {key: json.loads(json.dumps(values)) for key, values in fresh.items()}


def line(key: Key, values: dict[str, Any]) -> str:
    sample = dict(zip(("depth", "item", "spec"), key, strict=True)) | {"values": values}
    return json.dumps(sample | {"crc32": _checksum(sample)}) + "\n"


def _checksum(sample: dict[str, Any]) -> int:
    return crc32(json.dumps(sample).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} is no manifest: {error}. Give another folder with --dir.") from error


def read_samples(folder: Path) -> dict[Key, dict[str, Any]]:
    """Every whole line. Raises RecordError, naming the line, for one that is damaged or there twice."""
    path, found = folder / SAMPLES, dict[Key, dict[str, Any]]()
    whole = path.read_bytes().rpartition(b"\n")[0] if path.is_file() else b""
    for number, raw in enumerate(whole.split(b"\n") if whole else [], 1):
        try:
            sample = json.loads(raw)
            said = sample.pop("crc32")
            key = (sample["depth"], sample["item"], sample["spec"])
            intact = set(sample) == FIELDS and said == _checksum(sample)
        except (ValueError, KeyError, TypeError, AttributeError):
            intact, key, sample = False, None, {}
        if not intact or key is None:
            raise RecordError(
                f"{path}, line {number} is damaged. Delete that line to measure its sample again, or the folder to "
                "start anew."
            )
        if key in found:
            raise RecordError(f"{path}, line {number}: {' '.join(key)} is there twice. Delete one of the two lines.")
        found[key] = sample["values"]
    return found


def _cut_torn_line(path: Path) -> int:
    """Bytes that are left."""
    content = path.read_bytes() if path.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        _write_whole(path, whole.decode())
    return len(whole)


def _write_whole(path: Path, text: str) -> None:
    """Either the old file or the new one is there, whenever the process is killed."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def _check_same(former: dict[str, Any], manifest: dict[str, Any], folder: Path) -> None:
    names = sorted((former.keys() | manifest.keys()) - MAY_DIFFER)
    differing = [name for name in names if former.get(name) != manifest.get(name)]
    if differing:
        name = differing[0]
        raise RecordError(
            f"{folder} holds a run with another {', '.join(differing)} ({name}: {_short(former.get(name))}, now "
            f"{_short(manifest.get(name))}). Samples of two runs do not mix: give another folder with --dir."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
