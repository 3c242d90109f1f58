"""Tables on the 8-bit integers that matrix instructions multiply: entry i is near `middle + step * level[i]`."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

LARGEST = 127
CANDIDATES = 2**14  # steps that are tried: some bring all the levels near an integer at once


@dataclass(frozen=True)
class Levels:
    """What the kernels know of a table: signed bytes, or for 1 bit the bit itself."""

    level: tuple[int, ...]
    step: float
    middle: float

    @property
    def centre(self) -> float:
        """What is added to `step * level` so that rounded weights multiply numbers around 0: bits are 0 and 1."""
        return -self.step / 2 if len(self.level) == 2 else 0.0

    def error(self, table: tuple[float, ...]) -> float:
        """The largest distance of an entry from its level."""
        near = self.middle + self.step * np.array(self.level)
        return float(np.abs(near - np.array(table)).max())


@lru_cache
def levels(table: tuple[float, ...]) -> Levels:
    """Of 2 entries: bits. Of 256: code - 128 and equal steps. Of others: the step with the least squared error.

    An odd-symmetric table, such as Lloyd-Max's, has middle 0. Equal steps are represented exactly. Of 16, the kernels
    tell the lower eight by their sign, and add one to the others: those are below 0, and these from 0 to 126.
    """
    entries = np.array(table, dtype=np.float64)
    if len(table) == 2:
        return Levels((0, 1), float(entries[1] - entries[0]), float(entries[0]))
    if len(table) == 256:
        step = float(entries[-1] - entries[0]) / 255
        return Levels(tuple(range(-128, 128)), step, float(entries[0]) + 128 * step)
    halves = len(table) == 16
    middle = float(entries[7] + entries[8] if halves else entries.max() + entries.min()) / 2
    centred, largest = entries - middle, LARGEST - halves
    tried = np.linspace(largest / 2, largest + 0.49, CANDIDATES)[:, None]
    level = np.rint(centred * (tried / np.abs(centred).max()))
    if halves:
        level[:, :8], level[:, 8:] = np.minimum(level[:, :8], -1), np.maximum(level[:, 8:], 0)
    step = (level @ centred) / (level**2).sum(-1)
    best = int((((step[:, None] * level) - centred) ** 2).sum(-1).argmin())
    return Levels(tuple(int(n) for n in level[best]), float(step[best]), middle)


@lru_cache
def listed(table: tuple[float, ...]) -> bool:
    """Whether a table has to be looked up entry by entry: 256 of unequal steps, which no byte stands for."""
    found = levels(table)
    return len(table) == 256 and found.error(table) > found.step / 100


def packed(level: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The first 16 levels as bytes of four words, zeros after the last one."""
    content = np.zeros(16, dtype=np.int8)
    content[: min(len(level), 16)] = level[:16]
    words = content.view(np.uint32).tolist()
    return words[0], words[1], words[2], words[3]
