"""`tersekv doctor`: versions, devices, and which implementation runs."""

import os
import platform
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

from tersekv.ops import Implementation, explain
from tersekv.record import installed

PACKAGES = ("tersekv", "torch", "transformers", "numpy", "safetensors", "gguf")


@dataclass(frozen=True)
class Diagnosis:
    versions: dict[str, str]
    devices: dict[str, str]
    implementations: dict[str, list[Implementation]]
    decoding: list[Implementation]  # a model's steps, in transformers

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Group:
        versions = Table("package", "version", title="versions")
        for name, text in self.versions.items():
            versions.add_row(name, text)
        devices = Table("device", "what it is", title="devices")
        for name, text in self.devices.items():
            devices.add_row(name, text)
        runs = Table("device", "implementation", "runs", "why", title="attention and encoding")
        for device, rows in self.implementations.items():
            for row in rows:
                runs.add_row(device, row.name, "yes" if row.runs else "no", row.why)
        steps = Table("decoding", "runs", "why", title="in transformers, attached")
        for row in self.decoding:
            steps.add_row(row.name, "yes" if row.runs else "no", row.why)
        return Group(versions, devices, runs, steps)


def diagnose() -> Diagnosis:
    versions = {"python": platform.python_version()} | {name: installed(name) for name in PACKAGES}
    cpu = f"{platform.machine()}, {os.cpu_count()} processors, {torch.get_num_threads()} torch threads, "
    devices = {"cpu": cpu + torch.backends.cpu.get_cpu_capability()}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{facts.name}, {facts.total_memory >> 30} GiB, sm_{facts.major}{facts.minor}"
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return Diagnosis(versions, devices, {kind: explain(kind) for kind in kinds}, decoding())


def decoding() -> list[Implementation]:
    if not find_spec("transformers"):
        return [Implementation("transformers", False, 'Not installed. Install it with pip install "tersekv[hf]".')]
    return import_module("tersekv.hf.attach").explain()  # which imports all of transformers


def best_dtype(device: str) -> str:
    """bfloat16 where the device has instructions for it; elsewhere PyTorch emulates it many times slower than fp32."""
    if device.startswith("cuda"):
        return "bfloat16"
    capability = torch.backends.cpu.get_cpu_capability()
    return "bfloat16" if torch.cpu._is_amx_tile_supported() or "BF16" in capability else "float32"
