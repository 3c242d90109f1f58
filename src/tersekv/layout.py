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
    unit, f, p = (
        np.arange(plane.rows * plane.cols // 512)[:, None, None, None],
        field[:, None, :],
        np.arange(64)[:, None],
    )
    return ((token(unit, f, p) * plane.cols + channel(unit, f, p)) * plane.bits + of_code[:, None, :]).ravel()


def simd_k(plane: Plane) -> np.ndarray:
    """Units of 64 tokens by 8 channels. A 32-bit lane holds four channels of a token: one integer dot product."""
    return _simd(plane, lambda u, f, p: 16 * (f % 4) + p // 4 + 0 * u, lambda u, f, p: 8 * u + 4 * (f // 4) + p % 4)


def simd_v(plane: Plane) -> np.ndarray:
    """Units of 16 channels by 32 tokens. A 32-bit lane holds four tokens of a channel."""
    return _simd(plane, lambda u, f, p: 32 * (u % 2) + 4 * f + p % 4, lambda u, f, p: 16 * (u // 2) + p // 4 + 0 * f)


ORDERS: dict[str, Order] = {"linear": linear, "simd_k": simd_k, "simd_v": simd_v}


def fits(plane: Plane, order: str) -> bool:
    """Whether a plane of codes can be stored in an order."""
    whole = plane.rows == BLOCK and plane.cols % 16 == 0 and plane.bits in SIMD_BITS
    return order == "linear" or whole


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
                f"Order {order} holds codes of {', '.join(map(str, SIMD_BITS))} bits at head dims that are multiples "
                f"of 16, not {self.nominal_bits:g} bits at {self.d}. Keep the linear order."
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
