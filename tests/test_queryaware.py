"""`policy=queryaware`: keys encoded for the queries that read them, in pages that nobody needs to read differently."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hosting import forward
from torch import Tensor
from transformers import PreTrainedModel

import tersekv
from tersekv import SpecError
from tersekv.codecs.rotated import Rotated
from tersekv.hf.layer import PackedLayer
from tersekv.ops.feedback import DAMPING
from tersekv.spec import parse, parse_codec
from tersekv.store import Store

H, D, SCALE = 2, 64, 0.125
NONE = np.zeros(1, dtype=np.int64)
CODECS = ["rotated:bits=2", "rotated:bits=4", "trellis:bits=1,scale=unbiased", "trellis:bits=3"]


def tokens(n: int, b: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Queries that look along few directions, as those of real models do."""
    few = torch.randn(D, 8) @ torch.randn(8, D)
    q = torch.randn(b, 2 * H, n, D) @ few / 8 + 0.3 * torch.randn(b, 2 * H, n, D)
    return q, torch.randn(b, H, n, D), torch.randn(b, H, n, D)


def make(spec: str, b: int = 1) -> Store:
    return Store(parse(spec), b, H, D, torch.float32, torch.device("cpu"))


def filled(spec: str, qkv: tuple[Tensor, Tensor, Tensor], chunk: int) -> Store:
    store = make(spec)
    for q, k, v in zip(*(x.split(chunk, 2) for x in qkv), strict=True):
        store.append(k, v, NONE, (q, SCALE))
    return store


def pages(store: Store) -> Tensor:
    """(b, h, blocks, bytes), whatever the order that pages came in."""
    tier = store.tiers.packed["packed"]
    return tier.linear_pool()[tier.table.long()]


def seen_error(codec: Rotated, k: Tensor, packed: Tensor, a: Tensor) -> float:
    """e A e' of decoded keys, relative to the keys' without their block mean."""
    error, size = packed - k, k - k.mean(-2, keepdim=True)
    return float(((error @ a) * error).sum() / ((size @ a) * size).sum())


@pytest.mark.parametrize("text", CODECS)
def test_queries_see_less_of_the_error_at_the_same_bytes(text: str) -> None:
    codec = parse_codec(text, "k")
    assert isinstance(codec, Rotated)
    q, k, _ = tokens(512)
    moments = (x := codec.fold_query(q[0, 0])).mT @ x
    a = q[0, 0].mT @ q[0, 0]
    blocks = k[0, 0].unflatten(0, (-1, 64))
    plain, aware = codec.encode(blocks), codec.encode_for(blocks, codec.asked(moments))
    assert aware.data.shape == plain.data.shape
    errors = [seen_error(codec, blocks, codec.decode(packed), a) for packed in (plain, aware)]
    assert errors[1] < 0.7 * errors[0], errors
    flat = [float((codec.decode(packed) - blocks).square().sum()) for packed in (plain, aware)]
    assert flat[1] > flat[0]  # not a better code in itself


def test_where_queries_look_everywhere_nothing_is_gained() -> None:
    codec, k = parse_codec("rotated:bits=3", "k"), torch.randn(64, D)
    moments = torch.eye(D, dtype=torch.float64)
    assert torch.equal(codec.encode_for(k, codec.asked(moments)).data, codec.encode(k).data)


@pytest.mark.parametrize("text", CODECS)
def test_the_scale_is_unbiased_in_the_metric_of_the_queries(text: str) -> None:
    codec = parse_codec(f"{text},mean=none,scale_kind=fp16", "k")
    q, k, _ = tokens(64)
    y = codec.fold_query(q[0, 0])
    moments = (y.mT @ y).double()
    a = moments / moments.diagonal().mean() + DAMPING * torch.eye(D)
    k, got = (
        codec.fold_query(x).double() for x in (k[0, 0], codec.decode(codec.encode_for(k[0, 0], codec.asked(moments))))
    )
    assert torch.allclose((k @ a * got).sum(-1), (k @ a * k).sum(-1), rtol=2e-3)


def test_zero_keys_stay_zero_and_outliers_finite() -> None:
    codec = parse_codec("rotated:bits=2,mean=none", "k")
    x = torch.zeros(64, D)
    x[1, 3], x[2] = 3e4, 1e-6
    got = codec.decode(codec.encode_for(x, codec.asked(torch.ones(D, D))))
    assert not got[0].any() and got.isfinite().all()
    assert torch.equal(
        codec.encode_for(x, codec.asked(torch.zeros(D, D))).data, codec.encode(x).data
    )  # nobody has asked yet


