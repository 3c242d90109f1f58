"""The C++ kernels for processors: what they take, and how pages reach them. The source is in `native/`."""

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tersekv.layout import Layout, Plane
from tersekv.ops.pages import Pages, Partial
from tersekv.ops.recipe import Dense, Recipe

if find_spec("tersekv._native") is None:  # installed without a compiler
    _native: Any = None
else:
    from tersekv import _native

ORDERS = {"k": "simd_k", "v": "simd_v"}


def missing() -> str | None:
    """Why there are no native kernels at all, or None."""
    if _native is None:
        return "They are not built: no C++17 compiler was found at install time. Install GCC or Clang, then reinstall."
    return None


def isas() -> list[tuple[str, bool, str]]:
    """The instruction sets of this build, best first: name, whether it runs here, what it needs."""
    return _native.isas()


def refusal(layout: Layout, recipe: Recipe) -> str | None:
    """Why the kernels cannot read blocks of this layout, or None."""
    if isinstance(recipe, Dense):
        return None
    if not layout.takes("simd_k"):
        return (
            f"{layout.nominal_bits} bits at head dim {layout.d}: they read 1, 2, 3, 4 and 8 bits, d a multiple of 16."
        )
    for plane in layout.planes:
        whole = (layout.block, 1) if plane.name in ("scale", "zero") else (1, layout.d)
        if plane.name in ("scale", "zero", "channel_scale", "channel_zero") and (plane.rows, plane.cols) != whole:
            return f"plane {plane.name} is in groups: they read one number a token, or one a channel and block."
    return None


def order(layout: Layout, recipe: Recipe, side: str) -> str:
    """The storage order in which a side's codes are kept on a processor."""
    dense = isinstance(recipe, Dense)
    return "linear" if dense or missing() or refusal(layout, recipe) else ORDERS[side]


def reads(pages: Pages) -> bool:
    """Whether `attend_pages` can run: pages in memory, each side dense or in its simd order."""
    if missing() or pages.pool.device.type != "cpu":
        return False
    sides = ((pages.k_layout, pages.k_recipe, "k"), (pages.v_layout, pages.v_recipe, "v"))
    return all(isinstance(recipe, Dense) or layout.order == ORDERS[side] for layout, recipe, side in sides)


@lru_cache
def _side(layout: Layout, recipe: Recipe, start: int) -> Any:
    """What C++ needs to know of a side of a page, made once for each layout."""
    planes = [_plane(layout, p) for p in layout.planes if p.kind != "code" and not p.name.endswith("_step")]
    if isinstance(recipe, Dense):
        return _native.Side(0, start, 0, planes, [])
    return _native.Side(layout.nominal_bits, start, layout.offsets["codes"], planes, list(recipe.table))


def _plane(layout: Layout, plane: Plane) -> tuple[str, str, int, int]:
    return plane.name, plane.kind, layout.offsets[plane.name], layout.offsets.get(plane.name + "_step", -1)


def _outputs(q: Tensor) -> Partial:
    return torch.empty(q.shape, dtype=torch.float32), torch.empty(q.shape[:-1], dtype=torch.float32)


def attend_pages(q: Tensor, pages: Pages, scale: float, exact: bool = False, isa: str = "") -> Partial:
    """As `ops.attention.attend_pages`; codes of 1 to 4 bits are multiplied as int8 unless `exact`, and then as fp32."""
    out, lse = _outputs(q)
    k = _side(pages.k_layout, pages.k_recipe, 0)
    v = _side(pages.v_layout, pages.v_recipe, pages.k_layout.nbytes)
    arrays = q.float().contiguous(), pages.pool, pages.table.contiguous(), pages.lengths
    _native.attend_pages(*arrays, k, v, scale, exact, isa, torch.get_num_threads(), out, lse)
    return out, lse


def attend_dense(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, padding: Tensor, causal: bool, isa: str = ""
) -> Partial:
    """Of tokens `padding` to `lengths` of each sequence; `causal`: the last n are the queries' own."""
    out, lse = _outputs(q)
    arrays = q.float().contiguous(), k, v, lengths, padding
    _native.attend_dense(*arrays, causal, scale, isa, torch.get_num_threads(), out, lse)
    return out, lse


def merge(parts: list[Partial]) -> Partial:
    """Joins the parts in place: the first one becomes the whole."""
    _native.merge([out for out, _ in parts], [lse for _, lse in parts])
    return parts[0]


def read_memory(data: Tensor, streams: int, threads: int) -> None:
    """Read all bytes of `data`, in `streams` places at a time: what memory gives at best. See `bench.timing`."""
    _native.read_memory(data, streams, threads)
