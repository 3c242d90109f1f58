"""Decoder layers of a few tokens in native code, against fp64."""

from typing import Any

import pytest
import torch
from test_native_attend import RUN
from test_native_linear import STEPS
from torch import Tensor, nn

from tersekv.errors import InputError
from tersekv.ops import native
from tersekv.ops.decoder import DecoderLayer, Weights

pytestmark = [
    pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}"),
    pytest.mark.usefixtures("inference"),
]
EPS = 1e-5


def weights(hq: int, h: int, d: int, width: int, inner: int, dtype: torch.dtype, full: bool = False) -> Weights:
    """`full`: with biases and norms of heads."""
    draw = torch.Generator().manual_seed(hq + d + width)
    shapes = [(hq * d, width), (h * d, width), (h * d, width), (width, hq * d), (inner, width), (inner, width)]
    linear = [torch.randn(shape, generator=draw) / shape[1] ** 0.5 for shape in [*shapes, (width, inner)]]
    biases = [torch.randn(x.shape[0], generator=draw).to(dtype) if full else None for x in linear]
    gains = [1 + 0.1 * torch.randn(n, generator=draw) for n in (width, width, d, d)]
    norms: list[Any] = [x.to(dtype) for x in (gains if full else gains[:2])] + ([] if full else [None, None])
    return Weights(*zip([x.to(dtype) for x in linear], biases, strict=True), *norms, EPS, d)


