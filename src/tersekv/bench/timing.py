"""Fair times: every contestant in turn, none finding its data in a cache, and ratios of neighbours in time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from tersekv.errors import TersekvError
from tersekv.ops import native

# Bytes read between two calls: over ten times the share of the last-level cache of any processor we met. Where that
# cache has 480 MiB, for all of a machine's guests, 3 GiB made no call slower than 256 MiB did.
FLUSH = 512 * 2**20
STREAMS = (1, 8, 12, 16)  # places read at a time; which is fastest depends on the processor's prefetchers


class Cold:
    """Empties the caches by reading other memory, and so measures how fast this machine reads meanwhile."""

    def __init__(self, threads: int, size: int = FLUSH) -> None:
        if why := native.missing():
            raise TersekvError(f"The native kernels are needed to measure speed. {why}")
        self.threads, self.data = threads, torch.ones(size, dtype=torch.uint8)
        self.seconds: list[float] = []
        self.streams = min(STREAMS, key=lambda streams: median(self._read(streams) for _ in range(5)))

    def _read(self, streams: int) -> float:
        began = perf_counter()
        native.read_memory(self.data, streams, self.threads)
        return perf_counter() - began

    def __call__(self) -> None:
        self.seconds.append(self._read(self.streams))

    @property
    def gb_per_second(self) -> float:
        """Of every read since the last look, the median."""
        seconds, self.seconds = median(self.seconds), []
        return len(self.data) / seconds / 1e9


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch, and with it our kernels, on `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def take_turns(
    contestants: dict[str, Callable[[], Any]],
    rounds: int,
    prepare: Callable[[str], Any],
    report: Callable[[float], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each contestant, one a round; `prepare(name)` runs before every call and is not timed.

    The order is drawn anew for each round: whoever followed llama.cpp took a third longer, so nobody may do so always.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    drawn = Random(0)
    for number in range(rounds):
        for name in drawn.sample(list(contestants), len(contestants)):
            prepare(name)
            began = perf_counter()
            contestants[name]()
            seconds[name].append(perf_counter() - began)
        if report:
            report((number + 1) / rounds)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median and 20th to 80th percentile, in six digits: more are noise, and a record holds thousands of them."""
    low, high = np.percentile(values, [20, 80])
    return {name: float(f"{x:.6g}") for name, x in (("median", median(values)), ("p20", low), ("p80", high))}


def paired(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times as long `slow` takes, from ratios within one round each."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])
