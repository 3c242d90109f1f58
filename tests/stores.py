"""Stores of tokens without a model: what the tests of policies share."""

import numpy as np
import torch
from torch import Tensor

from tersekv.spec import parse
from tersekv.store import Store
from tersekv.tiers import Tiers

H, D, SCALE = 2, 64, 0.125


def make(spec: str, b: int = 1) -> Store:
    return Store(parse(spec), b, H, D, torch.float32, torch.device("cpu"))


def tokens(n: int, b: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values. Some keys draw much attention: otherwise all tokens are worth the same."""
    loud = torch.where(torch.rand(b, 1, n, 1) < 0.1, 3.0, 1.0)
    return torch.randn(b, 2 * H, n, D), torch.randn(b, H, n, D) * loud, torch.randn(b, H, n, D)


def fill(store: Store, q: Tensor, k: Tensor, v: Tensor, chunk: int = 10_000) -> Store:
    for some in zip(*(x.split(chunk, 2) for x in (q, k, v)), strict=True):
        store.append(some[1], some[2], None, (some[0], SCALE))
    return store


def assert_same(one: Tiers, other: Tiers) -> None:
    """Every token in the same tier, place and bytes."""
    for name, tier in one.dense.items():
        twin = other.dense[name]
        assert np.array_equal(tier.lengths, twin.lengths)
        counted = torch.from_numpy(np.arange(tier.k.shape[2]) < tier.lengths[..., None]).to(tier.k.device)
        for x, y in zip(tier.tensors().values(), twin.tensors().values(), strict=True):
            assert torch.equal(x[counted], y[:, :, : x.shape[2]][counted])
    pages, twins = one.packed["packed"], other.packed["packed"]
    assert np.array_equal(pages.lengths, twins.lengths)
    filled = pages.filled()
    assert torch.equal(pages.pool[pages.table[filled].long()], twins.pool[twins.table[filled].long()])
    assert torch.equal(pages.starts[filled], twins.starts[filled])