def tokens(w: Weights, b: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, cosines and sines, and what was attended to."""
    draw, dtype = torch.Generator().manual_seed(b + n), w.input_norm.dtype
    x = torch.randn(b, n, w.input_norm.shape[0], generator=draw)
    angles = torch.randn(b, n, w.d // 2, generator=draw).repeat(1, 1, 2)
    attended = torch.randn(b, n, w.q[0].shape[0] // w.d, w.d, generator=draw)
    return x.to(dtype), angles.cos().to(dtype), angles.sin().to(dtype), attended.to(dtype)


def norm(x: Tensor, gain: Tensor | None) -> Tensor:
    return x if gain is None else x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * gain.double()


def linear(x: Tensor, layer: tuple[Tensor, Tensor | None]) -> Tensor:
    return nn.functional.linear(x, layer[0].double(), None if layer[1] is None else layer[1].double())


def expected(w: Weights, x: Tensor, cos: Tensor, sin: Tensor, attended: Tensor) -> list[Tensor]:
    """Queries, keys, values, and the output, in fp64."""
    x, cos, sin, attended = (one.double() for one in (x, cos, sin, attended))
    into = norm(x, w.input_norm)
    q, k, v = (linear(into, one).unflatten(-1, (-1, w.d)).transpose(1, 2) for one in (w.q, w.k, w.v))
    q, k = norm(q, w.q_norm), norm(k, w.k_norm)
    turned = [
        y * cos[:, None] + torch.cat((-y[..., w.d // 2 :], y[..., : w.d // 2]), -1) * sin[:, None] for y in (q, k)
    ]
    h = x + linear(attended.flatten(2), w.o)
    n = norm(h, w.post_norm)
    return [*turned, v, h + linear(nn.functional.silu(linear(n, w.gate)) * linear(n, w.up), w.down)]


def both(w: Weights, given: tuple[Tensor, Tensor, Tensor, Tensor], isa: str = "") -> list[Tensor]:
    x, cos, sin, attended = given
    layer = DecoderLayer(w)
    return [*layer.project(x, cos, sin, isa), layer.finish(attended, x, isa)]


SHAPES = [(9, 3, 64, 576, 1536), (4, 4, 80, 320, 48), (2, 1, 96, 64, 16), (8, 1, 128, 1024, 2832), (1, 1, 256, 16, 32)]


@pytest.mark.parametrize("isa", RUN)
@pytest.mark.parametrize("dtype", STEPS)
@pytest.mark.parametrize(("hq", "h", "d", "width", "inner"), SHAPES)
def test_as_exact_as_the_type_allows(
    hq: int, h: int, d: int, width: int, inner: int, dtype: torch.dtype, isa: str
) -> None:
    for full, b, n in ((False, 1, 1), (True, 1, 3), (True, 2, 4), (False, 5, 1)):
        w = weights(hq, h, d, width, inner, dtype, full)
        given = tokens(w, b, n)
        for ours, truth in zip(both(w, given, isa), expected(w, *given), strict=True):
            assert ours.shape == truth.shape and ours.dtype == dtype
            bound = STEPS[dtype] * truth.abs() + 4e-6 * truth.abs().max()
            assert (ours.double() - truth).abs().le(bound).all()


def test_any_number_of_threads_and_any_company() -> None:
    w = weights(9, 3, 64, 576, 1536, torch.bfloat16)
    given = tokens(w, 2, 4)
    alone = both(w, given)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, both(w, given), alone))


def test_one_rotation_for_all_sequences_and_strided_input() -> None:
    w = weights(2, 1, 64, 64, 32, torch.float32)
    x, cos, sin, attended = tokens(w, 3, 2)
    layer = DecoderLayer(w)
    same = [one[:1].expand(3, 2, 64).contiguous() for one in (cos, sin)]
    right = layer.project(x, *same)
    assert all(map(torch.equal, layer.project(x, cos[:1], sin[:1]), right))
    strided = torch.cat((x, x), -1)[..., :64]
    assert all(map(torch.equal, layer.project(strided, *same), right))
    crossed = attended.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(layer.finish(crossed, x), layer.finish(attended, x))


def test_what_is_not_a_number_stays_with_its_token() -> None:
    w = weights(2, 1, 64, 64, 32, torch.bfloat16)
    x, cos, sin, attended = tokens(w, 1, 2)
    clean = both(w, (x, cos, sin, attended))
    x[0, 0, 3] = torch.nan
    for ours, right in zip(both(w, (x, cos, sin, attended))[:3], clean, strict=False):
        assert ours[:, :, 0].isnan().all() and torch.equal(ours[:, :, 1], right[:, :, 1])
    out = DecoderLayer(w).finish(attended, x)
    assert out[0, 0].isnan().all() and torch.equal(out[0, 1], clean[3][0, 1])


def changed(**parts: Any) -> Weights:
    w = weights(2, 1, 64, 64, 32, torch.float32)
    return Weights(**(vars(w) | parts))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"k": (torch.ones(32, 64), None)}, "Queries or keys|do not fit"),
        ({"up": (torch.ones(16, 64), None)}, "do not fit"),
        ({"down": (torch.ones(48, 32), None)}, "vectors of 64"),
        ({"o": (torch.ones(64, 128).half(), None)}, "several types"),
        ({"post_norm": torch.ones(48)}, "A norm's weights"),
        ({"d": 24}, "multiples of 16"),
        ({"v": (torch.ones(64, 64, device="meta"), None)}, "in memory"),
        ({"gate": (torch.ones(64, 32).t(), None)}, "contiguous"),
    ],
)
def test_weights_that_do_not_fit_are_refused(parts: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        DecoderLayer(changed(**parts))


def test_tokens_that_do_not_fit_are_refused() -> None:
    w = weights(2, 1, 64, 64, 32, torch.float32)
    x, cos, sin, attended = tokens(w, 1, 2)
    layer = DecoderLayer(w)
    for given, said in (
        ((x.half(), cos, sin), "Inputs"),
        ((x[..., :48], cos, sin), "Inputs"),
        ((x, cos.half(), sin.half()), "Cosines"),
    ):
        with pytest.raises(InputError, match=said):
            layer.project(*given)
    y = x.new_empty(1, 2, 4, 64)
    for half, arrays, said in (  # what annotations would not let through here
        ("project", (x, cos[:, :1], sin, y), "Cosines"),
        ("project", (x, cos, sin, y[:, :1]), "Outputs"),
        ("finish", (attended[:, :1], x, x.clone()), "attended"),
        ("finish", (attended, x, x[:, :1].clone()), "Outputs"),
    ):
        with pytest.raises(InputError, match=said):
            layer._call(getattr(layer._native, half), arrays, "")
