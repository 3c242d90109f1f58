"""`tersekv try` on a tiny model: what its table says must be what the cache did."""

import pytest
import torch
from conftest import make_model

from tersekv import SpecError, parse
from tersekv.models import LoadedModel
from tersekv.prompt import project_text, prompt_ids
from tersekv.registry import POLICIES
from tersekv.terminal import Stages, to_text
from tersekv.trial import run, split_words


class Letters:
    """One token a character; no chat template."""

    def __call__(self, text: str, **_: object) -> object:
        ids = [ord(c) % 96 + 1 for c in text]
        return type("Encoding", (), {"input_ids": torch.tensor([ids]) if _.get("return_tensors") else ids})()

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(chr(31 + i) for i in ids)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel(make_model("llama"), Letters(), "tiny", "random weights", "none")


def test_rows_agree_with_what_was_generated(loaded: LoadedModel) -> None:
    specs = [parse("none:dtype=fp32"), parse("terse4"), parse("terse2 recent=16")]
    with Stages() as stages:
        trial = run(loaded, specs, "a prompt of letters " * 20, 40, stages)
    dense, exact, four, two = trial.rows
    assert [row.tokens for row in trial.rows] == [trial.prompt_tokens + 39] * 4
    assert exact.text == dense.text and exact.kl < 1e-6 and exact.top1 == 1
    assert 0 < four.kl < two.kl
    assert dense.ratio == 1 and exact.ratio < 1.01 < four.ratio < two.ratio
    shown = to_text(trial, 160)
    assert "terse4" in shown and f"{two.kl:.4f}" in shown


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_can_be_tried(policy: str, loaded: LoadedModel) -> None:
    codec = "direction:bits=8" if policy == "wholesequence" else "rotated:bits=8"
    options = {"streaming": " keep=200", "snapkv": " keep=200"}.get(policy, "")
    with Stages() as stages:
        trial = run(loaded, [parse(f"{codec} policy={policy}{options}")], "a prompt of letters " * 20, 70, stages)
    _, row = trial.rows
    assert row.tokens == trial.prompt_tokens + 69 and row.kl < (0.5 if options else 0.01)


def test_words_are_specs_and_a_last_prompt() -> None:
    assert split_words([]) == ([parse("terse4")], None)
    assert split_words(["terse4", "k=none v=none", "Tell me a story"])[1] == "Tell me a story"
    assert split_words(["none of the above is right"]) == ([parse("terse4")], "none of the above is right")
    assert len(split_words(["terse4", "rotated:bits=2 sink=0", "intn"])[0]) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tersse4"], "Did you mean"),
        (["hello"], "--prompt"),
        (["rotated:bits=11"], "range"),
        (["terse4 resent=3"], 'Did you mean "recent"'),
        (["why is this", "terse4"], "Unknown codec"),
    ],
)
def test_other_words_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        split_words(words)


def test_the_default_prompt_is_the_projects_documents(loaded: LoadedModel) -> None:
    assert "tersekv" in project_text()
    ids = prompt_ids(loaded.tokenizer, None)
    assert 1960 < ids.shape[1] < 2200