@pytest.mark.parametrize("text", ["rotated:bits=2", "trellis:bits=2"])
@pytest.mark.parametrize("observe", [1, 200, 512])
def test_any_chunking_gives_the_same_bytes(text: str, observe: int) -> None:
    qkv, spec = tokens(700), f"{text} policy=queryaware observe={observe}"
    whole = filled(spec, qkv, 700)
    for chunk in (133, 1):
        other = filled(spec, qkv, chunk)
        assert torch.equal(pages(whole), pages(other))
        for beside in ("asked", "factors"):
            assert torch.equal(*(store.tiers.packed["packed"].tensors()[beside] for store in (whole, other)))
    assert whole.tiers.tensors()["counted"].tolist() == [[observe, observe]]


def test_bytes_depend_on_what_was_seen_alone() -> None:
    """Later queries and keys change no block that had left the recent window before them."""
    spec, (q, k, v) = "rotated:bits=2 policy=queryaware", tokens(600)
    first = pages(filled(spec, (q[:, :, :260], k[:, :, :260], v[:, :, :260]), 260))
    other = [torch.cat((x[:, :, :260], torch.randn_like(x[:, :, 260:])), 2) for x in (q, k, v)]
    then = pages(filled(spec, (other[0], other[1], other[2]), 600))
    assert first.shape[2] == 3 and torch.equal(then[:, :, :3], first)
    changed = torch.cat((torch.randn_like(q[:, :, :190]), q[:, :, 190:]), 2)
    assert not torch.equal(pages(filled(spec, (changed, k, v), 600))[:, :, :3], first)


def test_rows_of_different_length_are_as_if_alone() -> None:
    spec, (q, k, v) = "rotated:bits=3 policy=queryaware observe=150", tokens(500, b=2)
    store, padding = make(spec, 2), np.array([0, 170])
    for start in (0, 250):
        now = slice(start, start + 250)
        pads = np.clip(padding - start, 0, 250)
        store.append(k[:, :, now], v[:, :, now], pads, (q[:, :, now], SCALE))
    tier = store.tiers.packed["packed"]
    for row, pad in enumerate(padding):
        alone = filled(spec, (q[row : row + 1, :, pad:], k[row : row + 1, :, pad:], v[row : row + 1, :, pad:]), 99)
        blocks = int(tier.lengths[row, 0]) // 64
        assert torch.equal(pages(store)[row, :, :blocks], pages(alone)[0])


def test_queries_are_looked_at_first_and_not_later() -> None:
    (q, k, v), spec = tokens(400), "rotated:bits=3 policy=queryaware observe=128"
    store, whole = make(spec), filled(spec, (q, k, v), 400)
    store.append(k[:, :, :128], v[:, :, :128], NONE, (q[:, :, :128], SCALE))
    store.append(k[:, :, 128:], v[:, :, 128:], NONE)
    assert torch.equal(pages(store), pages(whole))
    store.crop(np.array([90]))
    store.append(k[:, :, 90:], v[:, :, 90:], NONE)
    assert store.lengths.tolist() == [400]


def test_where_no_queries_are_shown_keys_are_those_of_the_window() -> None:
    (_, k, v), stores = tokens(400), [make(f"rotated:bits=3{policy}") for policy in (" policy=queryaware", "")]
    for store in stores:
        store.append(k, v, NONE)
    assert torch.equal(pages(stores[0]), pages(stores[1]))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("rotated policy=queryaware observe=0", "Allowed: 1 to 8192"),
        ("kivi policy=queryaware", "a codec such as rotated or trellis, not Kivi"),
    ],
)
def test_what_it_cannot_do_is_said(spec: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        make(spec)


def test_in_a_model_decoded_saved_loaded_and_selected(llama: PreTrainedModel, tmp_path: Path) -> None:
    ids = torch.randint(1, 97, (2, 330))
    with tersekv.attached(llama):
        cache = tersekv.cache(llama, "rotated:bits=3 policy=queryaware observe=150")
        forward(llama, cache, ids[:, :200])
        for i in range(200, 300):
            forward(llama, cache, ids[:, i : i + 1])
        assert cache.report().planes()["packed", "asked"] == sum(2 * 2 * h * d * d for h, d in _heads(cache))
        assert cache.report().planes()["packed", "factors"] == sum(2 * 4 * h * d for h, d in _heads(cache))
        tersekv.save(cache, tmp_path / "c", llama)
        again = tersekv.load(tmp_path / "c", llama)
        for one in (cache, again):
            one.batch_select_indices(torch.tensor([1, 1]))
        assert torch.equal(forward(llama, cache, ids[:, 300:]), forward(llama, again, ids[:, 300:]))
        rest = [
            torch.cat([layer.opened().tiers.packed["packed"].linear_pool() for layer in _layers(x)])
            for x in (cache, again)
        ]
    assert torch.equal(rest[0], rest[1])


def _layers(cache: tersekv.PackedCache) -> list[PackedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, PackedLayer)]


def _heads(cache: tersekv.PackedCache) -> list[tuple[int, int]]:
    return [(like.shape[1], like.shape[3]) for like in (layer.opened().like for layer in _layers(cache))]
