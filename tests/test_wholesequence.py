"""The form of a whole sequence: it is nd-kv-quant's arithmetic, and nothing else of a cache changes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hosting import forward
from torch import Tensor
from transformers import PreTrainedModel

import tersekv
from tersekv import SpecError
from tersekv.describe import info
from tersekv.eval.fidelity import fidelity
from tersekv.hf.capture import Seen
from tersekv.spec import parse
from tersekv.store import Store

H, D, SCALE = 2, 64, 0.125
ORIGINAL = "direction:bits=3,norm=linear8 policy=wholesequence"


def make(spec: str = ORIGINAL, b: int = 1) -> Store:
    return Store(parse(f"{spec} prefill=packed"), b, H, D, torch.float32, torch.device("cpu"))


def tokens(n: int, b: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(b, 2 * H, n, D), torch.randn(b, H, n, D), torch.randn(b, H, n, D)


def published(x: np.ndarray, bits: int) -> np.ndarray:
    """One head (t, d) as the original has it: unit vectors by column, norms in 8 bits, both over all tokens."""

    def uniform(values: np.ndarray, bits: int) -> np.ndarray:
        low, high = values.min(0), values.max(0)
        step = (high - low) / (2**bits - 1)
        return np.round((values - low) / step) * step + low

    norm = np.linalg.norm(x, axis=1)
    directions = uniform(x / norm[:, None], bits)
    return uniform(norm, 8)[:, None] * directions / np.linalg.norm(directions, axis=1, keepdims=True)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_is_the_published_arithmetic(bits: int) -> None:
    """All tokens but sink and window, however they came; 1e-5 is fp32's rounding, a step of a grid is 1e-2."""
    (q, k, v), spec = tokens(500), f"direction:bits={bits},norm=linear8 policy=wholesequence"
    for chunk in (500, 60, 1):
        store = make(spec)
        for part in zip(*(x.split(chunk, 2) for x in (q, k, v)), strict=True):
            store.extend(*part, None, SCALE)
        tier = store.tiers.dense["rounded"]
        count = int(tier.lengths[0, 0])
        assert count == 384 and store.lengths.tolist() == [500]
        for found, x in ((tier.decoded().k, k), (tier.decoded().v, v)):
            for head in range(H):
                want = published(x[0, head, 4 : 4 + count].double().numpy(), bits)
                near = np.isclose(found[0, head].double().numpy(), want, atol=1e-5)
                assert near.mean() > 0.999, "a value on a threshold may fall to either side"


def test_a_later_token_changes_earlier_ones_which_no_stream_can_do() -> None:
    _, k, v = tokens(64 * 3 + 4)
    k[:, :, -64:] = k[:, :, -128:-64]  # which widens no range
    store = make(f"{ORIGINAL} recent=0")
    store.append(k[:, :, :-64], v[:, :, :-64], None)
    before = store.tiers.dense["rounded"].decoded().k
    k[0, 0, -1, 5] = 300.0
    store.append(k[:, :, -64:], v[:, :, -64:], None)
    changed = (store.tiers.dense["rounded"].decoded().k[:, :, :128] - before).abs()
    assert changed[0, 0].max() > 0.5 and changed[0, 1].max() < 1e-5


def test_a_ragged_batch_is_its_sequences_alone() -> None:
    (_, k, v), pads = tokens(400, 2), np.array([0, 150])
    both = make(b=2)
    both.append(k, v, pads)
    for row, pad in enumerate(pads):
        alone = make()
        alone.append(k[row : row + 1, :, pad:], v[row : row + 1, :, pad:], None)
        length = int(alone.lengths[0])
        assert torch.equal(alone.decoded().k[0], both.decoded().k[row, :, :length])


def test_in_a_model_it_saves_nothing_and_is_read_rounded(llama: PreTrainedModel, tmp_path: Path) -> None:
    ids = torch.randint(1, 97, (1, 300))
    with torch.inference_mode(), tersekv.attached(llama):
        packed = tersekv.cache(llama, f"{ORIGINAL} prefill=packed")
        forward(llama, packed, ids)
        report = packed.report()
        assert report.held >= report.dense
        tersekv.save(packed, tmp_path / "cache.safetensors", llama)
        again = tersekv.load(tmp_path / "cache.safetensors", llama)
        one = torch.randint(1, 97, (1, 1))
        exact = tersekv.cache(llama, "none:dtype=fp32 prefill=packed")
        forward(llama, exact, ids)
        out = forward(llama, packed, one)
        assert torch.equal(forward(llama, again, one), out)
        assert not torch.allclose(forward(llama, exact, one), out, atol=1e-4)
        packed.crop(-201)
        assert packed.get_seq_length() == 100


def test_it_is_measured_like_pages() -> None:
    q, k, v = tokens(400)
    seen = Seen(0, q, k, v, SCALE, q)
    errors = {
        spec: fidelity(seen, parse(f"direction:bits=3{spec} prefill=packed"))["k_error"].values.mean()
        for spec in ("", " policy=wholesequence", ",norm=linear8 policy=wholesequence")
    }
    # Of Gaussian keys the range over 320 tokens is a third wider than over 64.
    assert 1.1 < errors[" policy=wholesequence"] / errors[""] < 1.5
    assert errors[",norm=linear8 policy=wholesequence"] == pytest.approx(errors[" policy=wholesequence"], rel=0.02)


def test_what_it_refuses() -> None:
    for spec in ("direction:norm=linear8", "direction:norm=linear8 policy=hotcold"):
        with pytest.raises(SpecError, match="for evaluation only: no block can be encoded so"):
            make(spec)
    for spec in ("rotated policy=wholesequence", "direction:codebook=shared policy=wholesequence"):
        with pytest.raises(SpecError, match="has no form of a whole sequence"):
            make(spec)
    assert "for evaluation only" in info(ORIGINAL, None, None, None).attention
