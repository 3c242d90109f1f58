"""Operations that have more than one implementation, and which of them runs where."""

from dataclasses import dataclass

from tersekv.ops import attention as reference
from tersekv.ops.attention import Pages, Partial, merge

__all__ = [
    "Implementation",
    "Pages",
    "Partial",
    "attend_alone",
    "attend_causal",
    "attend_dense",
    "attend_pages",
    "explain",
    "merge",
]

attend_alone, attend_causal = reference.attend_alone, reference.attend_causal
attend_dense, attend_pages = reference.attend_dense, reference.attend_pages


@dataclass(frozen=True)
class Implementation:
    """One implementation of the ops: whether it runs on a device, and why or why not, in a sentence."""

    name: str
    runs: bool
    why: str


def explain(device: str = "cpu") -> list[Implementation]:
    """Every implementation for a kind of device ("cpu", "cuda", "mps", ...), the one that runs first."""
    kernels = {"cpu": "native C++", "cuda": "CUDA"}.get(device, device)
    return [
        Implementation("reference", True, "PyTorch in fp32, any device; it specifies the result and is slow."),
        Implementation(kernels, False, f"This version has no {kernels} kernels yet; the reference runs instead."),
    ]
