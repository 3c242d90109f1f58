"""Adaptive bits a token: the budget is exact, the routes are the same however a text came, and nothing is forgotten."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hosting import forward
from hypothesis import given
from hypothesis import strategies as st
from stores import SCALE, D, H, fill, make, tokens
from transformers import PreTrainedModel

import tersekv
from tersekv import CacheFileError, InputError, SpecError
from tersekv.eval.logits import Arm
from tersekv.eval.logits import forward as passes
from tersekv.files import fingerprint
from tersekv.policy.adaptive import BITS
from tersekv.policy.allocate import allocate
from tersekv.policy.controller import Controller, network, rarity
from tersekv.policy.routed import routed
from tersekv.spec import parse
from tersekv.store import Store

COST = np.array(BITS)
SPECS = ["rotated:bits=3 policy=adaptive", "k=intn:bits=2 v=rotated:bits=3 policy=adaptive sink=0 recent=20 shuffle=7"]


def levels(store: Store) -> np.ndarray:
    """Routes of all whole groups (b, h, groups, 64)."""
    tiers, sink = routed(store.tiers), store.tiers.dense["sink"].lengths.max()
    count = int((tiers.seen - tiers.dense["recent"].lengths).max())
    return tiers.levels()[..., sink:count].reshape(*tiers.seen.shape, -1, 64)


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=3, max_size=3),
    st.integers(2 * 3, 16 * 3),
)
def test_allocation_pays_what_it_has_and_little_is_better(gains: list[list[float]], budget: int) -> None:
    utility = np.concatenate([np.zeros((3, 1)), np.cumsum(np.sort(gains)[:, ::-1] * np.diff(COST), 1)], 1)
    chosen = allocate(utility[None], COST, budget)[0]
    spent = COST[chosen].sum()
    nexts = [COST[level + 1] - COST[level] for level in chosen if level < 3]
    assert spent <= budget and all(step > budget - spent for step in nexts), "what fits is spent"
    # Concave utilities: Lagrange is the best for what it spends before the rest is filled, so less than one step off.
    ways = product(range(4), repeat=3)
    best = max(utility[range(3), way].sum() for way in ways if COST[list(way)].sum() <= budget)
    step = max(utility[i, level + 1] - utility[i, level] for i in range(3) for level in range(3))
    assert utility[range(3), chosen].sum() >= best - step - 1e-9


@pytest.mark.parametrize("spec", SPECS)
def test_every_64_tokens_have_the_average_exactly(spec: str) -> None:
    store, average = make(spec), 3 if spec.startswith("rotated") else 2.5
    fill(store, *tokens(700))
    assert (COST[levels(store)].sum(-1) == 64 * average).all()
    assert len(np.unique(levels(store))) > 1


@pytest.mark.parametrize("spec", SPECS)
def test_any_chunking_gives_the_same(spec: str) -> None:
    x, stores = tokens(700), []
    for chunk in (700, 90, 1):
        stores.append(fill(make(spec), *x, chunk=chunk))
    for store in stores[1:]:
        for name, tier in store.tiers.all().items():
            assert (tier.lengths == stores[0].tiers.all()[name].lengths).all()
        assert (levels(store) == levels(stores[0])).all()
        one, other = store.decoded(), stores[0].decoded()
        assert torch.equal(one.k, other.k) and torch.equal(one.v, other.v)
        assert one.positions[0, 0].tolist() == list(range(700)) and torch.equal(one.positions, other.positions)


def test_a_padded_batch_is_its_sequences_alone() -> None:
    lengths, n = [400, 150, 290], 400
    q, k, v = tokens(n, 3)
    together = make(SPECS[0], 3)
    together.append(k, v, n - np.array(lengths), (q, SCALE))
    for row, length in enumerate(lengths):
        alone = fill(make(SPECS[0]), *(x[row : row + 1, :, n - length :] for x in (q, k, v)))
        mine, its = together.decoded(), alone.decoded()
        assert torch.equal(mine.k[row, :, :length], its.k[0]) and torch.equal(mine.v[row, :, :length], its.v[0])
        assert torch.equal(mine.positions[row, :, :length], its.positions[0])


def test_shuffled_routes_hold_the_same_bytes() -> None:
    x = tokens(900)
    mine, drawn, other = (fill(make(f"{SPECS[0]}{word}"), *x) for word in ("", " shuffle=1", " shuffle=2"))
    for store in (drawn, other):
        assert (np.sort(levels(store)) == np.sort(levels(mine))).all()
        assert not (levels(store) == levels(mine)).all()
        for name, tier in store.tiers.all().items():
            assert (tier.lengths == mine.tiers.all()[name].lengths).all()
    assert not (levels(drawn) == levels(other)).all()


def test_bits_where_attention_goes_beat_bits_drawn_at_random() -> None:
    """Twelve tokens that all queries look at, among 500."""
    q, k, v = torch.randn(1, 2 * H, 600, D), 0.3 * torch.randn(1, H, 600, D), torch.randn(1, H, 600, D)
    wanted = torch.nn.functional.normalize(torch.randn(D), dim=0)
    k[:, :, torch.randperm(450)[:12]] += 12 * wanted
    q += 3 * wanted
    found = {}
    for word in ("none:dtype=fp32", SPECS[0], f"{SPECS[0]} shuffle=1"):
        store = fill(make(word), q, k, v)
        found[word] = store.extend(q[:, :, :8], k[:, :, :8], v[:, :, :8], None, SCALE, "exact")
    exact, mine, drawn = found.values()
    assert (mine - exact).norm() < 0.5 * (drawn - exact).norm()


@pytest.mark.parametrize("length", [680, 500, 333, 130, 3])
def test_crop_keeps_positions_and_goes_on(length: int) -> None:
    x = tokens(700)
    store = fill(make(SPECS[0]), *x)
    before = store.decoded()
    store.crop(np.array([length]))
    after = store.decoded()
    assert after.positions[0, 1].tolist() == list(range(length))
    assert torch.equal(after.k, before.k[:, :, :length]), "nothing is encoded again"
    fill(store, *(y[:, :, length:] for y in x), chunk=50)
    assert store.decoded().positions[0, 0].tolist() == list(range(700))
    later = store.decoded()
    kept, waited = (y[:, :, :length] == before.k[:, :, :length] for y in (later.k, x[1]))
    assert (kept.all(-1) | waited.all(-1)).all(), "only what was dense is encoded"
    store.crop(np.array([length // 2]))
    assert torch.equal(store.decoded().k, later.k[:, :, : length // 2])


@pytest.fixture
def controller(llama: PreTrainedModel, tmp_path: Path) -> Path:
    about = {"fingerprint": fingerprint(llama), "model": {"name": "tiny"}}
    scales = {"mean": torch.zeros(4), "deviation": torch.ones(4)}
    counts = torch.randint(0, 9, (97,), dtype=torch.int32)
    path = tmp_path / "tiny.safetensors"
    Controller({**network().state_dict(), **scales, "counts": counts}, about).save(path)
    return path


def test_a_controller_has_the_size_that_the_paper_implies() -> None:
    assert sum(weight.numel() for weight in network().parameters()) == 17_668


def test_rarity_by_hand() -> None:
    counts = torch.tensor([5, 0, 3])
    want = [-np.log(6 / 11), -np.log(1 / 11)]  # N = 8 tokens, V = 2 kinds
    assert rarity(torch.tensor([[0, 1]]), counts)[0].tolist() == pytest.approx(want, abs=1e-6)


def test_spread_is_the_variance_of_attention_weights() -> None:
    q, k, v = tokens(200)
    store = fill(make("none:dtype=fp32"), *(x[:, :, :150] for x in (q, k, v)))
    found = store.spread(q[:, :, 150:], k[:, :, 150:], None, SCALE)
    scores = q @ k.repeat_interleave(2, 1).mT * SCALE
    for at in (150, 199):
        weights = scores[:, :, at, : at + 1].softmax(-1)
        assert found[0, at - 150].item() == pytest.approx(weights.var(-1, correction=0).mean().item(), rel=1e-3)


def test_a_controller_routes_the_same_however_a_text_came(llama: PreTrainedModel, controller: Path) -> None:
    ids, arms = torch.randint(1, 97, (1, 400)), []
    spec = parse(f"rotated:bits=3 policy=adaptive router={controller} prefill=packed")
    for chunk in (400, 37, 9):
        arm = Arm(spec, tersekv.cache(llama, spec))
        logits = torch.cat([passes(llama, part, arm) for part in ids.split(chunk, 1)])
        arms.append((arm, logits))
    first, one = arms[0][0].cache.layers, arms[0][1]
    for arm, logits in arms[1:]:
        for mine, its in zip(arm.cache.layers, first, strict=True):
            assert (levels(mine.store) == levels(its.store)).all()
        assert (logits - one).abs().max() < 1e-3 * one.abs().max()
    assert (COST[levels(first[0].store)].sum(-1) == 64 * 3).all()
    assert (levels(first[0].store) == levels(first[2].store)).all(), "a token has the same bits in all layers"


@pytest.mark.parametrize("router", ["attention", "learned"])
def test_in_a_model_saved_loaded_selected_and_generating(
    router: str, llama: PreTrainedModel, controller: Path, tmp_path: Path
) -> None:
    ids, name = torch.randint(1, 97, (2, 420)), controller if router == "learned" else router
    mask = torch.ones_like(ids)
    mask[0, :50] = 0
    with tersekv.attached(llama):
        cache = tersekv.cache(llama, f"rotated:bits=3 policy=adaptive router={name}")
        forward(llama, cache, ids, mask)
        report = cache.report()
        assert report.planes()["policy", "routes"] > 0
        assert sum(layer.held for layer in report.layers) < report.dense
        tersekv.save(cache, tmp_path / "cache.safetensors", llama)
        again = tersekv.load(tmp_path / "cache.safetensors", llama)
        for one in (cache, again):
            one.batch_select_indices(torch.tensor([1, 1]))
        assert torch.equal(forward(llama, cache, ids[:, :1]), forward(llama, again, ids[:, :1]))
        beams = llama.generate(
            ids[:1],
            past_key_values=tersekv.cache(llama, f"rotated:bits=3 policy=adaptive router={name}"),
            attention_mask=torch.ones_like(ids[:1]),
            max_new_tokens=8,
            num_beams=2,
        )
    assert beams.shape == (1, 428) and again.get_seq_length() == 421


def test_what_a_controller_refuses(llama: PreTrainedModel, controller: Path, any_model: PreTrainedModel) -> None:
    spec = f"rotated:bits=3 policy=adaptive router={controller}"
    if fingerprint(any_model) != fingerprint(llama):
        with pytest.raises(CacheFileError, match=r"trained on another model \(tiny\)"):
            tersekv.cache(any_model, spec)
    with pytest.warns(UserWarning, match="not attached"), pytest.raises(InputError, match="attached"):
        llama(input_ids=torch.ones(1, 9, dtype=torch.int64), past_key_values=tersekv.cache(llama, spec))
    with tersekv.attached(llama), pytest.raises(InputError, match="at most 1 tokens a pass"):
        forward(llama, tersekv.cache(llama, f"{spec} prefill=packed"), torch.ones(1, 300, dtype=torch.int64))
    damaged = bytearray(controller.read_bytes())
    damaged[-1] ^= 1
    controller.write_bytes(damaged)
    with pytest.raises(CacheFileError, match="is damaged"):
        tersekv.cache(llama, spec)
    with pytest.raises(CacheFileError, match="cannot be read"):
        tersekv.cache(llama, f"{spec}.missing")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none policy=adaptive", "NoneCodec has no option bits"),
        ("rotated:bits=1 policy=adaptive", "1 bits on average: policy=adaptive has 2 to 16"),
        ("rotated policy=adaptive recent=0", "Give at least 1"),
        ("rotated policy=adaptive shuffle=-1", "shuffle=-1 is no seed"),
    ],
)
def test_what_a_spec_cannot_be(spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make(spec)
