"""`vq`: sub-vectors looked up in codebooks, from 0.375 bits a value; universal, or fitted to a model (AnTKV).

AnTKV, arXiv 2506.19505: each `dim` values of a key or value are one index of `index` bits into a codebook, found by
k-means weighted with what an error of a token does to the output. `tersekv calibrate vq` fits such books, and
`books=FILE mean=none scale=none` is the paper's code: indices and nothing else. `policy=anchors` is its other half.

`books=universal` needs no calibration: rotation, block mean and token scales are those of `rotated`, and the books are
k-means on a standard normal. `stages=2` adds a second entry, found together with the first (additive code).

Differs from the paper: keys after RoPE by default, before it with books that were fitted so; indices of at most 8 bits.
See docs/methods/vq.md.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tersekv.codec import Codec, Fitted, check_choice
from tersekv.codecs.books import FIRST, UNIVERSAL, Books
from tersekv.codecs.rotated import centred, takes_norm
from tersekv.errors import SpecError
from tersekv.layout import BLOCK, Layout, Plane, check_head_dim
from tersekv.ops.planes import pack_codes, to_bytes
from tersekv.ops.recipe import Recipe
from tersekv.ops.rope import POSITION, UNKNOWN, Turned, before
from tersekv.ops.sums import channel_sum, root, unit_scale
from tersekv.ops.vq import PLANES, Tables, VectorLookup
from tersekv.packed import Packed
from tersekv.rotation import rotate

SHAPES = {(16, 6), (16, 8), (8, 6), (8, 8), (4, 8)}  # sub-vectors and indices that there are universal books for
GROWTH = 1.9  # an unbiased scale may make a token so many times longer, not more; the rest of 2 is the scale's rounding


@dataclass(frozen=True)
class VQ(Codec):
    """`dim` values an index of `index` bits, `stages` times; `mean`: block, none.

    `scale`: unbiased, norm, none, or auto, as keys have it: see `takes_norm`.

    `books`: universal, or a file, of which `layer` and `side` say whose tables. `rope`: whether keys are stored after
    it or before.
    """

    dim: int = 8
    index: int = 8
    stages: int = 1
    mean: str = "none"
    scale: str = "unbiased"
    rope: str = "after"
    books: str = "universal"
    seed: int = 0
    layer: int = FIRST
    side: str = "v"

    side_defaults: ClassVar = {"k": {"mean": "block", "scale": "auto", "side": "k"}}

    def __post_init__(self) -> None:
        check_choice("mean", self.mean, ("block", "none"))
        check_choice("scale", self.scale, ("unbiased", "norm", "auto", "none"))
        check_choice("rope", self.rope, ("after", "before"))
        check_choice("side", self.side, ("k", "v"))
        if self.stages not in (1, 2):
            raise SpecError(f"stages={self.stages} is out of range. Allowed: 1 and 2.")
        if self.books == "universal":
            self._check_universal()
        else:
            self._check_fitted()

    def _check_universal(self) -> None:
        if (self.dim, self.index) not in SHAPES:
            allowed = "; ".join(f"dim={dim},index={index}" for dim, index in sorted(SHAPES))
            raise SpecError(f"dim={self.dim},index={self.index}: there are no universal books. Allowed: {allowed}.")
        if self.rope == "before":
            raise SpecError("rope=before needs books=FILE, which knows how a model turns its keys.")
        if self.scale == "none":
            raise SpecError("scale=none: universal books are for tokens of variance 1. Use unbiased or norm.")

    def _check_fitted(self) -> None:
        Books.of(self.books, "vq", self.side, vars(self))
        _ = self.tables, self.frequencies  # kept from now on, whatever becomes of the file

    @cached_property
    def _file(self) -> Books:
        return Books.load(UNIVERSAL if self.books == "universal" else self.books)

    @cached_property
    def tables(self) -> Tables:
        if self.books == "universal":
            return self._file.tables(f"{self.dim}.{self.index}", self.stages)
        return self._file.tables(f"{self._file.layer(self.layer)}.{self.side}", self.stages)

    @cached_property
    def frequencies(self) -> tuple[float, ...]:
        return self._file.frequencies(self.layer) if self.positional else ()

    @property
    def fitted(self) -> Fitted | None:
        if self.books == "universal":
            return None
        name, nbytes = f"{self._file.layer(self.layer)}.{self.side}", self.tables.nbytes + 8 * len(self.frequencies)
        return self._file.fitted(f"{name} {self.stages}", nbytes)

    def at(self, layer: int) -> "VQ":
        return self if self.books == "universal" else replace(self, layer=layer)

    @property
    def positional(self) -> bool:
        return self.side == "k" and self.rope == "before"

    @property
    def rotation(self) -> int | None:
        return self.seed if self.books == "universal" else None

    def layout(self, d: int) -> Layout:
        check_head_dim(d)
        if d % self.dim or self.tables.places not in (1, d // self.dim):
            raise SpecError(f"head_dim {d}: dim={self.dim} does not divide it, or {self.books} is for another.")
        planes = [Plane(name, BLOCK, d // self.dim, self.index) for name in PLANES[: self.stages]]
        planes += [] if self.scale == "none" else [Plane("scale", BLOCK, 1, 8, "log8")]
        if self.mean == "block":
            planes += [Plane("channel_zero", 1, d, 8, "int8"), Plane("channel_zero_step", 1, 1, 16, "fp16")]
        planes += [POSITION] if self.positional else []
        return Layout(d, tuple(planes))

    def recipe(self, d: int) -> Recipe:
        base = VectorLookup(self.tables)
        return Turned(base, self.frequencies) if self.positional else base

    def encode(self, x: Float[Tensor, "*lead block d"]) -> Packed:
        if self.positional:
            raise SpecError(UNKNOWN)
        return self._looked_for(x, {})

    def encode_at(self, x: Float[Tensor, "*lead block d"], starts: Int[Tensor, "*lead"]) -> Packed:
        return self._looked_for(*before(x, starts, self.frequencies)) if self.positional else self.encode(x)

    def _looked_for(self, x: Tensor, position: dict[str, Tensor]) -> Packed:
        y, planes = self._centred(x)
        planes |= position
        energy = channel_sum(y * y)
        codes = self.tables.search(self._even(y, energy))
        for name, index in zip(PLANES, codes, strict=False):
            planes[name] = pack_codes(index.flatten(-2), self.index)
        if self.scale != "none":
            planes["scale"] = to_bytes(self._token_scale(y, self.tables.values(codes), energy), "log8")
        return Packed.assemble(self.layout(x.shape[-1]), planes)

    def looked_up(self, x: Float[Tensor, "*lead block d"]) -> Float[Tensor, "*lead block d"]:
        """What books are made of and for: the block as its sub-vectors are looked up."""
        y, _ = self._centred(x)
        return self._even(y, channel_sum(y * y))

    def _centred(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The block in the folded domain without its mean, and the mean's planes."""
        return centred(x.float() if self.rotation is None else rotate(x, self.rotation), self.mean)

    def _even(self, y: Tensor, energy: Tensor) -> Tensor:
        return y if self.scale == "none" else y * unit_scale(root(energy), y.shape[-1])[..., None]

    def _token_scale(self, y: Tensor, decoded: Tensor, energy: Tensor) -> Tensor:
        """As in `rotated`, but bounded: at half a bit the nearest entries may lie nearly across a token."""
        length = root(channel_sum(decoded * decoded))
        longest = torch.where(length > 0, root(energy) / length, 0)
        if takes_norm(self.scale, self.index * self.stages / self.dim):
            return torch.where(energy > 0, 1 / unit_scale(root(energy), y.shape[-1]), 0)
        along = channel_sum(y * decoded)
        return torch.minimum(torch.where(along > 0, energy / along, 0), GROWTH * longest)
