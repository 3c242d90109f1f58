"""`rotated`: signed Hadamard, Lloyd-Max table of the rotated marginal, unbiased token scale, block mean on keys.

After the rotation a coordinate of a unit vector follows a Beta marginal whatever the data was, so one table fits all
(TurboQuant, arXiv 2504.19874, algorithm 1). Two things differ from the paper, and both decide the quality at 2 and
3 bits on real keys:

- keys lose the per-channel mean of their block first. It is taken in the rotated domain (the rotation is linear, so
  this is the rotated mean), where an 8-bit grid fits it better and where kernels need it: the `grid` recipe's
  channel zero. It is stored, and the *stored* mean is what is subtracted.
- the token scale is s = |y|^2 / <y, c>, with c the decoded code, instead of the norm: then <y_hat, y> = |y|^2 and the
  shrinkage of a Lloyd-Max code does not add up over tokens. Stored as an 8-bit logarithm, 12 steps an octave, as 8
  bits with one step a block, or in fp16. Keys of one bit keep the norm: their error would become so large that softmax
  sees tokens that are not there.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tersekv import ops
from tersekv.codebook import lloyd_max, table
from tersekv.codec import Codec, check_bits, check_choice
from tersekv.layout import BLOCK, Layout, Plane, codes_and_scale
from tersekv.ops.encoders import Encoder, TableEncoder
from tersekv.ops.feedback import Coder, Nearest, prepared, steered
from tersekv.ops.lookup import nearest
from tersekv.ops.planes import in_steps, pack_codes, planes_of, to_bytes
from tersekv.ops.recipe import Grid, Recipe
from tersekv.ops.sums import channel_sum, root, token_sum, unit_scale
from tersekv.packed import Packed
from tersekv.rotation import rotate, signs


@dataclass(frozen=True)
class Rotated(Codec):
    """`mean`: block or none. `scale`: unbiased, norm or auto, see `takes_norm`; `scale_kind`: log8, int8 or fp16."""

    bits: int = 3
    mean: str = "none"
    scale: str = "unbiased"
    scale_kind: str = "log8"
    seed: int = 0

    side_defaults: ClassVar = {"k": {"mean": "block", "scale": "auto"}}

    def __post_init__(self) -> None:
        check_bits(self.bits, 1, 8)
        check_choice("mean", self.mean, ("block", "none"))
        check_choice("scale", self.scale, ("unbiased", "norm", "auto"))
        check_choice("scale_kind", self.scale_kind, ("log8", "int8", "fp16"))

    @property
    def unbiased(self) -> bool:
        return not takes_norm(self.scale, self.bits)

    @property
    def rotation(self) -> int:
        return self.seed

    def layout(self, d: int) -> Layout:
        planes = [*codes_and_scale(d, self.bits, self.scale_kind)]
        if self.mean == "block":
            planes += [Plane("channel_zero", 1, d, 8, "int8"), Plane("channel_zero_step", 1, 1, 16, "fp16")]
        return Layout(d, tuple(planes))

    def recipe(self, d: int) -> Recipe:
        return Grid(tuple(table(self.bits, d).tolist()))

    def encoder(self, d: int) -> Encoder | None:
        return TableEncoder(
            thresholds=tuple(lloyd_max(self.bits, d)[1].tolist()),
            centroids=tuple(table(self.bits, d).tolist()),
            unbiased=self.unbiased,
            factor=np.float32(d**-0.5).item(),
            signs=tuple(signs(d, self.seed).tolist()),
        )

    def encode(self, x: Float[Tensor, "*lead block d"]) -> Packed:
        return self._encoded(rotate(x, self.seed), None)  # in PyTorch: it is what native encoders are compared with

    def encode_for(self, x: Float[Tensor, "*lead block d"], asked: Float[Tensor, "*#lead d d"] | None) -> Packed:
        return self.encode(x) if asked is None else self._encoded(ops.rotate(x, self.seed), asked)

    def _encoded(self, rotated: Float[Tensor, "*lead block d"], asked: Float[Tensor, "*#lead d d"] | None) -> Packed:
        d = rotated.shape[-1]
        y, planes = centred(rotated, self.mean)
        energy = channel_sum(y * y)
        norm = root(energy)
        z = y * unit_scale(norm, d)[..., None]
        if asked is None:
            codes, centroids = self.quantised(z)
            scale = self._token_scale(y, centroids, energy)
        else:
            codes, factor = steered(z, asked, self.coder(d, z.device))
            scale = norm * d**-0.5 * (factor if self.unbiased else 1)
        planes["codes"] = pack_codes(codes.flatten(-2), self.bits)
        return Packed.assemble(self.layout(d), planes | planes_of("scale", scale, self.scale_kind))

    def asked(self, moments: Float[Tensor, "*lead d d"]) -> Float[Tensor, "*lead d d"]:
        return prepared(moments, self.coder(moments.shape[-1], moments.device).step)

    def coder(self, d: int, device: torch.device) -> Coder:
        thresholds = lloyd_max(self.bits, d)[1]
        return Nearest(thresholds, torch.from_numpy(table(self.bits, d)).to(device))

    def quantised(self, z: Float[Tensor, "*lead d"]) -> tuple[UInt8[Tensor, "*lead d"], Float[Tensor, "*lead d"]]:
        """Codes of tokens of variance 1, and what they stand for."""
        d = z.shape[-1]
        codes = nearest(z, lloyd_max(self.bits, d)[1])
        return codes, torch.from_numpy(table(self.bits, d)).to(z.device)[codes.int()]

    def _token_scale(self, y: Tensor, centroids: Tensor, energy: Tensor) -> Tensor:
        if not self.unbiased:
            return root(energy) * np.float32(y.shape[-1] ** -0.5).item()
        along = channel_sum(y * centroids)  # positive unless y is zero: every code has its value's sign
        return torch.where(along > 0, energy / along, 0)


def takes_norm(scale: str, bits: float | int) -> bool:
    """Whether a token's scale is its norm. auto, for keys: up to one bit a value, see docs/methods/trellis.md."""
    return scale == "norm" or (scale == "auto" and bits <= 1)


def centred(y: Float[Tensor, "*lead block d"], mean: str) -> tuple[Float[Tensor, "*lead block d"], dict[str, Tensor]]:
    """A block without its mean as that is stored, and the mean's planes."""
    if mean == "none":
        return y, {}
    step, steps = in_steps(token_sum(y) * (1 / BLOCK))
    planes = {"channel_zero": to_bytes(steps, "int8"), "channel_zero_step": to_bytes(step, "fp16")}
    return y - (steps * step)[..., None, :], planes
