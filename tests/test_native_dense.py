"""Native attention over dense tokens and its merge, against fp64 and the reference, on every instruction set here."""

import pytest
import torch
from test_attention import exact
from test_native_attend import RUN
from torch import Tensor

from tersekv.ops import attention as reference
from tersekv.ops import native

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")
EPS = torch.finfo(torch.float32).eps
TYPES = [torch.float32, torch.float16, torch.bfloat16]


def near(
    got: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float
) -> None:
    """Scores are sums of d products; weights move by their error, sums of t terms by one rounding each."""
    size = scale * q.norm(dim=-1).max() * k.nan_to_num(0, 0, 0).float().norm(dim=-1).max()
    off = (q.shape[-1] + 16) * EPS * size + 2**-21
    bound = (2 * off + (k.shape[2] + 64) * EPS) * v.nan_to_num(0, 0, 0).float().abs().max()
    assert torch.isfinite(got[0]).all()
    assert (got[0] - right[0]).abs().max() <= bound
    seen = torch.isfinite(right[1])
    assert torch.equal(torch.isfinite(got[1]), seen)
    error = (got[1] - right[1])[seen].abs()
    assert not len(error) or error.max() <= off + 64 * EPS * (1 + right[1][seen].abs().max())


def strided(x: Tensor) -> Tensor:
    """The same numbers in a tensor whose tokens lie apart, between NaNs."""
    b, h, t, d = x.shape
    room = torch.full((b, 2 * t + 1, h, 2 * d), torch.nan, dtype=x.dtype)
    view = room[:, 1::2, :, d:].transpose(1, 2)
    return view.copy_(x)


@pytest.mark.parametrize("isa", RUN)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("d", "g", "n"), [(64, 1, 1), (80, 3, 2), (72, 2, 5), (96, 16, 1), (128, 4, 17), (256, 2, 65)])
def test_ragged_strided_and_poisoned(d: int, g: int, n: int, dtype: torch.dtype, isa: str) -> None:
    b, h, t = 3, 2, 130
    q, k, v = torch.randn(b, h * g, n, d), torch.randn(b, h, t, d).to(dtype), torch.randn(b, h, t, d).to(dtype)
    lengths = torch.tensor([[0, 1], [63, 64], [65, 130]])
    beyond = torch.arange(t) >= lengths[..., None]
    k[beyond], v[beyond] = torch.nan, torch.inf
    right = exact(q, k, v, lengths, d**-0.5)
    no_padding = torch.zeros(b, dtype=torch.int64)
    got = native.attend_dense(q, k, v, lengths, d**-0.5, no_padding, False, isa)
    near(got, right, q, k, v, d**-0.5)
    again = native.attend_dense(q, strided(k), strided(v), lengths, d**-0.5, no_padding, False, isa)
    assert torch.equal(again[0], got[0]) and torch.equal(again[1], got[1])


@pytest.mark.parametrize("isa", RUN)
@pytest.mark.parametrize("n", [1, 2, 16, 63, 65, 130])
def test_causal_with_padding(n: int, isa: str) -> None:
    b, h, g, d = 3, 2, 3, 64
    q, k, v = torch.randn(b, h * g, n, d), torch.randn(b, h, n, d), torch.randn(b, h, n, d)
    padding = torch.tensor([0, n // 2, n])
    right = reference.attend_causal(q, k, v, padding, d**-0.5)
    lengths = torch.full((b, h), n)
    got = native.attend_dense(q, k, v, lengths, d**-0.5, padding, True, isa)
    near(got, right, q, k, v, d**-0.5)
    assert not got[0][2].any() and (got[1][2] == -torch.inf).all()


@pytest.mark.parametrize("isa", RUN)
def test_padding_longer_than_a_split(isa: str) -> None:
    q, k, v = torch.randn(1, 2, 2, 64), torch.randn(1, 1, 2100, 64), torch.randn(1, 1, 2100, 64)
    got = native.attend_dense(q, k, v, torch.tensor([[2100]]), 0.1, torch.tensor([1100]), False, isa)
    right = exact(q, k[:, :, 1100:], v[:, :, 1100:], torch.tensor([[1000]]), 0.1)
    near(got, right, q, k, v, 0.1)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_merge(layout: str) -> None:
    q, k, v = torch.randn(2, 4, 3, 64), torch.randn(2, 4, 100, 64), torch.randn(2, 4, 100, 64)
    parts = []
    for start, stop in ((0, 0), (0, 1), (1, 64), (64, 64), (64, 100)):
        lengths = torch.full((2, 4), stop - start)
        out, lse = reference.attend_dense(q, k[:, :, start:stop], v[:, :, start:stop], lengths, 0.1)
        if layout == "strided":
            out, lse = (
                out.transpose(1, 2).contiguous().transpose(1, 2),
                lse.transpose(0, 1).contiguous().transpose(0, 1),
            )
        parts.append((out, lse))
    nothing = [(out.clone(), lse.clone()) for out, lse in (parts[0], parts[3])]
    near(native.merge(parts), exact(q, k, v, torch.full((2, 4), 100), 0.1), q, k, v, 0.1)
    out, lse = native.merge(nothing)
    assert not out.any() and (lse == -torch.inf).all()
