"""Committed records: what was run, on what, and the numbers."""

import json
import platform
import re
import subprocess
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tersekv.errors import InputError, RecordError
from tersekv.ops import implementation

PACKAGES = ("torch", "transformers", "numpy")
ROOT = Path(__file__).parents[2]
SOURCES = ("src/tersekv", "native")
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
    """The commit that an archive carries, or that of a checkout.

    If the package is not clean, "+changes" and a hash of all its sources follow, so that a run is not gone on with by
    other code.
    """
    archival = root / ".git_archival.txt"
    # First, because an archive may lie inside another project's checkout. In our own it holds no commit.
    if archival.is_file() and (node := re.search("^node: ([0-9a-f]{40})$", archival.read_text(), re.MULTILINE)):
        return node[1]
    asked = [["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--", *SOURCES]]
    try:
        said = [subprocess.run(a, cwd=root, capture_output=True, text=True, check=True).stdout.strip() for a in asked]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said[0] + (f"+changes.{_digest(root)}" if said[1] else "")


def _digest(root: Path) -> str:
    digest = sha256()
    for path in sorted(path for name in SOURCES for path in (root / name).rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def write(record: dict[str, Any], path: Path) -> None:
    """As JSON with one field a line, and lists of numbers on one line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"\[[\s\d.,eE+-]+\]", lambda found: " ".join(found[0].split()), json.dumps(record, indent=1))
    path.write_text(text + "\n", encoding="utf-8")


def write_all(records: dict[str, dict[str, Any]], out: Path) -> None:
    """One record to the file `out`, several by model to the folder `out`. Raises InputError if `out` is the other."""
    if (len(records) == 1) != (out.suffix == ".json"):
        models = ", ".join(records)
        raise InputError(f"--out {out}: a file NAME.json for one model, a folder for several; this run has {models}.")
    for model, record in records.items():
        write(record, out if out.suffix == ".json" else out / f"{Path(model).name}.json")


def read(path: Path) -> dict[str, Any]:
    """A record of `tersekv eval`. Raises RecordError for anything else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = [row["spec"] for row in record["rows"]] if "run" in record else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} is no record: {error}. Give a file that `tersekv eval --out` wrote.") from error
    if "dense" not in rows:
        raise RecordError(f"{path} is no record of an evaluation: no dense row. Give what `tersekv eval --out` wrote.")
    return record


def headline(row: dict[str, Any]) -> dict[str, Any] | None:
    """The logits of the run file's first window length, which stand for the row where there is room for one number."""
    return next(iter(row["logits"].values())) if "logits" in row else None
