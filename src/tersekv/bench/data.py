"""What attention is timed on: keys with channel means, moderately peaked scores, pages in order or scattered."""

from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tersekv.codec import Codec
from tersekv.errors import InputError
from tersekv.layout import BLOCK
from tersekv.ops import new_pool, page_layouts
from tersekv.ops.pages import Pages
from tersekv.packed import repack

DISTINCT = 96  # blocks that are drawn and encoded; the others repeat them, each at its own place in memory
PEAK = 2.0  # standard deviation of a query's scores: some e^-4 of the tokens get most of the attention


@dataclass(frozen=True)
class Case:
    """One call: `hq` query heads and `n` new tokens over `t` cached tokens of `h` KV heads."""

    d: int
    hq: int
    h: int
    t: int
    n: int

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 1 or self.hq % self.h or self.d % 32:
            raise InputError(
                f"{self}: all must be at least 1, d a multiple of 32 (llama.cpp's groups), and the query heads a "
                "multiple of the KV heads, for example d=128, heads 32/8."
            )

    @property
    def scale(self) -> float:
        return self.d**-0.5


@dataclass(frozen=True)
class Drawn:
    """Queries (1, hq, n, d); `k` and `v`: the distinct blocks (m, 64, d); `index` (h, blocks): which block is where."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    index: Tensor

    def dense(self, blocks: Tensor) -> Tensor:
        """Cached tokens (1, h, t, d) made of these distinct blocks."""
        return blocks[self.index].flatten(1, 2)[None, :, : self.case.t].contiguous()

    @cached_property
    def undamaged(self) -> tuple[Tensor, Tensor]:
        return self.dense(self.k), self.dense(self.v)


def draw(case: Case, seed: int = 0) -> Drawn:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    blocks = -(-case.t // BLOCK)
    m = min(DISTINCT, case.h * blocks)
    k, v = (normal(m, BLOCK, case.d) + mean * normal(case.d) for mean in (2.0, 0.3))
    index = torch.randint(m, (case.h, blocks), generator=generator)
    return Drawn(case, PEAK * normal(1, case.hq, case.n, case.d), k, v, index)


def packed(drawn: Drawn, k: Codec, v: Codec) -> tuple[Pages, tuple[Tensor, Tensor]]:
    """The tokens as pages, head by head as a cache lays them down, and what the pages say, folded, as dense tokens."""
    case, parts, said = drawn.case, [], []
    recipes = k.recipe(case.d), v.recipe(case.d)
    sides = {"k": (k.layout(case.d), recipes[0]), "v": (v.layout(case.d), recipes[1])}
    k_layout, v_layout = page_layouts(sides, drawn.k.device)
    for codec, blocks, recipe, layout in zip((k, v), (drawn.k, drawn.v), recipes, (k_layout, v_layout), strict=True):
        plain = codec.encode(blocks)
        said.append(drawn.dense(recipe.values(plain)))
        parts.append(repack(plain, layout.order))
    blocks = torch.cat([part.data for part in parts], -1)
    pool = new_pool(drawn.index.numel(), blocks.shape[1], blocks.device)
    torch.index_select(blocks, 0, drawn.index.flatten(), out=pool)
    table = torch.arange(len(pool), dtype=torch.int32).view(1, *drawn.index.shape)
    lengths = torch.full((1, case.h), case.t)
    pages = Pages(pool, table, lengths, k_layout, v_layout, *recipes)
    return pages, (said[0], said[1])


def scattered(pages: Pages) -> Pages:
    """The same tokens with their pages anywhere in the pool, as an engine leaves them that shares it between users."""
    place = torch.randperm(len(pages.pool), generator=torch.Generator().manual_seed(1))
    pool = new_pool(len(pages.pool), pages.pool.shape[1], pages.pool.device)
    pool[place] = pages.pool
    return replace(pages, pool=pool, table=place.to(torch.int32)[pages.table.long()])


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v in fp64, one KV head at a time: what every contestant is held against."""
    heads = []
    for queries, keys, values in zip(q[0].double().chunk(k.shape[1]), k[0].double(), v[0].double(), strict=True):
        weights = torch.softmax(queries.flatten(0, 1) @ keys.mT * scale, -1)
        heads.append((weights @ values).view(queries.shape))
    return torch.cat(heads)[None]


def error(out: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth, over all heads and queries."""
    return float((out.double() - truth).norm() / truth.norm())
