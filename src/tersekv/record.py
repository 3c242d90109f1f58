"""Committed records: what was run, on what, and the numbers."""

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tersekv.ops import implementation

PACKAGES = ("torch", "transformers", "numpy")


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Commit, versions, device, implementation and date: the head of every record."""
    cuda = device.startswith("cuda")
    return {
        "commit": _commit(),
        "versions": {name: installed(name) for name in PACKAGES} | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "implementation": implementation("cuda" if cuda else "cpu"),
        "date": datetime.now(UTC).date().isoformat(),
    }


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of the source tree, with "+changes" if it is not clean; "unknown" outside a checkout."""
    here = Path(__file__).parent
    asked = [["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--", str(here)]]
    try:
        said = [subprocess.run(a, cwd=here, capture_output=True, text=True, check=True).stdout.strip() for a in asked]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said[0] + ("+changes" if said[1] else "")


def write(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
