"""Planes of a block and their storage orders: permutations of bits, one for each family of kernels. No torch."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BLOCK = 64  # tokens; a power of two, so that a block's channel mean is an exact halving tree and one division
ALIGNMENT = 16  # bytes; one SIMD load, and what `cp.async` moves at once

# An order says which bit of the linear stream each stored bit is: a permutation, so `repack` is exact by construction.
Order = Callable[["Plane"], np.ndarray]


@dataclass(frozen=True)
class Plane:
    """One stored array of a block: `rows` x `cols` elements of `bits` bits, row-major in the linear order."""

    name: str
    rows: int
    cols: int
    bits: int
    kind: str = "code"
    order: str = "linear"

    @property
    def nbytes(self) -> int:
        return -(-self.rows * self.cols * self.bits // 8)

    @property
    def stride(self) -> int:
        """Bytes that the plane occupies in a page, with the padding that aligns the next one."""
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT


def linear(plane: Plane) -> np.ndarray:
    """The canonical order: a little-endian bit stream, token by token. Used on disk and by the reference."""
    return np.arange(plane.nbytes * 8)


SIMD_BITS = (1, 2, 3, 4, 8)  # widths of which whole codes, or two spare bits of three bytes, fill a byte


def _simd_fields(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of eight fields, and which bit of its code, each bit of a byte holds in each of a unit's `bits` vectors."""
    vector, bit = np.indices((bits, 8))
    if bits != 3:
        return vector * (8 // bits) + bit // bits, bit % bits
    # Two fields in each byte of three vectors; the spare bits 6 and 7 make two more, 6 and 7.
    field, of_code = vector + 3 * (bit // 3), bit % 3
    field[:, 6:], of_code[:, 6:] = [[6, 6], [7, 7], [6, 7]], [[0, 1], [0, 1], [2, 2]]
    return field, of_code


def _simd(plane: Plane, token: Callable[..., np.ndarray], channel: Callable[..., np.ndarray]) -> np.ndarray:
    """Units of 512 codes in `bits` vectors of 64 bytes, each byte holding a bit of field f at place p of the unit."""
    field, of_code = _simd_fields(plane.bits)
    unit = np.arange(plane.rows * plane.cols // 512)[:, None, None, None]
    f, p = field[:, None, :], np.arange(64)[:, None]
    return ((token(unit, f, p) * plane.cols + channel(unit, f, p)) * plane.bits + of_code[:, None, :]).ravel()


def simd_k(plane: Plane) -> np.ndarray:
    """Units of 64 tokens by 8 channels. A 32-bit lane holds four channels of a token: one integer dot product."""
    return _simd(plane, lambda u, f, p: 16 * (f % 4) + p // 4 + 0 * u, lambda u, f, p: 8 * u + 4 * (f // 4) + p % 4)


def simd_v(plane: Plane) -> np.ndarray:
    """Units of 16 channels by 32 tokens. A 32-bit lane holds four tokens of a channel."""
    return _simd(plane, lambda u, f, p: 32 * (u % 2) + 4 * f + p % 4, lambda u, f, p: 16 * (u // 2) + p // 4 + 0 * f)


def _words(plane: Plane, word: np.ndarray, token: np.ndarray) -> np.ndarray:
    """Each token's codes as one stream, the highest bit of each first, in words of 32 bits, filled from the top."""
    place = 32 * word + 31 - np.arange(32)
    channel, bit = place // plane.bits, plane.bits - 1 - place % plane.bits
    return ((token * plane.cols + channel) * plane.bits + bit).ravel()


def trellis_k(plane: Plane) -> np.ndarray:
    """Word after word of 64 tokens: a 32-bit lane holds the last 8 bits before each of four channels of a token."""
    return _words(plane, np.arange(plane.cols * plane.bits // 32)[:, None, None], np.arange(BLOCK)[:, None])


def trellis_v(plane: Plane) -> np.ndarray:
    """Four tokens after four tokens, of each of which 128 bits hold a word: all channels of four tokens are near."""
    words = np.arange(plane.cols * plane.bits // 32)[:, None, None]
    return _words(plane, words, np.arange(BLOCK).reshape(-1, 1, 4, 1))


def _mma_fields(bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each bit of a lane's `4 * bits` words: register 0..31 after unpacking, byte in it, and bit of the code.

    A table look-up (`prmt`) takes four nibbles, so codes of 2 to 4 bits lie in nibbles; what is left is other codes'.
    """
    word, bit = np.indices((4 * bits, 32))
    nibble, low, byte = bit // 4, bit % 4, bit // 4 % 4
    if bits == 1:  # the fields of a byte are eight rows, so that a field's place is a factor of its row
        step, half, field = word // 2, word % 2, bit % 8
        return 8 * (field // 2) + 4 * step + 2 * half + field % 2, bit // 8, 0 * bit
    if bits == 2:
        return 4 * word + 2 * (low // 2) + nibble // 4, byte, low % 2
    if bits == 3:  # the fourth bits of three words are the nibbles of a fourth
        vector, part, spare = word // 4, word % 4, low == 3
        return 8 * part + 2 * np.where(spare, 3, vector) + nibble // 4, byte, np.where(spare, vector, low)
    return (2 * word + nibble // 4, byte, low) if bits == 4 else (word, bit // 8, bit % 8)


def _mma(plane: Plane, place: Callable[..., tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Units of 64 x 64 codes: eight operands A of `mma.m16n8k32` (16 rows by 32 columns) for each of 32 lanes.

    Register 8x + 4y + r of lane (g, p): rows 16x.., columns 32y.. of the unit; r is halves of rows and columns. Words
    come in vectors of 16 bytes, lanes side by side. `place`: token and channel of (unit, g, row, p, y, half, byte).
    """
    register, byte, of_code = (f.reshape(plane.bits, 1, 4, 32) for f in _mma_fields(plane.bits))
    unit, lane = np.arange(plane.rows * plane.cols // 4096)[:, None, None, None, None], np.arange(32)[:, None, None]
    x, y, half, r = register // 8, register // 4 % 2, register // 2 % 2, register % 2
    token, channel = place(unit, lane // 4, 2 * x + r, lane % 4, y, half, byte)
    return ((token * plane.cols + channel) * plane.bits + of_code).ravel()


def mma_k(plane: Plane) -> np.ndarray:
    """Rows are tokens, columns 64 channels a unit. A lane meets tokens and channels that are neighbours."""
    return _mma(
        plane,
        lambda u, g, row, p, y, half, i: (8 * g + row, plane.cols // 4 * p + 16 * u + 8 * y + 4 * half + i),
    )


def mma_v(plane: Plane) -> np.ndarray:
    """Rows are 64 channels a unit, columns tokens, in the order in which `movmatrix` leaves the weights."""
    return _mma(
        plane,
        lambda u, g, row, p, y, half, i: (
            16 * p + 8 * (i // 2) + 4 * y + 2 * half + i % 2,
            plane.cols // 8 * g + 8 * u + row,
        ),
    )


def mma_trellis_v(plane: Plane) -> np.ndarray:
    """A lane (g, p) has channels cols / 8 * g.. of tokens 16p..: as in `mma_v`, but each token's codes as one stream.

    The highest bit of each first, in bytes filled from the top. A vector is one of those bytes of the lane's 16 tokens;
    the byte before a lane's first one is the last one of lane (g - 1, p).
    """
    vector, lane = np.arange(plane.cols * plane.bits // 64)[:, None, None, None], np.arange(32)[:, None, None]
    place = 8 * vector + 7 - np.arange(8)
    token, channel = 16 * (lane % 4) + np.arange(16)[:, None], plane.cols // 8 * (lane // 4) + place // plane.bits
    return ((token * plane.cols + channel) * plane.bits + plane.bits - 1 - place % plane.bits).ravel()


ORDERS = {
    order.__name__: order for order in (linear, simd_k, simd_v, trellis_k, trellis_v, mma_k, mma_v, mma_trellis_v)
}
UNIT = {"simd": 16, "trellis": 32, "mma": 64, "mma_trellis": 64}  # channels that an order holds together
NARROW = SIMD_BITS[:-1]
WIDTHS = {"simd": SIMD_BITS, "trellis": NARROW, "mma": SIMD_BITS, "mma_trellis": NARROW}  # of its codes


def family_of(order: str) -> str:
    """The kernels' name for an order of keys and one of values."""
    return order.removesuffix("_k").removesuffix("_v")


def fits(plane: Plane, order: str) -> bool:
    """Whether a plane of codes can be stored in an order."""
    family = family_of(order)
    known = plane.bits in WIDTHS.get(family, SIMD_BITS)
    whole = plane.rows == BLOCK and known and plane.cols % UNIT.get(family, 1) == 0
    return order == "linear" or whole
