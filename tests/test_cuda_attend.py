"""Attention of the CUDA kernels against fp64 on pages of random codes. `pytest -m gpu` on a GPU machine."""

import pytest
import torch
from cuda_truth import truth
from native_cases import Case, make_case, mma_pages
from native_truth import compare

from tersekv.ops.cuda import attending, compiler, reading

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(compiler.missing() is not None, reason=str(compiler.missing()))]

FIRST = "channel_scale:fp16 channel_zero:fp16 scale:log8"
SIDES = {
    "1/2 bits": ("1 normal scale:log8", "2 normal scale:log8"),
    "2/3 bits, mean": ("2 normal scale:log8 channel_zero:int8", "3 normal scale:log8"),
    "3/4 bits, mean": ("3 normal scale:log8 channel_zero:int8", "4 normal scale:log8"),
    "4/1 bits, mean": ("4 normal scale:log8 channel_zero:int8", "1 normal scale:log8"),
    "4/3 bits in steps, mean": ("4 normal scale:+int8 channel_zero:int8", "3 normal scale:+int8"),
    "1/2 bits of a trellis in steps": ("1 normal scale:+int8", "2 trellis scale:+int8"),
    "zeros": ("4 uniform scale:+fp16 zero:fp16", "2 uniform scale:+fp16 zero:fp16"),
    "8/8 bits, zeros": ("8 uniform scale:+fp16 zero:fp16", "8 uniform scale:+fp16 zero:fp16"),
    "norms": ("4 normal scale:+fp32", "3 normal scale:+fp16"),
    "channels": ("4 uniform channel_scale:fp16 channel_zero:fp16", "4 uniform channel_scale:fp32 channel_zero:bf16"),
    "all": (
        "3 normal scale:+fp16 zero:fp16 channel_scale:fp16 channel_zero:fp16",
        "2 uniform scale:+fp16 zero:fp16 channel_scale:fp16 channel_zero:int8",
    ),
    "no scale": ("4 uniform", "1 uniform"),
    "channels first": (f"4 uniform first=channel {FIRST}", f"3 uniform first=channel {FIRST}"),
    "channels first, 1/8 bits": (f"1 uniform first=channel {FIRST}", f"8 uniform first=channel {FIRST}"),
    "channels first/mean": ("2 normal first=channel scale:+fp16 channel_zero:int8", "2 normal scale:log8"),
    "zeros/channels first": ("4 uniform scale:+fp16 zero:fp16", "1 uniform first=channel channel_scale:fp16"),
    "2/1 bits of a trellis, mean": ("2 normal scale:log8 channel_zero:int8", "1 trellis scale:log8"),
    "4/2 bits of a trellis": ("4 normal scale:log8", "2 trellis scale:+fp16"),
    "1/3 bits of a trellis": ("1 normal scale:log8", "3 trellis scale:log8"),
    "8/4 bits of a trellis": ("8 uniform scale:+fp16 zero:fp16", "4 trellis"),
}
RAGGED = [[0, 1], [63, 65]]
SHAPES = {  # d, g, n, lengths
    "d64": (64, 1, 1, RAGGED),
    "d64 g3 n2": (64, 3, 2, [[64, 130], [1, 0]]),
    "d128 g4": (128, 4, 1, [[127], [1121]]),
    "d128 g2 n8": (128, 2, 8, [[321, 64]]),
    "d256 g4": (256, 4, 1, [[66], [700]]),
    "d256 g16": (256, 16, 1, [[65]]),
    "splits": (64, 4, 1, [[4096, 4097], [2049, 1]]),
}


def check(case: Case) -> None:
    pages = mma_pages(case, "cuda")
    assert reading.reads(pages)
    q = case.q.cuda()
    torch.full((64 * 2**20,), torch.nan, device="cuda")  # what torch.empty will give, outputs and scratch
    first = attending.attend_pages(q, pages, case.scale)
    compare((first[0].cpu(), first[1].cpu()), truth(case), "cuda")
    again = attending.attend_pages(q, pages, case.scale)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "not deterministic"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sides", SIDES)
def test_pages(sides: str, shape: str) -> None:
    check(make_case(*SIDES[sides], *SHAPES[shape]))


@pytest.mark.parametrize("sides", ["2/3 bits, mean", "2/1 bits of a trellis, mean"])
@pytest.mark.parametrize("g", range(1, 17))
def test_every_group(g: int, sides: str) -> None:
    check(make_case(*SIDES[sides], 64, g, 1, RAGGED))
