"""`tersekv.edge` against the torch codec: equal bytes, except where the order of a sum decides a rounding."""

import subprocess
import sys
from math import sqrt

import numpy as np
import pytest
import torch

from tersekv import edge
from tersekv.codebook import distortion, lloyd_max
from tersekv.codecs.lloydmax import LloydMax
from tersekv.errors import InputError, SpecError
from tersekv.layout import BLOCK
from tersekv.ops.lookup import nearest
from tersekv.ops.planes import read, read_codes
from tersekv.ops.sums import channel_sum, root, unit_scale
from tersekv.packed import Packed

# Two fp32 sums of 256 squares differ by a random walk of some 30 half ulps; the root halves the difference.
NORM_ULPS = 4
# z has two more roundings, and an ulp is worth up to twice as much at one end of its binade as at the other.
Z_ULPS = 2 * (NORM_ULPS + 2)


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def near_thresholds(n: int, d: int, bits: int) -> np.ndarray:
    """Gaussian vectors of which channel 1 normalises to a threshold, give or take three ulps."""
    x, thresholds = gaussian(n, d, seed=bits), lloyd_max(bits)[1].astype(np.float64)
    t = np.resize(thresholds[thresholds < 0.9 * sqrt(d)], n)
    rest = (np.delete(x, 1, axis=1).astype(np.float64) ** 2).sum(1)
    planted = (t * np.sqrt(rest / (d - t * t))).astype(np.float32)
    planted += np.resize(np.arange(-3, 4), n) * np.spacing(planted)
    x[:, 1] = planted * np.resize([1, 1, -1], n)
    return x


