"""The peers of a timing and how they were compiled, for its record."""

from importlib import import_module
from typing import Any

from tersekv.record import installed, provenance

PEERS = ("llama-cpp-python", "optimum-quanto")


def facts() -> dict[str, Any]:
    """`record.provenance`, the versions of the peers, and what llama.cpp was compiled for."""
    made = provenance()
    made["versions"] |= {name: installed(name) for name in PEERS}
    return made | {"llama_cpp_system": _llama_cpp_system()}


def _llama_cpp_system() -> str:
    try:
        return import_module("llama_cpp").llama_print_system_info().decode()
    except ImportError:
        return "not installed"
