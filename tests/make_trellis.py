"""Prints the tables of `codecs/trellis.py`: `python tests/make_trellis.py [BITS]`. They are part of the format.

Start: positive quantiles of the normal distribution in a random order, with random signs. Then rounds of the Viterbi
encoder over Gaussian vectors, each entry and its negative moving to the mean of what they were chosen for (Lloyd's
iteration, with the trellis in place of the table). Of several starts the best on other vectors stays.
"""

import sys
from statistics import NormalDist

import numpy as np
import torch

from tersekv.codecs.trellis import HALF
from tersekv.ops.trellis import STATES, Trellis, viterbi, walk

ROUNDS, STARTS, VECTORS, D = 200, 4, 3000, 128
FINE = 1 / 256  # entries move in finer steps than they have in the end


def recipe(table: torch.Tensor, half: float, bits: int) -> Trellis:
    odd = (2 * torch.floor(table / (2 * half)) + 1).clamp(-127 * HALF // half, 127 * HALF // half)
    return Trellis(tuple(map(int, odd.tolist())), half, bits)


def error(trellis: Trellis, x: torch.Tensor) -> float:
    states = walk(viterbi(x, trellis), trellis.bits).long()
    return float((torch.tensor(trellis.table)[states] - x).square().mean())


def design(bits: int, generator: torch.Generator) -> Trellis:
    half = STATES // 2
    quantiles = [0.95 * NormalDist().inv_cdf((i + 0.5) / STATES) for i in range(half, STATES)]
    signs = torch.randint(0, 2, (half,), generator=generator) * 2 - 1
    table = torch.tensor(quantiles)[torch.randperm(half, generator=generator)] * signs
    x = torch.randn(VECTORS, D, generator=generator)
    for _ in range(ROUNDS):
        states = walk(viterbi(x, recipe(table, FINE, bits)), bits).long().flatten()
        sign = torch.where(states < half, 1.0, -1.0).double()
        count = torch.bincount(states % half, minlength=half)
        total = torch.bincount(states % half, x.flatten() * sign, minlength=half)
        table = torch.where(count > 0, total / count.clamp(min=1), table).float()
    return recipe(table, HALF, bits)


def best(bits: int) -> Trellis:
    generator = torch.Generator().manual_seed(bits)
    other = torch.randn(4 * VECTORS, D, generator=generator)
    found = []
    for _ in range(STARTS):
        trellis = design(bits, generator)
        found.append((error(trellis, other), trellis))
        print(f"{bits} bits: {found[-1][0]:.5f}", file=sys.stderr)
    return min(found, key=lambda one: one[0])[1]


for width in map(int, sys.argv[1:] or "1234"):
    print(f"    {width}: (")
    text = np.array(best(width).odd, np.int8).tobytes().hex()
    for start in range(0, len(text), 104):
        print(f'        "{text[start : start + 104]}"')
    print("    ),")
