"""Bytes, offsets and storage orders."""

import numpy as np
import pytest
import torch

from tersekv import SpecError, layout, parse
from tersekv.layout import BLOCK, Layout, Plane
from tersekv.ops.planes import log8_codes, log8_values, pack_codes, read_codes, unpack_codes
from tersekv.ops.trellis import walk
from tersekv.packed import Packed, repack
from tersekv.testing import sample


@pytest.mark.parametrize(
    ("spec", "d", "page"),
    [
        # By hand: codes, then a byte a token of scale, then a byte a channel and one 16-byte slot of mean on K.
        ("rotated:bits=3", 64, (1536 + 64 + 64 + 16) + (1536 + 64)),
        ("k=rotated:bits=4 v=rotated:bits=2", 128, (4096 + 64 + 128 + 16) + (2048 + 64)),
        ("lloydmax:bits=3", 128, 2 * (3072 + 128)),
        ("intn:bits=4,group=32", 64, 2 * (2048 + 256 + 256)),
        ("none", 80, 2 * 64 * 80 * 2),
    ],
)
def test_page_bytes_by_hand(spec: str, d: int, page: int) -> None:
    parsed = parse(spec)
    assert parsed.k.layout(d).nbytes + parsed.v.layout(d).nbytes == page


def test_lloydmax_is_fifty_bytes_a_vector() -> None:
    """3 bits at d=128 with an fp16 norm: 50 bytes, 5.12 times less than bf16."""
    assert parse("lloydmax:bits=3").v.layout(128).nbytes == 64 * 50


@pytest.mark.parametrize("order", ["simd_k", "trellis_v", "mma_k"])
def test_an_order_says_which_codes_it_holds(order: str) -> None:
    of_bits = {bits: Layout(64, (Plane("codes", BLOCK, 64, bits),)) for bits in range(1, 9)}
    held = ", ".join(str(bits) for bits, layout in of_bits.items() if layout.takes(order))
    with pytest.raises(SpecError, match=f"Order {order} holds codes of {held} bits at head dims"):
        of_bits[5].ordered(order)


def test_padding_is_counted() -> None:
    odd = Layout(64, (Plane("codes", 64, 64, 3), Plane("scale", 1, 1, 16, "fp16")))
    assert odd.nbytes == 1536 + 16
    assert odd.bits_per_value == 8 * odd.nbytes / 4096 > odd.nominal_bits == 3


@pytest.mark.parametrize("bits", range(1, 9))
def test_linear_order_is_a_little_endian_bit_stream(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 40), dtype=torch.uint8)
    stream = pack_codes(codes, bits)
    assert stream.shape == (5, 5 * bits)
    assert torch.equal(unpack_codes(stream, bits), codes)
    for row, packed in zip(codes.tolist(), stream, strict=True):
        number = sum(code << (bits * i) for i, code in enumerate(row))
        assert bytes(packed.tolist()) == number.to_bytes(5 * bits, "little")


def channel_major(plane: Plane) -> np.ndarray:
    """Another order for the tests: all tokens of a channel together."""
    bits = np.arange(plane.rows * plane.cols * plane.bits).reshape(plane.rows, plane.cols, plane.bits)
    return bits.swapaxes(0, 1).reshape(-1)


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_repack_is_exact(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layout.ORDERS, "channel_major", channel_major)
    packed = parse(f"rotated:bits={bits}").k.encode(sample(80))
    other = repack(packed, "channel_major")
    assert not torch.equal(other.data, packed.data)
    assert torch.equal(repack(other, "linear").data, packed.data)
    plane = other.layout.plane("codes")
    moved = unpack_codes(other.plane("codes"), bits).unflatten(-1, (plane.cols, plane.rows)).mT
    assert torch.equal(moved, read_codes(packed))
    with pytest.raises(ValueError, match="linear"):
        read_codes(other)


def test_unknown_order_is_refused() -> None:
    with pytest.raises(SpecError, match="spiral"):
        repack(parse("rotated:bits=4").k.encode(sample(64)), "spiral")


def test_log8_rounds_to_the_nearest_step() -> None:
    x = torch.logspace(-3, 2.5, 4001, dtype=torch.float64).float()
    error = (torch.log2(log8_values(log8_codes(x)).double()) - torch.log2(x.double())).abs().max()
    assert error <= 0.5 / 12 + 1e-6
    assert log8_codes(torch.tensor([0.0, 1e-4, 2e-4, 1e9])).tolist() == [0, 0, 1, 255]  # 2^-11.9 is 2.6e-4


@pytest.mark.parametrize("d", [0, 4, 12, 100])
def test_head_dim_must_end_on_a_byte(d: int) -> None:
    with pytest.raises(SpecError, match=f"head_dim {d}"):
        parse("rotated:bits=4").k.layout(d)


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_words_of_a_trellis_end_with_its_states(bits: int, side: str) -> None:
    """Joined from the highest word on, a token's words are its codes as one number; a state is eight bits of it."""
    codes = torch.randint(0, 2**bits, (1, BLOCK, 96), dtype=torch.uint8)
    plain = Layout(96, (Plane("codes", BLOCK, 96, bits),))
    stored = repack(Packed.assemble(plain, {"codes": pack_codes(codes.flatten(-2), bits)}), f"trellis_{side}")
    words = stored.plane("codes").numpy().view(np.uint32)
    fours = words.reshape(16, -1, 4).transpose(0, 2, 1)
    words = words.reshape(-1, BLOCK).T if side == "k" else fours.reshape(BLOCK, -1)
    for token in (0, 5, 63):
        stream = int("".join(f"{word:032b}" for word in words[token]), 2)
        states = [stream >> bits * (95 - i) & 255 for i in range(96)]
        assert states == walk(codes[0, token], bits).tolist()
