"""Metrics of an evaluation against values that are computed by hand, and what observing a model changes: nothing."""

from math import exp, log, sqrt

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tersekv import InputError, parse
from tersekv.eval.fidelity import Found, cosine, fidelity, logit_error, relative_error
from tersekv.eval.logits import Divergence, arms, compare
from tersekv.eval.statistics import difference, interval
from tersekv.eval.tensors import _one_metric
from tersekv.hf.capture import Seen, observed
from tersekv.reports.differences import against


def test_divergence_by_hand() -> None:
    dense, packed = torch.tensor([[0.0, log(3.0)], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [log(3.0), 0.0]])
    divergence = Divergence()
    divergence.add(dense, packed, torch.tensor([1, 1]))
    got = divergence.summary()
    kl = [0.25 * log(0.25 / 0.5) + 0.75 * log(0.75 / 0.5), 0.5 * log(0.5 / 0.75) + 0.5 * log(0.5 / 0.25)]
    assert got["kl_mean"] == pytest.approx(sum(kl) / 2, abs=1e-6)
    assert got["kl_max"] == pytest.approx(max(kl), abs=1e-6)
    assert got["top1"] == 0.5  # equal logits: torch takes the first, and packed swaps the first row's order
    assert got["perplexity"] == pytest.approx(exp((log(2) + log(4)) / 2), abs=1e-5)
    assert got["positions"] == 2


def test_chunking_does_not_change_the_result(llama: PreTrainedModel) -> None:
    ids = torch.randint(1, 97, (1, 400))
    rows = []
    for chunk in (400, 77):
        chosen = arms(llama, [parse("rotated:bits=2 prefill=packed"), parse("none:dtype=fp32 prefill=packed")])
        compare(llama, ids, chosen, chunk, 128)
        rows.append([arm.divergence.summary() for arm in chosen])
    for whole, parts in zip(*rows, strict=True):
        assert whole["positions"] == 400 - 1 - 128
        assert parts == pytest.approx(whole, rel=2e-3, abs=1e-6)
    dense, packed, exact = rows[0]
    assert dense["kl_mean"] == 0 and dense["top1"] == 1
    assert exact["kl_mean"] < 1e-6 < packed["kl_mean"]
    assert exact["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-5)


def test_tensor_metrics_by_hand() -> None:
    x, got = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 4.5], [0.0, 0.0]])
    assert relative_error(x, got).tolist() == pytest.approx([0.1, 0.0])
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])).item() == pytest.approx(sqrt(0.5))
    # Attention 1/4 and 3/4 on two tokens with errors 6 and 4: their mean is 4.5, which a softmax does not see.
    logits, wrong = torch.tensor([0.0, log(3.0), 9.0]), torch.tensor([6.0, 4.0, 100.0])
    seen = torch.tensor([True, True, False])
    assert logit_error(logits, logits + wrong, seen).item() == pytest.approx(sqrt(0.25 * 1.5**2 + 0.75 * 0.5**2))
    assert logit_error(logits, logits + 7, seen).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("policy", ["window", "anchors permille=50", "queryaware"])
def test_keys_are_compared_with_what_they_came_as(policy: str) -> None:
    """Under `anchors` tokens of a block are no neighbours: their errors are still those of the codec, 8 bits."""
    q, k, v = torch.randn(1, 4, 500, 64), torch.randn(1, 2, 500, 64), torch.randn(1, 2, 500, 64)
    found = fidelity(Seen(0, q, k, v, 0.125, q), parse(f"rotated:bits=8 policy={policy} prefill=packed"))
    assert found["k_error"].values.max() < 0.05 and found["v_error"].values.max() < 0.05


def test_the_worst_head_by_hand() -> None:
    # Two layers of two heads and two tokens; heads' means .9, .5, .8, .7: 5 % of heads are below .5 + .15 * .2.
    values = np.array([[[1.0, 0.8], [0.9, 0.1]], [[0.7, 0.9], [0.7, 0.7]]])
    layers = [(3 + n, Found(x, np.array([[6, 7], [6, 7]]))) for n, x in enumerate(values)]
    found = _one_metric("self_cosine", layers)
    assert found["mean"] == 0.725 and found["worst"] == 0.1 and found["where"] == {"layer": 3, "head": 1, "token": 7}
    assert found["worst_head"] == 0.5 and found["head_tail"] == pytest.approx(0.53)
    assert _one_metric("k_error", layers)["worst_head"] == 0.9


