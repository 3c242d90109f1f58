"""Writes `codecs/vq.safetensors`, the universal books of `vq`: `python tests/make_vq.py`. They are part of the format.

k-means on vectors of a standard normal; the second stage on what the first leaves. What tokens look like once they
are rotated and brought to variance 1.
"""

import sys

import torch

from tersekv.calibrate.kmeans import kmeans, nearest
from tersekv.codecs.books import UNIVERSAL, Books
from tersekv.codecs.vq import SHAPES

SAMPLES, ROUNDS, STAGES = 400_000, 40, 2

books = {}
for dim, index in sorted(SHAPES):
    left = torch.randn(1, SAMPLES, dim, generator=torch.Generator().manual_seed(1000 * dim + index))
    for stage in range(STAGES):
        even = torch.ones(1, SAMPLES)
        table = kmeans(left, even, 2**index, ROUNDS, seed=stage).half()
        left = left - nearest(left, table.float())
        print(f"dim={dim} index={index} stage {stage}: {left.square().mean():.4f}", file=sys.stderr)
        books[f"{dim}.{index}.{stage}"] = table[None]
Books("", {"samples": SAMPLES, "rounds": ROUNDS, "density": "standard normal"}, books).save(UNIVERSAL)
