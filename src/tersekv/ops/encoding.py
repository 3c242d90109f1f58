"""Encoding, storage orders and rotation: native code where it can run, otherwise what specifies it."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tersekv import packed as reference
from tersekv import rotation
from tersekv.layout import Layout
from tersekv.ops import native_encoding as native
from tersekv.packed import Packed

if TYPE_CHECKING:
    from tersekv.codec import Codec


def encode(
    codec: Codec, x: Float[Tensor, "*lead block d"], layout: Layout, out: UInt8[Tensor, "*lead n"] | None = None
) -> Packed:
    """The bytes of `codec.encode(x)` in the order of `layout`, written to `out` if it is given. `x` may be strided."""
    encoder = codec.encoder(layout.d)
    if encoder is None or not native.writes(encoder, layout, codec.recipe(layout.d), x):
        packed = repack(codec.encode(x), layout.order)
        return packed if out is None else Packed(layout, out.copy_(packed.data))
    if out is None:
        out = torch.empty(*x.shape[:-2], layout.nbytes, dtype=torch.uint8)
    native.encode(encoder, x, layout, out)
    return Packed(layout, out)


def repack(packed: Packed, order: str) -> Packed:
    """As `packed.repack`: the same codes in another storage order."""
    if packed.layout.order == order or not native.repacks(packed):
        return reference.repack(packed, order)
    return native.repack(packed, order)


def rotate(x: Float[Tensor, "*lead d"], seed: int) -> Float[Tensor, "*lead d"]:
    """As `rotation.rotate`, bit for bit."""
    if native.rotates(x):
        return native.rotate(x, rotation_signs(x.shape[-1], seed), back=False)
    return rotation.rotate(x, seed)


def unrotate(y: Float[Tensor, "*lead d"], seed: int) -> Float[Tensor, "*lead d"]:
    """As `rotation.unrotate`, bit for bit."""
    if native.rotates(y):
        return native.rotate(y, rotation_signs(y.shape[-1], seed), back=True)
    return rotation.unrotate(y, seed)


@lru_cache
def rotation_signs(d: int, seed: int) -> Tensor:
    return torch.from_numpy(rotation.signs(d, seed))
