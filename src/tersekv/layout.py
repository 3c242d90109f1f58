"""Planes of a packed block: names, shapes, bytes and order. No arithmetic on values, no torch.

A block is a rectangle of `block` tokens by `d` channels of one KV head. Each plane lays a coarser or equal grid of
stored elements over it: codes have one element a value, a per-token scale has `block` rows and 1 column, a
per-channel zero has 1 row and `d` columns. A page is the K layout's bytes followed by the V layout's.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tersekv.errors import SpecError
from tersekv.orders import ALIGNMENT, BLOCK, ORDERS, UNIT, WIDTHS, Plane, family_of, fits

# Whole cache lines for a block on a GPU: else up to a twentieth of the speed is lost.
WHOLE = {"mma": 128, "mma_trellis": 128}

# How stored elements become numbers. "code" indexes the codec's table; "log8" is 0 or 2^((i - 144) / 12);
# "int8" is a signed integer times the plane of the same name + "_step"; "index" is a channel or a token, 0 to 255.
KIND_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "log8": 8, "int8": 8, "index": 8}


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
        whole = WHOLE.get(family_of(self.order), ALIGNMENT)
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
            family = family_of(order)
            raise SpecError(
                f"Order {order} holds codes of {', '.join(map(str, WIDTHS[family]))} bits at head dims that are "
                f"multiples of {UNIT[family]}, not {self.nominal_bits:g} bits at {self.d}. Keep the linear order."
            )
        planes = (replace(p, order=order) if p.kind == "code" else p for p in self.planes)
        return replace(self, planes=tuple(planes))


def codes_and_scale(d: int, bits: int, kind: str) -> tuple[Plane, ...]:
    """The planes of a token-scaled codec: a code for each value and, stored as `kind`, a scale for each token."""
    check_head_dim(d)
    step = (Plane("scale_step", 1, 1, 16, "fp16"),) if kind == "int8" else ()
    return Plane("codes", BLOCK, d, bits), Plane("scale", BLOCK, 1, KIND_BITS[kind], kind), *step


def check_head_dim(d: int) -> None:
    """Raise SpecError unless codes of every bit width end a token on a whole byte."""
    if d < 8 or d % 8:
        raise SpecError(f"head_dim {d}: must be a multiple of 8 and at least 8, so that each token ends on a byte.")
