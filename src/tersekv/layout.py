"""Planes of a packed block: names, shapes, bytes and order. No arithmetic on values, no torch.

A block is a rectangle of `block` tokens by `d` channels of one KV head. Each plane lays a coarser or equal grid of
stored elements over it: codes have one element a value, a per-token scale has `block` rows and 1 column, a
per-channel zero has 1 row and `d` columns. A page is the K layout's bytes followed by the V layout's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tersekv.errors import SpecError

BLOCK = 64  # tokens; a power of two, so that a block's channel mean is an exact halving tree and one division
ALIGNMENT = 16  # bytes; one SIMD load, and what `cp.async` moves at once
WHOLE = {"mma": 128}  # whole cache lines for a block on a GPU: else up to a twentieth of the speed is lost

# How stored elements become numbers. "code" indexes the codec's table; "log8" is 0 or 2^((i - 144) / 12);
# "int8" is a signed integer times the plane of the same name + "_step"; "index" is a channel or a token, 0 to 255.
KIND_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "log8": 8, "int8": 8, "index": 8}

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


ORDERS = {order.__name__: order for order in (linear, simd_k, simd_v, trellis_k, trellis_v, mma_k, mma_v)}
UNIT = {"simd": 16, "trellis": 32, "mma": 64}  # channels that an order holds together
WIDTHS = {"simd": SIMD_BITS, "trellis": SIMD_BITS[:-1], "mma": SIMD_BITS}  # of its codes


def fits(plane: Plane, order: str) -> bool:
    """Whether a plane of codes can be stored in an order."""
    family, _, side = order.partition("_")
    known = plane.bits in WIDTHS.get(family, SIMD_BITS)
    whole = plane.rows == BLOCK and known and plane.cols % UNIT.get(family, 1) == 0
    return not side or whole


@dataclass(frozen=True)
class Layout:
    """The planes of one codec for one head dim; every shape and byte count derives from it."""

    d: int
    planes: tuple[Plane, ...]
    block: int = BLOCK

    @cached_property
    def offsets(self) -> dict[str, int]:
        starts = np.cumsum([0, *(plane.stride for plane in self.planes)])
        return {plane.name: int(start) for plane, start in zip(self.planes, starts, strict=False)}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one block of one head, padding included."""
        whole = WHOLE.get(self.order.partition("_")[0], ALIGNMENT)
        return -(-self.used_bytes // whole) * whole

    @cached_property
    def used_bytes(self) -> int:
        """Those before the padding behind the last plane."""
        return sum(plane.stride for plane in self.planes)

    @property
    def code_bits(self) -> int:
        """Bits of one element of the plane that kernels read."""
        return next(plane.bits for plane in self.planes if plane.name in ("codes", "values"))

    @property
    def nominal_bits(self) -> float:
        """Bits of codes alone for each value: what papers print. See `bits_per_value` for what is held."""
        codes = [plane for plane in self.planes if plane.kind == "code" or plane.name == "values"]
        return sum(plane.rows * plane.cols * plane.bits for plane in codes) / (self.block * self.d)

    @property
    def bits_per_value(self) -> float:
        return 8 * self.nbytes / (self.block * self.d)

    def plane(self, name: str) -> Plane:
        return next(plane for plane in self.planes if plane.name == name)

    def __contains__(self, name: str) -> bool:
        return name in self.offsets

    def span(self, name: str) -> slice:
        """Where a plane's bytes lie in the block."""
        start = self.offsets[name]
        return slice(start, start + self.plane(name).nbytes)

    def takes(self, order: str) -> bool:
        return all(fits(plane, order) for plane in self.planes if plane.kind == "code")

    @property
    def order(self) -> str:
        """Of the codes; a layout without codes is linear."""
        return next((plane.order for plane in self.planes if plane.kind == "code"), "linear")

    def ordered(self, order: str) -> "Layout":
        """The same layout with its codes in another storage order.

        Raises SpecError for an unknown order, and for codes that it cannot hold.
        """
        if order not in ORDERS:
            raise SpecError(f'Unknown storage order "{order}". Allowed: {", ".join(ORDERS)}.')
        if not self.takes(order):
            raise SpecError(
                f"Order {order} holds codes of {', '.join(map(str, WIDTHS[order[:-2]]))} bits at head dims that are "
                f"multiples of {UNIT[order[:-2]]}, not {self.nominal_bits:g} bits at {self.d}. Keep the linear order."
            )
        planes = (replace(p, order=order) if p.kind == "code" else p for p in self.planes)
        return replace(self, planes=tuple(planes))


def codes_and_scale(d: int, bits: int, kind: str) -> tuple[Plane, Plane]:
    """The two planes of a token-scaled codec: a code for each value and, stored as `kind`, a scale for each token."""
    check_head_dim(d)
    return Plane("codes", BLOCK, d, bits), Plane("scale", BLOCK, 1, KIND_BITS[kind], kind)


def check_head_dim(d: int) -> None:
    """Raise SpecError unless codes of every bit width end a token on a whole byte."""
    if d < 8 or d % 8:
        raise SpecError(f"head_dim {d}: must be a multiple of 8 and at least 8, so that each token ends on a byte.")
