"""`none`: pages that hold the values themselves, in 16 or 32 bits. The control beside every other codec."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tersekv.codec import Codec, check_choice
from tersekv.layout import BLOCK, KIND_BITS, Layout, Plane, check_head_dim
from tersekv.ops.encoders import DenseEncoder
from tersekv.ops.planes import FLOATS, to_bytes
from tersekv.ops.recipe import Dense
from tersekv.packed import Packed


@dataclass(frozen=True)
class NoneCodec(Codec):
    """Values as they are, in `dtype` (fp32, fp16 or bf16)."""

    dtype: str = "bf16"

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, tuple(FLOATS))

    def layout(self, d: int) -> Layout:
        check_head_dim(d)
        return Layout(d, (Plane("values", BLOCK, d, KIND_BITS[self.dtype], self.dtype),))

    def recipe(self, d: int) -> Dense:
        return Dense()

    def encoder(self, d: int) -> DenseEncoder:
        return DenseEncoder()

    def encode(self, x: Float[Tensor, "*lead block d"]) -> Packed:
        layout = self.layout(x.shape[-1])
        return Packed.assemble(layout, {"values": to_bytes(x, self.dtype).flatten(-2)})
