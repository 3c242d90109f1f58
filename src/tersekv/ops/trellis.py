"""Codes of which each value depends on the last eight bits written: the recipe `trellis` and its encoder.

A bit-shift trellis (QTIP, arXiv 2406.11235, section 3.1): the state is the last 8 bits of a token's codes, starting
from 0, and the value is table[state]. Encoding finds the walk of least squared error (Viterbi); decoding is a look-up
by a sliding window of bits. Entries are odd multiples of a step, and the oldest bit is a sign: 128 of them are kept.
Errors are integers, so that every backend finds the same walk.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from tersekv.ops.planes import read, read_codes
from tersekv.packed import Packed

STATE_BITS = 8
STATES = 2**STATE_BITS
ROWS = 2048  # tokens at a time: their costs fit in a cache
UNREACHED = 2**30  # a cost above those of all walks


@dataclass(frozen=True)
class Trellis:
    """Plane "codes" holds `bits` a value; then as `grid`, with a scale a token and a zero a channel.

    `odd`: entries of the states 0..127 in units of `half`, odd integers -127..127. State s + 128 negates that of s.
    """

    odd: tuple[int, ...]
    half: float
    bits: int
    name = "trellis"

    @cached_property
    def table(self) -> tuple[float, ...]:
        return tuple(sign * odd * self.half for sign in (1, -1) for odd in self.odd)

    def values(self, packed: Packed) -> Float[Tensor, "*lead block d"]:
        states = walk(read_codes(packed), self.bits)
        x = torch.tensor(self.table, device=states.device)[states]
        scale, zero = read(packed, "scale"), read(packed, "channel_zero")
        x = x if scale is None else x * scale
        return x if zero is None else x + zero


def walk(codes: UInt8[Tensor, "*lead d"], bits: int) -> Int[Tensor, "*lead d"]:
    """The state at each value: the last 8 bits of the codes up to it, zeros before the first."""
    states, shifted = torch.zeros_like(codes, dtype=torch.int32), codes.int()
    for back in range(-(-STATE_BITS // bits)):
        states[..., back:] += shifted[..., : codes.shape[-1] - back] << back * bits
    return states % STATES


@dataclass(frozen=True)
class Onward:
    """Codes of a token some channels at a time, for `feedback.steered`: the best walk from the state that was reached.

    Eight channels and eight more to look at: a state has been forgotten after eight bits, which is at most as many.
    """

    recipe: Trellis
    step = 8
    ahead = 8

    def coded(self, w: Float[Tensor, "channels *lead"], state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        bits, rows = self.recipe.bits, _whole(w.flatten(1), self.recipe)
        before = torch.zeros(rows.shape[1], dtype=torch.int64, device=w.device) if state is None else state
        parts = zip(rows.split(ROWS, 1), before.split(ROWS), strict=True)
        codes = torch.cat([_viterbi(some, self.recipe, start) for some, start in parts], 1)[: self.step]
        states = walk(torch.cat((_last_codes(before, bits), codes)).mT, bits).mT[-len(codes) :]
        shape = (len(codes), *w.shape[1:])
        table = torch.tensor(self.recipe.table, device=w.device)
        return codes.view(shape), table[states].view(shape), states[-1].long()


def _last_codes(state: Int[Tensor, "rows"], bits: int) -> UInt8[Tensor, "n rows"]:
    """Codes that lead to a state from 0, oldest first."""
    count = -(-STATE_BITS // bits)
    shifts = torch.arange(count - 1, -1, -1, device=state.device)[:, None] * bits
    return ((state >> shifts) % 2**bits).to(torch.uint8)


def _whole(z: Tensor, recipe: Trellis) -> Tensor:
    """`w` of z = w * half / 2, rounded."""
    return (z * np.float32(2 / recipe.half).item()).round().int()


def viterbi(z: Float[Tensor, "*lead d"], recipe: Trellis) -> UInt8[Tensor, "*lead d"]:
    """Codes of the walk whose values are nearest to `z`. Of equal walks, the one with the lower older bits.

    With z = w * half / 2 and w rounded to an integer, (table - z)^2 is u^2 - u w in units of half^2, without z^2, which
    all walks have in common. |z| up to sqrt(d) keeps the sums in 31 bits.
    """
    rows = _whole(z.reshape(-1, z.shape[-1]), recipe)
    codes = [_viterbi(some.mT, recipe).mT for some in rows.split(ROWS)]
    return torch.cat(codes).view(z.shape) if codes else torch.empty_like(z, dtype=torch.uint8)


def _viterbi(w: Tensor, recipe: Trellis, start: Tensor | int = 0) -> Tensor:
    """`w` (d, rows). A state's predecessors differ in the bits that fall out, the state's fork: costs' leading index.

    A cost is a multiple of `forks`, plus the fork of its state: the least of costs names its fork, the lower of equals.
    """
    d, rows = w.shape
    forks, heads = 2**recipe.bits, STATES // 2**recipe.bits
    odd = torch.tensor([*recipe.odd, *(-u for u in recipe.odd)], dtype=torch.int32, device=w.device)[:, None]
    fork = torch.arange(STATES, dtype=torch.int32, device=w.device)[:, None] // heads
    here = forks * odd * odd + fork
    cost = torch.full((STATES, rows), UNREACHED, dtype=torch.int32, device=w.device)
    cost[start, torch.arange(rows, device=w.device)] = fork[start, 0]
    fallen = torch.empty(d, heads, rows, dtype=torch.uint8, device=w.device)
    for i in range(d):
        best = cost.view(forks, heads, rows).amin(0)
        fallen[i] = best & (forks - 1)
        added = (here - forks * odd * w[i]).view(heads, forks, rows)
        cost = ((best & -forks)[:, None] + added).view(STATES, rows)
    return _traced(cost, fallen, recipe.bits)


def _traced(cost: Tensor, fallen: Tensor, bits: int) -> Tensor:
    """The codes (d, rows) of the cheapest walk, read from its end."""
    d, heads, rows = fallen.shape
    state = _lowest(cost)
    codes = torch.empty(d, rows, dtype=torch.uint8, device=cost.device)
    for i in range(d - 1, -1, -1):
        codes[i] = (state % 2**bits).to(torch.uint8)
        head = state >> bits
        state = head + heads * fallen[i].gather(0, head[None])[0].long()
    return codes


def _lowest(cost: Tensor) -> Tensor:
    """Index of the smallest of each column, the first of equals."""
    return (cost == cost.amin(0)).to(torch.uint8).argmax(0)
