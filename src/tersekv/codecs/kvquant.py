"""`kvquant`: a non-uniform table, keys per channel and values per token, with the farthest values kept apart (KVQuant).

arXiv 2401.18079: quantisers per channel for keys and per token for values (3.1), of keys before RoPE (3.2), levels that
are not equally far, by k-means weighted with sensitivity (3.3), and about 1 % of each vector in 16 bits beside them
(3.4), so that a range is not stretched by few. Of each vector, 64 tokens of a channel or `d` channels of a token,
`outliers` values get an index and a correction. Its first token in 16 bits is the policy's, `sink=1`.

`tersekv calibrate kvquant` fits tables to a model: of keys one a channel, of values one a layer; `rope=before` needs
it. Without, tables are Lloyd-Max for a normal density, and scale and zero of a vector are its deviation and mean (in
the paper its range; its Q-Norm restores the same two). See docs/methods/kvquant.md for what differs.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from tersekv.codebook import lloyd_max, table
from tersekv.codec import Codec, Fitted, check_bits, check_choice
from tersekv.codecs.books import FIRST, Books
from tersekv.errors import SpecError
from tersekv.layout import BLOCK, Layout, Plane, check_head_dim
from tersekv.ops.lookup import nearest
from tersekv.ops.planes import pack_codes, read, stored, to_bytes
from tersekv.ops.recipe import Grid, Recipe
from tersekv.ops.rope import POSITION, UNKNOWN, Turned, before
from tersekv.ops.sums import channel_sum, root
from tersekv.ops.vq import Tables, VectorLookup
from tersekv.packed import Packed


@dataclass(frozen=True)
class Corrected:
    """A grid or tables, plus the plane `correction` at the places listed in `at`, of a token or of a channel."""

    base: Recipe
    axis: str

    @property
    def name(self) -> str:
        return f"{self.base.name} with outliers"

    def values(self, packed: Packed) -> Float[Tensor, "*lead block d"]:
        x, at, correction = self.base.values(packed), read(packed, "at"), read(packed, "correction")
        assert at is not None and correction is not None  # for the type checker: the layout declares both
        return x.scatter_add_(-2 if self.axis == "channel" else -1, at.long(), correction)


@dataclass(frozen=True)
class KVQuant(Codec):
    """`outliers` of each vector are kept apart; 0: none. `books`: none, or a file, of which `layer` and `side` say
    whose tables. `rope`: whether keys are stored after it or before.
    """

    bits: int = 3
    axis: str = "token"
    outliers: int = 1
    rope: str = "after"
    books: str = "none"
    layer: int = FIRST
    side: str = "v"

    side_defaults: ClassVar = {"k": {"axis": "channel", "side": "k"}}

    def __post_init__(self) -> None:
        check_bits(self.bits, 1, 8)
        check_choice("axis", self.axis, ("token", "channel"))
        check_choice("rope", self.rope, ("after", "before"))
        check_choice("side", self.side, ("k", "v"))
        if not 0 <= self.outliers <= 8:
            raise SpecError(f"outliers={self.outliers} is out of range. Allowed: 0 to 8 of a vector.")
        if self.books != "none":
            _ = self._file, self.tables, self.frequencies  # kept from now on, whatever becomes of the file
        elif self.rope == "before":
            raise SpecError("rope=before needs books=FILE, which knows how a model turns its keys.")

    @cached_property
    def _file(self) -> Books:
        return Books.of(self.books, "kvquant", self.side, vars(self))

    @cached_property
    def tables(self) -> Tables:
        """Of keys (h, d, entries, 1), of values (1, 1, entries, 1), ascending."""
        return self._file.tables(f"{self._file.layer(self.layer)}.{self.side}", 1)

    @cached_property
    def frequencies(self) -> tuple[float, ...]:
        return self._file.frequencies(self.layer) if self.positional else ()

    @property
    def fitted(self) -> Fitted | None:
        if self.books == "none":
            return None
        nbytes = self.tables.nbytes + 8 * len(self.frequencies)
        return self._file.fitted(f"{self._file.layer(self.layer)}.{self.side}", nbytes)

    def at(self, layer: int) -> "KVQuant":
        return self if self.books == "none" else replace(self, layer=layer)

    @property
    def positional(self) -> bool:
        return self.side == "k" and self.rope == "before"

    @property
    def _by_channel(self) -> bool:
        """Whether each channel has a table, which makes scale and zero needless."""
        return self.books != "none" and self.side == "k"

    def layout(self, d: int) -> Layout:
        check_head_dim(d)
        if self.outliers and self.axis == "token" and d > 256:
            raise SpecError(f"head_dim {d}: an outlier's channel is stored in a byte, up to 256. Use outliers=0.")
        if self._by_channel and self.tables.places != d:
            raise SpecError(f"head_dim {d}: {self.books} is for {self.tables.places}.")
        channel = self.axis == "channel"
        shape, apart = ((1, d), (self.outliers, d)) if channel else ((BLOCK, 1), (BLOCK, self.outliers))
        prefix = "channel_" if channel else ""
        planes = [Plane("codes", BLOCK, d, self.bits)]
        planes += [] if self._by_channel else [Plane(prefix + x, *shape, 16, "fp16") for x in ("scale", "zero")]
        if self.outliers:
            planes += [Plane("at", *apart, 8, "index"), Plane("correction", *apart, 16, "fp16")]
        planes += [POSITION] if self.positional else []
        return Layout(d, tuple(planes))

    def recipe(self, d: int) -> Recipe:
        base = VectorLookup(self.tables) if self._by_channel else Grid(tuple(self._levels.tolist()))
        whole = Corrected(base, self.axis) if self.outliers else base
        return Turned(whole, self.frequencies) if self.positional else whole

    @property
    def _levels(self) -> Float[Tensor, "entries"]:
        """The table that all vectors share."""
        return torch.from_numpy(table(self.bits)) if self.books == "none" else self.tables.stages[0].float().flatten()

    def encode(self, x: Float[Tensor, "*lead block d"]) -> Packed:
        if self.positional:
            raise SpecError(UNKNOWN)
        return self._with_tables(x, {}) if self._by_channel else self._with_moments(x)

    def encode_at(self, x: Float[Tensor, "*lead block d"], starts: Int[Tensor, "*lead"]) -> Packed:
        return self._with_tables(*before(x, starts, self.frequencies)) if self.positional else self.encode(x)

    def _with_tables(self, x: Tensor, planes: dict[str, Tensor]) -> Packed:
        """Outliers are the values that tables are farthest from."""
        layout = self.layout(x.shape[-1])
        codes = self.tables.search(x.float())
        left = (x.float() - self.tables.values(codes)).mT
        at = left.abs().argsort(dim=-1, descending=True, stable=True)[..., : self.outliers]
        planes["codes"] = pack_codes(codes[0].flatten(-2), self.bits)
        if self.outliers:
            planes["at"] = to_bytes(at.mT.flatten(-2), "index")
            planes["correction"] = to_bytes(left.gather(-1, at).mT.flatten(-2), "fp16")
        return Packed.assemble(layout, planes)

    def _with_moments(self, x: Tensor) -> Packed:
        across = (lambda y: y.mT) if self.axis == "channel" else (lambda y: y)
        vectors, layout = across(x.float()).contiguous(), self.layout(x.shape[-1])
        at = farthest(vectors, self.outliers)
        zero, scale = moments(vectors, at)
        z, levels = (vectors - zero) * torch.where(scale > 0, 1 / scale, 0), self._levels.to(x.device)
        codes = nearest(z, lloyd_max(self.bits)[1]) if self.books == "none" else _nearest(z, levels)
        correction = (vectors - (levels[codes.int()] * scale + zero)).gather(-1, at)
        planes = {"codes": pack_codes(across(codes).flatten(-2), self.bits)}
        for plane, content in zip(layout.planes[1:], (scale, zero, at, correction), strict=False):
            planes[plane.name] = to_bytes(across(content).flatten(-2), plane.kind)
        return Packed.assemble(layout, planes)


def farthest(vectors: Float[Tensor, "*lead n"], count: int) -> Int[Tensor, "*lead count"]:
    """Indices of the values farthest from their vector's mean."""
    n = vectors.shape[-1]
    far = (vectors - channel_sum(vectors)[..., None] * np.float32(1 / n).item()).abs()
    return far.argsort(dim=-1, descending=True, stable=True)[..., :count]


def moments(
    vectors: Float[Tensor, "*lead n"], without: Int[Tensor, "*lead count"]
) -> tuple[Float[Tensor, "*lead 1"], Float[Tensor, "*lead 1"]]:
    """Stored mean and deviation of each vector without the values at some indices."""
    share = np.float32(1 / (vectors.shape[-1] - without.shape[-1])).item()
    zero = stored(channel_sum(vectors.scatter(-1, without, 0))[..., None] * share, "fp16")
    centred = (vectors - zero).scatter(-1, without, 0)
    return zero, stored(root(channel_sum(centred * centred)[..., None] * share), "fp16")


def _nearest(z: Float[Tensor, "*shape"], levels: Float[Tensor, "entries"]) -> UInt8[Tensor, "*shape"]:
    """The nearest of ascending levels; half-way between two, the lower one."""
    return torch.bucketize(z, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
