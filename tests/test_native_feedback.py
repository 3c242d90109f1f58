"""Error feedback in C++ against `feedback._in_turn`: the same codes, for every instruction set that runs here."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tersekv.codebook import lloyd_max, table
from tersekv.codecs.rotated import Rotated
from tersekv.errors import InputError
from tersekv.layout import BLOCK
from tersekv.ops import feedback, native, native_encoding
from tersekv.ops.feedback import Nearest
from tersekv.spec import parse_codec

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=native.missing() or "")

ISAS = [name for name, runs, _ in native.isas() if runs] if native.missing() is None else []
HEAD_DIMS = (16, 64, 80, 96, 128, 256, 512)


def asked(d: int, *lead: int) -> Tensor:
    """What queries ask for that look along few directions."""
    q = torch.randn(*lead, 200, 4) @ torch.randn(4, d) + 0.3 * torch.randn(*lead, 200, d)
    return feedback.prepared((q.mT @ q).double(), 1)


def hard(d: int, thresholds: np.ndarray) -> Tensor:
    """(blocks, BLOCK, d): values on and beside thresholds, zeros of both signs, what is not finite, what overflows."""
    on = torch.tensor([0.0, *thresholds.tolist()])
    beside = torch.cat([on, torch.nextafter(on, on + 1), torch.nextafter(on, on - 1)])
    signed = torch.cat([beside, -beside])
    edges = signed[torch.arange(BLOCK * d) % len(signed)].view(BLOCK, d)
    odd = torch.randn(4, BLOCK, d)
    for block, value in zip(odd, (torch.nan, torch.inf, -torch.inf, 3e38), strict=True):
        block[::3, 1], block[1::3, d // 2], block[2::3, -1] = value, value, value
    return torch.stack([edges, torch.zeros(BLOCK, d), -torch.zeros(BLOCK, d), 1e-40 * torch.randn(BLOCK, d), *odd])


def assert_same(z: Tensor, passed: Tensor, coder: Nearest, isas: list[str]) -> None:
    want = feedback._in_turn(z, passed[(None,) * (z.ndim - passed.ndim)], coder)[0]
    assert native_encoding.steers(z)
    for isa in isas:
        got = native_encoding.codes(z, passed, coder.thresholds, coder.table, isa)
        assert torch.equal(got, want), f"{isa}: {(got != want).sum()} of {got.numel()} codes differ"


def nearest(bits: int, d: int) -> Nearest:
    return Nearest(lloyd_max(bits, d)[1], torch.from_numpy(table(bits, d)))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_the_codes_of_the_reference(d: int, bits: int) -> None:
    coder, own = nearest(bits, d), asked(d, 3, 1).float().triu(1)
    own[2] = 0  # values meet thresholds as they are
    blocks = torch.cat([torch.randn(1, BLOCK, d), hard(d, coder.thresholds)])
    assert_same(blocks.expand(3, -1, -1, -1), own, coder, ISAS)


@pytest.mark.parametrize("isa", ISAS)
def test_any_stride_and_one_matrix_or_many(isa: str) -> None:
    d, coder = 96, nearest(3, 96)
    inside = torch.randn(2, 3 * BLOCK, 5, 3 * d)[..., d : 2 * d].transpose(1, 2).unflatten(2, (3, BLOCK))
    every = torch.randn(2, 5, 3, 2 * BLOCK, 2 * d)[..., ::2, ::2]  # neither tokens nor channels are neighbours
    one, many, each = (asked(d, *lead).float().triu(1) for lead in ((), (2, 5, 1), (2, 5, 3)))
    for z in (inside, every, inside[:, :, :0]):
        for passed in (one, many[:1], each[:, :, : z.shape[2]].mT.contiguous().mT):
            assert_same(z, passed, coder, [isa])
    assert_same(inside[0, 0, 0], one, coder, [isa])


def test_threads_change_nothing() -> None:
    coder, z, passed = nearest(2, 64), torch.randn(37, BLOCK, 64), asked(64).float().triu(1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = native_encoding.codes(z, passed, coder.thresholds, coder.table)
        torch.set_num_threads(5)
        assert torch.equal(native_encoding.codes(z, passed, coder.thresholds, coder.table), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bits", range(1, 9))
def test_keys_are_encoded_by_native_code_to_the_same_bytes(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, x = Rotated(bits=bits, mean="block"), torch.randn(2, 3, BLOCK, 80)
    x[0, 0, 5:9] = 0
    matrices, in_turn = asked(80, 2, 1), feedback._in_turn
    monkeypatch.setattr(feedback, "_in_turn", None)
    got = codec.encode_for(x, matrices)
    monkeypatch.setattr(feedback, "_in_turn", in_turn)
    monkeypatch.setattr(native_encoding, "steers", lambda _: False)
    assert torch.equal(got.data, codec.encode_for(x, matrices).data)


@pytest.mark.parametrize(
    ("text", "shape"), [("rotated:bits=2", (32, 64)), ("rotated:bits=2", (BLOCK, 40)), ("trellis:bits=2", (BLOCK, 64))]
)
def test_what_has_no_native_form_runs_on_the_reference(text: str, shape: tuple[int, int]) -> None:
    codec, z = parse_codec(text, "k"), torch.randn(3, *shape)
    assert isinstance(codec, Rotated)
    coder, passed = codec.coder(shape[1], z.device), asked(shape[1])
    codes, _ = feedback.steered(z, passed, coder)
    assert torch.equal(codes, feedback._in_turn(z, passed.float().triu(1)[None], coder)[0])


def test_what_it_cannot_take_is_said() -> None:
    coder, z, passed = nearest(2, 64), torch.randn(3, BLOCK, 64), torch.zeros(64, 64)
    for wrong, said in (
        (z[:, :32], "Blocks of 32 tokens"),
        (torch.randn(3, BLOCK, 40), "head_dim 40: the encoders take multiples of 16"),
        (z.half(), "must be fp32"),
    ):
        with pytest.raises(InputError, match=said):
            native_encoding.codes(wrong, torch.zeros(wrong.shape[-1], wrong.shape[-1]), coder.thresholds, coder.table)
    for thresholds, entries in (
        (coder.thresholds, coder.table[1:]),
        (coder.thresholds[:0], coder.table),
        (np.zeros(255, np.float32), torch.zeros(512)),
    ):
        with pytest.raises(InputError, match="an entry for each code"):
            native_encoding.codes(z, passed, thresholds, entries)
    for thresholds in (-coder.thresholds, np.float32(np.inf) * coder.thresholds, np.float32(np.nan) * coder.thresholds):
        with pytest.raises(InputError, match="must be positive and ascend"):
            native_encoding.codes(z, passed, thresholds, coder.table)


def test_arrays_that_do_not_fit_are_refused_before_they_are_read() -> None:
    z, matrices, out = torch.zeros(3, BLOCK, 64), torch.zeros(3, 64, 64), torch.zeros(3, BLOCK, 64, dtype=torch.uint8)
    for arrays in (
        (z, matrices[:2], out),
        (z, matrices, out[:2]),
        (z, matrices[:, :63], out),
        (z, matrices[..., :48], out),
        (z, matrices.mT, out),
        (z, matrices[0], out),
        (z, matrices.double(), out),
        (z[..., ::2], matrices, out),
        (z, matrices, out.mT.contiguous().mT),
    ):
        with pytest.raises(ValueError, match=r"Dim|dims|fp32|contiguous|neighbours"):
            native._native.steer(
                *(native.array(x) for x in arrays[:2]), [1.0], [0.0] * 4, native.array(arrays[2]), "", 1
            )
