"""The machine and the peers of a timing, for its record."""

from importlib import import_module
from pathlib import Path
from platform import machine, processor
from typing import Any

from tersekv.record import installed, provenance

PEERS = {"llama-cpp-python": "llama_cpp", "optimum-quanto": "optimum.quanto"}


def processor_name() -> str:
    """As the kernel of the system calls it."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else processor() or machine()


def facts() -> dict[str, Any]:
    """`record.provenance`, the processor, the versions of the peers, and what llama.cpp was compiled for."""
    made = provenance()
    made["versions"] |= {name: installed(name) for name in PEERS}
    return made | {"processor": processor_name(), "llama_cpp_system": _llama_cpp_system()}


def _llama_cpp_system() -> str:
    try:
        return import_module("llama_cpp").llama_print_system_info().decode()
    except ImportError:
        return "not installed"
