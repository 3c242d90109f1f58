"""The reference attention against fp64 softmax, on nasty shapes, with poisoned memory."""

import pytest
import torch
from torch import Tensor

from tersekv.ops import Pages, attend_causal, attend_dense, attend_pages, merge
from tersekv.spec import parse
from tersekv.testing import sample

# A fp32 softmax over t terms of size s is off by at most a few eps * s * log2(t); 64 covers every shape below.
TOLERANCE = 64 * torch.finfo(torch.float32).eps


def exact(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """fp64, one (sequence, query head) at a time."""
    b, hq, n, d = q.shape
    g = hq // k.shape[1]
    out, lse = torch.zeros(b, hq, n, d, dtype=torch.float64), torch.full((b, hq, n), -torch.inf, dtype=torch.float64)
    for i in range(b):
        for j in range(hq):
            t = int(lengths[i, j // g])
            if t == 0:
                continue
            scores = q[i, j].double() @ k[i, j // g, :t].double().T * scale
            lse[i, j] = scores.logsumexp(-1)
            out[i, j] = scores.softmax(-1) @ v[i, j // g, :t].double()
    return out, lse


def near(part: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor], size: float) -> None:
    assert torch.isfinite(part[0]).all()
    assert (part[0] - whole[0]).abs().max() <= TOLERANCE * size * max(whole[0].abs().max().item(), 1)
    seen = torch.isfinite(whole[1])
    assert torch.equal(torch.isfinite(part[1]), seen)
    difference = (part[1] - whole[1])[seen].abs()
    assert not len(difference) or difference.max() <= TOLERANCE * size * 10


@pytest.mark.parametrize("g", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
def test_dense_ragged_and_poisoned(d: int, g: int) -> None:
    b, h, n, t = 3, 2, 2, 65
    q, k, v = torch.randn(b, h * g, n, d), torch.randn(b, h, t, d), torch.randn(b, h, t, d)
    lengths = torch.tensor([[0, 1], [63, 64], [65, 65]])
    beyond = torch.arange(t) >= lengths[..., None]
    k[beyond], v[beyond] = torch.nan, torch.inf
    near(attend_dense(q, k, v, lengths, d**-0.5), exact(q, k, v, lengths, d**-0.5), 1)


@pytest.mark.parametrize("spec", ["rotated:bits=3", "intn:bits=2,axis=channel", "k=lloydmax:bits=4 v=none:dtype=fp32"])
@pytest.mark.parametrize("d", [64, 80, 128])
def test_pages_ragged_shuffled_and_poisoned(spec: str, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages lie in any order, rows have any number of blocks, unused pages hold NaN bytes."""
    monkeypatch.setattr("tersekv.ops.pages.TILE_VALUES", 7 * 4 * 64 * d)  # three tiles of 7, 7 and 6 blocks
    parsed = parse(spec)
    b, h, g, blocks = 2, 2, 3, 20
    k, v = (torch.stack([sample(d, blocks, 2 * i + j)[:, :, 0].transpose(0, 1) for i in range(b)]) for j in range(2))
    packed_k, packed_v = parsed.k.encode(k), parsed.v.encode(v)
    data = torch.cat((packed_k.data, packed_v.data), -1).flatten(0, 2)
    place = torch.randperm(len(data) + 5)
    pool = torch.full((len(place), data.shape[1]), 255, dtype=torch.uint8)
    pool[place[: len(data)]] = data
    table = place[: len(data)].view(b, h, blocks).to(torch.int32)
    lengths = torch.tensor([[0, 64], [17 * 64, blocks * 64]])
    table[torch.arange(blocks) * 64 >= lengths[..., None]] = -1
    layouts, recipes = (packed_k.layout, packed_v.layout), (parsed.k.recipe(d), parsed.v.recipe(d))
    q = torch.randn(b, h * g, 2, d)
    out, lse = attend_pages(parsed.k.fold_query(q), Pages(pool, table, lengths, *layouts, *recipes), d**-0.5)
    dense_k, dense_v = parsed.k.decode(packed_k).flatten(2, 3), parsed.v.decode(packed_v).flatten(2, 3)
    size = (q.norm(dim=-1).max() * dense_k.norm(dim=-1).max() * d**-0.5).item()
    near((parsed.v.unfold_output(out), lse), exact(q, dense_k, dense_v, lengths, d**-0.5), size)


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257])
def test_causal_with_left_padding(n: int) -> None:
    b, h, g, d = 2, 2, 2, 64
    q, k, v = torch.randn(b, h * g, n, d), torch.randn(b, h, n, d), torch.randn(b, h, n, d)
    padding = torch.tensor([0, n // 2])
    out, lse = attend_causal(q, k, v, padding, d**-0.5)
    for i in range(b):
        for query in {0, n // 2, n - 1}:
            first = int(padding[i])
            if query < first:
                assert not out[i, :, query].any() and (lse[i, :, query] == -torch.inf).all()
                continue
            row = (
                q[i : i + 1, :, query : query + 1],
                k[i : i + 1, :, first : query + 1],
                v[i : i + 1, :, first : query + 1],
            )
            whole = exact(*row, torch.full((1, h), query + 1 - first), d**-0.5)
            near((out[i : i + 1, :, query : query + 1], lse[i : i + 1, :, query : query + 1]), whole, 1)


def test_merge_is_attention_over_the_union() -> None:
    b, hq, n, t, d = 2, 4, 3, 100, 64
    q, k, v = torch.randn(b, hq, n, d), torch.randn(b, hq, t, d), torch.randn(b, hq, t, d)
    parts = []
    for start, stop in ((0, 1), (1, 1), (1, 64), (64, 100)):
        lengths = torch.full((b, hq), stop - start)
        parts.append(attend_dense(q, k[:, :, start:stop], v[:, :, start:stop], lengths, 0.1))
    near(merge(parts), exact(q, k, v, torch.full((b, hq), t), 0.1), 1)
    nothing = attend_dense(q, k[:, :, :0], v[:, :, :0], torch.zeros(b, hq, dtype=torch.long), 0.1)
    out, lse = merge([nothing, nothing])
    assert not out.any() and (lse == -torch.inf).all()


def test_one_huge_score_does_not_overflow() -> None:
    q, k, v = torch.full((1, 1, 1, 64), 100.0), torch.full((1, 1, 4, 64), 100.0), torch.randn(1, 1, 4, 64)
    k[:, :, 1:] = -100
    out, _ = attend_dense(q, k, v, torch.tensor([[4]]), 1.0)
    assert torch.allclose(out[0, 0, 0], v[0, 0, 0])
