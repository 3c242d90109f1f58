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
# "int8" is a signed integer times the plane of the same name + "_step".
KIND_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "log8": 8, "int8": 8}

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


ORDERS: dict[str, Order] = {"linear": linear}


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
    def nominal_bits(self) -> int:
        """Bits of a code alone: what papers print. See `bits_per_value` for what is held."""
        return next(plane.bits for plane in self.planes if plane.name in ("codes", "values"))

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

    def ordered(self, order: str) -> "Layout":
        """The same layout with its codes in another storage order."""
        if order not in ORDERS:
            raise SpecError(f'Unknown storage order "{order}". Allowed: {", ".join(ORDERS)}.')
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
