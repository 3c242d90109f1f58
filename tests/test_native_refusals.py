"""Page tables, lengths and arrays that no kernel may follow: an error that helps, before anything is read."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_cases import Case, make_case
from native_truth import compare, truth
from torch import Tensor

from tersekv.errors import InputError
from tersekv.layout import BLOCK
from tersekv.ops import Pages, native

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")
BLOCKS, PAGES = 3, 15  # of each row; of the pool


@pytest.fixture(scope="module")
def case() -> Case:
    torch.manual_seed(0)
    full = [[BLOCKS * BLOCK] * 2] * 2
    return make_case("3 normal scale:log8 channel_zero:int8", "2 uniform scale:fp16 zero:fp16", 64, 2, 1, full)


def changed(pages: Pages, **fields: Any) -> Pages:
    """As `replace`, without the checks of shapes that tests have and users have not."""
    other = replace(pages)
    for name, value in fields.items():
        object.__setattr__(other, name, value)
    return other


ids = st.one_of(
    st.integers(0, PAGES - 1), st.integers(0, PAGES - 1), st.sampled_from([-1, -(2**31), PAGES, PAGES + 1, 2**31 - 1])
)
lengths = st.one_of(
    st.integers(0, BLOCKS * BLOCK), st.sampled_from([-1, -(2**63), BLOCKS * BLOCK + 1, BLOCKS * BLOCK + 64, 2**62])
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=st.lists(ids, min_size=12, max_size=12), length=st.lists(lengths, min_size=4, max_size=4))
def test_random_tables_and_lengths(case: Case, table: list[int], length: list[int]) -> None:
    """Either the attention of exactly these pages, or a refusal that says what was wrong and what is allowed."""
    rows = [table[3 * i : 3 * i + 3] for i in range(4)]
    fits = all(
        0 <= n <= BLOCKS * BLOCK and all(0 <= page < PAGES for page in row[: -(-n // BLOCK)])
        for row, n in zip(rows, length, strict=True)
    )
    tensors = {"table": torch.tensor(rows).int().view(2, 2, 3), "lengths": torch.tensor(length).view(2, 2)}
    pages = changed(case.native, **tensors)
    if not fits:
        with pytest.raises(InputError, match=r"Allowed: 0 to 192|The pool has 15 pages: name one of them"):
            native.attend_pages(case.q, pages, case.scale)
        return
    out, lse = native.attend_pages(case.q, pages, case.scale, exact=True)
    for i, (row, n) in enumerate(zip(rows, length, strict=True)):
        alone = changed(case.native, table=torch.tensor([[row]]).int(), lengths=torch.tensor([[n]]))
        q = case.q.view(4, 1, 2, 1, 64)[i]
        one = native.attend_pages(q, alone, case.scale, exact=True)
        for whole, part in ((out.view(4, 2, 1, 64)[i], one[0][0]), (lse.view(4, 2, 1)[i], one[1][0])):
            # Pages of the pool that no block uses hold NaN; a table that names one gets it.
            torch.testing.assert_close(whole, part, rtol=0, atol=0, equal_nan=True)


def test_the_case_itself_is_right(case: Case) -> None:
    compare(native.attend_pages(case.q, case.native, case.scale, exact=True), truth(case, exact=True), "exact")


def wrong_pages(pages: Pages) -> dict[str, tuple[dict[str, Tensor], str]]:
    table, lengths, pool = pages.table, pages.lengths, pages.pool
    return {
        "table of int64": ({"table": table.long()}, r"table \(2, 2, 4\) torch.int64.*table \(b, h, blocks\) int32"),
        "table without heads": ({"table": table[0]}, r"table \(2, 4\) torch.int32.*table \(b, h, blocks\) int32"),
        "table of another batch": ({"table": table[:1], "lengths": lengths[:1]}, "Queries of 2 sequences, keys of 1"),
        "lengths of int32": ({"lengths": lengths.int()}, r"lengths \(2, 2\) torch.int32.*lengths \(b, h\) int64"),
        "lengths of another head": ({"lengths": lengths[:, :1]}, r"lengths \(2, 1\) must be \(b, h\)"),
        "pool of int8": ({"pool": pool.view(torch.int8)}, r"torch.int8.*pool \(pages, bytes\) uint8"),
        "pool of short pages": ({"pool": pool[:, :-16]}, r"Pages of \d+ bytes. Their layouts say \d+ of keys"),
        "pool of long pages": ({"pool": torch.cat((pool, pool), 1)}, r"Pages of \d+ bytes. Their layouts say"),
        "no pages": ({"pool": pool[:0]}, "The pool has 0 pages"),
    }


def test_wrong_pages(case: Case) -> None:
    for name, (fields, message) in wrong_pages(case.native).items():
        with pytest.raises(InputError, match=message):
            native.attend_pages(case.q, changed(case.native, **fields), case.scale)
            pytest.fail(f"{name} was taken")


def test_pages_that_lie_apart_are_read_where_they_are(case: Case) -> None:
    spread = {
        "table": torch.stack([case.native.table] * 2, -1)[..., 0],
        "lengths": case.native.lengths.T.contiguous().T,
        "pool": torch.cat([case.native.pool] * 2, 1)[:, : case.native.pool.shape[1]],
    }
    right = native.attend_pages(case.q, case.native, case.scale)
    got = native.attend_pages(case.q, changed(case.native, **spread), case.scale)
    assert torch.equal(got[0], right[0])


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (torch.randn(2, 4, 1, 128), "Queries of head_dim 128, keys of 64. Both must be the same"),
        (torch.randn(2, 3, 1, 64), "3 query heads over 2 KV heads"),
        (torch.randn(3, 4, 1, 64), "Queries of 3 sequences, keys of 2"),
        (torch.randn(4, 1, 64), r"q \(4, 1, 64\).*q \(b, hq, n, d\)"),
    ],
)
def test_wrong_queries(case: Case, q: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        native.attend_pages(q, case.native, case.scale)


def test_unknown_instruction_set(case: Case) -> None:
    with pytest.raises(InputError, match=r'Instruction set "sse9" does not run here\. Allowed: .*portable'):
        native.attend_pages(case.q, case.native, case.scale, isa="sse9")


KEYS, COUNT, PADS = torch.randn(2, 2, 5, 64), torch.full((2, 2), 5), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": COUNT + 1}, "length 6. Allowed: 0 to the 5 tokens"),
        ({"lengths": COUNT - 6}, "length -1. Allowed: 0 to the 5 tokens"),
        ({"lengths": COUNT[:1]}, r"lengths \(1, 2\) must be \(b, h\)"),
        ({"lengths": COUNT.int()}, r"torch.int32.*lengths \(b, h\) int64"),
        ({"padding": PADS - 1}, "padding -1. Allowed: 0 and more"),
        ({"padding": PADS[:1]}, r"padding \(1\) must be \(b\)"),
        ({"k": KEYS[:, :, :4]}, r"Keys \(2, 2, 4, 64\), values \(2, 2, 5, 64\). Both must have one shape"),
        ({"k": KEYS.double()}, "another type. Allowed: fp32, fp16 and bf16"),
        ({"k": KEYS.mT.contiguous().mT}, "lie 5 elements apart. They must be contiguous"),
        ({"k": KEYS[..., :32], "v": KEYS[..., :32]}, "Queries of head_dim 64, keys of 32. Both must be the same"),
        ({"causal": True, "lengths": COUNT - 4}, "length 1 with 2 causal queries"),
        ({"q": torch.randn(2, 4, 2, 60)}, "head_dim 60. Allowed: a multiple of 8 up to 512"),
    ],
)
def test_wrong_dense_tokens(changes: dict[str, Any], message: str) -> None:
    right = {"q": torch.randn(2, 4, 2, 64), "k": KEYS, "v": KEYS, "lengths": COUNT, "padding": PADS, "causal": False}
    native.attend_dense(**right, scale=1.0)
    with pytest.raises(InputError, match=message):
        native.attend_dense(**{**right, **changes}, scale=1.0)


def test_parts_that_do_not_fit() -> None:
    part = torch.zeros(1, 2, 1, 64), torch.zeros(1, 2, 1)
    other = torch.zeros(1, 2, 2, 64), torch.zeros(1, 2, 2)
    with pytest.raises(InputError, match=r"Part 1 is \(1, 2, 2, 64\) and \(1, 2, 2\), part 0 is \(1, 2, 1, 64\)"):
        native.merge([part, other])
