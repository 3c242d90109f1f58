"""The CUDA encoders against the codecs' own `encode` on the CPU: the same bytes. `pytest -m gpu` on a GPU machine."""

import pytest
import torch
from test_native_encode import BITS, assert_same, blocks
from test_native_encode import CODECS as NATIVE_CODECS

from tersekv import ops, rotation
from tersekv.layout import BLOCK, ORDERS
from tersekv.ops import cuda
from tersekv.packed import Packed, repack
from tersekv.spec import parse_codec
from tersekv.testing import sample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))]
# 8-bit tables, trellis codes of keys and pages of plain numbers are the reference's on a GPU.
KERNELS = ("intn", "rotated", "lloydmax")
CODECS = [text for text in NATIVE_CODECS if text.startswith(KERNELS) and ("bits=8" not in text or text[:4] == "intn")]


@pytest.mark.parametrize("text", CODECS)
def test_the_bytes_of_the_reference(text: str) -> None:
    """For hard blocks too; what is filled is poisoned, and what lies beside it must stay."""
    codec = parse_codec(text, "v")
    for d in (64, 128, 256):
        x, encoder = blocks(d)[:, 0], codec.encoder(d)
        want = codec.encode(x)
        for order in ("mma_k", "mma_v"):
            layout = codec.layout(d).ordered(order)
            assert encoder is not None and cuda.writes(encoder, layout, codec.recipe(d), x.cuda())
            pages = torch.full((len(x), layout.nbytes + 64), 0xAB, dtype=torch.uint8, device="cuda")
            cuda.encode(encoder, x.cuda(), layout, pages[:, 32:-32])
            assert (pages[:, :32] == 0xAB).all() and (pages[:, -32:] == 0xAB).all()
            assert_same(pages[:, 32:-32].cpu(), repack(want, order))


TRELLIS = [text for text in NATIVE_CODECS if text.startswith("trellis") and "mean=block" not in text]


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("text", [*TRELLIS, "trellis:bits=1,scale=norm"])
def test_walks_are_those_of_the_reference(text: str, d: int) -> None:
    """For hard blocks too, as above."""
    codec, order = parse_codec(text, "v"), "mma_trellis_v"
    x, encoder, layout = blocks(d)[:, 0], codec.encoder(d), codec.layout(d).ordered(order)
    assert encoder is not None and cuda.writes(encoder, layout, codec.recipe(d), x.cuda())
    pages = torch.full((len(x), layout.nbytes + 64), 0xAB, dtype=torch.uint8, device="cuda")
    cuda.encode(encoder, x.cuda(), layout, pages[:, 32:-32])
    assert (pages[:, :32] == 0xAB).all() and (pages[:, -32:] == 0xAB).all()
    assert_same(pages[:, 32:-32].cpu(), repack(codec.encode(x), order))


@pytest.mark.parametrize("text", ["rotated:bits=3,mean=block", "intn", "none"])
def test_any_precision_and_stride(text: str) -> None:
    codec, d = parse_codec(text, "k"), 128
    layout = codec.layout(d)
    layout = layout.ordered("mma_k") if layout.takes("mma_k") and text != "none" else layout
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = sample(d, blocks=6).reshape(2, 3, 2, BLOCK, d).transpose(1, 2).to(dtype)
        for given in (x, x[:0], x.transpose(1, 2)):
            got = ops.encode(codec, given.cuda(), layout)
            assert torch.equal(got.data.cpu(), repack(codec.encode(given), layout.order).data)


@pytest.mark.parametrize("bits", BITS)
def test_repack_is_the_permutation(bits: int) -> None:
    plain = parse_codec(f"rotated:bits={bits}", "k").layout(128)
    data = torch.randint(0, 256, (3, 2, plain.nbytes), dtype=torch.uint8)
    for source in filter(plain.takes, ORDERS):
        for target in filter(plain.takes, ORDERS):
            packed = repack(Packed(plain, data), source)
            got = ops.repack(Packed(packed.layout, packed.data.cuda()), target)
            want = repack(packed, target)
            assert got.layout == want.layout and got.data.shape == want.data.shape
            for plane in want.layout.planes:
                assert torch.equal(got.plane(plane.name).cpu(), want.plane(plane.name))


@pytest.mark.parametrize("d", [64, 128, 256])
def test_rotation_bit_for_bit(d: int) -> None:
    for x in (torch.randn(1, 9, 1, d), torch.randn(2, 300, d)[:, ::2], torch.randn(0, d), torch.randn(3, d).bfloat16()):
        assert cuda.rotates(x.cuda())
        for fast, reference in ((ops.rotate, rotation.rotate), (ops.unrotate, rotation.unrotate)):
            assert torch.equal(fast(x.cuda(), 3).cpu().view(torch.int32), reference(x, 3).view(torch.int32))
