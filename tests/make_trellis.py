"""Prints the tables of `codecs/trellis.py`: `python tests/make_trellis.py`. They are part of the format.

Start: quantiles of the normal distribution in a random order. Then rounds of the Viterbi encoder over Gaussian vectors,
each entry moving to the mean of what it was chosen for (Lloyd's iteration, with the trellis in place of the table).
"""

import sys
from statistics import NormalDist

import numpy as np
import torch

from tersekv.ops.trellis import STATES, viterbi, walk

ROUNDS, VECTORS, D = 12, 4000, 64


def design(bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    quantiles = [0.95 * NormalDist().inv_cdf((i + 0.5) / STATES) for i in range(STATES)]
    table = torch.tensor(quantiles)[torch.randperm(STATES, generator=generator)]
    x = torch.randn(VECTORS, D, generator=generator)
    for step in range(ROUNDS):
        states = walk(viterbi(x, table, bits), bits).long()
        print(f"{bits} bits, round {step}: {(table[states] - x).square().mean():.5f}", file=sys.stderr)
        count = torch.bincount(states.flatten(), minlength=STATES)
        total = torch.bincount(states.flatten(), x.flatten().double(), minlength=STATES)
        table = torch.where(count > 0, total / count.clamp(min=1), table).float()
    return table


for bits in (1, 2, 3, 4):
    # Steps of 1/32 from -4 to 4, as integers of a byte.
    steps = (design(bits) * 32).round().clamp(-127, 127).to(torch.int8)
    print(f"    {bits}: (")
    text = np.asarray(steps).tobytes().hex()
    for start in range(0, len(text), 104):
        print(f'        "{text[start : start + 104]}"')
    print("    ),")
