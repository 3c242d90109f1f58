"""`trellis`: `rotated` with trellis codes in place of a table of its own for each value; same planes, same bytes.

A value depends on the last eight bits of a token's codes, of which each adds `bits` (bit-shift trellis, QTIP, arXiv
2406.11235): 256 table entries at the rate of 2 to 16, and an encoder that looks for the best walk through them. See
`ops.trellis`. Block mean, token scale and rotation are those of `rotated`.

Differs from QTIP: keys and values instead of weights; 8 bits of state; the table is trained on Gaussian vectors and
rounded to steps of 1/32, where theirs is computed or Gaussian; a walk begins at state 0 instead of closing on itself.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tersekv.codec import check_bits
from tersekv.codecs.rotated import Rotated
from tersekv.ops.trellis import Onward, Trellis, viterbi, walk

# What each state stands for, in steps of 1/32: made by tests/make_trellis.py, part of the format.
TABLES = {
    1: (
        "ea1aec0fea0726f30cfafc3514dcdd03f2feee192a0bdb0b15f81ee12304f8d6fbd3fd24e8be42fef719e50af61efcdaed1c040f"
        "fb26f63116dbf30b23d9ff14fb2fdb1a1ae20f1105dddc010904cb0721eabff2f1e2fd3efc29d7f3df00c9011df50f0ffbec0fd4"
        "eded03d20416fd2b1e14da041006de0dd91ddd38f222f5d303be14e3e613fbe20ffd20e4c1e70e29d51531140cdf0defeaf81736"
        "01f421fa2a03cdf624fe151114f925ef2af407e713e401d92eff03e3ed0c25f30ce0ccfafe1828f805ffc8dee70a35d1e107f5fc"
        "24ef05dce81b230234ffed10071edb19f0ff310af514e6113ee1fd13f63814ef2be6e026f2caf61bf924021402f011ee"
    ),
    2: (
        "09d92af23e1b13f31133e50018f0d6c1ef27c905fcd8b818f42de20d3106e304e0250809d30943eb230bf5aee9ffd81af0d4f803"
        "1336ef1fbedc1cf9ea2a09cc3b040df6cb10f10f39f6f3240a1af5fa0edfedf9fdbde2230920e0ea0f16f033f6d0e01b1ad92bfb"
        "00ffe1f3351cc0510f0609e4ecf75015fce808ce200626e400ed2b19183351f9d6e71dbfd9e8a70f2c061600ee1121d3c2f8fe26"
        "e0c721f4250e30f8b1f507e20cdc031c00f0d70e57f714d6161cedfa0d3410e524efca080e3de9080ff3fbcceb06d134fadc1fda"
        "0ed3ea22f0073d05d10315f6ff37ee1f1704fc3500ef2b1af918e2e31b07ef2ddaf20fd6d2fa12e8ddf8410c13ffe5f7"
    ),
    3: (
        "042ae0f8cb13ee5ef5c4e80803112f1e05ddd50711e7f8f30a1a12fbc52efeeb1efcdcf4ef023a0d08fa28d7ec3fdeef22f3f5d8"
        "1402e5e5fef0e00d2eae1ccff30205151c470de61638241e02f728d300381ff8ead80cc1dcebd04617e7d0ddc9200d06eafdf716"
        "0e101cf9da07eefd24e5ebe208eff6fcf02aca07b018de1cee12cedc062f15fc351ecfe544fc13bd3129af10f0081f0307f21ce1"
        "54f82911022f131321e003e451db0e33f30305fdec0c401cd4f7172701e030bdf7ef9c0ae3d8fb270f1fce38000affee14e623f2"
        "491c33caeaf7041111c1ee19f9071800d6ede63c262efd1af7fd14d2e4cfc20c1026d538e31ef404f5ffb902080fe6f4"
    ),
    4: (
        "03ebf211e2f5ed0afc39001ee8c1f8d70f35eb0b1a4116050a2c21f312e505fddbf00118eaccf9f5df0af21f26fce4e9f5fc1c04"
        "d30bb817f113e222c8aa10ed1cfe0231ee07cff1f5f510e0e62b36faee0ae11666261cda01d6fbe8f3f50eec1ae5db0dfe1503ed"
        "0ffcf70435094423f71d27ee3a18222d03cf19093111fededa08cef6f1fe11f819ec05e71d2a0cc7163d0cfe1f47c6120c9b29d2"
        "06f602e8e5f9d11fc0105601f41933daee2209290b02d3b2e104f7fb2930d8f13e14fee62217100e120828bdede207dd2ffe1ad3"
        "2f01ca0c05e9f3e00823edfcd4f8c014fdf63b02dae606fd15e6f30f4bee22e007251e4dca0eb610fa0217d7d4e4f2dd"
    ),
}


@lru_cache
def entries(bits: int) -> tuple[float, ...]:
    steps = memoryview(bytes.fromhex(TABLES[bits])).cast("b")
    return tuple(step / 32 for step in steps)


@dataclass(frozen=True)
class TrellisCodec(Rotated):
    """The options of `rotated`, with 1 to 4 bits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.bits, 1, 4)

    def recipe(self, d: int) -> Trellis:
        return Trellis(entries(self.bits), self.bits)

    def encoder(self, d: int) -> None:
        return None

    def coder(self, d: int, device: torch.device) -> Onward:
        return Onward(torch.tensor(entries(self.bits), device=device), self.bits)

    def quantised(self, z: Float[Tensor, "*lead d"]) -> tuple[UInt8[Tensor, "*lead d"], Float[Tensor, "*lead d"]]:
        table = torch.tensor(entries(self.bits), device=z.device)
        codes = viterbi(z, table, self.bits)
        return codes, table[walk(codes, self.bits)]
