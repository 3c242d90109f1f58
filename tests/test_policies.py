"""Selection policies: what is held, what it is worth, and that any codec can pack it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hosting import forward
from torch import Tensor
from transformers import PreTrainedModel

import tersekv
from tersekv import InputError
from tersekv.ops.attention import attend_dense
from tersekv.spec import parse
from tersekv.store import Store

H, D, SCALE = 2, 64, 0.125
NONE = np.zeros(1, dtype=np.int64)
CODECS = ["none:dtype=fp32", "rotated:bits=4", "kivi:bits=4"]


def make(spec: str, b: int = 1) -> Store:
    return Store(parse(spec), b, H, D, torch.float32, torch.device("cpu"))


def tokens(n: int, b: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(b, 2 * H, n, D), torch.randn(b, H, n, D), torch.randn(b, H, n, D)


def counts(store: Store) -> list[int]:
    return [int(tier.lengths[0, 0]) for tier in store.tiers.all().values()]


@pytest.mark.parametrize("codec", CODECS)
def test_streaming_attends_to_sink_and_newest_and_frees_the_rest(codec: str) -> None:
    store, (q, k, v) = make(f"{codec} policy=streaming sink=4 recent=64 keep=200"), tokens(1000)
    store.append(k, v, NONE)
    sink, recent, packed = counts(store)
    assert sink == 4 and 200 <= recent + packed < 264 and packed > 0
    assert len(store.tiers.packed["packed"].pool) == H * packed // 64
    assert store.lengths.tolist() == [1000]
    newest = 1000 - recent - packed
    kept = store.decoded()
    assert kept.positions[0, 0].tolist() == [*range(4), *range(newest, 1000)]
    found = store.extend(q[:, :, :1], k[:, :, :1], v[:, :, :1], NONE, SCALE, "exact")
    everything = [torch.cat((x, new[:, :, :1]), 2) for x, new in ((kept.k, k), (kept.v, v))]
    want, _ = attend_dense(q[:, :, :1], *everything, torch.full((1, H), everything[0].shape[2]), SCALE)
    assert torch.allclose(found, want, atol=2e-5)


def test_streaming_holds_the_same_however_the_text_came() -> None:
    _, k, v = tokens(700)
    spec, stores = "rotated:bits=3 policy=streaming keep=150", []
    for chunk in (700, 90, 1):
        store = make(spec)
        for some_k, some_v in zip(k.split(chunk, 2), v.split(chunk, 2), strict=True):
            store.append(some_k, some_v, NONE)
        stores.append(store)
    for store in stores[1:]:
        assert counts(store) == counts(stores[0])
        assert torch.equal(store.decoded().k, stores[0].decoded().k)
        assert (store.tiers.evicted.below == stores[0].tiers.evicted.below).all()


def test_what_was_evicted_cannot_come_back() -> None:
    store, (_, k, v) = make("rotated:bits=4 policy=streaming keep=100"), tokens(500)
    store.append(k, v, NONE)
    below = int(store.tiers.evicted.below[0, 0])
    before = store.decoded()
    with pytest.raises(InputError, match=f"cannot return to its first {below - 1} tokens"):
        store.crop(np.array([below - 1]))
    assert torch.equal(store.decoded().k, before.k), "a failed crop changes nothing"
    store.crop(np.array([below + 10]))
    assert store.lengths.tolist() == [below + 10]


@pytest.mark.parametrize("codec", CODECS)
def test_snapkv_keeps_what_the_last_queries_look_for(codec: str) -> None:
    """Six needles in 900 tokens, others for each KV head: found by its votes, lost by a window of the same size."""
    q, k, v = tokens(900)
    needles = torch.stack([torch.randperm(800)[:6] + 20 for _ in range(H)])
    for head in range(H):
        direction = torch.nn.functional.normalize(torch.randn(D), dim=0)
        k[0, head, needles[head]] += 20 * direction
        q[0, 2 * head : 2 * head + 2, -32:] += 10 * direction
        v[0, head, needles[head]] += 5
    outputs = {}
    for policy in ("window", "snapkv keep=160", "streaming keep=160"):
        store = make(f"{codec} policy={policy}")
        store.extend(q, k, v, NONE, SCALE)
        outputs[policy] = store.extend(q[:, :, -1:], k[:, :, :1], v[:, :, :1], NONE, SCALE, "exact")
        if policy.startswith("snapkv"):
            assert sum(counts(store)) == 160 + 1 and store.lengths.tolist() == [901]
    error = {
        policy: float((out - outputs["window"]).norm() / outputs["window"].norm()) for policy, out in outputs.items()
    }
    assert error["snapkv keep=160"] < 0.15 < 0.5 < error["streaming keep=160"]


def test_snapkv_of_a_padded_batch_is_its_sequences_alone() -> None:
    lengths, n = [400, 100, 250], 400
    q, k, v = tokens(n, 3)
    spec = "rotated:bits=4 policy=snapkv keep=120"
    together = make(spec, 3)
    together.extend(q, k, v, n - np.array(lengths), SCALE)
    assert together.lengths.tolist() == lengths
    for row, length in enumerate(lengths):
        alone = make(spec)
        alone.extend(*(x[row : row + 1, :, n - length :] for x in (q, k, v)), NONE, SCALE)
        assert (alone.tiers.evicted.count == together.tiers.evicted.count[row]).all()
        for name, tier in alone.tiers.dense.items():
            count = int(tier.lengths[0, 0])
            mine = together.tiers.dense[name]
            assert torch.equal(mine.k[row, :, :count], tier.k[0, :, :count])
            assert torch.equal(mine.positions[row, :, :count], tier.positions[0, :, :count])


def test_snapkv_without_queries_says_what_it_needs() -> None:
    store, (_, k, v) = make("rotated:bits=4 policy=snapkv keep=100"), tokens(300)
    with pytest.raises(InputError, match=r"needs the prompt's queries. Run inside"):
        store.append(k, v, NONE)


@pytest.mark.parametrize("policy", ["streaming keep=128", "snapkv keep=128"])
def test_in_a_model_saved_loaded_and_selected(policy: str, llama: PreTrainedModel, tmp_path: Path) -> None:
    ids = torch.randint(1, 97, (2, 420))
    with tersekv.attached(llama):
        cache = tersekv.cache(llama, f"rotated:bits=4 policy={policy}")
        forward(llama, cache, ids)
        report = cache.report()
        assert report.held < 0.5 * report.dense
        tersekv.save(cache, tmp_path / "cache.safetensors", llama)
        again = tersekv.load(tmp_path / "cache.safetensors", llama)
        for one in (cache, again):
            one.batch_select_indices(torch.tensor([1, 1]))
        assert torch.equal(forward(llama, cache, ids[:, :1]), forward(llama, again, ids[:, :1]))
    assert again.get_seq_length() == 421
