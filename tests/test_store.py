"""One layer's tiers: placement, chunking, ragged sequences, crop, beams and memory."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersekv.accounting import storage_bytes, tier_bytes
from tersekv.packed_tier import PackedTier
from tersekv.spec import parse
from tersekv.store import Store

H, D = 2, 64
NONE = np.zeros(1, dtype=np.int64)


def make(spec: str, b: int = 1, d: int = D, dtype: torch.dtype = torch.float32) -> Store:
    return Store(parse(spec), b, H, d, dtype, torch.device("cpu"))


def filled(spec: str, t: int, chunks: list[int] | None = None) -> tuple[Store, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    k, v = torch.randn(1, H, t, D, generator=generator), torch.randn(1, H, t, D, generator=generator)
    store, start = make(spec), 0
    for n in chunks or [t]:
        store.append(k[:, :, start : start + n], v[:, :, start : start + n], NONE)
        start += n
    return store, k, v


def packed(store: Store) -> PackedTier:
    return store.tiers.packed["packed"]


def blocks(store: Store) -> Tensor:
    """Page bytes in the order of the table: what is stored, wherever it lies."""
    tier = packed(store)
    return tier.pool[tier.table.long()]


@pytest.mark.parametrize("sink", [0, 4])
@pytest.mark.parametrize("recent", [0, 64])
@pytest.mark.parametrize("t", [0, 1, 3, 63, 64, 65, 131, 132, 1023])
def test_tokens_are_where_the_policy_says(t: int, recent: int, sink: int) -> None:
    store, k, _ = filled(f"none:dtype=fp32 sink={sink} recent={recent}", t)
    held = {name: int(tier.lengths[0, 0]) for name, tier in store.tiers.all().items()}
    due = max(t - sink - recent, 0) // 64 * 64
    assert held == {"sink": min(sink, t), "packed": due, "recent": max(t - sink, 0) - due}
    whole = store.decoded()
    assert torch.equal(whole.k, k)
    assert torch.equal(whole.positions[0, 0], torch.arange(t, dtype=torch.int32))


@settings(max_examples=40, deadline=None)
@given(chunks=st.lists(st.integers(1, 150), min_size=1, max_size=12))
def test_any_chunking_is_one_append(chunks: list[int]) -> None:
    once, _, _ = filled("k=rotated:bits=3 v=intn:bits=4 sink=3 recent=20", sum(chunks))
    often, _, _ = filled("k=rotated:bits=3 v=intn:bits=4 sink=3 recent=20", sum(chunks), chunks)
    assert torch.equal(blocks(once), blocks(often))
    for name in ("sink", "recent"):
        assert torch.equal(once.tiers.dense[name].k, often.tiers.dense[name].k)
        assert torch.equal(once.tiers.dense[name].positions, often.tiers.dense[name].positions)


@pytest.mark.parametrize("prefill", ["exact", "packed"])
def test_padded_batch_is_its_sequences_alone(prefill: str) -> None:
    """Padding is never stored: a padded batch holds the very pages of its sequences run one by one."""
    lengths, spec = [0, 5, 300, 333], f"rotated:bits=3 prefill={prefill}"
    b, n = len(lengths), max(lengths)
    q, k, v = torch.randn(b, 2 * H, n, D), torch.randn(b, H, n, D), torch.randn(b, H, n, D)
    together = make(spec, b)
    cut = 200  # two chunks, so that padding ends within the first, the second or none
    padding = n - np.array(lengths)
    first = together.extend(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], np.minimum(padding, cut), 0.125)
    second = together.extend(q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], np.maximum(padding - cut, 0), 0.125)
    out = torch.cat((first, second), 2)
    assert together.lengths.tolist() == lengths
    for i, t in enumerate(lengths):
        alone = make(spec)
        pads, parts = n - t, []
        for a, z in ((pads, max(cut, pads)), (max(cut, pads), n)):
            if z > a:
                row = [x[i : i + 1, :, a:z] for x in (q, k, v)]
                parts.append(alone.extend(*row, NONE, 0.125))
        count = packed(alone).table.shape[2]
        mine = packed(together).table[i : i + 1, :, :count].long()
        assert torch.equal(packed(together).pool[mine], blocks(alone))
        if t:
            assert torch.allclose(out[i : i + 1, :, pads:], torch.cat(parts, 2), atol=1e-5)


@pytest.mark.parametrize(
    "spec", ["rotated:bits=4", "rotated:bits=2 sink=0 recent=0", "k=none:dtype=fp32 v=intn:bits=8"]
)
def test_fused_and_decoded_routes_agree(spec: str) -> None:
    for chunks in ([300], [100, 1, 1, 150, 48]):
        outputs = []
        for route in ("exact", "decoded"):
            torch.manual_seed(1)
            store, parts = make(spec), []
            for n in chunks:
                q, k, v = torch.randn(1, 3 * H, n, D), torch.randn(1, H, n, D), torch.randn(1, H, n, D)
                parts.append(store.extend(q, k, v, NONE, D**-0.5, route))
            outputs.append(torch.cat(parts, 2))
        assert torch.allclose(*outputs, atol=2e-5)


@pytest.mark.parametrize("route", ["exact", "fused"])
def test_packed_prefill_is_decoding_token_by_token(route: str) -> None:
    q, k, v = torch.randn(1, H, 400, D), torch.randn(1, H, 400, D), torch.randn(1, H, 400, D)
    whole = make("rotated:bits=2 prefill=packed").extend(q, k, v, NONE, 0.125, route)
    store = make("rotated:bits=2")
    steps = [store.extend(q[:, :, [i]], k[:, :, [i]], v[:, :, [i]], NONE, 0.125, route) for i in range(400)]
    assert torch.allclose(whole, torch.cat(steps, 2), atol=1e-5)


@pytest.mark.parametrize("keep", [0, 3, 4, 67, 68, 100, 132, 250, 299, 300])
def test_crop(keep: int) -> None:
    """Blocks that remain whole keep their bytes; a block that is cut becomes dense with what its codes say."""
    store, k, _ = filled("rotated:bits=3", 300)
    before, decoded = blocks(store), store.decoded()
    store.crop(np.array([keep]))
    assert store.lengths.tolist() == [keep]
    whole = packed(store).table.shape[2]
    assert whole == min(max(keep - 4, 0) // 64, before.shape[2])
    assert torch.equal(blocks(store), before[:, :, :whole])
    assert torch.equal(store.decoded().k, decoded.k[:, :, :keep])
    assert len(packed(store).pool) == H * whole
    more = torch.randn(1, H, 90, D)
    store.append(more, more, NONE)
    assert torch.equal(store.decoded().positions[0, 0], torch.arange(keep + 90, dtype=torch.int32))
    assert torch.equal(blocks(store)[:, :, :whole], before[:, :, :whole])
    store.crop(np.array([keep]))
    assert torch.equal(store.decoded().k[:, :, :4], k[:, :, : min(4, keep)])


def test_crop_of_ragged_sequences() -> None:
    store = make("rotated:bits=3", 2)
    k = torch.randn(2, H, 300, D)
    store.append(k, k, np.array([0, 200]))
    before = store.decoded()
    store.crop(np.array([150, 90]))
    after = store.decoded()
    for i, keep in enumerate((150, 90)):
        assert store.lengths[i] == keep
        assert torch.equal(after.k[i, :, :keep], before.k[i, :, :keep])


def test_beams_share_pages_and_dead_ones_are_freed() -> None:
    store = make("rotated:bits=4", 2)
    k = torch.randn(2, H, 300, D)
    store.append(k, k, np.zeros(2, dtype=np.int64))
    pages, one = len(packed(store).pool), store.decoded().k[1]
    store.select(torch.tensor([1, 1, 1]))
    assert len(packed(store).pool) == pages  # nothing is copied
    assert all(torch.equal(store.decoded().k[i], one) for i in range(3))
    more = torch.randn(3, H, 64, D)
    store.append(more, more, np.zeros(3, dtype=np.int64))
    assert len(packed(store).pool) == pages // 2 + 3 * H  # sequence 0 is gone, each beam has one page of its own
    assert torch.equal(store.decoded().k[2, :, 4:132], one[:, 4:132])


def test_declared_bytes_are_held_bytes() -> None:
    store, _, _ = filled("rotated:bits=3", 1000, [300, 700])
    for tier in store.tiers.all().values():
        assert sum(tier_bytes(tier).values()) == storage_bytes(*tier.tensors().values()) + tier.lengths.nbytes
    tier, layouts = tier_bytes(packed(store)), packed(store).layouts
    pages = H * ((1000 - 4 - 64) // 64)
    assert tier["k.codes"] == pages * layouts[0].plane("codes").nbytes
    assert len(packed(store).pool) * sum(x.nbytes for x in layouts) == storage_bytes(packed(store).pool)


def test_three_bits_hold_at_least_4_3_times_less_at_4096_tokens() -> None:
    """SmolLM2's shape (3 KV heads, d=64) in bf16, filled as a prefill and a decode would; everything counted."""
    for chunks in ([4096], [4000] + [1] * 96):
        store = Store(parse("rotated:bits=3"), 1, 3, 64, torch.bfloat16, torch.device("cpu"))
        for n in chunks:
            x = torch.randn(1, 3, n, 64).bfloat16()
            store.append(x, x, NONE)
        held = sum(sum(tier_bytes(tier).values()) for tier in store.tiers.all().values())
        assert 2 * 3 * 4096 * 64 * 2 / held >= 4.3


def test_store_refuses_a_head_dim_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="group=48 does not divide"):
        make("intn:bits=4,group=48")


@pytest.mark.parametrize(("pads", "full"), [([0, 0], True), ([0, 130], False)])
def test_pages_know_whether_every_row_is_full(pads: list[int], full: bool) -> None:
    """A kernel that is not told of lengths reads whole rows of the table, which must not have unused places then."""
    store = Store(parse("rotated:bits=3"), 2, H, D, torch.float32, torch.device("cpu"))
    store.append(torch.randn(2, H, 400, D), torch.randn(2, H, 400, D), np.array(pads))
    pages = store.tiers.packed["packed"].pages
    assert pages.full == full == bool((pages.table >= 0).all())
