"""`trellis`: `rotated` with trellis codes in place of a table of its own for each value; same planes, same bytes.

A value depends on the last eight bits of a token's codes, of which each adds `bits` (bit-shift trellis, QTIP, arXiv
2406.11235): 256 table entries at the rate of 2 to 16, and an encoder that looks for the best walk through them. See
`ops.trellis`. Block mean, token scale and rotation are those of `rotated`.

Differs from QTIP: keys and values instead of weights; 8 bits of state; the table is trained on Gaussian vectors and
rounded to 128 levels, where theirs is computed or Gaussian; a walk begins at state 0 instead of closing on itself.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tersekv.codec import check_bits
from tersekv.codecs.rotated import Rotated
from tersekv.ops.encoders import TrellisEncoder
from tersekv.ops.trellis import Trellis, viterbi, walk
from tersekv.rotation import signs

# What the states 0..127 stand for, in odd multiples of HALF: made by tests/make_trellis.py, part of the format.
HALF = 51 / 2048
TABLES = {
    1: (
        "f11133c5df532501c32905e909d52fed2b53db05d721f737f10bab271dcdffe905e58b213ded61172301e313ddbb0739212b07f1"
        "cfeb01b3e543250be1af370b210dfbe7ab3d0fdbe7ffbb3125d7ed05cbf315332f0be5bf1d9dd5f7fde5511521450bef0927f145"
        "f35d19cd0503dd250905cbe3f51133d9f5e90fbfe9051741"
    ),
    2: (
        "f11133c5df532501c32905e909d52fed2b53db05d721f737f10bab271dcdffe905e58b213ded61172301e313ddbb0739212b07f1"
        "cfeb01b3e543250be1af370b210dfbe7ab3d0fdbe7ffbb3125d7ed05cbf315332f0be5bf1d9dd5f7fde5511521450bef0927f145"
        "f35d19cd0503dd250905cbe3f51133d9f5e90fbfe9051741"
    ),
    3: (
        "f11133c5df532501c32905e909d52fed2b53db05d721f737f10bab271dcdffe905e58b213ded61172301e313ddbb0739212b07f1"
        "cfeb01b3e543250be1af370b210dfbe7ab3d0fdbe7ffbb3125d7ed05cbf315332f0be5bf1d9dd5f7fde5511521450bef0927f145"
        "f35d19cd0503dd250905cbe3f51133d9f5e90fbfe9051741"
    ),
    4: (
        "f11133c5df532501c32905e909d52fed2b53db05d721f737f10bab271dcdffe905e58b213ded61172301e313ddbb0739212b07f1"
        "cfeb01b3e543250be1af370b210dfbe7ab3d0fdbe7ffbb3125d7ed05cbf315332f0be5bf1d9dd5f7fde5511521450bef0927f145"
        "f35d19cd0503dd250905cbe3f51133d9f5e90fbfe9051741"
    ),
}


@lru_cache
def trellis(bits: int) -> Trellis:
    return Trellis(tuple(memoryview(bytes.fromhex(TABLES[bits])).cast("b")), HALF, bits)


@dataclass(frozen=True)
class TrellisCodec(Rotated):
    """The options of `rotated`, with 1 to 4 bits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.bits, 1, 4)

    def recipe(self, d: int) -> Trellis:
        return trellis(self.bits)

    def encoder(self, d: int) -> TrellisEncoder:
        unbiased, factor = self.scale == "unbiased", np.float32(d**-0.5).item()
        return TrellisEncoder(self.recipe(d), unbiased, factor, tuple(signs(d, self.seed).tolist()))

    def quantised(self, z: Float[Tensor, "*lead d"]) -> tuple[UInt8[Tensor, "*lead d"], Float[Tensor, "*lead d"]]:
        recipe = self.recipe(z.shape[-1])
        codes = viterbi(z, recipe)
        return codes, torch.tensor(recipe.table, device=z.device)[walk(codes, self.bits)]
