"""The C++ encoders against the codecs' own `encode`: the same bytes, for every instruction set that runs here."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tersekv import ops, rotation
from tersekv.codec import Codec
from tersekv.errors import InputError, SpecError
from tersekv.layout import BLOCK, Layout
from tersekv.ops import native, native_encoding
from tersekv.ops.native_encoding import ORDERS
from tersekv.packed import Packed, repack
from tersekv.spec import parse, parse_codec
from tersekv.store import Store
from tersekv.testing import sample

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=native.missing() or "")

ISAS = [name for name, runs, _ in native.isas() if runs] if native.missing() is None else []
HEAD_DIMS = (16, 64, 80, 96, 112, 128, 256, 512)
BITS = (1, 2, 3, 4, 8)
CODECS = [
    *(f"lloydmax:bits={bits}" for bits in BITS),
    "lloydmax:bits=3,norm=fp32",
    *(f"rotated:bits={bits},mean={mean}" for bits in BITS for mean in ("block", "none")),
    "rotated:bits=3,scale=norm",
    "rotated:bits=2,mean=block,scale=norm,scale_kind=fp16",
    "rotated:bits=4,scale_kind=fp16,seed=7",
    "rotated:bits=4,mean=block,scale_kind=int8",
    "rotated:bits=3,mean=none,scale=norm,scale_kind=int8",
    *(
        f"intn:bits={bits},axis={axis},symmetric={symmetric}"
        for bits in BITS[1:]
        for axis in ("token", "channel")
        for symmetric in ("no", "yes")
    ),
    *(f"trellis:bits={bits},mean={mean}" for bits in BITS[:4] for mean in ("block", "none")),
    "trellis:bits=2,scale=norm,scale_kind=fp16,seed=5",
    "trellis:bits=1,scale_kind=int8",
    "trellis:bits=3,mean=block,scale=norm,scale_kind=int8",
    *(f"none:dtype={dtype}" for dtype in ("bf16", "fp16", "fp32")),
]


def blocks(d: int) -> Tensor:
    """(n, 1, block, d): keys of a model, and blocks that rounding, ranges and exponents could trip over."""
    x = sample(d, blocks=2).reshape(-1, 1, BLOCK, d)
    alternating = torch.where(torch.arange(d) % 2 == 0, 1.0, -1.0).expand(1, 1, BLOCK, d)
    outlier = x[:1].clone()
    outlier[..., 5] *= 1000
    hard = [
        torch.zeros(1, 1, BLOCK, d),
        -torch.zeros(1, 1, BLOCK, d),
        0.0 * alternating,
        torch.full((1, 1, BLOCK, d), 3.0),
        torch.full((1, 1, BLOCK, d), -0.7),
        alternating,
        outlier,
        1e5 * x[:1],  # norms and ranges above fp16
        1e18 * x[:1],  # squares near the end of fp32
        *(10.0**-e * x[:1] for e in (3, 4, 5, 6, 7, 8, 20, 30, 39)),  # towards subnormal numbers, of fp16 and of fp32
        torch.cat((x[:1, :, : BLOCK // 2], 0.0 * x[:1, :, BLOCK // 2 :]), 2),
        (8 * x[:1]).round() / 8,  # ties
        torch.exp(2 * x[1:2].clamp(-40, 40)),  # finite, and squares above fp32
    ]
    return torch.cat([x, *hard])


def encoded(codec: Codec, x: Tensor, layout: Layout, isa: str = "") -> Tensor:
    """By native code or not at all; what it fills is poisoned, and what lies beside it must stay."""
    encoder = codec.encoder(layout.d)
    assert encoder is not None and native_encoding.writes(encoder, layout, codec.recipe(layout.d), x)
    pages = torch.full((*x.shape[:-2], layout.nbytes + 64), 0xAB, dtype=torch.uint8)
    native_encoding.encode(encoder, x, layout, pages[..., 32:-32], isa)
    assert (pages[..., :32] == 0xAB).all() and (pages[..., -32:] == 0xAB).all()
    return pages[..., 32:-32]


def assert_same(got: Tensor, want: Packed) -> None:
    for plane in want.layout.planes:
        mine, theirs = Packed(want.layout, got).plane(plane.name), want.plane(plane.name)
        wrong = (mine != theirs).any(-1).nonzero()
        assert not len(wrong), f"{plane.name} differs in {len(wrong)} blocks, the first at {wrong[0].tolist()}"
    assert torch.equal(got, want.data)  # the padding too


@pytest.mark.parametrize("text", CODECS)
def test_the_bytes_of_the_reference(text: str) -> None:
    codec, few = parse_codec(text, "v"), (32, 64, 96, 128) if text.startswith("trellis") else (64, 80, 128)
    for d in HEAD_DIMS if text in ("lloydmax:bits=3", "rotated:bits=3,mean=block") else few:
        x, layout = blocks(d), codec.layout(d)
        want = codec.encode(x)
        for order in filter(layout.takes, ORDERS) if "codes" in layout else ["linear"]:
            ordered = repack(want, order)
            for isa in ISAS:
                assert_same(encoded(codec, x, layout.ordered(order), isa), ordered)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "text", ["lloydmax", "rotated:bits=4,mean=block", "trellis", "intn", "intn:axis=channel", "none"]
)
def test_any_precision_and_stride(text: str, isa: str) -> None:
    codec, d = parse_codec(text, "v"), 96
    layout = codec.layout(d)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        heads = sample(d, blocks=6).reshape(2, 3, 2, BLOCK, d).transpose(1, 2)  # (b, h, blocks, block, d)
        fused = torch.randn(2, 3 * BLOCK, 2, 3 * d).to(dtype)  # (b, t, h, d) inside of a wider row
        inside = fused[..., d : 2 * d].transpose(1, 2).unflatten(2, (3, BLOCK))
        every = torch.randn(2, 2 * BLOCK, 2 * d).to(dtype)[:, ::2, ::2]  # neither tokens nor channels are neighbours
        for x in (heads.to(dtype), inside, every, inside[:0], inside[:, :, :0]):
            assert_same(encoded(codec, x, layout, isa), codec.encode(x))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", BITS)
def test_values_on_and_beside_every_threshold(bits: int, isa: str) -> None:
    """Each token has the norm sqrt(d), so that its values are compared with the thresholds as they are."""
    codec, d = parse_codec(f"lloydmax:bits={bits},norm=fp32", "v"), 256
    encoder = codec.encoder(d)
    assert encoder is not None
    near = torch.tensor([0.0, *encoder.thresholds])  # type: ignore[attr-defined]
    steps = torch.cat([near, torch.nextafter(near, near + 1), torch.nextafter(near, near - 1)])
    signed = torch.cat([steps, -steps])
    x = signed[torch.arange(4 * BLOCK * d) % len(signed)].view(4, BLOCK, d).clone()
    # The last channel makes up for the rest.
    rest = x[..., :-1].double().square().sum(-1)
    x[..., -1] = (d - rest).clamp(min=0).sqrt().float()
    layout = codec.layout(d).ordered("simd_v")
    assert_same(encoded(codec, x, layout, isa), repack(codec.encode(x), "simd_v"))


def test_threads_change_nothing() -> None:
    codec, x = parse_codec("rotated", "k"), torch.randn(37, BLOCK, 64)
    layout, threads = codec.layout(64).ordered("simd_k"), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = encoded(codec, x, layout)
        torch.set_num_threads(5)
        assert torch.equal(encoded(codec, x, layout), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("text", ["lloydmax:bits=5", "intn:group=16", "intn:axis=channel,group=32", "rotated:bits=7"])
def test_what_has_no_native_form_falls_back(text: str) -> None:
    codec, x = parse_codec(text, "v"), sample(64)
    layout, out = codec.layout(64), torch.empty(*x.shape[:-2], codec.layout(64).nbytes + 3, dtype=torch.uint8)
    encoder = codec.encoder(64)
    assert encoder is not None and not native_encoding.writes(encoder, layout, codec.recipe(64), x)
    assert torch.equal(ops.encode(codec, x, layout, out[..., 3:]).data, codec.encode(x).data)
    assert torch.equal(out[..., 3:], codec.encode(x).data)


def test_a_codec_without_encoder_is_encoded_by_its_own() -> None:
    class Plain(type(parse_codec("lloydmax", "v"))):
        def encoder(self, d: int) -> None:
            return None

    x, layout = sample(64), Plain().layout(64).ordered("simd_k")
    assert torch.equal(ops.encode(Plain(), x, layout).data, repack(Plain().encode(x), "simd_k").data)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_repack_is_the_permutation(d: int, bits: int) -> None:
    plain = parse_codec(f"rotated:bits={bits}", "k").layout(d)
    data = torch.randint(0, 256, (1, 2, plain.nbytes + 5), dtype=torch.uint8)[..., 5:]
    for source in filter(plain.takes, ORDERS):
        packed = Packed(plain.ordered(source), data)
        assert native_encoding.repacks(packed, "simd_v")
        for target in filter(plain.takes, ORDERS):
            want = repack(packed, target)
            spans = [want.layout.span(plane.name) for plane in want.layout.planes]
            for isa in ISAS:
                got = native_encoding.repack(packed, target, isa)
                assert got.layout == want.layout
                assert all(torch.equal(got.data[..., s], want.data[..., s]) for s in spans)


def test_repack_of_what_native_code_does_not_take() -> None:
    packed = parse_codec("lloydmax:bits=5", "v").encode(sample(64))
    assert not native_encoding.repacks(packed, "simd_k")
    assert ops.repack(packed, "linear") is packed
    with pytest.raises(SpecError):
        ops.repack(packed, "simd_k")
    none = parse_codec("none", "v").encode(sample(64))
    assert ops.repack(none, "linear") is none


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_rotation_bit_for_bit(d: int, isa: str) -> None:
    signs = torch.from_numpy(rotation.signs(d, 3))
    for x in (torch.randn(1, 9, 1, d), torch.randn(2, 300, d)[:, ::2], torch.randn(0, d), torch.randn(3, d).bfloat16()):
        assert native_encoding.rotates(x)
        for back, reference in ((False, rotation.rotate), (True, rotation.unrotate)):
            got, want = native_encoding.rotate(x, signs, back, isa), reference(x, 3)
            assert torch.equal(got.view(torch.int32), want.view(torch.int32))


def test_rotation_of_other_head_dims_is_the_reference() -> None:
    x = torch.randn(2, 72)
    assert not native_encoding.rotates(x)
    assert torch.equal(ops.unrotate(ops.rotate(x, 0), 0), rotation.unrotate(rotation.rotate(x, 0), 0))


def test_wrong_shapes_are_refused_before_any_write() -> None:
    codec, x = parse_codec("lloydmax", "v"), torch.randn(2, BLOCK, 64)
    layout, encoder = codec.layout(64), codec.encoder(64)
    assert encoder is not None
    good = torch.empty(2, layout.nbytes, dtype=torch.uint8)
    for wrong_x, wrong_out in ((x[:, :32], good), (x[..., :32], good), (x, good[:, :-1])):
        with pytest.raises(InputError, match=r"(?i)block"):
            native_encoding.encode(encoder, wrong_x, layout, wrong_out)
    with pytest.raises(InputError, match=r"does not run here\. Allowed: "):
        native_encoding.encode(encoder, x, layout, good, "sse9")


@pytest.mark.parametrize("spec", ["rotated:bits=3", "k=intn:axis=channel v=lloydmax:bits=2", "trellis", "none"])
def test_a_store_encodes_natively(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor the codecs' own `encode` does not run."""
    parsed = parse(spec)
    for codec in (parsed.k, parsed.v):
        monkeypatch.setattr(type(codec), "encode", None)
    store = Store(parsed, 1, 2, 64, torch.float32, torch.device("cpu"))
    q, k, v = torch.randn(3, 1, 2, 300, 64)
    store.extend(q, k, v, np.zeros(1, dtype=np.int64), 0.125)
    assert sum(tier.lengths.sum() for tier in store.tiers.packed.values()) > 0
