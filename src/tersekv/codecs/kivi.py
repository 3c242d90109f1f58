"""`kivi`: keys rounded per channel over groups of tokens, values per token over groups of channels (KIVI).

arXiv 2402.02750, sections 3.2 and 3.3: key outliers sit in a few channels, so a scale for each channel keeps them from
the others; values have none, and what attention adds up of them is a token at a time. The arithmetic is `intn`'s. The
paper's residual of 128 tokens in 16 bits is the policy's: `recent=128`.

Differs from the paper: keys are packed 64 tokens at a time and not once 128 have gathered, so 128 to 191 tokens stay
dense; its kernels take only a group of 32, ours read groups of 16 and any multiple.
"""

from dataclasses import dataclass
from typing import ClassVar

from tersekv.codecs.intn import IntN


@dataclass(frozen=True)
class Kivi(IntN):
    """`intn` with the paper's choices; `group` counts tokens for keys and channels for values."""

    bits: int = 2
    group: int = 32

    side_defaults: ClassVar = {"k": {"axis": "channel"}}
