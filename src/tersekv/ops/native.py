"""The C++ kernels for processors: what they take, and how pages reach them. The source is in `native/`."""

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._C import _to_dlpack as array  # ten times quicker than nanobind's own way to a tensor's memory

from tersekv.errors import InputError
from tersekv.layout import Layout, Plane
from tersekv.ops.pages import Pages, Partial
from tersekv.ops.recipe import Dense, Grid, Recipe
from tersekv.ops.trellis import Trellis
from tersekv.ops.vq import PLANES, VectorLookup

if find_spec("tersekv._native") is None:  # installed without a compiler
    _native: Any = None
else:
    from tersekv import _native

MAX_HEAD_DIM = 512  # of the scratch memory in `native/kernels.h`
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ORDERS = ("simd_k", "simd_v", "trellis_k", "trellis_v")  # that C++ knows, beside the linear one
TOKEN_NUMBERS, CHANNEL_NUMBERS = ("scale", "zero"), ("channel_scale", "channel_zero")
TAKEN = (
    "Allowed, in memory: q (b, hq, n, d); pool (pages, bytes) uint8; table (b, h, blocks) int32; lengths (b, h) int64; "
    "padding (b) int64; k and v (b, h, t, d) in fp32, fp16 or bf16. Convert them with .to()."
)


def missing() -> str | None:
    """Why there are no native kernels at all, or None."""
    if _native is None:
        return "They are not built: no C++17 compiler was found at install time. Install GCC or Clang, then reinstall."
    return None


def isas() -> list[tuple[str, bool, str]]:
    """The instruction sets of this build, best first: name, whether it runs here, what it needs."""
    return _native.isas()


def refusal(layout: Layout, recipe: Recipe, side: str = "") -> str | None:
    """Why the kernels cannot read blocks of this layout, or None: the same for keys and values."""
    if layout.d > MAX_HEAD_DIM:
        return f"head dim {layout.d}: they read up to {MAX_HEAD_DIM}."
    if isinstance(recipe, Dense):
        return None
    if isinstance(recipe, VectorLookup):
        return _refused_books(layout, recipe)
    trellis = isinstance(recipe, Trellis)
    if not isinstance(recipe, Grid | Trellis):
        return f"recipe {recipe.name}: they read dense, grid, trellis and vq."
    if trellis and not layout.takes("trellis_k"):
        return f"a trellis at head dim {layout.d}: they read multiples of 32."
    if not layout.takes("simd_k"):
        return f"{layout.code_bits} bits at head dim {layout.d}: they read 1, 2, 3, 4 and 8 bits, d a multiple of 16."
    if layout.plane("codes").cols != layout.d:
        return f"{layout.plane('codes').cols} codes a token: they read one for each of the {layout.d} channels."
    return _refused_numbers(layout, recipe)


def _refused_books(layout: Layout, recipe: VectorLookup) -> str | None:
    if layout.d % 16:
        return f"recipe vq at head dim {layout.d}: they read multiples of 16."
    dim, index = recipe.tables.dim, layout.code_bits
    if dim % 4 or index < 2:
        return f"indices of {index} bits to sub-vectors of {dim}: they read 2 bits and more, multiples of 4 values."
    return None


def _refused_numbers(layout: Layout, recipe: Grid | Trellis) -> str | None:
    planes = [plane for plane in layout.planes if plane.name in TOKEN_NUMBERS + CHANNEL_NUMBERS]
    in_groups = [plane for plane in planes if groups(layout, plane) > 1]
    for plane in in_groups:
        what, all_of = ("tokens", layout.block) if plane.name in CHANNEL_NUMBERS else ("channels", layout.d)
        each = all_of // groups(layout, plane)
        if each % 16:
            return f"plane {plane.name} is in groups of {each} {what}: they read groups of 16 or a multiple."
    if in_groups and (isinstance(recipe, Trellis) or len({plane.name in TOKEN_NUMBERS for plane in planes}) == 2):
        return (
            f"plane {in_groups[0].name} is in groups: they read that on a grid, of tokens or of channels but not both."
        )
    if isinstance(recipe, Grid) and recipe.first == "channel" and (in_groups or "zero" in layout):
        return f"recipe {recipe.name}: they read it without zeros of tokens and without groups."
    return None


