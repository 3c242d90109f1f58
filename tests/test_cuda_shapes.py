"""Which shape a launch of attention gets, and into how many parts rows of pages are cut."""

import pytest
from cuda_layouts import layouts
from hypothesis import given
from hypothesis import strategies as st

from tersekv.ops.cuda import shapes
from tersekv.spec import parse

H200 = shapes.Limits(9, 132, 228 * 1024, 227 * 1024)


@pytest.mark.parametrize(
    ("bits", "d", "rows", "rows_of_pages", "blocks", "best"),  # the fastest on an H200 of up to 36, or within 6 % of it
    [
        *((4, 128, 4, 8, blocks, best) for blocks, best in ((2048, (256, 16)), (512, (256, 16)), (64, (256, 8)))),
        *((2, 128, 4, 8, blocks, best) for blocks, best in ((2048, (512, 16)), (64, (256, 8)))),
        *((bits, 128, 4, 128, 128, (threads, 1)) for bits, threads in ((4, 256), (3, 256), (2, 512))),
        *((4, 128, 4, count, 256, (128, parts)) for count, parts in ((192, 2), (384, 1), (512, 1))),
        (4, 128, 4, 640, 256, (512, 1)),
        (4, 128, 4, 960, 128, (128, 1)),
        (4, 64, 3, 48, 256, (128, 8)),
        *((bits, 64, 4, 128, 256, (512, 1)) for bits in (2, 3, 4)),
        (4, 256, 4, 16, 256, (256, 8)),
        (4, 128, 6, 32, 128, (256, 4)),
        (2, 128, 8, 128, 128, (512, 1)),
    ],
)
def test_shapes_are_chosen_as_measured(
    bits: int, d: int, rows: int, rows_of_pages: int, blocks: int, best: tuple[int, int]
) -> None:
    how, parts = shapes.choose(*layouts(parse(f"rotated:bits={bits}"), d), rows, H200, rows_of_pages, blocks)
    assert (how.threads, parts) == best


@given(
    rows=st.integers(1, 40),
    rows_of_pages=st.integers(1, 2000),
    blocks=st.integers(1, 5000),
    gpu=st.sampled_from(
        [H200, shapes.Limits(8, 108, 164 * 1024, 163 * 1024), shapes.Limits(12, 40, 100 * 1024, 99 * 1024)]
    ),
)
def test_no_shape_is_more_than_a_gpu_has(rows: int, rows_of_pages: int, blocks: int, gpu: shapes.Limits) -> None:
    how, parts = shapes.choose(*layouts(parse("rotated:bits=4"), 128), rows, gpu, rows_of_pages, blocks)
    assert how.shared_bytes <= min(gpu.block_bytes, gpu.sm_bytes // how.blocks) and how.heads in (4, 8)
    assert 1 <= parts <= blocks
