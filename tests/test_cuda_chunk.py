"""Attention of many query rows by the CUDA kernels against fp64, and who attends from how many. `pytest -m gpu`."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cuda_truth import chunk_truth
from native_cases import Case, make_case, mma_pages
from native_truth import compare
from test_cuda_attend import RAGGED, SIDES

from tersekv import ops
from tersekv.ops import attention as reference
from tersekv.ops.cuda import attending, chunks, compiler, joining, unpacked
from tersekv.ops.pages import Pages, Partial

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(compiler.missing() is not None, reason=str(compiler.missing()))]

MORE_SIDES = SIDES | {
    "8/8 bits, unequal": ("8 normal scale:log8 channel_zero:int8", "8 normal scale:log8"),
    "signs in steps": ("4 normal scale:int8 channel_zero:int8", "3 normal scale:int8"),
    "signs": ("2 normal scale:fp16", "4 normal scale:fp16 zero:fp16"),
    "bf16/bf16": ("dense bf16", "dense bf16"),
    "bf16/3 bits": ("dense bf16", "3 normal scale:log8"),
    "4 bits, mean/bf16": ("4 normal scale:log8 channel_zero:int8", "dense bf16"),
    "bf16/2 bits of a trellis": ("dense bf16", "2 trellis scale:log8"),
}
SHAPES = {  # d, g, n, lengths
    "d64 ragged": (64, 3, 33, RAGGED),
    "d64 g3 n17": (64, 3, 17, [[127], [1121]]),
    "d64 n129": (64, 1, 129, [[321, 64]]),
    "d128 ragged": (128, 4, 33, RAGGED),
    "d128 g3 n7": (128, 3, 7, [[64, 130], [1, 0]]),
    "d128 g4 n17": (128, 4, 17, [[127], [1121]]),
    "d128 n129": (128, 1, 129, [[321, 64]]),
    "d256 g2 n65": (256, 2, 65, [[66], [700]]),
    "splits": (128, 8, 8, [[4096, 4097], [2049, 1]]),
}


def full_pages(case: Case) -> Pages:
    """Of a case whose rows are equally long, in whole blocks: without the columns of the table that nobody may read."""
    pages = mma_pages(case, "cuda")
    return replace(pages, table=pages.table[..., : int(pages.lengths[0, 0]) // 64].contiguous(), full=True)


def check(case: Case, attend: Callable[[torch.Tensor, Pages, float], Partial] = chunks.attend_chunk) -> None:
    pages = mma_pages(case, "cuda") if attend is chunks.attend_chunk else full_pages(case)
    q = case.q.cuda()
    torch.full((64 * 2**20,), torch.nan, device="cuda")  # what torch.empty will give
    first = attend(q, pages, case.scale)
    compare((first[0].cpu(), first[1].cpu()), chunk_truth(case), "cuda")
    again = attend(q, pages, case.scale)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "not deterministic"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sides", MORE_SIDES)
def test_pages(sides: str, shape: str) -> None:
    check(make_case(*MORE_SIDES[sides], *SHAPES[shape]))


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("sides", MORE_SIDES)
def test_unpacked(sides: str, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles of two blocks, and of one at the end: more partial results than are held at a time."""
    case = make_case(*MORE_SIDES[sides], d, 2, 33, [[19 * 64] * 3, [19 * 64] * 3])
    monkeypatch.setattr(unpacked, "TILE_BYTES", 2 * 6 * 64 * d * 4)
    k, v = unpacked.unpack(full_pages(case), 5, 2)
    wanted_k, wanted_v, _ = next(case.linear.tiles())
    for got, wanted in ((k, wanted_k), (v, wanted_v)):
        near = float(wanted.abs().max()) / 100  # table entries are on levels
        torch.testing.assert_close(got.cpu().float(), wanted[:, :, 5 * 64 : 7 * 64], rtol=2**-8, atol=near)
    check(case, unpacked.attend_pages)


@pytest.mark.parametrize(("n", "full", "tiles"), [(1057, True, [2]), (1056, True, []), (1057, False, [])])
def test_rows_that_fill_the_gpu_are_multiplied_by_cudnn(
    n: int, full: bool, tiles: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """68 tiles of 128 rows take cuDNN as long as 132, the other kernel not quite twice as long as 68 of 132."""
    calls: list[int] = []
    real, gpu = unpacked.unpack, replace(attending.limits(torch.cuda.current_device()), major=9, processors=132)

    def counted(pages: Pages, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(count)
        return real(pages, first, count)

    monkeypatch.setattr(unpacked, "unpack", counted)
    monkeypatch.setattr(attending, "limits", lambda device: gpu)
    case = make_case(*MORE_SIDES["norms"], 128, 4, n, [[128, 128]])
    ops.attend_pages(case.q.cuda(), replace(full_pages(case), full=full), case.scale)
    assert calls == tiles


@pytest.mark.parametrize(
    ("sides", "d", "n", "many"),
    [
        ("norms", 128, 6, False),
        ("norms", 128, 7, True),
        ("norms", 64, 7, True),
        ("8/8 bits, unequal", 64, 1, True),
        ("4 bits, mean/bf16", 128, 1, True),
    ],
)
def test_rows_choose_the_kernel(sides: str, d: int, n: int, many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case, calls = make_case(*MORE_SIDES[sides], d, 4, n, [[65]]), []
    real = chunks.attend_chunk

    def counted(q: torch.Tensor, pages: Pages, scale: float) -> Partial:
        calls.append(q.shape)
        return real(q, pages, scale)

    monkeypatch.setattr(chunks, "attend_chunk", counted)
    ops.attend_pages(case.q.cuda(), mma_pages(case, "cuda"), case.scale)
    assert bool(calls) == many


@pytest.mark.parametrize("padding", [[0, 0], [0, 3]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_new_tokens_among_themselves(dtype: torch.dtype, padding: list[int]) -> None:
    q, k, v = (torch.randn(2, h, 300, 128, device="cuda").to(dtype) for h in (8, 2, 2))
    assert joining.flashes(q, k, v)
    given = torch.tensor(padding)
    got, right = ops.attend_causal(q, k, v, given, 0.1), reference.attend_causal(q, k, v, given, 0.1)
    step = torch.finfo(dtype).eps
    assert (got[0] - right[0]).abs().max() <= 4 * step * v.abs().max()
    visible = torch.isfinite(right[1])
    assert torch.equal(torch.isfinite(got[1]), visible)
    assert (got[1] - right[1])[visible].abs().max() <= 1e-4
