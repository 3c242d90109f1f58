"""Factors of channels: keys are multiplied by them and queries divided, so that codes lose less."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tersekv.ops.balance import MOST, balanced, multiplied
from tersekv.policy import queryaware
from tersekv.spec import parse
from tersekv.store import Store

B, H, G, D, SCALE = 2, 2, 3, 64, 0.125
SPEC = "rotated:bits=3 policy=queryaware observe=100"


def sizes() -> Tensor:
    """Of channels of keys, alike in pairs."""
    return 2.0 ** torch.randint(-3, 4, (B, H, 1, D // 2), generator=torch.Generator().manual_seed(1)).tile(2)


def uneven(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; channels of keys differ by up to 64, those of queries the other way round."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, heads, n, D, generator=generator) for heads in (G * H, H, H))
    by = sizes()
    return q / by.repeat_interleave(G, 1), k * by, v


def filled(n: int, spec: str = SPEC) -> Store:
    store, (q, k, v) = Store(parse(spec), B, H, D, torch.float32, torch.device("cpu")), uneven(n)
    store.append(k, v, np.zeros(B, dtype=np.int64), (q, SCALE))
    return store


def test_factors_by_hand() -> None:
    sizes, signs = torch.tensor([1.0, 16.0]).tile(2), torch.tensor([1.0, -1.0]).repeat(4)[:, None]
    keys = torch.stack([sizes * signs + 5, sizes * signs - 1000])  # two blocks, whose means do not count
    # Octaves of queries 4, 2 and of keys 0, 4 in both channels of a pair: a quarter less three quarters 1, -2.5 around
    # -.75, which leaves 1.75 and -1.75.
    queries = torch.tensor([256.0, 16.0, 256.0, 16.0], dtype=torch.float64) * 7
    assert balanced(queries, keys).tolist() == [4.0, 0.25, 4.0, 0.25]


def test_channels_that_rope_turns_into_each_other_share_a_factor() -> None:
    keys, queries = torch.randn(3, 64, D) * torch.rand(D), torch.rand(D, dtype=torch.float64)
    factors = balanced(queries, keys)
    assert torch.equal(*factors.chunk(2)) and len(factors.unique()) > 1
    turned = torch.cat((-keys[..., D // 2 :], keys[..., : D // 2]), -1)
    assert torch.equal(balanced(queries.roll(D // 2), turned), factors)


def test_where_nothing_is_known_factors_are_one() -> None:
    some = torch.randn(1, 64, D)
    for queries, keys in ((torch.zeros(D), some), (torch.ones(D), torch.full((1, 64, D), 3.0))):
        assert balanced(queries.double(), keys).tolist() == [1.0] * D


def test_dead_channels_and_what_is_not_finite_keep_factors_in_range() -> None:
    keys, queries = torch.randn(2, 64, D), torch.rand(D, dtype=torch.float64)
    keys[..., [3, D // 2 + 3]], keys[0, 5, 7], queries[[4, D // 2 + 4]] = 0, torch.nan, 0
    factors = balanced(queries, keys)
    assert factors.isfinite().all() and (factors >= 2.0**-MOST).all() and (factors <= 2.0**MOST).all()
    assert torch.equal(factors.log2(), factors.log2().round())
    assert factors[3] > 1 > factors[4]


def test_keys_are_only_converted_where_there_are_factors() -> None:
    keys = torch.randn(2, 3, 64, D).bfloat16()
    assert multiplied(keys, None) is keys
    factors = 2.0 ** torch.randint(-3, 4, (2, 3, D))
    assert torch.equal((multiplied(keys, factors) / factors[:, :, None]).bfloat16(), keys)


def test_each_row_has_factors_of_its_own_and_they_level_channels() -> None:
    tier = filled(140).tiers.packed["packed"]
    assert tier.factors is not None
    level = tier.factors * sizes()[:, :, 0]
    assert (level.log2() - level.log2().mean(-1, keepdim=True)).abs().max() <= 1
    assert not torch.equal(tier.factors[0, 0], tier.factors[1, 0])


@pytest.mark.parametrize("route", ["fused", "exact"])
@pytest.mark.parametrize("n", [1, 3, 40])
def test_every_route_sees_the_same_keys(route: str, n: int) -> None:
    """In one native call (n = 1, 3) and in one for each tier; folded into queries, or taken off decoded keys."""
    q, k, v = uneven(n, 5)
    outputs = [filled(300).extend(q, k, v, None, SCALE, way) for way in (route, "decoded")]
    bound = 0.02 if route == "fused" else 1e-5
    assert (outputs[0] - outputs[1]).norm() <= bound * outputs[1].norm()


def test_what_queries_see_of_the_error_is_less(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = uneven(400)
    scores = torch.einsum("bhgtd,bhsd->bhgts", q.unflatten(1, (H, G)), k)
    errors = []
    for factors in (balanced, lambda queries, keys: torch.ones_like(queries, dtype=torch.float32)):
        monkeypatch.setattr(queryaware, "balanced", factors)
        got = torch.einsum("bhgtd,bhsd->bhgts", q.unflatten(1, (H, G)), filled(400).decoded().k)
        errors.append(float((got - scores).square().mean()))
    assert errors[0] < 0.3 * errors[1], errors


def test_a_cropped_block_is_dense_in_the_domain_of_the_model() -> None:
    store, (_, k, _) = filled(300), uneven(300)
    before = store.tiers.packed["packed"].factors
    store.crop(np.array([120, 90]))
    sink = store.tiers.dense["sink"]
    assert sink.lengths[0, 0] > 4
    for row, length in enumerate(sink.lengths[:, 0]):
        now = k[row, :, sink.positions[row, 0, :length].long()]
        assert (sink.k[row, :, :length] - now).square().mean() < 0.1 * now.square().mean()
    store.append(*uneven(200, 7)[1:], np.zeros(B, dtype=np.int64))
    after = store.tiers.packed["packed"].factors
    assert before is not None and after is not None and torch.equal(before, after)  # they stay for good


def test_selected_rows_take_their_factors_along() -> None:
    store = filled(200)
    before = store.tiers.packed["packed"].factors
    store.select(torch.tensor([1, 1, 0]))
    after = store.tiers.packed["packed"].factors
    assert before is not None and after is not None and torch.equal(after, before[[1, 1, 0]])
    assert store.tiers.tensors()["balanced"].shape == (3, H)
