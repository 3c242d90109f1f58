"""The text that is compiled: a layout's constants, then the kernels. Layouts are data, also here."""

from functools import cache
from importlib.resources import files

from tersekv.layout import Layout, Plane
from tersekv.ops.cuda.levels import Levels, levels, listed, packed
from tersekv.ops.recipe import Dense, Grid
from tersekv.ops.trellis import Trellis

Read = Dense | Grid | Trellis  # recipes of pages that the kernels read; keys are never of a trellis
NUMBERS = ("scale", "zero", "channel_scale", "channel_zero")


@cache
def read(name: str) -> str:
    return files("tersekv.ops.cuda").joinpath(name).read_text(encoding="utf-8")


def side(name: str, layout: Layout, recipe: Read | None = None) -> str:
    """`struct K` or `struct V`: where the planes of a side lie and, with a recipe, what its codes stand for."""
    dense = "values" in layout  # bf16, and neither codes nor numbers
    numbers = "\n".join(f"  static constexpr Plane {plane.upper()} = {_plane(layout, plane)};" for plane in NUMBERS)
    return f"""struct {name} {{
  static constexpr int BITS = {layout.code_bits}, CODES = {layout.offsets["values" if dense else "codes"]};
  static constexpr bool DENSE = {int(dense)};
  static constexpr int BYTES = {layout.nbytes}, USED = {layout.used_bytes};
{numbers}
{_table(recipe) if recipe else ""}}};
"""


def _table(recipe: Read) -> str:
    trellis = isinstance(recipe, Trellis)
    nothing = Levels((), recipe.half if trellis else 0.0, 0.0)
    found = levels(recipe.table) if isinstance(recipe, Grid) else nothing
    words = ", ".join(f"T{i} = {word:#010x}u" for i, word in enumerate(packed(found.level)))
    return f"""  static constexpr float STEP = {number(found.step)}, MID = {number(found.middle)};
  static constexpr float CENTRE = {number(found.centre)};
  static constexpr bool LISTED = {int(bool(_entries(recipe)))}, TRELLIS = {int(trellis)};
  static constexpr bool CHANNELS_FIRST = {int(isinstance(recipe, Grid) and recipe.first == "channel")};
  static constexpr u32 {words};
"""


def dequantising(k: Layout, v: Layout, k_recipe: Read, v_recipe: Read) -> str:
    """What kernels begin with that make numbers of codes: both sides, and their tables where these are looked up."""
    sides = side("K", k, k_recipe) + side("V", v, v_recipe)
    return f'#include "planes.cuh"\n{sides}{_list("K_LIST", k_recipe)}{_list("V_LIST", v_recipe)}'


def _list(name: str, recipe: Read) -> str:
    return f"__constant__ float {name}[] = {{{', '.join(map(number, _entries(recipe) or (0.0,)))}}};\n"


def _entries(recipe: Read) -> tuple[float, ...]:
    """Those that are looked up one by one, by 8 bits."""
    if isinstance(recipe, Dense) or (isinstance(recipe, Grid) and not listed(recipe.table)):
        return ()
    return recipe.table


def _plane(layout: Layout, name: str) -> str:
    plane: Plane | None = layout.plane(name) if name in layout else None
    if plane is None:
        return "{NONE, 0, 0}"
    return f"{{{plane.kind.upper()}, {layout.offsets[name]}, {layout.offsets.get(name + '_step', 0)}}}"


def number(x: float) -> str:
    """A C++ constant of exactly these bits."""
    return f"float({x.hex()})" if x else "0.f"


@cache
def headers() -> dict[bytes, bytes]:
    folder = files("tersekv.ops.cuda")
    return {path.name.encode(): path.read_bytes() for path in folder.iterdir() if path.name.endswith(".cuh")}
