"""The `lloydmax` codec for edge devices: NumPy alone, no torch, and the same bytes.

Differs from the torch codec in one thing: a norm is summed in BLAS order, because the order of
`ops.sums.channel_sum` would cost NumPy 57 ns more a vector, a quarter of the time. So the stored norm may be
off by a rounding, and the code of a value within a few ulps of a threshold by one: about one Gaussian vector
in 30,000. Norms below 1e-15, whose squares underflow, may differ by more.

Measured on one core, fp32 in, d = 128, 3 bits: 161 ns a vector or 6.2 million a second on an EPYC with AVX-512
(Zen 4), where the torch codec on one thread takes 34 times as long and `searchsorted` 29. On a shared Zen 3 with
AVX2 it was 200 ns at best, under the neighbours' load up to half as much again. The bound is the number of
passes that NumPy makes over each chunk; of the 200 ns, norm and product took 75 (reading memory alone takes
40), sign and comparisons 62, merging 21, storing 27.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import prod, sqrt

import numpy as np
from jaxtyping import Float, Int64, UInt8

from tersekv.codebook import table
from tersekv.edge_encoder import NORMS, ChunkEncoder
from tersekv.errors import InputError, SpecError, did_you_mean
from tersekv.layout import BLOCK, Layout, codes_and_scale

CHUNK = 2**18  # values, 1.8 MiB of scratch. Half of it loses a tenth to the calls, twice as much is no faster


@dataclass(frozen=True)
class EdgePacked:
    """Encoded vectors in blocks of 64, of which the last is filled up with zero vectors."""

    layout: Layout
    data: UInt8[np.ndarray, "blocks nbytes"]
    shape: tuple[int, ...]  # (*lead, d) of the array that was encoded

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def ratio(self) -> float:
        """Bytes of the same values at 16 bits over the bytes held; a partly filled last block lowers it."""
        return 2 * prod(self.shape) / max(1, self.nbytes)


def encode(x: np.ndarray, bits: int = 3, norm: str = "fp16") -> EdgePacked:
    """Pack vectors of fp32 or fp16, shape (*lead, d), in blocks of 64.

    Raises InputError for another type, NaN or infinity, and SpecError for `bits`, `norm` or `d` out of range.
    """
    packed = _checked(x, bits, norm)
    rows = x.reshape(-1, packed.d)
    data = np.zeros((-(-len(rows) // BLOCK), packed.nbytes), np.uint8)
    step = max(1, CHUNK // (BLOCK * packed.d))
    encoder = ChunkEncoder(packed, min(step, len(data)))
    with np.errstate(all="ignore"):  # norms of 0 and squares beyond fp32 are looked after
        for first in range(0, len(data), step):
            out = data[first : first + step]
            if len(out) < encoder.blocks:
                encoder = ChunkEncoder(packed, len(out))
            if not encoder(rows[first * BLOCK : (first + step) * BLOCK], out):
                where = np.argwhere(~np.isfinite(x))[0].tolist()
                raise InputError(f"x{where} is {x[tuple(where)]}. Only finite values can be encoded.")
    return EdgePacked(packed, data, x.shape)


def _checked(x: np.ndarray, bits: int, norm: str) -> Layout:
    if not isinstance(x, np.ndarray) or x.dtype not in (np.float32, np.float16):
        given = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
        raise InputError(f"x is {given}. Pass a NumPy array of float32 or float16.")
    if x.ndim == 0:
        raise InputError("x is a single number. Pass vectors, shape (*lead, d).")
    if bits not in range(1, 9):
        raise SpecError(f"bits={bits} is out of range. Allowed: 1 to 8.")
    if norm not in NORMS:
        raise SpecError(f"norm={norm} is unknown. {did_you_mean(norm, NORMS)}")
    d = x.shape[-1]
    return Layout(d, codes_and_scale(d, bits, norm))


@lru_cache
def _patterns(bits: int, d: int) -> Float[np.ndarray, "patterns codes"]:
    """What every pattern of neighbouring codes stands for; as many codes as 12 bits hold."""
    codes = 2 ** ((12 // bits).bit_length() - 1)
    patterns = np.arange(2 ** (bits * codes))[:, None] >> bits * np.arange(codes)
    return (table(bits) / np.float32(sqrt(d)))[patterns % 2**bits]


def decode(packed: EdgePacked) -> Float[np.ndarray, "*lead d"]:
    """fp32 values in the shape that was encoded; the same bits as the torch codec's."""
    plan, data = packed.layout, packed.data
    patterns = _patterns(plan.code_bits, plan.d)
    x = np.empty((len(data), BLOCK, plan.d), np.float32)
    step = max(1, CHUNK // (BLOCK * plan.d))
    for first in range(0, len(data), step):
        blocks, part = data[first : first + step], x[first : first + step]
        index = _indices(blocks[:, plan.span("codes")], plan.code_bits, patterns.shape[1])
        values = part.reshape(*index.shape, -1)
        np.take(patterns, index, axis=0, out=values, mode="clip")  # the default mode would buffer `out`
        norm = blocks[:, plan.span("scale")].view(NORMS[plan.plane("scale").kind])
        np.multiply(part, norm.astype(np.float32)[..., None], out=part)
    return x.reshape(-1, plan.d)[: prod(packed.shape[:-1])].reshape(packed.shape)


def _indices(stream: UInt8[np.ndarray, "blocks m"], bits: int, codes: int) -> Int64[np.ndarray, "blocks w k"]:
    """Patterns of `codes` codes each, k in each of w words of 8 codes, which take `bits` bytes."""
    words = np.zeros((len(stream), stream.shape[1] // bits, 8), np.uint8)
    for i in range(bits):
        words[..., i] = stream[:, i::bits]
    eights = words.view(np.int64)
    index = np.empty((*eights.shape[:-1], 8 // codes), np.int64)
    for i in range(8 // codes):
        index[..., i] = eights[..., 0] >> bits * codes * i
    return np.bitwise_and(index, 2 ** (bits * codes) - 1, out=index)


def cosine(x: Float[np.ndarray, "*lead d"], y: Float[np.ndarray, "*lead d"]) -> Float[np.ndarray, "*lead"]:
    """Cosine similarity of each pair of vectors, fp64; 1 for two zero vectors and 0 if only one is."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    product, square = np.vecdot(x, y), np.vecdot(x, x) * np.vecdot(y, y)
    both_zero = ~(x.any(-1) | y.any(-1))
    return np.where(square > 0, product / np.sqrt(np.where(square > 0, square, 1)), both_zero)
