"""Encoding, storage orders and rotation: native code where it can run, otherwise what specifies it."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from tersekv import packed as reference
from tersekv import rotation
from tersekv.layout import Layout
from tersekv.ops import cuda
from tersekv.ops import native_encoding as native
from tersekv.packed import Packed

if TYPE_CHECKING:
    from tersekv.codec import Codec


def encode(
    codec: Codec,
    x: Float[Tensor, "*lead block d"],
    layout: Layout,
    out: UInt8[Tensor, "*lead n"] | None = None,
    asked: Float[Tensor, "*#lead d d"] | None = None,
    starts: Int[Tensor, "*lead"] | None = None,
) -> Packed:
    """The bytes of `codec.encode(x)` in the order of `layout`, written to `out` if it is given. `x` may be strided.

    With `asked` those of `codec.encode_for(x, asked)`. `starts`: see `Codec.encode_at`; only there are they needed.
    """
    encoder, recipe = None if asked is not None else codec.encoder(layout.d), codec.recipe(layout.d)
    kernels = next((k for k in (native, cuda) if encoder is not None and k.writes(encoder, layout, recipe, x)), None)
    if encoder is None or kernels is None:
        there = None if starts is None or not codec.positional else codec.encode_at(x, starts)
        packed = repack(codec.encode_for(x, asked) if there is None else there, layout.order)
        return packed if out is None else Packed(layout, out.copy_(packed.data))
    if out is None:
        out = torch.empty(*x.shape[:-2], layout.nbytes, dtype=torch.uint8, device=x.device)
    kernels.encode(encoder, x, layout, out)
    return Packed(layout, out)


def repack(packed: Packed, order: str) -> Packed:
    """As `packed.repack`: the same codes in another storage order."""
    if packed.layout.order == order:
        return packed
    if native.repacks(packed, order):
        return native.repack(packed, order)
    return cuda.repack(packed, order) if cuda.repacks(packed) else reference.repack(packed, order)


def rotate(x: Float[Tensor, "*lead d"], seed: int) -> Float[Tensor, "*lead d"]:
    """As `rotation.rotate`, bit for bit."""
    if kernels := _rotating(x):
        return kernels.rotate(x, rotation_signs(x.shape[-1], seed, x.device), back=False)
    return rotation.rotate(x, seed)


def unrotate(y: Float[Tensor, "*lead d"], seed: int) -> Float[Tensor, "*lead d"]:
    """As `rotation.unrotate`, bit for bit."""
    if kernels := _rotating(y):
        return kernels.rotate(y, rotation_signs(y.shape[-1], seed, y.device), back=True)
    return rotation.unrotate(y, seed)


def _rotating(x: Tensor) -> ModuleType | None:
    return next((kernels for kernels in (native, cuda) if kernels.rotates(x)), None)


@lru_cache
def rotation_signs(d: int, seed: int, device: torch.device) -> Tensor:
    return torch.from_numpy(rotation.signs(d, seed)).to(device)