def reference(x: np.ndarray, bits: int, norm: str) -> Packed:
    rows = np.zeros((-(-(x.size // x.shape[-1]) // BLOCK) * BLOCK, x.shape[-1]), np.float32)
    rows[: x.size // x.shape[-1]] = x.reshape(-1, x.shape[-1])
    return LloydMax(bits, norm).encode(torch.from_numpy(rows).view(-1, BLOCK, x.shape[-1]))


def assert_same(x: np.ndarray, bits: int, norm: str = "fp16") -> int:
    """Equal bytes but for the rule of the module's docstring; the number of codes that differ."""
    got, want = edge.encode(x, bits, norm), reference(x, bits, norm)
    assert (got.layout, got.data.shape, got.shape) == (want.layout, want.data.shape, x.shape)
    if np.array_equal(got.data, want.data.numpy()):
        return 0
    mine = Packed(want.layout, torch.from_numpy(got.data))
    codes, expected = (read_codes(p).reshape(-1, x.shape[-1]).numpy().astype(int) for p in (mine, want))
    norms = read(mine, "scale").reshape(-1).numpy()
    rows = torch.from_numpy(x.reshape(-1, x.shape[-1])).float()
    exact = root(channel_sum(rows * rows)).numpy()
    kind, slack = edge.NORMS[norm], NORM_ULPS * np.spacing(exact)
    assert ((exact - slack).astype(kind) <= norms[: len(exact)]).all()
    assert (norms[: len(exact)] <= (exact + slack).astype(kind)).all()
    row, channel = np.nonzero(codes != expected)
    a, b = codes[row, channel], expected[row, channel]
    assert (abs(a - b) == 1).all()
    thresholds = lloyd_max(bits)[1]
    between = np.concatenate([-thresholds[::-1], np.zeros(1, np.float32), thresholds])[np.minimum(a, b)]
    z = rows.numpy()[row, channel] * (np.float32(sqrt(x.shape[-1])) / exact[row])
    assert (abs(z - between) <= Z_ULPS * np.spacing(abs(between))).all()
    return len(row)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("d", [8, 64, 80, 96, 128, 256])
def test_same_bytes_as_the_torch_codec(bits, d):
    for n in (0, 1, 63, 64, 65, 1000):
        assert_same(gaussian(n, d, seed=n), bits, "fp32" if n == 65 else "fp16")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_only_values_at_a_threshold_differ(bits):
    differing = assert_same(near_thresholds(20_000, 128, bits), bits, "fp32")
    assert differing > 0  # otherwise the rule was not put to the test


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_follow_from_the_stored_norm_bit_for_bit(bits):
    x = near_thresholds(2000 // BLOCK * BLOCK, 128, bits) if bits > 1 else gaussian(1984, 128)
    got = edge.encode(x, bits, "fp32")
    packed = Packed(got.layout, torch.from_numpy(got.data))
    inverse = unit_scale(read(packed, "scale"), 128)
    expected = nearest(torch.from_numpy(x).view(-1, BLOCK, 128) * inverse, lloyd_max(bits)[1])
    assert torch.equal(read_codes(packed), expected)


@pytest.mark.parametrize("bits", [1, 3, 4, 5])
def test_cruel_inputs(bits):
    x = gaussian(200, 96)
    x[[0, 70, 199]] = 0
    x[65:69] *= 1e-6
    x[:, 5] *= 1000
    x[3, 7] = -0.0
    assert_same(x, bits)
    assert_same(1000 * x, bits)  # beyond fp16: the norm saturates
    assert_same(gaussian(2, 3, 70, 64), bits)
    assert_same(gaussian(70, 3, 64).transpose(1, 0, 2), bits)
    assert_same(gaussian(300, 128)[::3, ::2], bits)
    assert_same(gaussian(100, 64).astype(np.float16), bits)
    assert_same(gaussian(64), bits)


def test_a_norm_beyond_fp32_and_one_below_it_encode_as_the_torch_codec_does():
    x = gaussian(64, 64)
    x[1] *= 1e30
    x[2] *= 1e-30
    np.testing.assert_array_equal(edge.encode(x).data[0], reference(x, 3, "fp16").data[0].numpy())


def test_any_chunking_gives_the_same_bytes(monkeypatch):
    x = gaussian(1000, 128)
    x[500] = 0
    whole = edge.encode(x)
    restored = edge.decode(whole)
    monkeypatch.setattr(edge, "CHUNK", 3 * BLOCK * 128)
    np.testing.assert_array_equal(edge.encode(x).data, whole.data)
    np.testing.assert_array_equal(edge.decode(whole), restored)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("norm", ["fp16", "fp32"])
def test_decodes_to_the_same_bits_as_the_torch_codec(bits, norm):
    x = gaussian(2, 65, 80)
    packed = edge.encode(x, bits, norm)
    want = LloydMax(bits, norm).decode(Packed(packed.layout, torch.from_numpy(packed.data)))
    got = edge.decode(packed)
    assert got.shape == x.shape
    np.testing.assert_array_equal(got.reshape(-1, 80), want.view(-1, 80)[:130].numpy())


def test_cosine_of_gaussian_vectors_is_what_the_codebook_predicts():
    """<z, q> = <q, q> for a Lloyd-Max code, so it is sqrt(1 - D); finite d shifts that by less than 1 / d."""
    d, n = 4096, 256
    x = gaussian(n, d)
    cosines = edge.cosine(x, edge.decode(edge.encode(x)))
    assert abs(cosines.mean() - sqrt(1 - distortion(3))) < 1 / d + 4 * cosines.std() / sqrt(n)
    assert sqrt(1 - distortion(3)) == pytest.approx(0.98257, abs=1e-5)


def test_cosine_of_zero_vectors():
    zero, one = np.zeros((1, 8), np.float32), np.ones((1, 8), np.float32)
    assert [edge.cosine(a, b)[0] for a, b in ((zero, zero), (zero, one), (one, -one))] == [1, 0, -1]


def test_bytes_held():
    packed = edge.encode(gaussian(2, 64, 128))
    assert packed.nbytes == packed.data.nbytes == 2 * 64 * 50
    assert packed.ratio == pytest.approx(5.12)
    assert edge.encode(gaussian(32, 128)).ratio == pytest.approx(2.56)  # half a block costs a whole one
    assert edge.encode(gaussian(0, 128)).ratio == 0


def test_runs_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np; from tersekv import edge\n"
        "x = np.ones((3, 64), np.float32); assert edge.cosine(x, edge.decode(edge.encode(x))).min() > 0.99\n"
        "try: edge.encode(x.tolist())\n"
        "except edge.InputError as error: assert 'x is list. Pass' in str(error)\n"
        "else: raise SystemExit('a list was encoded')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(bad):
    x = gaussian(2, 100, 64)
    x[1, 40, 9] = bad
    with pytest.raises(InputError, match=rf"x\[1, 40, 9\] is {bad}"):
        edge.encode(x)


def test_arguments_that_do_not_exist():
    x = gaussian(4, 64)
    with pytest.raises(InputError, match="float64"):
        edge.encode(x.astype(np.float64))
    with pytest.raises(InputError, match="single number"):
        edge.encode(np.array(1, np.float32))
    for options in ({"bits": 0}, {"bits": 9}, {"norm": "fp8"}):
        with pytest.raises(SpecError):
            edge.encode(x, **options)
    with pytest.raises(SpecError, match="head_dim 12"):
        edge.encode(gaussian(4, 12))
