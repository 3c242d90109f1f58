"""Metrics against hand-computed values, and a whole quality run on a tiny model."""

import json
from math import exp, log
from pathlib import Path

import pytest
import torch
from conftest import make_model
from transformers import PreTrainedModel

from tersekv import InputError, parse
from tersekv.eval.logits import Divergence, arms, compare
from tersekv.eval.run import Result, Run, read_run, run
from tersekv.models import LoadedModel
from tersekv.terminal import Stages, to_text


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
        chosen = arms(llama, [parse("terse2 prefill=packed"), parse("none:dtype=fp32 prefill=packed")])
        compare(llama, ids, chosen, chunk, 128)
        rows.append([arm.divergence.summary() for arm in chosen])
    for whole, parts in zip(*rows, strict=True):
        assert whole["positions"] == 400 - 1 - 128
        assert parts == pytest.approx(whole, rel=2e-3, abs=1e-6)
    dense, packed, exact = rows[0]
    assert dense["kl_mean"] == 0 and dense["top1"] == 1
    assert exact["kl_mean"] < 1e-6 < packed["kl_mean"]
    assert exact["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-5)


class Letters:
    """A tokenizer for tests: one token a character."""

    def __call__(self, text: str, return_tensors: str) -> object:
        ids = torch.tensor([[ord(c) % 96 + 1 for c in text]])
        return type("Encoding", (), {"input_ids": ids})()


def test_a_run_is_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LoadedModel(make_model("llama"), Letters(), "tiny", "random weights", "none")
    monkeypatch.setattr("tersekv.eval.run.load", lambda *_: loaded)
    text, file = tmp_path / "text.txt", tmp_path / "run.toml"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 12)
    file.write_text('model = "tiny"\nspecs = ["terse4", "terse2"]\ntokens = 400\ndtype = "float32"\n')
    with Stages() as stages:
        result = Result(run(read_run(file, text=str(text)), stages))
    record = json.loads(json.dumps(result.as_dict()))
    assert [row["spec"] for row in record["rows"]] == [
        "dense",
        "rotated:bits=4 prefill=packed",
        "rotated:bits=2 prefill=packed",
    ]
    four, two = record["rows"][1:]
    assert four["kl_mean"] < two["kl_mean"] and four["held"] > two["held"]
    assert four["nominal_bits"] == 4 < four["body_bits"] < 5
    assert record["run"]["text"] == "text.txt" and len(record["text_sha256"]) == 64
    assert record["model"] == {"source": "random weights", "revision": "none"}
    assert "rotated:bits=4" in to_text(result.__rich__(), width=80)
    with pytest.raises(InputError, match="has only"):
        run(Run("tiny", str(text), ["terse4"], tokens=10_000), Stages())
    with pytest.raises(InputError, match="nothing to score"):
        run(Run("tiny", str(text), ["terse4"], tokens=129), Stages())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model = 3 = 4", "is not a run file"),
        ('model = "x"\nmodle = "x"', 'unknown field "modle". Did you mean "model"'),
        ('model = "x"', "text, specs missing"),
    ],
)
def test_bad_run_files(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(content)
    with pytest.raises(InputError, match=said):
        read_run(file)
