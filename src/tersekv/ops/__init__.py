"""Operations that have more than one implementation, and which of them runs where."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tersekv.layout import BLOCK, Layout
from tersekv.ops import attention as reference
from tersekv.ops import cuda, native
from tersekv.ops.encoding import encode, repack, rotate, rotation_signs, unrotate
from tersekv.ops.pages import Pages, Partial
from tersekv.ops.recipe import Recipe

__all__ = [
    "BLOCK",
    "KERNELS",
    "Implementation",
    "Pages",
    "Partial",
    "StepTokens",
    "attend_alone",
    "attend_causal",
    "attend_dense",
    "attend_pages",
    "dense_part",
    "encode",
    "explain",
    "few_on_processor",
    "implementation",
    "implementation_of",
    "merge",
    "multipliers",
    "new_pool",
    "ordered",
    "page_layouts",
    "pages_part",
    "pages_step",
    "queries_step",
    "refusals",
    "repack",
    "rotate",
    "step",
    "step_on_device",
    "tail",
    "unrotate",
]

FEW_QUERIES = 16  # up to here one pass over the keys is faster than torch's matrix products
KERNELS = {"cpu": native, "cuda": cuda}  # by the type of device
attend_alone = reference.attend_alone
step, tail = native.step, native.tail
StepTokens, step_on_device = cuda.StepTokens, cuda.step
queries_step, pages_step = cuda.queries_step, cuda.pages_step


def ordered(layout: Layout, recipe: Recipe, side: str, device: torch.device) -> Layout:
    """The layout of a side ("k" or "v") in the storage order of the kernels that run on a device."""
    return layout.ordered(KERNELS[device.type].order(layout, recipe, side)) if device.type in KERNELS else layout


def dense_part(k: Tensor, v: Tensor, lengths: Int[np.ndarray, "b h"]) -> Any:
    """Dense tokens as `step` takes them; None if it cannot."""
    fits = native.missing() is None and k.device.type == "cpu" and k.dtype in native.DTYPES
    return native.dense_part(k, v, lengths) if fits else None


def pages_part(
    pages: Pages, k_rotation: int | None, v_rotation: int | None, factors: Float[Tensor, "b h d"] | None = None
) -> Any:
    """Pages as `step` takes them, with the way into the domain of their codes: see `multipliers`. None if it cannot."""
    d = pages.k_layout.d
    rotated = k_rotation is not None or v_rotation is not None
    if not native.reads(pages) or (rotated and d % 16):
        return None
    return native.pages_part(pages, *multipliers(k_rotation, v_rotation, d, pages.pool.device, factors))


def multipliers(
    k_rotation: int | None,
    v_rotation: int | None,
    d: int,
    device: torch.device,
    factors: Float[Tensor, "b h d"] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """What a query is multiplied by before its Hadamard rotation, and an output after it: the rotations' signs.

    None where there is none, (1, d) where all rows have the same, (b * h, d) where `factors` divide queries, too.
    """
    k, v = (None if seed is None else rotation_signs(d, seed, device)[None] for seed in (k_rotation, v_rotation))
    if factors is not None:
        assert k is not None  # who balances keys with queries has them rotated
        k = (k / factors).flatten(0, 1)
    return k, v


def new_pool(pages: int, nbytes: int, device: torch.device) -> Tensor:
    """Uninitialised memory for pages (pages, nbytes), uint8."""
    if device.type == "cpu" and native.missing() is None:
        return native.new_pool(pages, nbytes)
    return torch.empty(pages, nbytes, dtype=torch.uint8, device=device)


def page_layouts(sides: Mapping[str, tuple[Layout, Recipe]], device: torch.device) -> tuple[Layout, ...]:
    """The layouts of the sides "k" and "v", ordered for the kernels on a device; linear if these cannot read both.

    For whatever attends to a page reads both its sides.
    """
    if refusals(sides, device.type):
        return tuple(layout for layout, _ in sides.values())
    return tuple(ordered(layout, recipe, side, device) for side, (layout, recipe) in sides.items())


def refusals(sides: Mapping[str, tuple[Layout, Recipe]], device: str = "cpu") -> str:
    """Why the kernels of a kind of device cannot read pages of these sides; empty if they can, or if there are none."""
    if device not in KERNELS:
        return ""
    names, refusal = {"k": "keys", "v": "values"}, KERNELS[device].refusal
    return "; ".join(f"{names[side]}: {why}" for side, given in sides.items() if (why := refusal(*given, side)))


def attend_pages(q: Tensor, pages: Pages, scale: float, exact: bool = False) -> Partial:
    """Attention of folded queries over packed pages, in the values' folded domain. See `ops.attention`.

    `exact` computes in fp32 where kernels would multiply codes as 8-bit integers; the reference always does.
    """
    if native.reads(pages):
        return native.attend_pages(q, pages, scale, exact)
    if cuda.reads(pages) and not exact:
        return cuda.attend_pages(q, pages, scale)
    return reference.attend_pages(q, pages, scale)


def attend_dense(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Partial:
    """Attention over the first `lengths` tokens (b, h) of dense keys and values."""
    if few_on_processor(q):
        return native.attend_dense(q, k, v, lengths, scale, torch.zeros(len(q), dtype=torch.int64), False)
    if q.shape[2] <= FEW_QUERIES and cuda.reads_dense(q, k):
        return cuda.attend_dense(q, k, v, _counted(lengths, k.shape[2]), scale, None, False)
    return reference.attend_dense(q, k, v, lengths, scale)


def attend_causal(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, scale: float) -> Partial:
    """Attention of new tokens among themselves; the first `padding` (b) of each sequence are seen by nobody."""
    if few_on_processor(q):
        lengths = torch.full(k.shape[:2], k.shape[2], dtype=torch.int64)
        return native.attend_dense(q, k, v, lengths, scale, padding, True)
    if q.shape[2] <= FEW_QUERIES and cuda.reads_dense(q, k):
        return cuda.attend_dense(q, k, v, None, scale, _counted(padding, 0), True)
    if cuda.flashes(q, k, v) and _counted(padding, 0) is None:
        return cuda.attend_causal(q, k, v, scale)
    return reference.attend_causal(q, k, v, padding, scale)


def merge(parts: Iterable[Partial]) -> Partial:
    """Join attention over disjoint token sets. The parts are not to be used afterwards."""
    whole = list(parts)
    if native.missing() is None and whole[0][0].device.type == "cpu":
        return native.merge(whole)
    return cuda.merge(whole) if cuda.joins(whole) else reference.merge(whole)


def _counted(counts: Tensor, usual: int) -> Tensor | None:
    """None if all counts are the usual one: most calls need no copy to the device."""
    return None if counts.device.type == "cpu" and bool((counts == usual).all()) else counts


def few_on_processor(q: Tensor) -> bool:
    """Whether native code attends from these queries to dense tokens."""
    fits = q.shape[2] <= FEW_QUERIES and q.shape[3] <= native.MAX_HEAD_DIM and q.shape[3] % 8 == 0
    return fits and native.missing() is None and q.device.type == "cpu" and q.dtype in native.DTYPES


@dataclass(frozen=True)
class Implementation:
    """One implementation of the ops: whether it runs on a device, and why or why not, in a sentence."""

    name: str
    runs: bool
    why: str


def explain(device: str = "cpu") -> list[Implementation]:
    """Every implementation for a kind of device ("cpu", "cuda", "mps", ...), the one that runs first."""
    slow = Implementation("reference", True, "PyTorch in fp32, any device; it specifies the result and is slow.")
    if device == "cuda":
        if why := cuda.missing():
            return [slow, Implementation("CUDA", False, why)]
        return [Implementation("CUDA", True, "CUDA C++ kernels in 8-bit integers, compiled at first use."), slow]
    if device != "cpu":
        why = f"This version has no {device} kernels; the reference runs instead."
        return [slow, Implementation(device, False, why)]
    if why := native.missing():
        return [slow, Implementation("native", False, why)]
    rows = [
        Implementation(
            f"native {name}", runs, f"C++ kernels for {needs}." if runs else f"This processor lacks {needs}."
        )
        for name, runs, needs in native.isas()
    ]
    return [*sorted(rows, key=lambda row: not row.runs), slow]


def implementation(device: str = "cpu") -> str:
    """The name of what runs on a kind of device, for reports and records."""
    return explain(device)[0].name


def implementation_of(pages: Pages) -> str:
    """What attends to these pages: the reference names why nothing faster does."""
    device = pages.pool.device.type
    if device in KERNELS and KERNELS[device].reads(pages):
        return implementation(device)
    reasons = refusals({"k": (pages.k_layout, pages.k_recipe), "v": (pages.v_layout, pages.v_recipe)}, device)
    return f"reference ({reasons})" if reasons else "reference"
