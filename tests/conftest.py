"""Shapes are checked in tests only: jaxtyping's hook wraps every function of the package."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook("tersekv", "beartype.beartype")

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tersekv.calibrate.session import Settings
from tersekv.models import LoadedModel

SMALL = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def inference() -> Iterator[None]:
    """Without gradients; the number of threads is afterwards what it was."""
    before = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def make_model(family: str) -> PreTrainedModel:
    """A random model of three layers; Gemma 3 with a sliding window of 32 on two of them, Qwen 2 without head_dim."""
    torch.manual_seed(0)
    if family == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=3, head_dim=32))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SMALL, num_hidden_layers=3))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SMALL, num_hidden_layers=3, head_dim=32))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**SMALL, num_hidden_layers=3, head_dim=32, sliding_window=None))
    else:
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        sizes = {"num_hidden_layers": 3, "head_dim": 32, "sliding_window": 32, "layer_types": kinds}
        model = Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **sizes))
    return model.eval().requires_grad_(False)


FAMILIES = ("llama", "qwen2", "gemma3")


@pytest.fixture(scope="session", params=FAMILIES)
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 97, (2, 300))


class Letters:
    """A tokenizer for tests: one token a character."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> object:
        return type("Encoding", (), {"input_ids": [ord(c) % 96 + 1 for c in text]})()


@pytest.fixture
def calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of a random model, on a text of letters."""
    monkeypatch.setattr(
        "tersekv.calibrate.session.load",
        lambda *_: LoadedModel(make_model("llama"), Letters(), "tiny", "random weights", "none"),
    )
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, and runs. " * 60)
    return Settings("tiny", text, "none", windows=5, tokens=260, follow=1)
