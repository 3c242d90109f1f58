"""`tersekv plan`: sizes counted by hand, numbers that are the largest ones that fit, and errors."""

import json
from pathlib import Path

import pytest
import torch
from tiny_model import save_tiny_model
from transformers import LlamaForCausalLM

import tersekv
from tersekv.errors import InputError
from tersekv.hf.cost import sequence_bytes, weight_count
from tersekv.plan import MOST, largest, memory_bytes, plan
from tersekv.registry import PRESETS
from tersekv.spec import parse


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(save_tiny_model(tmp_path / "tiny"))


def test_units_are_decimal_or_binary() -> None:
    assert memory_bytes("80GB") == 80 * 10**9
    assert memory_bytes("1.5 GiB") == 3 * 2**29
    assert memory_bytes("512b") == 512
    for text in ("80", "GB", "80 bananas", "-1GB"):
        with pytest.raises(InputError, match="80GB or 24GiB"):
            memory_bytes(text)


def test_weights_are_those_of_the_loaded_model(folder: str) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    assert weight_count(model.config) == model.num_parameters()


def test_bytes_of_a_sequence_are_those_of_a_cache(folder: str) -> None:
    model, spec = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), parse("terse4")
    cache = tersekv.cache(model, spec)
    with torch.inference_mode(), tersekv.attached(model):
        model(input_ids=torch.ones(1, 700, dtype=torch.int64), past_key_values=cache)
    held, planes = cache.report().held, cache.report().planes()
    numbers = ("positions", "lengths", "counted", "balanced")
    left_out = sum(count for (_, plane), count in planes.items() if plane in numbers)
    assert sequence_bytes(model.config, spec, 700) == held - left_out
    assert left_out < 0.06 * held  # of this tiny model; 8 bytes a token and head at most


def test_what_fits_fits_and_one_token_more_does_not(folder: str) -> None:
    made = plan(folder, "1MiB", 256, 3, 16.0, 0.2)
    free = int(2**20 * 0.8) - made.weights
    config = LlamaForCausalLM.from_pretrained(folder).config
    for room, text in zip(made.rooms, ("none", *PRESETS), strict=True):
        spec = parse(text)
        for tokens, memory in ((room.one_user_tokens, free), (room.shared_tokens, free // 3)):
            assert sequence_bytes(config, spec, tokens) <= memory < sequence_bytes(config, spec, tokens + 1)
        assert room.user_bytes == sequence_bytes(config, spec, 256)
        assert room.users == free // room.user_bytes
    tokens = [room.one_user_tokens for room in made.rooms]
    assert tokens == sorted(tokens)
    assert json.loads(json.dumps(made.as_dict()))["users"] == 3


def test_quality_comes_from_the_records(folder: str) -> None:
    rooms = {room.spec: room for room in plan(folder, "1MiB", None, 1, 16.0, 0.1).rooms}
    record = json.loads((Path(__file__).parents[1] / "results" / "models" / "smollm2.json").read_text())
    kl = next(row["logits"]["1024"]["kl_mean"] for row in record["rows"] if row["spec"] == str(parse("terse3")))
    assert rooms["terse3"].kl["smollm2"] == kl


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("1KiB", None, 1, 16.0, 0.1), "weights at 16 bits, but 1KiB"),
        (("1MiB", 0, 1, 16.0, 0.1), "--context 0: this model takes 1 to"),
        (("1MiB", None, 0, 16.0, 0.1), "--users 0"),
        (("1MiB", None, 1, 40.0, 0.1), "--weight-bits 40"),
        (("1MiB", None, 1, 16.0, 1.0), "--reserve 1"),
    ],
)
def test_what_cannot_be_planned_is_said(
    folder: str, options: tuple[str, int | None, int, float, float], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        plan(folder, *options)


def test_a_cache_that_never_grows_fits_any_number_of_tokens() -> None:
    assert MOST <= largest(lambda tokens: 5, 10) <= 2 * MOST
    assert largest(lambda tokens: 5, 4) == 0
    assert largest(lambda tokens: 3 * tokens, 100) == 33
