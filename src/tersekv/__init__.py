"""tersekv: the KV cache of language models in 1 to 8 bits, attended to where it lies.

Importing this package imports neither torch nor transformers; the names below do so at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tersekv.errors import CacheError, CacheFileError, InputError, ModelError, SpecError, TersekvError

if TYPE_CHECKING:
    from tersekv.files import load, save
    from tersekv.hf import GraphedStep, PackedCache, attached, cache
    from tersekv.spec import Spec, parse

_WHERE = {
    "GraphedStep": "tersekv.hf",
    "PackedCache": "tersekv.hf",
    "attached": "tersekv.hf",
    "cache": "tersekv.hf",
    "load": "tersekv.files",
    "save": "tersekv.files",
    "Spec": "tersekv.spec",
    "parse": "tersekv.spec",
}

__all__ = [
    "CacheError",
    "CacheFileError",
    "GraphedStep",
    "InputError",
    "ModelError",
    "PackedCache",
    "Spec",
    "SpecError",
    "TersekvError",
    "attached",
    "cache",
    "load",
    "parse",
    "save",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'tersekv' has no attribute {name!r}")
