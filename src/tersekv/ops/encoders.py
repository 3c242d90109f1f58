"""How codes are taken, as data: what native code needs to do the work of a codec's `encode`. No arithmetic.

A codec returns one of these from `encoder`; which planes it fills, and as what kind, is in its layout.
"""

from dataclasses import dataclass

from tersekv.ops.trellis import Trellis


@dataclass(frozen=True)
class TableEncoder:
    """Brings a token to variance 1 and takes the nearest entry of an odd-symmetric table: see `ops.lookup`.

    `signs`: of the rotation that goes first; none: no rotation. A layout with a `channel_zero` then loses the mean of
    each channel over the block, as it is stored. The token scale is |y|^2 / <y, centroids> if `unbiased`, and otherwise
    the norm times `factor`.
    """

    thresholds: tuple[float, ...]
    centroids: tuple[float, ...]
    unbiased: bool = False
    factor: float = 1.0
    signs: tuple[float, ...] = ()


@dataclass(frozen=True)
class UniformEncoder:
    """Equal steps over the range of a token, or of a channel if the layout has a `channel_scale`."""

    symmetric: bool = False


@dataclass(frozen=True)
class DenseEncoder:
    """The values themselves, saturated and rounded to the kind of the plane `values`."""


@dataclass(frozen=True)
class TrellisEncoder:
    """As TableEncoder, but the codes are those of the walk through a trellis that is nearest to the token."""

    recipe: Trellis
    unbiased: bool = False
    factor: float = 1.0
    signs: tuple[float, ...] = ()


Encoder = TableEncoder | UniformEncoder | DenseEncoder | TrellisEncoder
