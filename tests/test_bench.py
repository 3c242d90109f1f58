"""The speed harness on tiny sizes: gates close, records are whole, and nobody who is absent is left out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tersekv import InputError
from tersekv.bench import ggml
from tersekv.bench.attend import Grid, attend, grid_of, read_grids
from tersekv.bench.attend_tables import AttendResult, tables
from tersekv.bench.data import Case, draw, error, exact, packed, scattered
from tersekv.bench.timing import Cold, paired, take_turns
from tersekv.errors import TersekvError
from tersekv.ops import attention, native
from tersekv.packed import Packed, repack
from tersekv.spec import parse
from tersekv.terminal import to_text

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="no native kernels")

TINY = Grid("main", bits=(3,), d=(64,), heads=("4/2",), tokens=(200,), rounds=2)
FLUSH = 2**20


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    grids = [TINY, Grid("context", (4, 2), (64,), ("2/2",), (64, 130), (3,), 1)]
    return attend(grids, flush=FLUSH)


def test_rows_are_complete_and_the_record_is_json(record: dict[str, Any]) -> None:
    assert json.loads(json.dumps(record))["bench"] == "attend"
    for key in ("commit", "versions", "device", "date", "implementation", "settings", "absent"):
        assert record[key] or key == "absent"
    assert [(case["grid"], case["t"], case["n"]) for case in record["cases"]] == [
        ("main", 200, 1),
        ("context", 64, 3),
        ("context", 130, 3),
    ]
    for case in record["cases"]:
        kinds = {row["kind"] for row in case["rows"]}
        assert kinds == ({"ours", "torch"} if record["absent"] else {"ours", "torch", "llama.cpp"})
        assert case["bandwidth"] > 0
        first, names = case["rows"][0], {row["name"] for row in case["rows"]}
        assert len(names) == len(case["rows"])
        assert set(first["times_faster_than"]) == names - {first["name"]}
        others = {row["name"] for row in case["rows"] if row["kind"] != "ours"}
        assert all(set(row["times_faster_than"]) == others for row in case["rows"][1:] if row["kind"] == "ours")
        for row in case["rows"]:
            assert row["bytes"] > 0 and row["error"] >= 0 and row["seconds"]["p20"] <= row["seconds"]["median"]


def test_bytes_are_those_of_the_pages(record: dict[str, Any]) -> None:
    layouts = [codec.layout(64) for codec in (parse("rotated:bits=3").k, parse("rotated:bits=3").v)]
    assert record["cases"][0]["rows"][0]["bytes"] == 2 * 4 * sum(layout.nbytes for layout in layouts)  # heads, blocks


def test_tables_have_a_row_for_everyone(record: dict[str, Any]) -> None:
    found = tables(record)
    assert list(found) == ["main", "context"]
    assert found["main"].row_count == len(record["cases"][0]["rows"]) + len(record["absent"])
    assert found["context"].row_count == 2
    assert "4 bits: x faster" in to_text(AttendResult(record))


@pytest.mark.parametrize("spoil", [lambda out: 1.2 * out, lambda out: torch.full_like(out, torch.nan)])
def test_a_wrong_kernel_is_not_timed(spoil: Any) -> None:
    def wrong(*arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = native.attend_part(*arguments)
        return spoil(out), lse

    with pytest.raises(TersekvError, match=r"Parity gate: 3 bits is off by .* No timing\."):
        attend([TINY], flush=FLUSH, kernel=wrong)


def test_an_absent_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersekv.bench.ggml._functions", _not_installed)
    made = attend([TINY], flush=FLUSH)
    assert set(made["absent"]) == {f"llama.cpp {kind}" for kind in ggml.KINDS}
    assert tables(made)["main"].row_count == len(made["cases"][0]["rows"]) + 3
    assert (
        'llama.cpp q8_0 did not take part. llama-cpp-python is not installed: pip install "tersekv[peers]".'
        in to_text(AttendResult(made), 200)
    )


def _not_installed() -> Any:
    raise TersekvError(ggml.INSTALL)


@pytest.mark.skipif(ggml.absent() is not None, reason="llama-cpp-python is not installed (extra peers)")
@pytest.mark.parametrize("kind", ggml.KINDS)
@pytest.mark.parametrize("n", [1, 5])
def test_llama_cpp_is_called_correctly(kind: str, n: int) -> None:
    drawn = draw(Case(64, 6, 2, 300, n))
    call = ggml.FlashAttention(kind, drawn.q, *drawn.undamaged, 0.125, 1)
    k, v = call.stored()
    assert error(call(), exact(drawn.q, k, v, 0.125)) < 0.05
    bits = {"f16": 16, "q8_0": 8.5, "q4_0": 4.5}[kind]
    assert call.nbytes == 2 * k.numel() * bits / 8


def test_pages_say_what_the_reference_reads_in_them() -> None:
    drawn, spec = draw(Case(64, 4, 2, 500, 2)), parse("rotated:bits=4")
    pages, (k, v) = packed(drawn, spec.k, spec.v)
    q = spec.k.fold_query(drawn.q)
    split, pool = pages.k_layout.nbytes, pages.pool
    sides = [repack(Packed(pages.k_layout, pool[:, :split]), "linear")]
    sides.append(repack(Packed(pages.v_layout, pool[:, split:]), "linear"))
    layouts = {"k_layout": sides[0].layout, "v_layout": sides[1].layout}
    linear = replace(pages, pool=torch.cat([side.data for side in sides], -1), **layouts)
    out, _ = attention.attend_pages(q, linear, 0.125)
    assert error(out, exact(q, k, v, 0.125)) < 1e-5
    assert pages.table.flatten().tolist() == list(range(16))
    anywhere = scattered(linear)
    assert sorted(anywhere.table.flatten().tolist()) == list(range(16))
    assert anywhere.table.flatten().tolist() != list(range(16))
    assert torch.equal(attention.attend_pages(q, anywhere, 0.125)[0], out)


def test_contestants_take_turns_and_ratios_are_paired() -> None:
    order: list[str] = []
    contestants = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    seconds = take_turns(contestants, 8, lambda name: order.append(f"before {name}"))
    assert order[::2] == [f"before {name}" for name in order[1::2]]
    rounds = [tuple(order[4 * i + 1 : 4 * i + 4 : 2]) for i in range(8)]
    assert set(rounds) == {("a", "b"), ("b", "a")}
    assert [len(values) for values in seconds.values()] == [8, 8]
    assert paired([2.0, 30.0, 8.0], [1.0, 10.0, 2.0])["median"] == 3


def test_bandwidth_is_measured() -> None:
    cold = Cold(2, FLUSH)
    cold()
    assert 0.01 < cold.gb_per_second < 10_000
    with pytest.raises(ValueError, match="1 or more"):
        native.read_memory(torch.ones(10, dtype=torch.uint8), 0, 1)


def test_run_files_and_options_make_grids(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[[grid]]\nname = "x"\nd = [64, 128]\nheads = ["8/2"]\ntokens = [100]\n')
    assert [case.d for case in read_grids(path)[0].cases()] == [64, 128]
    assert grid_of({"bits": "3", "tokens": "10, 20", "heads": "4/4"}, 5) == Grid(
        bits=(3,), tokens=(10, 20), heads=("4/4",), rounds=5
    )
    assert read_grids(Path(__file__).parents[1] / "runs" / "attend.toml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no run file of grids"),
        ("[[grid]]\ntoken = [1]", 'Did you mean "tokens"'),
        ("[[grid]]\nbits = [5]", "1, 2, 3, 4, 8"),
        ('[[grid]]\nheads = ["32-8"]', "for example 32/8"),
        ('[[grid]]\nheads = ["5/2"]', "multiple of the KV heads"),
        ("[[grid]]\nd = [40]", "multiple of 32"),
    ],
)
def test_a_run_file_that_makes_no_sense_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        [grid.cases() for grid in read_grids(path)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threads": 0}, "at least 1"),
        ({"isas": ["avx1024"]}, "Allowed: "),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        attend([TINY], flush=FLUSH, **options)
    with pytest.raises(InputError, match="whole numbers"):
        grid_of({"bits": "4,x"}, 1)
