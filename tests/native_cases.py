"""Pages of random codes for every form of the recipes, what attention over them is, and how far kernels may be off.

No codec has all planes at once, so sides are made here: text such as "3 normal scale:log8 channel_zero:int8", or
"2 trellis scale:log8" or "dense fp16". A plus sign, "scale:+fp16": no negative ones. "scale/32:fp16": one for 32
channels of a token, "channel_scale/32:fp16": for 32 tokens of a channel. "3 uniform first=channel ...": channels first.
"vq 8x6 scale:log8": indices of 6 bits to sub-vectors of 8, "8x6x2" in two stages, "8x6x2 own" in books of each head and
place.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from tersekv.layout import BLOCK, KIND_BITS, Layout, Plane
from tersekv.ops import Pages, native
from tersekv.ops.planes import read, read_codes, to_bytes, unpack_codes
from tersekv.ops.recipe import Dense, Grid
from tersekv.ops.trellis import STATES, Trellis, walk
from tersekv.ops.vq import PLANES, Tables, VectorLookup
from tersekv.packed import Packed, repack


@dataclass(frozen=True)
class Side:
    """Pages of one side in the linear order."""

    packed: Packed
    recipe: Dense | Grid | Trellis | VectorLookup
    heads: Tensor  # KV head of each page

    @property
    def int8(self) -> bool:
        return isinstance(self.recipe, Trellis) or (isinstance(self.recipe, Grid) and len(self.recipe.table) < 256)

    @property
    def channels_first(self) -> bool:
        return isinstance(self.recipe, Grid) and self.recipe.first == "channel"

    @property
    def middle(self) -> float:
        return (min(self.recipe.table) + max(self.recipe.table)) / 2 if isinstance(self.recipe, Grid) else 0.0

    @property
    def channels_each(self) -> int:
        """Channels that share the numbers of a token."""
        layout = self.packed.layout
        return layout.d // max([p.cols for p in layout.planes if p.name in native.TOKEN_NUMBERS], default=1)

    def numbers(self, name: str, otherwise: float) -> Tensor:
        """(pages, 64 or 1, d or 1): those of groups repeated."""
        values = read(self.packed, name)
        if values is None:
            return torch.full((1, 1, 1), otherwise).double()
        if name in native.TOKEN_NUMBERS and values.shape[-1] > 1:
            values = values.repeat_interleave(self.channels_each, -1)
        elif name in native.CHANNEL_NUMBERS and values.shape[-2] > 1:
            values = values.repeat_interleave(BLOCK // values.shape[-2], -2)
        return values.double()

    def stages(self) -> list[Tensor]:
        """Of `vq`, what each stage adds: (pages, 64, d)."""
        assert isinstance(self.recipe, VectorLookup)
        tables, places = self.recipe.tables, self.packed.layout.plane("codes").cols
        pages, place = self.heads[:, None, None], torch.arange(places)
        found = []
        for name, table in zip(PLANES, tables.stages, strict=False):
            bits = self.packed.layout.plane(name).bits
            codes = unpack_codes(self.packed.plane(name), bits).unflatten(-1, (BLOCK, places)).long()
            one_head, one_place = (n == 1 for n in table.shape[:2])
            found.append(table.double()[0 * pages if one_head else pages, 0 * place if one_place else place, codes])
        return [x.flatten(-2) for x in found]

    def size(self) -> Tensor:
        """Magnitude of what is summed up to `table`."""
        if isinstance(self.recipe, VectorLookup):
            return torch.stack(self.stages()).abs().sum(0)
        return self.table()[0].abs()

    def table(self) -> tuple[Tensor, Tensor]:
        """What each stored element stands for before scales, exactly and on the 128 levels of the int8 route."""
        if isinstance(self.recipe, Dense):
            values = read(self.packed, "values")
            assert values is not None
            return values.double(), values.double()
        if isinstance(self.recipe, VectorLookup):
            total = torch.stack(self.stages()).sum(0)
            return total, total
        table = np.array(self.recipe.table, dtype=np.float32)
        if isinstance(self.recipe, Trellis):  # its entries are levels
            t = torch.from_numpy(table).double()[walk(read_codes(self.packed), self.recipe.bits)]
            return t, t
        step = (table.max() - table.min()) / np.float32(127)
        level = np.rint((table - table.min()) / step)
        near = np.float64(table.min()) + np.float64(step) * level
        codes = read_codes(self.packed).int()
        return torch.from_numpy(table).double()[codes], torch.from_numpy(near)[codes]


def _plane(text: str, d: int) -> Plane:
    name, kind = text.replace("+", "").split(":")
    name, _, each = name.partition("/")
    whole = BLOCK if name.startswith("channel") else d
    groups = whole // int(each or whole)
    rows, cols = (groups, d) if name.startswith("channel") else (BLOCK, groups)
    return Plane(name, rows, cols, KIND_BITS[kind], kind)


def _content(plane: Plane, pages: int, positive: bool) -> Tensor:
    shape = (pages, plane.rows * plane.cols)
    if plane.kind == "code":
        return torch.randint(0, 256, (pages, plane.nbytes), dtype=torch.uint8)
    if plane.name.endswith("_step"):
        return to_bytes(torch.rand(shape) / 50, plane.kind)
    if plane.kind == "int8":
        return torch.randint(0, 128 if plane.name == "scale" and positive else 256, shape, dtype=torch.uint8)
    if plane.name.endswith("scale"):
        sign = torch.ones(shape) if plane.kind == "log8" or positive else torch.randn(shape).sign()
        return to_bytes((torch.rand(shape) + 0.5) * sign, plane.kind)
    return to_bytes(torch.randn(shape) / 2, plane.kind)


def _recipe(form: str, bits: int, first: str) -> Grid | Trellis:
    if form == "trellis":
        return Trellis(tuple((2 * torch.randint(0, 128, (STATES // 2,)) - 127).tolist()), 1 / 64, bits)
    if form == "positive":
        return Grid(tuple(float(i) for i in range(2**bits)), first)
    if form == "uniform":
        return Grid(tuple(i - 2.0 ** (bits - 1) for i in range(2**bits)), first)
    return Grid(tuple(NormalDist().inv_cdf((i + 0.5) / 2**bits) for i in range(2**bits)), first)


def _books(form: str, own: bool, d: int, heads: int) -> tuple[list[Plane], VectorLookup]:
    dim, index, *stages = map(int, form.split("x"))
    shape = (heads if own else 1, d // dim if own else 1, 2**index, dim)
    tables = tuple(torch.randn(shape).half() for _ in range(stages[0] if stages else 1))
    planes = [Plane(name, BLOCK, d // dim, index) for name in PLANES[: len(tables)]]
    return planes, VectorLookup(Tables(f"{torch.rand(()):.9f}", tables))


def make_side(text: str, d: int, heads: Tensor) -> Side:
    """`heads`: the KV head of each page."""
    first, form, *rest = text.split()
    pages = len(heads)
    if first == "vq":
        planes, recipe = _books(form, "own" in rest, d, int(heads.max()) + 1 if pages else 1)
        planes += [_plane(word, d) for word in rest if ":" in word]
        planes += [Plane(p.name + "_step", 1, 1, 16, "fp16") for p in planes if p.kind == "int8"]
    elif first == "dense":
        planes = [Plane("values", BLOCK, d, KIND_BITS[form], form)]
        recipe = Dense()
    else:
        planes = [Plane("codes", BLOCK, d, int(first)), *(_plane(word, d) for word in rest if "=" not in word)]
        planes += [Plane(p.name + "_step", 1, 1, 16, "fp16") for p in planes if p.kind == "int8"]
        recipe = _recipe(form, int(first), "channel" if "first=channel" in rest else "token")
    layout = Layout(d, tuple(planes))
    return Side(
        Packed.assemble(layout, {p.name: _content(p, pages, f"{p.name}:+" in text) for p in planes}), recipe, heads
    )


@dataclass(frozen=True)
class Case:
    """Sides, whose pages lie row after row, and pools of them: `linear` for the reference, `native` for kernels."""

    k: Side
    v: Side
    q: Tensor
    linear: Pages
    native: Pages
    scale: float


def make_case(k: str, v: str, d: int, g: int, n: int, lengths: list[list[int]]) -> Case:
    """Pages in random places among unused ones; every byte that does not count is 0xFF, a NaN in floats."""
    count = torch.tensor(lengths)
    blocks = -(-int(count.max()) // BLOCK) + 1
    starts = torch.arange(blocks) * BLOCK
    used = starts < count[..., None]
    total = int(used.sum())
    place = torch.randperm(total + 3)[:total]
    table = torch.full(used.shape, -1, dtype=torch.int32)
    table[used] = place.to(torch.int32)
    left = (count[..., None] - starts)[used].clamp(max=BLOCK)
    heads = torch.arange(count.shape[1])[:, None].expand(used.shape)[used]
    sides = [make_side(text, d, heads) for text in (k, v)]
    for side in sides:
        _poison(side.packed, left)
    pools = []
    for kernels in (False, True):
        stored = [
            repack(s.packed, native.order(s.packed.layout, s.recipe, side) if kernels else "linear")
            for s, side in zip(sides, "kv", strict=True)
        ]
        pool = torch.full((total + 3, sum(p.layout.nbytes for p in stored)), 0xFF, dtype=torch.uint8)
        pool[place] = torch.cat([p.data for p in stored], -1)
        layouts = [p.layout for p in stored]
        pools.append(Pages(pool, table, count, *layouts, *(s.recipe for s in sides)))
    b, h = count.shape
    return Case(*sides, torch.randn(b, h * g, n, d), *pools, d**-0.5)


def mma_pages(case: Case, device: str) -> Pages:
    """The pages of a case in the orders of the CUDA kernels."""
    linear, split = case.linear, case.linear.k_layout.nbytes
    values = "mma_trellis_v" if isinstance(linear.v_recipe, Trellis) else "mma_v"
    sides = ((linear.k_layout, linear.pool[:, :split], "mma_k"), (linear.v_layout, linear.pool[:, split:], values))
    stored = [repack(Packed(layout, data), order) for layout, data, order in sides]
    moved = (x.to(device) for x in (torch.cat([p.data for p in stored], -1), linear.table, linear.lengths))
    return Pages(*moved, *(p.layout for p in stored), linear.k_recipe, linear.v_recipe)


def _poison(packed: Packed, left: Tensor) -> None:
    """Numbers of tokens beyond the first `left` of each page become NaN, where their kind has one."""
    for plane in packed.layout.planes:
        if plane.rows == BLOCK and plane.kind != "code":
            rows = packed.data[:, packed.layout.span(plane.name)].unflatten(1, (BLOCK, -1))
            rows[torch.arange(BLOCK) >= left[:, None]] = 0xFF
