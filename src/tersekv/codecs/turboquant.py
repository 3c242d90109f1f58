"""`turboquant`: rotation and Lloyd-Max codes with the norm; `form=prod` adds a sign sketch of what is left.

arXiv 2504.19874, algorithms 1 (mse) and 2 (prod). The mse form is `rotated` with the paper's choices: no mean is
removed and the scale is the norm. The prod form spends one of its bits on sign(S r) of the residual r and 16 bits a
token on |r|: then <q, x_hat> is unbiased. Attention reads both parts side by side, for the query and its projections.

Differs from the paper: the rotation is a signed Hadamard and not dense; norms are fp16. Its outlier channels are
`outliers`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tersekv import sketch
from tersekv.codec import Codec, check_bits, check_choice
from tersekv.codecs.rotated import Rotated
from tersekv.layout import BLOCK, Layout, Plane
from tersekv.ops.encoders import Encoder
from tersekv.ops.planes import pack_codes, to_bytes
from tersekv.ops.recipe import Joined, Recipe
from tersekv.ops.sums import channel_sum, root
from tersekv.packed import Packed
from tersekv.rotation import rotate


@dataclass(frozen=True)
class TurboQuant(Codec):
    """`form`: mse (nearest) or prod (unbiased). `bits` counts the sketch's."""

    bits: int = 3
    form: str = "mse"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("form", self.form, ("mse", "prod"))
        check_bits(self.bits, 2 if self.form == "prod" else 1, 8)

    @property
    def nearest(self) -> Rotated:
        bits = self.bits - 1 if self.form == "prod" else self.bits
        return Rotated(bits, mean="none", scale="norm", scale_kind="fp16", seed=self.seed)

    @property
    def rotation(self) -> int:
        return self.seed

    @property
    def folds_by_rotation(self) -> bool:
        return self.form == "mse"

    def layout(self, d: int) -> Layout:
        nearest = self.nearest.layout(d)
        sketched = (Plane("sketch_codes", BLOCK, d, 1), Plane("sketch_scale", BLOCK, 1, 16, "fp16"))
        return nearest if self.form == "mse" else Layout(d, (*nearest.planes, *sketched))

    def recipe(self, d: int) -> Recipe:
        nearest = self.nearest.recipe(d)
        return nearest if self.form == "mse" else Joined((("", nearest), ("sketch_", sketch.recipe(d))))

    def encoder(self, d: int) -> Encoder | None:
        return self.nearest.encoder(d) if self.form == "mse" else None

    def encode(self, x: Float[Tensor, "*lead block d"]) -> Packed:
        nearest, d = self.nearest.encode(x), x.shape[-1]
        if self.form == "mse":
            return nearest
        left = rotate(x, self.seed) - self.nearest.recipe(d).values(nearest)
        codes = sketch.sign_codes(left, d, self.seed)
        planes = {plane.name: nearest.plane(plane.name) for plane in nearest.layout.planes}
        planes["sketch_codes"] = pack_codes(codes.flatten(-2), 1)
        planes["sketch_scale"] = to_bytes(root(channel_sum(left * left)), "fp16")
        return Packed.assemble(self.layout(d), planes)

    def fold_query(self, q: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead folded"]:
        y = self.nearest.fold_query(q)
        return y if self.form == "mse" else torch.cat((y, sketch.project(y, y.shape[-1], self.seed)), -1)

    def unfold_output(self, o: Float[Tensor, "*lead folded"]) -> Float[Tensor, "*lead d"]:
        if self.form == "prod":
            nearest, sketched = o.chunk(2, -1)
            o = nearest + sketch.unproject(sketched, sketched.shape[-1], self.seed)
        return self.nearest.unfold_output(o)
