"""Committed records: what was run, on what, and the numbers."""

import json
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tersekv.ops import implementation

PACKAGES = ("torch", "transformers", "numpy")
ROOT = Path(__file__).parents[2]
CPU_FACTS = Path("/proc/cpuinfo")


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Commit, versions, device, implementation and date: the head of every record."""
    cuda = device.startswith("cuda")
    return {
        "commit": _commit(),
        "versions": {name: installed(name) for name in PACKAGES} | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "implementation": implementation("cuda" if cuda else "cpu"),
        "date": datetime.now(UTC).date().isoformat(),
    }


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The CPU's name, where Linux tells it, and the instructions that torch uses of it."""
    try:
        facts = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", CPU_FACTS.read_text(), re.MULTILINE))
    except OSError:
        facts = {}
    # Virtual machines call several generations "AMD EPYC"; family and model tell them apart.
    names = [facts.get("model name", ""), *(f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts)]
    return " ".join([*filter(None, names), platform.machine(), torch.backends.cpu.get_cpu_capability()])


def _commit(root: Path = ROOT) -> str:
    """The commit that an archive carries, or that of a checkout, with "+changes" if the package is not clean."""
    archival = root / ".git_archival.txt"
    # First, because an archive may lie inside another project's checkout. In our own it holds no commit.
    if archival.is_file() and (node := re.search("^node: ([0-9a-f]{40})$", archival.read_text(), re.MULTILINE)):
        return node[1]
    asked = [["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--", "src/tersekv"]]
    try:
        said = [subprocess.run(a, cwd=root, capture_output=True, text=True, check=True).stdout.strip() for a in asked]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said[0] + ("+changes" if said[1] else "")


def write(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
