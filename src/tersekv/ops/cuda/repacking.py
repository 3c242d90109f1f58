"""Storage orders on a GPU: any permutation of the bits of a block's codes, in one launch."""

from ctypes import Structure, c_int, c_longlong, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from tersekv.layout import Plane
from tersekv.ops.cuda import source
from tersekv.ops.cuda.compiler import kernel, missing
from tersekv.packed import Packed, moves

MOST_BLOCKS = 2**16  # of threads; each takes several bytes


class Repacking(Structure):
    """The arguments of `repack.cu`."""

    _fields_ = (
        *((name, c_void_p) for name in ("from", "moves", "to")),
        *((name, c_longlong) for name in ("blocks", "from_stride", "to_stride")),
        *((name, c_int) for name in ("bytes", "codes", "codes_bytes")),
    )


@lru_cache
def _moves(plane: Plane, target: Plane, device: int) -> Tensor:
    return torch.from_numpy(moves(plane, target)).to(f"cuda:{device}", torch.int32)


def repacks(packed: Packed) -> bool:
    """Whether `repack` can run: one plane of codes on a GPU."""
    codes = sum(plane.kind == "code" for plane in packed.layout.planes)
    return packed.data.device.type == "cuda" and codes == 1 and missing() is None


def repack(packed: Packed, order: str) -> Packed:
    layout, device = packed.layout.ordered(order), packed.data.device
    blocks = packed.data.reshape(-1, packed.layout.nbytes)
    blocks = blocks if blocks.stride(-1) == 1 else blocks.contiguous()
    out = torch.zeros(*packed.data.shape[:-1], layout.nbytes, dtype=torch.uint8, device=device)
    plane = packed.layout.plane("codes")
    table = _moves(plane, layout.plane("codes"), device.index)
    total = len(blocks) * layout.used_bytes
    numbers = (len(blocks), blocks.stride(0), layout.nbytes, layout.used_bytes, layout.offsets["codes"], plane.nbytes)
    if total:
        run = kernel(source.read("repack.cu"), "repack", device.index)
        arguments = Repacking(blocks.data_ptr(), table.data_ptr(), out.data_ptr(), *numbers)
        run((min(-(-total // 256), MOST_BLOCKS), 1, 1), 256, arguments)
    return Packed(layout, out)