def test_attention_by_own_keys_is_what_it_says() -> None:
    draw = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 2, 128, 64, generator=draw) for _ in range(2))
    spec, seen = parse("rotated:bits=2 sink=0 recent=0 prefill=packed"), Seen(0, k, k, v, 1.0, v)
    stored = []
    for x, codec in ((k, spec.k), (v, spec.v)):
        blocks = x[0].unflatten(1, (-1, 64))
        stored.append(codec.decode(codec.encode(blocks)).flatten(1, 2))
    outputs = []
    for keys, values in ((k[0], v[0]), stored):
        scores = (keys @ keys.mT / 8).masked_fill(torch.ones(128, 128).triu(1).bool(), -torch.inf)
        outputs.append(scores.softmax(-1) @ values)
    wanted = torch.nn.functional.cosine_similarity(*outputs, dim=-1)
    got = fidelity(seen, spec)["self_cosine"].values
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5)
    assert got.min() < 0.9, "two bits must show"
    exact = fidelity(seen, parse("none:dtype=fp32 sink=0 recent=0 prefill=packed"))["self_cosine"].values
    np.testing.assert_allclose(exact, 1, atol=1e-6)


def test_bootstrap_intervals() -> None:
    assert interval([1.0]) is None
    assert interval([2.0] * 5) == (2.0, 2.0)
    found = interval([0.0, 1.0] * 200)
    assert found is not None
    # The mean of 400 coins has a standard deviation of .025: 95 % lie within 1.96 of it.
    assert found == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.006)


def test_differences_are_paired_by_sample() -> None:
    assert difference([3.0, 5.0], [1.0, 3.0]) == {"difference": 2.0, "difference_interval": [2.0, 2.0]}
    assert difference([3.0], [1.0]) == {"difference": 2.0, "difference_interval": None}
    with pytest.raises(ValueError, match="zip"):
        difference([3.0, 5.0], [1.0])
    # Windows differ by more than rows do: one row is worse by an eighth in each, the other better in one, worse in one.
    samples = {"dense": [0.0, 0.0], "intn:bits=4": [0.125, 0.875]}
    samples |= {"intn:bits=3": [0.25, 1.0], "intn:bits=2": [0.25, 0.75]}
    rows = [{"spec": spec, "body_bits": 4.5, "logits": {"1024": {"kl_by_window": x}}} for spec, x in samples.items()]
    record = {"run": {"seed": 0, "logits": {}}, "rows": rows}
    table = against(record, "intn")  # its default is four bits
    found = dict(zip(*(column.cells for column in (table.columns[0], table.columns[2])), strict=True))
    assert [column.header for column in table.columns] == ["less intn:bits=4", "body", "1,024: KL (95 %)"]
    assert found["intn:bits=3"] == "+0.1250 (+0.1250 to +0.1250)"
    assert found["intn:bits=2"] == "+0.0000 (-0.1250 to +0.1250)"
    assert found["dense"] == "-0.5000 (-0.8750 to -0.1250)" and "intn:bits=4" not in found
    with pytest.raises(InputError, match=r'No row "intn:bits=8" to compare with\. Did you mean "intn:bits='):
        against(record, "intn:bits=8")
    with pytest.raises(InputError, match="holds no samples to pair"):
        against({"run": {"speed": {}}, "rows": [{"spec": "intn:bits=4"}]}, "intn:bits=4")


def test_observing_shows_what_attention_got_and_changes_nothing(any_model: PreTrainedModel) -> None:
    ids, shown = torch.randint(1, 97, (1, 90)), list[Seen]()
    before = any_model(input_ids=ids, use_cache=False).logits
    with observed(any_model, shown.append):
        during = any_model(input_ids=ids, use_cache=False).logits
    assert torch.equal(before, during) and torch.equal(before, any_model(input_ids=ids, use_cache=False).logits)
    sliding = any_model.config.model_type.startswith("gemma3")
    assert [seen.layer for seen in shown] == ([1] if sliding else [0, 1, 2])
    for seen in shown:
        torch.testing.assert_close(seen.exact, seen.out, rtol=1e-4, atol=1e-5)
