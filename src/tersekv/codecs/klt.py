"""`klt`: channels that a model's keys and queries agree on, and bits for each group of them by what errors there cost.

Transform coding in the manner of OSCAR (arXiv 2605.17757), whose rotation follows the covariance of queries. Here the
basis is that of both covariances: `tersekv calibrate klt` finds per layer and KV head a matrix T with y = T x
uncorrelated and an error of y no more visible along one channel than along another of its group. Groups of channels
get bits by reverse water-filling; a group may get none. Queries are folded by the inverse of T, once a step.

Differs from OSCAR: T is no rotation, keys and queries decide it together; bits differ by channels, where theirs differ
by side; block mean and token scale are those of `rotated`; no clipping. `books=none` is the signed Hadamard rotation.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tersekv.codebook import distortion, lloyd_max, table
from tersekv.codec import Codec, Fitted, check_bits, check_choice
from tersekv.codecs.books import FIRST, Books
from tersekv.codecs.rotated import centred
from tersekv.errors import SpecError
from tersekv.layout import BLOCK, Layout, Plane, check_head_dim
from tersekv.ops.lookup import nearest
from tersekv.ops.planes import pack_codes, to_bytes
from tersekv.ops.recipe import Grid, Grids, Recipe
from tersekv.ops.sums import channel_sum, products, root, unit_scale
from tersekv.packed import Packed
from tersekv.rotation import rotate, unrotate

MOST = 8  # bits of a group


def allocated(costs: list[float], bits: int) -> tuple[int, ...]:
    """Bits of each group, `bits` on average: one after the other to where it saves most. `costs`: of an error of 1."""
    given = [0] * len(costs)
    left = [1.0, *(distortion(some) for some in range(1, MOST + 1)), 0.0]
    for _ in range(bits * len(costs)):
        savings = [cost * (left[b] - left[b + 1]) * (b < MOST) for cost, b in zip(costs, given, strict=True)]
        given[savings.index(max(savings))] += 1
    return tuple(given)


@dataclass(frozen=True, eq=False)
class KLT(Codec):
    """`bits` on average over `groups` of channels, which `books` was made for, and of which `layer` and `side` say
    whose matrix. `scale`: unbiased in the metric of the queries, or norm.
    """

    bits: int = 3
    groups: int = 1
    scale: str = "unbiased"
    books: str = "none"
    layer: int = FIRST
    side: str = "v"

    side_defaults: ClassVar = {"k": {"side": "k"}}

    def __post_init__(self) -> None:
        check_bits(self.bits, 1, MOST)
        check_choice("scale", self.scale, ("unbiased", "norm"))
        check_choice("side", self.side, ("k", "v"))
        if self.books != "none":
            _ = self._file, self.forward, self.costs  # kept from now on, whatever becomes of the file
        elif self.groups != 1:
            raise SpecError(f"groups={self.groups} needs books=FILE, which says which channels belong together.")

    def __eq__(self, other: object) -> bool:
        """Files under one name differ, and so then do bits of groups."""
        return isinstance(other, KLT) and (vars_of(self), self._digest) == (vars_of(other), other._digest)

    def __hash__(self) -> int:
        return hash((*vars_of(self).items(), self._digest))

    @cached_property
    def _file(self) -> Books:
        return Books.of(self.books, "klt", self.side, vars_of(self))

    @property
    def _digest(self) -> str:
        return "" if self.books == "none" else self._file.digest

    @property
    def _name(self) -> str:
        return f"{self._file.layer(self.layer)}.{self.side}"

    @cached_property
    def forward(self) -> Float[Tensor, "h d d"]:
        """T of each KV head, in fp16."""
        return self._file.tensor(f"{self._name}.forward")

    @cached_property
    def costs(self) -> Float[Tensor, "h groups"]:
        """What an error of variance 1 costs in a group, in units that the heads of a layer share."""
        return self._file.tensor(f"{self._name}.costs")

    @cached_property
    def inverse(self) -> Float[Tensor, "h d d"]:
        """fp32. No code depends on it, so it may differ in its last bit."""
        return torch.linalg.inv(self.forward.double()).float()

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Bits of each group."""
        costs = [[0.0]] if self.books == "none" else self.costs.double().tolist()
        return allocated([sum(heads) for heads in zip(*costs, strict=True)], self.bits)

    @property
    def fitted(self) -> Fitted | None:
        nbytes = 0 if self.books == "none" else self.forward.nbytes + self.inverse.nbytes + self.costs.nbytes
        return None if self.books == "none" else self._file.fitted(self._name, nbytes)

    def at(self, layer: int) -> "KLT":
        return self if self.books == "none" else replace(self, layer=layer)

    def _parts(self, d: int) -> tuple[tuple[str, int, int], ...]:
        """Neighbouring groups of as many bits share a plane: its name, channels, bits."""
        if self.books != "none" and d != self.forward.shape[-1]:
            raise SpecError(f"head_dim {d}: {self.books} is for {self.forward.shape[-1]}.")
        runs: list[list[int]] = []
        for bits in self.widths:
            if not runs or runs[-1][1] != bits:
                runs.append([0, bits])
            runs[-1][0] += d // self.groups
        return tuple((f"codes{i}" if i else "codes", channels, bits) for i, (channels, bits) in enumerate(runs))

    def layout(self, d: int) -> Layout:
        check_head_dim(d)
        planes = [Plane(name, BLOCK, channels, bits) for name, channels, bits in self._parts(d) if bits]
        planes += [Plane("scale", BLOCK, 1, 8, "log8")]
        if self.side == "k":
            planes += [Plane("channel_zero", 1, d, 8, "int8"), Plane("channel_zero_step", 1, 1, 16, "fp16")]
        return Layout(d, tuple(planes))

    def recipe(self, d: int) -> Recipe:
        parts = self._parts(d)
        tables = tuple((name, channels, _entries(bits, d)) for name, channels, bits in parts)
        return Grid(tables[0][2]) if len(parts) == 1 else Grids(tables)

    def encode(self, x: Float[Tensor, "*lead block d"]) -> Packed:
        d = x.shape[-1]
        y = rotate(x, 0) if self.books == "none" else products(x.float(), self.forward.to(x.device).float()[:, None])
        y, planes = centred(y, "block" if self.side == "k" else "none")
        norm = root(channel_sum(y * y))
        z, parts, decoded = y * unit_scale(norm, d)[..., None], self._parts(d), []
        for part, (name, _, bits) in zip(z.split([channels for _, channels, _ in parts], -1), parts, strict=True):
            codes = nearest(part, lloyd_max(bits, d)[1]) if bits else torch.zeros_like(part, dtype=torch.uint8)
            planes |= {name: pack_codes(codes.flatten(-2), bits)} if bits else {}
            decoded.append(torch.tensor(_entries(bits, d), device=x.device)[codes.int()])
        planes["scale"] = to_bytes(self._token_scale(y, torch.cat(decoded, -1), norm), "log8")
        return Packed.assemble(self.layout(d), planes)

    def _token_scale(self, y: Tensor, decoded: Tensor, norm: Tensor) -> Tensor:
        """As in `rotated`; where bits differ, over channels that have any, and as much as queries see of them."""
        if self.scale == "norm":
            return torch.where(norm > 0, 1 / unit_scale(norm, y.shape[-1]), 0)
        seen = y if self.groups == 1 else y * self._visibility(y)
        along = channel_sum(seen * decoded)
        return torch.where(along > 0, channel_sum(seen * y) / along, 0)

    def _visibility(self, like: Tensor) -> Float[Tensor, "h 1 1 d"]:
        """0 where there are no codes: a scale cannot make up for them."""
        coded = torch.tensor([bits > 0 for bits in self.widths])
        each = self.costs / self.costs.amax(-1, keepdim=True) * coded
        return each.repeat_interleave(like.shape[-1] // self.groups, -1)[:, None, None].to(like.device)

    def fold_query(self, q: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
        return rotate(q, 0) if self.books == "none" else _by_head(q, self.inverse)

    def unfold_output(self, o: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
        return unrotate(o, 0) if self.books == "none" else _by_head(o, self.inverse.mT)


def vars_of(codec: KLT) -> dict[str, object]:
    """Its options, without what is cached beside them."""
    return {f.name: getattr(codec, f.name) for f in fields(codec)}


def _entries(bits: int, d: int) -> tuple[float, ...]:
    return tuple(table(bits, d).tolist()) if bits else (0.0,)


def _by_head(x: Float[Tensor, "b heads *more d"], matrices: Float[Tensor, "h d d"]) -> Float[Tensor, "b heads *more d"]:
    """Each row times the matrix of its KV head; query heads come in groups."""
    h, d = len(matrices), x.shape[-1]
    groups = x.unflatten(1, (h, -1))
    return (groups @ matrices.to(x.device).view(h, *[1] * (groups.ndim - 4), d, d)).flatten(1, 2)
