"""Bytes of the tensors that are alive: by storage, and for a tier by plane."""

from torch import Tensor

from tersekv.dense_tier import DenseTier
from tersekv.packed_tier import PackedTier


def storage_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the distinct storages behind the tensors: a view counts as all that it keeps alive."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x is not None}
    return sum(storages.values())


def tier_bytes(tier: DenseTier | PackedTier) -> dict[str, int]:
    """Bytes of a tier by plane, everything counted: {plane: bytes}."""
    planes = {name: storage_bytes(x) for name, x in tier.tensors().items()} | {"lengths": tier.lengths.nbytes}
    if isinstance(tier, PackedTier):
        pages = len(tier.pool)
        total = planes.pop("pool")
        inside = {
            f"{side}.{plane.name}": plane.nbytes * pages
            for side, layout in zip("kv", tier.layouts, strict=True)
            for plane in layout.planes
        }
        planes = inside | {"padding": total - sum(inside.values())} | planes
    return planes