def groups(layout: Layout, plane: Plane) -> int:
    """Of tokens that share the numbers of a channel, or of channels that share those of a token."""
    whole = {TOKEN_NUMBERS: layout.block, CHANNEL_NUMBERS: layout.d}
    return next((plane.rows * plane.cols // n for names, n in whole.items() if plane.name in names), 1)


def order(layout: Layout, recipe: Recipe, side: str) -> str:
    """The storage order in which a side's codes are kept on a processor."""
    if missing() or refusal(layout, recipe):
        return "linear"
    return _order(recipe, side)


def _order(recipe: Recipe, side: str) -> str:
    return (
        "linear"
        if isinstance(recipe, Dense | VectorLookup)
        else f"{'trellis' if isinstance(recipe, Trellis) else 'simd'}_{side}"
    )


def reads(pages: Pages) -> bool:
    """Whether `attend_pages` can run: pages in memory, each side dense or in its simd order."""
    if missing() or pages.pool.device.type != "cpu":
        return False
    sides = ((pages.k_layout, pages.k_recipe, "k"), (pages.v_layout, pages.v_recipe, "v"))
    return all(
        refusal(layout, recipe) is None and layout.order == _order(recipe, side) for layout, recipe, side in sides
    )


@lru_cache
def _side(layout: Layout, recipe: Recipe, start: int) -> Any:
    """What C++ needs to know of a side of a page, made once for each layout."""
    numbers = [p for p in layout.planes if p.kind != "code" and not p.name.endswith("_step")]
    planes = [(*_plane(layout, p), groups(layout, p)) for p in numbers]
    if isinstance(recipe, Dense):
        return _native.Side(0, layout.d, start, layout.nbytes, 0, planes, [], 0, False)
    if isinstance(recipe, VectorLookup):
        stages = [array(stage.float().cpu().contiguous()) for stage in recipe.tables.stages]
        codes = [layout.offsets[name] for name in PLANES if name in layout]
        return _native.books_side(layout.d, start, layout.nbytes, codes, planes, layout.code_bits, stages)
    assert isinstance(recipe, Grid | Trellis)  # for the type checker: `refusal` let it through
    half = recipe.half if isinstance(recipe, Trellis) else 0.0
    first = isinstance(recipe, Grid) and recipe.first == "channel"
    codes, table = layout.offsets["codes"], list(recipe.table)
    return _native.Side(layout.code_bits, layout.d, start, layout.nbytes, codes, planes, table, half, first)


def _plane(layout: Layout, plane: Plane) -> tuple[str, str, int, int]:
    return plane.name, plane.kind, layout.offsets[plane.name], layout.offsets.get(plane.name + "_step", -1)


def _call(kernel: Any, arrays: dict[str, Any], *options: Any) -> Any:
    """Run a kernel, or raise InputError: C++ checks every value, nanobind the types, before anything is read."""
    try:
        return kernel(*[array(x.detach()) if isinstance(x, Tensor) else x for x in arrays.values()], *options)
    except ValueError as error:
        raise InputError(str(error)) from None
    except TypeError:
        tensors = {name: x for name, x in arrays.items() if isinstance(x, Tensor)}
        what = ", ".join(f"{name} {tuple(x.shape)} {x.dtype} on {x.device}" for name, x in tensors.items())
        raise InputError(f"The native kernels cannot take {what}. {TAKEN}") from None


def pages_part(pages: Pages, before: Tensor | None = None, after: Tensor | None = None) -> Any:
    """Pages as kernels take them, made once for many queries. `before` and `after`: see `ops.multipliers`."""
    arrays = {name: getattr(pages, name).contiguous() for name in ("pool", "table", "lengths")}
    k = _side(pages.k_layout, pages.k_recipe, 0)
    v = _side(pages.v_layout, pages.v_recipe, pages.k_layout.nbytes)
    multipliers = [None if x is None else array(x) for x in (before, after)]
    return _call(_native.pages_part, arrays, k, v, *multipliers)


def dense_part(k: Tensor, v: Tensor, lengths: Any, padding: Any = None, causal: bool = False) -> Any:
    """Tokens `padding` (b) to `lengths` (b, h) of each sequence, int64; `causal`: the last are the queries' own."""
    return _call(_native.dense_part, {"k": k, "v": v, "lengths": lengths, "padding": padding}, causal)


def tail(k: Tensor, v: Tensor) -> Any:
    """Room (b, h, room, d) for the tokens of steps."""
    return _call(_native.Tail, {"k": k, "v": v})


def step(
    q: Tensor, k: Tensor, v: Tensor, parts: list[Any], tail: Any, held: int, scale: float, exact: bool, isa: str = ""
) -> Tensor | None:
    """Writes new tokens behind the first `held` of a tail, and attends to all parts and, causally, to the tail.

    Folding, merging and rounding to the queries' dtype included. None, and nothing is written, if the tokens are not
    finite, or not of the tail's shape and type.
    """
    q = q if q.stride(-1) == 1 else q.contiguous()
    if torch.is_grad_enabled():
        q, k, v = q.detach(), k.detach(), v.detach()
    out = torch.empty_like(q)
    try:
        done = _native.step(
            array(q), array(k), array(v), parts, tail, held, scale, exact, isa, torch.get_num_threads(), array(out)
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    return out if done else None


def attend(
    q: Tensor, parts: list[Any], scale: float, exact: bool, out: Tensor, lse: Tensor | None, isa: str = ""
) -> None:
    """Attention over all parts, written to `out` (b, hq, n, d) and `lse` (b, hq, n)."""
    arrays = {"q": q if q.stride(-1) == 1 else q.contiguous()}
    end = None if lse is None else array(lse)
    _call(_native.attend, arrays, parts, scale, exact, isa, torch.get_num_threads(), array(out), end)


def attend_part(q: Tensor, part: Any, scale: float, exact: bool, isa: str = "") -> Partial:
    """Of one part, in fp32: outputs as the queries, and their log-sum-exps."""
    out, lse = torch.empty(q.shape, dtype=torch.float32), torch.empty(q.shape[:-1], dtype=torch.float32)
    attend(q, [part], scale, exact, out, lse, isa)
    return out, lse


def attend_pages(q: Tensor, pages: Pages, scale: float, exact: bool = False, isa: str = "") -> Partial:
    """As `ops.attention.attend_pages`; codes of 1 to 4 bits are multiplied as int8 unless `exact`, and then as fp32."""
    return attend_part(q, pages_part(pages), scale, exact, isa)


def attend_dense(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, padding: Tensor, causal: bool, isa: str = ""
) -> Partial:
    """Of tokens `padding` to `lengths` of each sequence; `causal`: the last n are the queries' own."""
    return attend_part(q, dense_part(k, v, lengths, padding, causal), scale, True, isa)


def merge(parts: list[Partial]) -> Partial:
    """Joins the parts in place: the first one becomes the whole."""
    outs, lses = ([x.detach().contiguous() for x in xs] for xs in zip(*parts, strict=True))
    _call(_native.merge, {}, [array(x) for x in outs], [array(x) for x in lses])
    return outs[0], lses[0]


def new_pool(pages: int, nbytes: int) -> Tensor:
    """Room for pages, in large memory pages where the system has them: scattered pages are read a quarter faster."""
    pool = torch.empty(pages, nbytes, dtype=torch.uint8)
    _native.prefer_large_pages(array(pool))
    return pool


def read_memory(data: Tensor, streams: int, threads: int) -> None:
    """Read all bytes of `data`, in `streams` places at a time: what memory gives at best. See `bench.timing`."""
    _native.read_memory(data.numpy(), streams, threads)
