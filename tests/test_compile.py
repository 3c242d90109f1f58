"""`torch.compile` of a model that attends to a packed cache: the steps of eager decoding. See `compiled_steps`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "compiled_steps.py"


def measured(case: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, SCRIPT, case], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_step_is_one_graph_with_the_logits_of_eager(family: str) -> None:
    """One graph for prompts, one for all steps of any cache."""
    assert measured(f"logits:{family}") == {"error": 0, "graphs": 2, "later": 0, "breaks": []}


def test_layers_that_stay_dense_break_the_graph_and_nothing_else_does() -> None:
    """Their attention rounds otherwise in a compiled model, also without a packed cache."""
    found = measured("logits:gemma3")
    assert found["error"] < 1e-3 and found["later"] == 0
    assert len(found["breaks"]) == 1 and "disable" in found["breaks"][0]


def test_generate_with_a_compiled_forward_pass() -> None:
    assert measured("generate") == {"greedy": True, "sampled": True, "differ": True}


def test_storing_tokens_is_an_effect() -> None:
    found = measured("effects")
    assert found["tokens"] == [50, 50] and "runs the model twice" in found["found"]


def test_errors_are_those_of_eager() -> None:
    found = measured("errors")
    for words, said in zip(("context of 160", "holds sequences 2", "mask shows"), found["found"], strict=True):
        assert words in said
    assert found["tokens"] == 90 and found["error"] == 0


def test_who_asks_for_a_gradient_is_told_why_there_is_none() -> None:
    found = measured("gradients")
    assert found["error"] == 0 and "no gradient" in found["found"]
