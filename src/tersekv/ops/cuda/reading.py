"""Which pages the CUDA kernels read, and in which storage order."""

from tersekv.layout import Layout
from tersekv.ops.cuda import source
from tersekv.ops.cuda.compiler import missing
from tersekv.ops.cuda.levels import listed
from tersekv.ops.pages import Pages
from tersekv.ops.recipe import Dense, Grid, Recipe
from tersekv.ops.trellis import Trellis

HEAD_DIMS = (64, 128, 256)
CHUNK_HEAD_DIMS = (64, 128)  # of what chunk.cu alone reads, unequal steps and bf16: at 256 it is for Hopper alone
ORDERS = {"k": "mma_k", "v": "mma_v"}
TRELLIS_ORDER = "mma_trellis_v"
Form = tuple[Layout, Layout, source.Read, source.Read]  # of keys and values


def refusal(layout: Layout, recipe: Recipe, side: str) -> str | None:
    """Why the kernels cannot read blocks of this layout as keys ("k") or values ("v"), or None."""
    if layout.d not in HEAD_DIMS:
        return f"head dim {layout.d}: the CUDA kernels read {', '.join(map(str, HEAD_DIMS))}."
    if isinstance(recipe, Trellis):
        return _trellis_refusal(layout, side)
    if isinstance(recipe, Dense):
        return _dense_refusal(layout)
    if not isinstance(recipe, Grid):
        return f"recipe {recipe.name}: the CUDA kernels read dense, grid, and trellis as values."
    if recipe.first == "channel" and "zero" in layout:
        return f"recipe {recipe.name}: the CUDA kernels read it without zeros of tokens."
    if not layout.takes("mma_k"):
        return f"{layout.code_bits} bits: the CUDA kernels read 1, 2, 3, 4 and 8."
    if listed(recipe.table) and layout.d not in CHUNK_HEAD_DIMS:
        return f"8 bits of unequal steps at head dim {layout.d}: the CUDA kernels read them at 64 and 128."
    if layout.plane("codes").cols != layout.d:
        return f"{layout.plane('codes').cols} codes a token: they read one for each of the {layout.d} channels."
    for plane in layout.planes:
        whole = (layout.block, 1) if plane.name in ("scale", "zero") else (1, layout.d)
        if plane.name in source.NUMBERS and (plane.rows, plane.cols) != whole:
            return f"plane {plane.name} is in groups: they read one number a token, or one a channel and block."
    return None


def _trellis_refusal(layout: Layout, side: str) -> str | None:
    if side == "k":
        return "recipe trellis: the CUDA kernels read it as values, not as keys."
    if others := [p.name for p in layout.planes if p.name in source.NUMBERS and p.name != "scale"]:
        return f"plane {others[0]}: the CUDA kernels read trellis codes with a scale alone (mean=none)."
    return None


def _dense_refusal(layout: Layout) -> str | None:
    if (kind := layout.plane("values").kind) != "bf16":
        return f"stored in {kind}: the CUDA kernels read bf16, in which they multiply."
    if layout.d not in CHUNK_HEAD_DIMS:
        return f"stored in bf16 at head dim {layout.d}: the CUDA kernels read that at 64 and 128."
    return None


def order(layout: Layout, recipe: Recipe, side: str) -> str:
    """The storage order in which a side's codes are kept on a GPU."""
    return "linear" if missing() or refusal(layout, recipe, side) else ordered(recipe, side)


def ordered(recipe: Recipe, side: str) -> str:
    """The storage order that the kernels read."""
    if isinstance(recipe, Dense):
        return "linear"
    return TRELLIS_ORDER if isinstance(recipe, Trellis) else ORDERS[side]


def reads(pages: Pages) -> bool:
    """Whether `attend_pages` can run: pages on a GPU, both sides in the order of the kernels."""
    if pages.pool.device.type != "cuda" or missing():
        return False
    sides = ((pages.k_layout, pages.k_recipe, "k"), (pages.v_layout, pages.v_recipe, "v"))
    return all(
        layout.order == ordered(recipe, side) and refusal(layout, recipe, side) is None
        for layout, recipe, side in sides
    )


def form(pages: Pages) -> Form:
    """What kernels are compiled for that read each side as it is. `attending.Form` is what the 8-bit ones read."""
    assert isinstance(pages.k_recipe, source.Read) and isinstance(pages.v_recipe, source.Read)  # see `reads`
    return pages.k_layout, pages.v_layout, pages.k_recipe, pages.v_recipe


def integers(pages: Pages) -> bool:
    """Whether the codes of both sides stand for 8-bit integers; if not, only `chunk.cu` reads them."""
    recipes = pages.k_recipe, pages.v_recipe
    return all(isinstance(r, Trellis) or (isinstance(r, Grid) and not listed(r.table)) for r in recipes)
