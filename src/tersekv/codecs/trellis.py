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
from tersekv.ops.trellis import Onward, Trellis, viterbi, walk
from tersekv.rotation import signs

# What the states 0..127 stand for, in odd multiples of HALF: made by tests/make_trellis.py, part of the format.
HALF = 27 / 1024
TABLES = {
    1: (
        "e31b1fed1bd7eb1f13f309d51ff52fe3e7eb073f0dc31ff50fdb33f1eb1719d91b45c9fbe51513f30535e109f9d1ed1bdb0f3dff"
        "27e70de109c5f32bdf1117f10bb5f133ed173ded1bfbed13bdf5fd3bddc52bf915ed2bf715ef43d7fb31e10d1debf529df0fe949"
        "f50bcf0d0923db0f0bc9e50519edef49bd0bf11d1321efe3"
    ),
    2: (
        "f1cd330f09f5d725f3d5092b13bff1411d99d3f5e9bd03210dedcf450f31fbddb319e7fff335d10fcf2feb0bf10d53d501e5bd13"
        "3b07ef21e7ad032b5b2301d7b1f3230fd733f50f47fbd9136d0dd5ef0319ed3fbfe723032bf711dbc50fe1f7e9094f27d5f12109"
        "19e701c3f1d11b03d1f10d2defd52507210949f1d50d33f1"
    ),
    3: (
        "091fb7d3e341fbf1e90323b70df94fddc9a7fddf23530bef0319eda7f3e1cfbb23c13509f9e7d515f3c3ff29d5e70d151b0f35f1"
        "bfdf9303c72ff919d705ed0fc9f79f05b927e9d9dff1c915492505332903e181f3c515d529f5e3f91bc9051315d7f33f65a7bf05"
        "fde3f135e10b1db9051bedf9330bd51ded4f29370313e1d1"
    ),
    4: (
        "abfb490b03dbc5ef01f31b2de1d3f9e9151d2d2707350fc9d545f5ed593bffdfcd290713a5fd311ffbe981f343ddef0543ddc503"
        "cdb3e52b21fb1507f1fdf50de731dfe5d51911f5c3dd45cbedfb99edf3c3e7df0dd1259fb5d903e3fd11ebf723510fed154101f9"
        "0b35d91d19e5b3cdd711f7f11ff907e9e52d1b25f5913d01"
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
        unbiased, factor = self.unbiased, np.float32(d**-0.5).item()
        return TrellisEncoder(self.recipe(d), unbiased, factor, tuple(signs(d, self.seed).tolist()))

    def coder(self, d: int, device: torch.device) -> Onward:
        return Onward(self.recipe(d))

    def quantised(self, z: Float[Tensor, "*lead d"]) -> tuple[UInt8[Tensor, "*lead d"], Float[Tensor, "*lead d"]]:
        recipe = self.recipe(z.shape[-1])
        codes = viterbi(z, recipe)
        return codes, torch.tensor(recipe.table, device=z.device)[walk(codes, self.bits)]
