"""Packed blocks as torch bytes, and the exact change of their storage order."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from tersekv.layout import ORDERS, Layout, Plane


@dataclass(frozen=True)
class Packed:
    """Encoded blocks of one side (keys or values): `data` holds `layout.nbytes` bytes a block."""

    layout: Layout
    data: UInt8[Tensor, "*lead nbytes"]

    @staticmethod
    def assemble(layout: Layout, planes: Mapping[str, UInt8[Tensor, "*lead _"]]) -> "Packed":
        """Lay the planes' bytes into blocks; the padding between planes is zero, so equal content has equal bytes."""
        first = next(iter(planes.values()))
        data = torch.zeros(*first.shape[:-1], layout.nbytes, dtype=torch.uint8, device=first.device)
        for name, content in planes.items():
            data[..., layout.span(name)] = content
        return Packed(layout, data)

    def plane(self, name: str) -> UInt8[Tensor, "*lead _"]:
        """The stored bytes of one plane."""
        return self.data[..., self.layout.span(name)]

    def part(self, prefix: str, d: int | None = None) -> "Packed":
        """The planes whose names begin with `prefix`, named without it, as blocks of head dim `d`."""
        if not prefix:
            return self
        names = {p.name.removeprefix(prefix): p for p in self.layout.planes if p.name.startswith(prefix)}
        layout = Layout(d or self.layout.d, tuple(replace(plane, name=name) for name, plane in names.items()))
        return Packed.assemble(layout, {name: self.plane(plane.name) for name, plane in names.items()})

    @property
    def nbytes(self) -> int:
        return self.data.numel()


@lru_cache
def moves(plane: Plane, target: Plane) -> np.ndarray:
    """For each bit of the target, which bit of the plane it is."""
    return np.argsort(ORDERS[plane.order](plane))[ORDERS[target.order](target)]


def _reordered(content: Tensor, plane: Plane, target: Plane) -> Tensor:
    """Bytes of a plane moved to the target's order: bit i of the result is bit ORDER(i) of the linear stream."""
    shifts = torch.arange(8, dtype=torch.uint8, device=content.device)
    bits = ((content[..., None] >> shifts) & 1).flatten(-2)
    index = torch.from_numpy(moves(plane, target)).to(content.device)
    moved = bits[..., index].unflatten(-1, (-1, 8))
    return (moved << shifts).sum(-1, dtype=torch.uint8)


def repack(packed: Packed, order: str) -> Packed:
    """The same codes in another storage order; exact, and its own inverse through the former order.

    Raises SpecError for an order that is not registered in `layout.ORDERS`.
    """
    if packed.layout.order == order:
        return packed
    layout = packed.layout.ordered(order)
    planes = {}
    for plane in packed.layout.planes:
        target, content = layout.plane(plane.name), packed.plane(plane.name)
        planes[plane.name] = content if target.order == plane.order else _reordered(content, plane, target)
    return Packed.assemble(layout, planes)
