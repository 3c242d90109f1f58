"""Lloyd-Max codebooks, computed here and nowhere copied. NumPy only; cached, deterministic.

A codebook for `bits` bits is the `2**bits`-level quantiser of least squared error for one density: the standard
normal, or the marginal of a coordinate of a random unit vector in `d` dimensions times sqrt(d), whose density is
proportional to (1 - z^2/d)^((d-3)/2) (TurboQuant, arXiv 2504.19874, Lemma 1). Both are even, so only the positive
half is iterated: Lloyd 1982, eq. 4 and 5 (centroid = conditional mean, threshold = midpoint).
"""

from dataclasses import dataclass
from functools import lru_cache
from math import erf, sqrt
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Density:
    """An even density on a fine grid of z >= 0: its mass and first moment from 0 to each grid point."""

    z: np.ndarray
    mass: np.ndarray
    moment: np.ndarray

    def between(self, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mass and first moment of each interval between neighbouring `edges`."""
        mass, moment = np.interp(edges, self.z, self.mass), np.interp(edges, self.z, self.moment)
        return np.diff(mass), np.diff(moment)


@lru_cache
def _density(d: int | None) -> Density:
    # 2**18 points: the linear interpolation error, about (z step)^2 / 8, stays below 1e-10.
    z = np.linspace(0.0, 12.0 if d is None else sqrt(d), 2**18 + 1)
    if d is None:
        mass = 0.5 * np.array([erf(x / sqrt(2)) for x in z])
        moment = (1 - np.exp(-z * z / 2)) / sqrt(2 * np.pi)
        return Density(z, mass, moment)
    inside = np.clip(1 - z * z / d, 0, None)
    density = inside ** ((d - 3) / 2)
    steps = (density[1:] + density[:-1]) / 2 * np.diff(z)
    mass = np.concatenate([[0.0], np.cumsum(steps)])
    moment = d / (d - 1) * (1 - inside ** ((d - 1) / 2))
    return Density(z, 0.5 * mass / mass[-1], 0.5 * moment / mass[-1])


@lru_cache
def lloyd_max(bits: int, d: int | None = None, tolerance: float = 1e-9) -> tuple[np.ndarray, np.ndarray]:
    """Positive centroids and the thresholds between them, fp32, `2**(bits-1)` and one fewer.

    `d` None is the standard normal; otherwise the marginal of a rotated unit vector times sqrt(d).
    The full table mirrors them: see `table`. Thresholds are fp32 roundings of the fp64 midpoints.
    """
    density, half = _density(d), 2 ** (bits - 1)
    # Start from the asymptotically optimal companding (density^(1/3)): plain quantiles need 100 times more rounds.
    start = [sqrt(3) * NormalDist().inv_cdf(0.5 + (i + 0.5) / (2 * half)) for i in range(half)]
    centroids = np.minimum(start, 0.999 * density.z[-1])
    for _ in range(20_000):
        edges = np.concatenate([[0.0], (centroids[1:] + centroids[:-1]) / 2, [density.z[-1]]])
        mass, moment = density.between(edges)
        moved = np.where(mass > 0, moment / np.maximum(mass, 1e-300), centroids)
        done = np.abs(moved - centroids).max() < tolerance
        centroids = moved
        if done:
            break
    thresholds = (centroids[1:] + centroids[:-1]) / 2
    return centroids.astype(np.float32), thresholds.astype(np.float32)


def table(bits: int, d: int | None = None) -> np.ndarray:
    """All `2**bits` centroids in ascending order, fp32: what code i stands for."""
    centroids, _ = lloyd_max(bits, d)
    return np.concatenate([-centroids[::-1], centroids])


def distortion(bits: int, d: int | None = None) -> float:
    """Mean squared error of the codebook on its own density (variance 1)."""
    centroids, thresholds = (x.astype(np.float64) for x in lloyd_max(bits, d))
    density = _density(d)
    mass, moment = density.between(np.concatenate([[0.0], thresholds, [density.z[-1]]]))
    return 1 - 2 * float((2 * centroids * moment - centroids**2 * mass).sum())
