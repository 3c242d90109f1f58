"""Codebooks against the published constants (methods of ManthanQuant, TurboQuant; Max 1960)."""

import numpy as np
import pytest

from tersekv.codebook import distortion, lloyd_max, table

# Positive centroids and mean squared error of the optimal quantiser of N(0,1).
PUBLISHED = {
    1: ([0.7979], 0.363380),
    2: ([0.4528, 1.5104], 0.117482),
    3: ([0.2451, 0.7560, 1.3439, 2.1519], 0.034548),
    4: ([0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326], 0.009501),
}


@pytest.mark.parametrize("bits", PUBLISHED)
def test_normal_codebook_is_the_published_one(bits: int) -> None:
    centroids, error = PUBLISHED[bits]
    assert lloyd_max(bits)[0] == pytest.approx(centroids, abs=6e-5)
    assert distortion(bits) == pytest.approx(error, abs=2e-6)


def test_three_bit_cosine() -> None:
    assert np.sqrt(1 - distortion(3)) == pytest.approx(0.98257, abs=1e-5)


@pytest.mark.parametrize(
    ("d", "edge", "error"), [(64, 2.11131, 0.0334), (128, 2.13147, 0.0340), (256, 2.14167, 0.0343)]
)
def test_rotated_marginal_shrinks_the_edge(d: int, edge: float, error: float) -> None:
    """Edges from adaptive quadrature in 15 digits, outside this project."""
    assert lloyd_max(3, d)[0][-1] == pytest.approx(edge, abs=1e-5)
    assert distortion(3, d) == pytest.approx(error, abs=5e-5)


@pytest.mark.parametrize("d", [None, 64])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_codebook_is_a_fixed_point(bits: int, d: int | None) -> None:
    """Lloyd's two conditions, checked by sampling-free numerical integration of the density."""
    values = table(bits, d).astype(np.float64)
    assert len(values) == 2**bits and (np.diff(values) > 0).all() and (values == -values[::-1]).all()
    limit = 12.0 if d is None else np.sqrt(d)
    z = np.linspace(-limit, limit, 2_000_001)
    density = np.exp(-z * z / 2) if d is None else np.clip(1 - z * z / d, 0, None) ** ((d - 3) / 2)
    cell = np.searchsorted((values[1:] + values[:-1]) / 2, z)
    means = np.bincount(cell, density * z, 2**bits) / np.bincount(cell, density, 2**bits)
    spacing = np.diff(values).min()
    assert np.abs(means - values).max() < 0.02 * spacing
