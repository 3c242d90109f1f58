"""Native attention gives the same bits for any number of threads, in two callers at once, and after a fork."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from native_cases import Case, make_case
from test_native_attend import RAGGED, RUN, SIDES
from torch import Tensor

from tersekv.ops import native
from tersekv.spec import parse
from tersekv.store import Store

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def attended(case: Case, isa: str = "") -> tuple[Tensor, ...]:
    routes = (native.attend_pages(case.q, case.native, case.scale, exact, isa) for exact in (True, False))
    return tuple(x for route in routes for x in route)


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("isa", RUN)
@pytest.mark.parametrize("sides", ["2/3 bits, mean", "groups, as KIVI", "channels first", "vq, own books"])
@pytest.mark.parametrize(("n", "lengths"), [(1, [[3000, 1025], [1, 1024]]), (40, [[130, 64]]), (1, RAGGED)])
def test_any_number_of_threads(n: int, lengths: list[list[int]], sides: str, isa: str) -> None:
    case = make_case(*SIDES[sides], 64, 4, n, lengths)
    results = []
    for threads in (1, 2, 3, 8, 1):
        torch.set_num_threads(threads)
        results.append(attended(case, isa))
    assert all(same(results[0], other) for other in results[1:])


def test_two_callers_at_once() -> None:
    """One of them has the worker threads at any time, the other one works alone."""
    cases = [make_case(*SIDES["2/3 bits, mean"], 64, 4, 1, [[2000, 1500]]) for _ in range(2)]
    torch.set_num_threads(3)
    alone = [attended(case) for case in cases]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda i: [attended(cases[i]) for _ in range(50)], (0, 1)))
    for right, results in zip(alone, both, strict=True):
        assert all(same(right, result) for result in results)


def decoded_texts(seed: int) -> list[Tensor]:
    """A cache that takes a chunk and then tokens one by one, blocks becoming due meanwhile."""
    generator = torch.Generator().manual_seed(seed)
    store = Store(parse("rotated:bits=3"), 1, 2, 64, torch.float32, torch.device("cpu"))
    outputs = []
    for n in (300, *[1] * 80):
        q, k, v = (torch.randn(1, h, n, 64, generator=generator) for h in (4, 2, 2))
        outputs.append(store.extend(q, k, v, np.zeros(1, dtype=np.int64), 0.125))
    return outputs


def test_two_caches_on_two_threads() -> None:
    torch.set_num_threads(2)
    alone = [decoded_texts(seed) for seed in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(decoded_texts, (0, 1)))
    for right, result in zip(alone, both, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(right, result, strict=True))


def _in_child(case: Case, right: tuple[Tensor, ...]) -> None:
    for _ in range(3):
        assert same(attended(case), right)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_attends() -> None:
    """It has none of its parent's threads."""
    torch.set_num_threads(2)
    case = make_case(*SIDES["1/2 bits"], 64, 2, 1, [[3000]])
    right = attended(case)
    child = get_context("fork").Process(target=_in_child, args=(case, right))
    child.start()
    child.join(20)
    ended = child.exitcode
    child.kill()
    assert ended == 0
