"""`intn`: uniform rounding to 2..8 bits, per token or per channel, in groups; the common baseline.

Value = code * scale + zero (asymmetric), or (code - 2^(bits-1)) * scale (symmetric). Scale and zero are stored as
fp16 and codes are taken against the *stored* ones, so no decoder sees a scale the encoder did not. Rounding is half
to even. Both axes exist for either side, so that they can be compared; `kivi` is this with that paper's choices.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tersekv.codec import Codec, check_bits, check_choice
from tersekv.errors import SpecError
from tersekv.layout import BLOCK, Layout, Plane, check_head_dim
from tersekv.ops.encoders import UniformEncoder
from tersekv.ops.planes import pack_codes, stored, to_bytes
from tersekv.ops.recipe import Grid
from tersekv.packed import Packed


@dataclass(frozen=True)
class IntN(Codec):
    """`group` counts channels (axis=token) or tokens (axis=channel) that share a scale; 0 means all of them."""

    bits: int = 4
    axis: str = "token"
    group: int = 0
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits, 2, 8)
        check_choice("axis", self.axis, ("token", "channel"))
        if self.axis == "channel" and self.group and (self.group < 0 or BLOCK % self.group):
            raise SpecError(
                f"group={self.group} does not divide a block of {BLOCK} tokens. Use a power of two up to {BLOCK}."
            )

    def layout(self, d: int) -> Layout:
        check_head_dim(d)
        rows, cols = self._scale_shape(d)
        prefix = "channel_" if self.axis == "channel" else ""
        planes = [Plane("codes", BLOCK, d, self.bits), Plane(prefix + "scale", rows, cols, 16, "fp16")]
        if not self.symmetric:
            planes.append(Plane(prefix + "zero", rows, cols, 16, "fp16"))
        return Layout(d, tuple(planes))

    def _scale_shape(self, d: int) -> tuple[int, int]:
        if self.axis == "channel":
            return BLOCK // (self.group or BLOCK), d
        group = self.group or d
        if group < 0 or d % group:
            fitting = ", ".join(str(n) for n in range(16, d + 1) if d % n == 0)
            raise SpecError(f"head_dim {d}: group={group} does not divide it. Allowed: {fitting}.")
        return BLOCK, d // group

    def recipe(self, d: int) -> Grid:
        low = -(2 ** (self.bits - 1)) if self.symmetric else 0
        return Grid(tuple(float(low + code) for code in range(2**self.bits)))

    def encoder(self, d: int) -> UniformEncoder:
        return UniformEncoder(self.symmetric)

    def encode(self, x: Float[Tensor, "*lead block d"]) -> Packed:
        layout = self.layout(x.shape[-1])
        rows, cols = self._scale_shape(x.shape[-1])
        groups = x.float().unflatten(-1, (cols, -1)).unflatten(-3, (rows, -1))
        scale, zero, low, high = self._range(groups)
        # A range too small for fp16 has scale 0: every code is then 0 and the group is its zero.
        inverse = torch.where(scale > 0, 1 / scale, 0)
        codes = ((groups - zero) * inverse).round().clamp(low, high) - low
        planes = {"codes": pack_codes(codes.to(torch.uint8).flatten(-4), self.bits)}
        for plane in layout.planes[1:]:
            values = scale if plane.name.endswith("scale") else zero
            planes[plane.name] = to_bytes(values.flatten(-4), plane.kind)
        return Packed.assemble(layout, planes)

    def _range(self, groups: Tensor) -> tuple[Tensor, Tensor, int, int]:
        """Stored scale and zero of each group, and the lowest and highest step.

        Multiplied by a constant, because torch divides by one on the CPU and multiplies by its inverse on a GPU. The
        sums with 0 make a zero positive: of a positive and a negative one, either may be found first.
        """
        smallest, largest = groups.amin((-1, -3), keepdim=True), groups.amax((-1, -3), keepdim=True)
        if self.symmetric:
            top = 2 ** (self.bits - 1) - 1
            scale = torch.maximum(-smallest, largest) * np.float32(1 / top).item() + 0.0
            return stored(scale, "fp16"), torch.zeros_like(scale), -top - 1, top
        top = 2**self.bits - 1
        scale = (largest - smallest) * np.float32(1 / top).item() + 0.0
        return stored(scale, "fp16"), stored(smallest + 0.0, "fp16"), 0, top
