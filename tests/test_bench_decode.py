"""`tersekv bench decode` on a model of a few kilobytes."""

import json
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_model import save_tiny_model

from tersekv import InputError
from tersekv.bench.decode import decode
from tersekv.bench.decode_tables import DecodeResult, tables
from tersekv.bench.decoders import Decoder, Decoders
from tersekv.bench.llama_cpp import ALL
from tersekv.errors import TersekvError
from tersekv.terminal import Stages, to_text

SPECS = ["sink=2 recent=16 rotated:bits=4"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


def run(tiny: str, **options: Any) -> dict[str, Any]:
    arguments = {"contexts": [90, 200], "specs": SPECS, "dtypes": ["float32"], "new_tokens": 3, "memory": False}
    return decode(tiny, stages=Stages(), **(arguments | options))


def test_a_record_has_everyone_at_every_context_and_the_memory(tiny: str) -> None:
    record = run(tiny, dtypes=["float32", "bfloat16"], memory=True)
    assert json.loads(json.dumps(record))["bench"] == "decode"
    names = [row["name"] for row in record["rows"] if row["context"] == 200]
    assert names == [row["name"] for row in record["rows"] if row["context"] == 90]
    quanto = [] if "quanto 4 bits" in record["absent"] else ["quanto 4 bits"]
    assert names == ["dense float32", "dense bfloat16", *quanto, "dense float32, attached", *SPECS]
    assert set(record["absent"]) >= {kind.name for kind in ALL}  # a folder has no GGUF file
    for row in record["rows"]:
        assert row["prefill_seconds"] > 0 and row["tokens_per_second"]["median"] > 0 and row["kl"] < 0.1
    assert set(record["rows"][-1]["times_faster_than"]) == set(names) - set(SPECS)
    assert [row["name"] for row in record["memory"]] == ["dense", *SPECS]
    assert all(row["peak"] >= row["loaded"] > row["held"] > 0 for row in record["memory"])
    said = to_text(DecodeResult(record), 120)
    assert "llama.cpp q4_0 did not take part." in said
    assert tables(record)["tokens"].row_count == len(names) + len(record["absent"])


def test_a_cache_that_says_something_else_is_not_timed(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Decoders.at.__wrapped__  # type: ignore[attr-defined]

    def spoilt(self: Decoders, context: int) -> Any:
        (found,) = whole(self, context)
        last = found[-1]
        yield [*found[:-1], Decoder(last.name, "ours", lambda tokens: -50 * last.read(tokens))]

    monkeypatch.setattr(Decoders, "at", contextmanager(spoilt))
    with pytest.raises(TersekvError, match=r"Parity gate: .* KL .* No timing\."):
        run(tiny)


@pytest.mark.parametrize("options", [{"threads": 0}, {"new_tokens": 0}, {"contexts": [3]}, {"contexts": [4096]}])
def test_options_that_cannot_be_are_refused(tiny: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        run(tiny, **options)


def test_threads_are_as_before(tiny: str) -> None:
    before = torch.get_num_threads()
    assert run(tiny, contexts=[20], llama_cpp=False)["absent"]["llama.cpp f16"] == "Left out by --no-llama-cpp."
    assert torch.get_num_threads() == before
