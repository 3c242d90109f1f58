"""Hot and cold tiers: who is hot, that moves lose nothing twice, and that memory is freed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hosting import forward
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

import tersekv
from tersekv import InputError, SpecError
from tersekv.accounting import storage_bytes, tier_bytes
from tersekv.ops.attention import attend_dense
from tersekv.policy.hotcold_tiers import HotColdTiers, hot_and_cold
from tersekv.policy.shares import block_lses, blocks_of, dense_scores, observed
from tersekv.spec import parse
from tersekv.store import Store

H, D, SCALE = 2, 64, 0.125
NONE = np.zeros(1, dtype=np.int64)
FIRST = 4  # position of the first block: after the sink


def make(options: str, b: int = 1, codec: str = "rotated:bits=4") -> Store:
    text = f"{codec} policy=hotcold {options} prefill=packed"
    return Store(parse(text), b, H, D, torch.float32, torch.device("cpu"))


def tokens(n: int, b: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(b, 2 * H, n, D), torch.randn(b, H, n, D), torch.randn(b, H, n, D)


def starts(tier: object) -> list[int]:
    """Positions of the first tokens of a tier's blocks, of the first row."""
    if hasattr(tier, "starts"):
        return sorted(tier.starts[0, 0, : tier.lengths[0, 0] // 64].tolist())
    return tier.positions[0, 0, : tier.lengths[0, 0] : 64].tolist()


def topical(n: int, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens of which block `block` points in one direction, which is returned: a query along it uses that block."""
    q, k, v = tokens(n)
    direction = normalize(torch.randn(D), dim=0)
    first = FIRST + 64 * block
    k[:, :, first : first + 64] += 6 * direction
    return q, k, v, direction


def state(store: Store) -> HotColdTiers:
    return hot_and_cold(store.tiers)


def test_the_newest_blocks_are_hot_if_none_is_used() -> None:
    store, (q, k, v) = make("hot=128 use=100"), tokens(800)
    store.extend(q, k, v, None, SCALE)
    hot, cold = state(store).dense["hot"], state(store).packed["cold"]
    assert starts(hot) == [FIRST + 64 * i for i in (9, 10)] and starts(cold) == [FIRST + 64 * i for i in range(9)]
    assert store.lengths.tolist() == [800] and len(cold.pool) == 9 * H


def test_a_used_block_stays_hot_with_its_own_values() -> None:
    q, k, v, direction = topical(1000, 1)
    q[:, :, ::40] += 40 * direction
    store = make("hot=128 use=50")
    store.extend(q, k, v, None, SCALE)
    hot = state(store).dense["hot"]
    assert starts(hot)[0] == FIRST + 64 and len(starts(hot)) == 2
    assert torch.equal(hot.k[:, :, :64], k[:, :, FIRST + 64 : FIRST + 128])
    assert state(store).statistics()["hot hits"] > 0


@pytest.mark.parametrize("codec", ["rotated:bits=4", "kivi:bits=2", "none:dtype=fp32"])
def test_promotion_gives_what_decoding_gives_and_demotion_encodes_nothing_again(codec: str) -> None:
    q, k, v, direction = topical(900, 1)
    store = make("hot=128 use=50 promote=yes", codec=codec)
    store.extend(torch.zeros_like(q), k, v, None, SCALE)
    block = FIRST + 64
    assert block in starts(state(store).packed["cold"])
    page = state(store).packed["cold"].where(state(store).packed["cold"].starts.numpy() == block)
    before = store.decoded()
    q, k, v = tokens(1)
    store.extend(q + 60 * direction, k, v, None, SCALE)
    while starts(state(store).packed["cold"]).count(block):  # until a block leaves the recent tier
        store.extend(torch.zeros(1, 2 * H, 1, D), *tokens(1)[1:], None, SCALE)
        assert store.lengths[0] < 980
    tiers = state(store)
    assert starts(tiers.dense["hot"])[0] == block and starts(tiers.packed["parked"]) == [block]
    assert block not in starts(tiers.packed["cold"])
    assert torch.equal(store.decoded().k[:, :, FIRST : FIRST + 128], before.k[:, :, FIRST : FIRST + 128])
    store.extend(torch.zeros(1, 2 * H, 300, D), *tokens(300)[1:], None, SCALE)
    tiers = state(store)
    assert block in starts(tiers.packed["cold"]) and starts(tiers.packed["parked"]) == []
    again = tiers.packed["cold"].where(tiers.packed["cold"].starts.numpy() == block)
    assert torch.equal(again.pool, page.pool), "the page that came back is the one that was parked"
    assert tiers.statistics()["promoted"] == H == tiers.statistics()["demoted to a parked page"]


def test_every_token_is_attended_to_once_whatever_moves() -> None:
    store, seen = make("hot=128 use=3 promote=yes", codec="none:dtype=fp32"), [torch.empty(1, H, 0, D)] * 2
    for _ in range(60):
        q, k, v = tokens(17)
        seen = [torch.cat((x, new), 2) for x, new in zip(seen, (k, v), strict=True)]
        found = store.extend(6 * q, k, v, None, SCALE)
        want, _ = attend_dense(6 * q[:, :, -1:], *seen, torch.full((1, H), seen[0].shape[2]), SCALE)
        assert torch.allclose(found[:, :, -1:], want, atol=1e-4)
        positions = store.decoded().positions
        assert (positions == torch.arange(positions.shape[2])).all()
    counted = state(store).statistics()
    assert all(counted.values()), f"the data must exercise every move: {counted}"


def test_shares_are_those_of_plain_attention() -> None:
    store, (q, k, v) = make("hot=128 use=100", codec="rotated:bits=4"), tokens(700)
    store.extend(q, k, v, None, SCALE)
    tiers, q = state(store), torch.randn(1, 2 * H, 5, D)
    asked = observed(q, SCALE, tiers.seen, np.full((1, H), 5), 64)
    hot = blocks_of(dense_scores(tiers.dense["hot"], asked), 64)
    cold = block_lses(tiers.packed["cold"], asked)
    whole = store.decoded()
    scores = torch.einsum("bhgmd,bhtd->bhgmt", q.unflatten(1, (H, -1)), whole.k) * SCALE
    for name, found in (("hot", hot), ("cold", cold)):
        for i, first in enumerate(starts(tiers.held()[name])):
            want = scores[..., first : first + 64].logsumexp(-1)
            # 8-bit integers in the kernels: scores are off by a hundredth of their spread.
            assert torch.allclose(found[..., i], want, atol=0.05), (name, i)


def test_any_chunks_give_the_same_tiers() -> None:
    q, k, v, direction = topical(900, 2)
    q[:, :, ::50] += 40 * direction
    stores = []
    for chunk in (900, 70, 1):
        store = make("hot=128 use=30 promote=yes")
        for part in zip(*(x.split(chunk, 2) for x in (q, k, v)), strict=True):
            store.extend(*part, None, SCALE)
        stores.append(store)
    for store in stores[1:]:
        for name, tier in state(store).held().items():
            assert starts(tier) == starts(state(stores[0]).held()[name]), name
        assert torch.equal(store.decoded().k, stores[0].decoded().k)


def test_demotion_frees_memory() -> None:
    """Bytes of the storages alive: 16 blocks of dense values become pages, nothing else stays behind."""
    q, k, v = tokens(64 * 18 + FIRST)
    held = {}
    for hot in (1024, 0):
        store = make(f"hot={hot} use=100")
        store.extend(q, k, v, None, SCALE)
        tensors = [x for tier in state(store).held().values() for x in tier.tensors().values()]
        held[hot] = storage_bytes(*tensors)
        assert held[hot] <= sum(sum(tier_bytes(t).values()) for t in state(store).held().values())
    dense, page = 2 * 64 * D * 4 + 64 * 4, state(store).packed["cold"].pool.shape[1] + 8
    assert held[1024] - held[0] == pytest.approx(16 * H * (dense - page), rel=0.01)


@pytest.mark.parametrize("at", [FIRST + 64 * 3, FIRST + 64 * 1 + 20, 500, 2])
def test_crop_is_what_was_never_there(at: int) -> None:
    q, k, v, direction = topical(900, 1)
    q[:, :, 800:] += 60 * direction
    store = make("hot=128 use=50 promote=yes")
    store.extend(q, k, v, None, SCALE)
    before, parked = store.decoded(), starts(state(store).packed["parked"])
    assert parked == [FIRST + 64]
    store.crop(np.array([at]))
    after = store.decoded()
    assert store.lengths.tolist() == [at] and after.positions[0, 0].tolist() == list(range(at))
    assert torch.equal(after.k, before.k[:, :, :at])
    assert starts(state(store).packed["parked"]) == [p for p in parked if p + 64 <= at]
    store.extend(*tokens(400), None, SCALE)
    assert store.lengths.tolist() == [at + 400]


def test_a_padded_batch_is_its_sequences_alone() -> None:
    lengths, n = [400, 90, 250], 400
    q, k, v = (4 * x for x in tokens(n, 3))
    together = make("hot=64 use=5 promote=yes", 3)
    together.extend(q, k, v, n - np.array(lengths), SCALE)
    for row, length in enumerate(lengths):
        alone = make("hot=64 use=5 promote=yes")
        alone.extend(*(x[row : row + 1, :, n - length :] for x in (q, k, v)), None, SCALE)
        for name, tier in state(alone).dense.items():
            count = int(tier.lengths[0, 0])
            mine = state(together).dense[name]
            assert mine.lengths[row].tolist() == tier.lengths[0].tolist(), name
            assert torch.equal(mine.positions[row, :, :count], tier.positions[0, :, :count]), name


def test_in_a_model_saved_copied_and_selected(llama: PreTrainedModel, tmp_path: Path) -> None:
    ids = torch.randint(1, 97, (2, 420))
    with tersekv.attached(llama):
        cache = tersekv.cache(llama, "rotated:bits=4 policy=hotcold hot=64 promote=yes")
        forward(llama, cache, ids)
        report = cache.report()
        assert {"hot", "cold", "parked", "policy"} <= set(report.layers[0].tiers)
        assert report.statistics()["demoted"] > 0 and "demoted" in str(report)
        assert report.as_dict()["statistics"] == report.statistics()
        tersekv.save(cache, tmp_path / "cache.safetensors", llama)
        again = tersekv.load(tmp_path / "cache.safetensors", llama)
        assert again.report().statistics() == report.statistics()
        for one in (cache, again):
            one.batch_select_indices(torch.tensor([1, 1]))
        assert torch.equal(forward(llama, cache, ids[:, :100]), forward(llama, again, ids[:, :100]))


def test_what_it_refuses(llama: PreTrainedModel) -> None:
    with pytest.raises(SpecError, match=r"hot=100 must be whole blocks of 64 tokens"):
        parse("rotated:bits=4 policy=hotcold hot=100")
    with pytest.raises(SpecError, match=r"use=0 is no share"):
        parse("rotated:bits=4 policy=hotcold use=0")
    store, (_, k, v) = make("hot=64"), tokens(100)
    with pytest.raises(InputError, match="needs the queries of all tokens"):
        store.append(k, v, NONE)
