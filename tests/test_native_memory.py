"""Memory of page pools: large pages where the operating system has them."""

import re
from pathlib import Path

import pytest
import torch

from tersekv.ops import native, new_pool

SMAPS = Path("/proc/self/smaps")
LARGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CPU = torch.device("cpu")


def flags_at(address: int) -> list[str]:
    """What Linux notes about the mapping that holds an address."""
    for text in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", SMAPS.read_text())[1:]:
        start, stop = (int(x, 16) for x in text.split(" ", 1)[0].split("-"))
        if start <= address < stop:
            return text.split("VmFlags:")[1].split()
    raise AssertionError(f"{address:#x} is not mapped")


def test_pools_have_the_shape_asked_for() -> None:
    for pages, nbytes in ((0, 100), (1, 16), (3, 8464)):
        pool = new_pool(pages, nbytes, CPU)
        assert (pool.shape, pool.dtype) == ((pages, nbytes), torch.uint8)


@pytest.mark.skipif(native.missing() is not None, reason="the native kernels are not built")
@pytest.mark.skipif(not (SMAPS.exists() and LARGE.exists()), reason="this system has no transparent large pages")
def test_large_pools_ask_for_large_pages() -> None:
    pool = new_pool(2000, 8464, CPU)
    assert "hg" in flags_at(pool.data_ptr() + pool.numel() // 2)
