"""Layouts as a GPU has them, on any machine."""

from tersekv.layout import Layout
from tersekv.ops.cuda import reading
from tersekv.spec import Spec


def layouts(codecs: Spec, d: int) -> tuple[Layout, Layout]:
    """In the orders of the kernels, which `reading.order` names only where there is a GPU."""
    sides = ((codecs.k, "k"), (codecs.v, "v"))
    k, v = (codec.layout(d).ordered(reading.ordered(codec.recipe(d), side)) for codec, side in sides)
    return k, v
