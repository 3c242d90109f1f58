"""Anchor tokens: scores are the theorem's, anchors are those that it names, and any codec packs the others."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hosting import forward
from stores import SCALE, D, H, fill, make, tokens
from torch import Tensor
from transformers import PreTrainedModel

import tersekv
from tersekv import InputError, SpecError
from tersekv.errors import ModelError
from tersekv.hf.capture import Seen, observed
from tersekv.models import load
from tersekv.ops.anchors import SCORES, causal_scores
from tersekv.policy.routed import routed
from tersekv.prompt import prompt_ids
from tersekv.spec import parse
from tersekv.store import Store

SPECS = ["rotated:bits=2 policy=anchors permille=40", "vq policy=anchors permille=10 sink=0 recent=20 score=key"]


def by_matrix(q: Tensor, k: Tensor, v: Tensor, score: str, counts: Tensor) -> Tensor:
    """The formulas as they are written, with all weights at hand. `counts` (n, t): which queries count for whom."""
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    ahead = torch.ones(q.shape[2], k.shape[2]).triu(1).bool()
    weights = (q @ k.mT * SCALE).masked_fill(ahead, -torch.inf).softmax(-1)
    out = weights @ v
    if score == "key":
        weights = weights * (v[:, :, None] - out[:, :, :, None]).abs().sum(-1) * q.norm(dim=-1)[..., None] * SCALE
    total = (weights * counts).sum(2).unflatten(1, (H, 2)).sum(2)
    return total * v[:, ::2].abs().sum(-1) if score == "value" else total


@pytest.mark.parametrize("score", SCORES)
def test_scores_in_tiles_are_those_of_the_whole_matrix(score: str) -> None:
    q, k, v = tokens(600, 2)
    found, want = causal_scores(q, k, v, SCALE, score), by_matrix(q, k, v, score, torch.ones(600, 600))
    assert torch.allclose(found, want, rtol=1e-4, atol=1e-5 * want.max().item())


def test_the_key_score_is_the_derivative_that_the_theorem_bounds() -> None:
    """Of one query: |d o / d (logit j)|_1 = A_j |v_j - o|_1, by automatic differentiation."""
    q, k, v = torch.randn(1, 1, 1, D), torch.randn(1, 1, 9, D), torch.randn(1, 1, 9, D)
    logits = (q @ k.mT * SCALE).flatten()
    slopes = torch.autograd.functional.jacobian(lambda x: x.softmax(-1) @ v[0, 0], logits)
    weights = logits.softmax(-1)
    out = weights @ v[0, 0]
    assert torch.allclose(slopes.abs().sum(0), weights * (v[0, 0] - out).abs().sum(-1), atol=1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_the_policy_keeps_those_that_the_queries_behind_them_name(score: str) -> None:
    """With a codec that loses nothing its scores are those of the matrix, from the 50 queries behind 64 tokens."""
    x, n = tokens(700), 700
    store = fill(make(f"none:dtype=fp32 policy=anchors permille=50 recent=50 score={score}"), *x, chunk=90)
    i = torch.arange(n)
    ends = (i - 4) // 64 * 64 + 68
    queries = i[:, None]
    scores = by_matrix(*x, score, ((queries >= ends) & (queries < ends + 50)).float())
    count = int((store.tiers.seen - store.tiers.dense["recent"].lengths)[0, 0])
    anchors, groups = store.tiers.dense["anchors"], 0
    for head in range(H):
        found = anchors.positions[0, head, : anchors.lengths[0, head]].tolist()
        held = 0
        for groups, start in enumerate(range(4, count - 63, 64), 1):
            allowed = groups * 64 * 50 // 1000 - held
            want = scores[0, head, start : start + 64].topk(allowed).indices + start
            assert sorted(want.tolist()) == [at for at in found if start <= at < start + 64]
            held += allowed
    assert groups >= 8 and anchors.lengths.tolist() == [[groups * 64 * 50 // 1000] * H]


@pytest.mark.parametrize("spec", SPECS)
def test_any_chunking_gives_the_same(spec: str) -> None:
    x, stores = tokens(700), []
    for chunk in (700, 90, 1):
        stores.append(fill(make(spec), *x, chunk=chunk))
    assert stores[0].tiers.dense["anchors"].lengths.all()
    for store in stores[1:]:
        for name, tier in store.tiers.all().items():
            assert (tier.lengths == stores[0].tiers.all()[name].lengths).all()
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


def outputs(words: list[str], q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """What the last 64 queries get, each seeing what decoding would show it, fp32."""
    return [fill_and_ask(make(f"{word} prefill=packed"), q, k, v) for word in words]


def fill_and_ask(store: Store, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return store.extend(q, k, v, None, SCALE, "exact")[:, :, -64:]


@pytest.mark.parametrize(
    ("codec", "left"),
    [("rotated:bits=2", 0.5), ("vq:dim=16,index=6", 0.5), ("kivi:bits=2", 0.5), ("trellis:bits=1", 0.6)],
)
def test_anchors_help_any_codec_more_than_as_many_random_tokens(codec: str, left: float) -> None:
    """Ten tokens that all queries look at, among 600."""
    q, k, v = torch.randn(1, 2 * H, 700, D), 0.3 * torch.randn(1, H, 700, D), torch.randn(1, H, 700, D)
    wanted = torch.nn.functional.normalize(torch.randn(D), dim=0)
    k[:, :, torch.arange(10) * 55 + 20] += 12 * wanted
    q += 3 * wanted
    words = [f"{codec} policy=anchors permille=20{more}" for more in ("", " shuffle=1")]
    exact, mine, drawn = outputs(["none:dtype=fp32", *words], q, k, v)
    assert (mine - exact).norm() < left * (drawn - exact).norm()


def test_the_control_holds_as_many_and_others() -> None:
    x = tokens(900)
    mine, drawn, other = (fill(make(f"{SPECS[0]}{word}"), *x) for word in ("", " shuffle=1", " shuffle=2"))
    for store in (drawn, other):
        for name, tier in store.tiers.all().items():
            assert (tier.lengths == mine.tiers.all()[name].lengths).all()
        ours, its = (y.tiers.dense["anchors"].positions for y in (mine, store))
        assert not torch.equal(ours, its)


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


def test_in_a_model_saved_loaded_selected_and_counted(llama: PreTrainedModel, tmp_path: Path) -> None:
    ids = torch.randint(1, 97, (2, 420))
    mask = torch.ones_like(ids)
    mask[0, :50] = 0
    with tersekv.attached(llama):
        cache = tersekv.cache(llama, "vq policy=anchors permille=20")
        forward(llama, cache, ids, mask)
        planes, heads, layers = cache.report().planes(), 2, 3
        anchors = [256 * 20 // 1000, 320 * 20 // 1000]  # of 5 or 6 groups
        rows = routed(cache.layers[0].store.tiers).dense["anchors"].lengths[:, 0].tolist()
        assert rows == anchors and planes["policy", "routes"] > 0
        assert planes["anchors", "k"] == max(rows) * 2 * heads * layers * 32 * 4, (
            "dense rows are as long as the longest"
        )
        tersekv.save(cache, tmp_path / "cache.safetensors", llama)
        again = tersekv.load(tmp_path / "cache.safetensors", llama)
        for one in (cache, again):
            one.batch_select_indices(torch.tensor([1, 1]))
        assert torch.equal(forward(llama, cache, ids[:, :1]), forward(llama, again, ids[:, :1]))
    assert again.get_seq_length() == 421


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vq policy=anchors permille=1001", "Allowed: 0 to 1000"),
        ("vq policy=anchors score=keys", 'Did you mean "key"'),
        ("vq policy=anchors recent=0", "Give at least 1"),
        ("vq policy=anchors shuffle=-1", "shuffle=-1 is no seed"),
    ],
)
def test_what_a_spec_cannot_be(spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make(spec)


def test_without_queries_it_says_what_it_needs() -> None:
    _, k, v = tokens(300)
    with pytest.raises(InputError, match=r"needs the queries of all tokens. Run in"):
        make("vq policy=anchors").append(k, v, None)


@pytest.fixture(scope="module")
def real() -> dict[int, Seen]:
    """Some layers of SmolLM2 on 700 tokens, in fp32."""
    try:
        loaded = load("smollm2", "float32")
    except ModelError as error:
        pytest.skip(f"smollm2 cannot be had here: {error}")
    found: dict[int, Seen] = {}
    with observed(loaded.model, lambda seen: found.__setitem__(seen.layer, seen) if seen.layer % 6 == 5 else None):
        loaded.model(input_ids=prompt_ids(loaded.tokenizer, None)[:, :700], use_cache=False, logits_to_keep=1)
    return found


@pytest.mark.model
@pytest.mark.parametrize("score", SCORES)
def test_anchors_beat_random_tokens_on_real_keys_and_values(real: dict[int, Seen], score: str) -> None:
    """Error of attention outputs at one bit, 2 % anchors: lower than with as many random ones, over the layers."""
    errors = dict.fromkeys(("", " shuffle=1", " shuffle=2"), 0.0)
    for seen in real.values():
        for word in errors:
            spec = parse(f"vq policy=anchors score={score} permille=20{word} prefill=packed")
            store = Store(spec, 1, 3, D, torch.float32, torch.device("cpu"))
            out = store.extend(seen.q, seen.k, seen.v, None, seen.scale, "exact")
            wrong = (out - seen.exact)[:, :, 256:].norm(dim=-1) / seen.exact[:, :, 256:].norm(dim=-1)
            errors[word] += wrong.mean().item()
    assert errors[""] < 0.9 * min(errors[" shuffle=1"], errors[" shuffle=2"])
