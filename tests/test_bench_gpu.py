"""The GPU's speed harness: run files, tables, and on a GPU a tiny run with its gate. The rest needs no GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tersekv import InputError
from tersekv.bench import gpu, gpu_dense, gpu_generate, gpu_run, verbs
from tersekv.bench.gpu_tables import GpuResult, tables
from tersekv.errors import TersekvError
from tersekv.ops import cuda
from tersekv.spec import parse
from tersekv.terminal import Stages, to_text

RUNS = Path(__file__).parents[1] / "runs"
TIMES = {"median": 2e-5, "p20": 1e-5, "p80": 3e-5}
needs_gpu = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))


@pytest.mark.parametrize(
    ("run", "names"),
    [("attend", {"batch", "single", "unquantised", "shapes", "chunks"}), ("attend-trellis", {"trellis"})],
)
def test_the_run_files_make_sense(run: str, names: set[str]) -> None:
    grids = gpu_run.read_grids(RUNS / f"{run}-cuda.toml")
    assert {grid.name for grid in grids} == names
    for grid in grids:
        assert all(parse(text) for text in grid.specs.values())
        assert all(gpu.Case(**fields).hq % fields["h"] == 0 for fields in grid.cases)


def test_the_command_line_makes_a_grid() -> None:
    grid = gpu_run.grid_of({"bits": "4,2", "d": "64", "heads": "8/2", "tokens": "128,256", "new_tokens": "1"}, 3)
    assert list(grid.specs) == ["4 bits", "2 bits"] and [case["t"] for case in grid.cases] == [128, 256]


@pytest.mark.parametrize("text", ["grid = 1", "[[grid]]\nname = 'x'", "[[grid]]\nbad = 1"])
def test_a_run_file_that_makes_no_sense_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(InputError, match="no run file for a GPU"):
        gpu_run.read_grids(tmp_path / "run.toml")


def test_tables() -> None:
    row = {"name": "4 bits", "kind": "ours", "bytes": 1000, "error": 0.004, "error_of_bf16": 0.003, "seconds": TIMES}
    row |= {"gb_per_second": 2500.0, "share_of_copy": 0.9, "times_faster": 3.4}
    case: dict[str, Any] = {"grid": "batch", "b": 1, "d": 64, "hq": 4, "h": 2, "t": 128, "n": 1, "rows": [row]}
    found = tables({"bench": "attend cuda", "cases": [case]})
    assert "3.40" in to_text(found["batch"]) and "90 %" in to_text(found["batch"])
    one = {"codec": "intn", "side": "k", "vectors_per_second": 5e9, "seconds": TIMES, "gb_per_second": 1.0}
    settings = {"vectors": 64, "d": 128}
    record = {"bench": "encode cuda", "settings": settings, "rows": [one | {"share_of_copy": 0.5}]}
    assert "5.00" in to_text(GpuResult(record))
    row = {"b": 2, "t": 4096, "name": "4 bits", "way": "in a CUDA graph", "seconds": TIMES, "host_seconds": 3e-4}
    said = to_text(GpuResult({"bench": "generate cuda", "rows": [row]}), 120)
    assert all(words in said for words in ("in a CUDA graph", "0.02 (0.01-0.03)", "100,000", "300"))


@pytest.mark.gpu
@needs_gpu
def test_generate_is_timed_both_ways() -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    plan = gpu_generate.Plan({"vocab_size": 97, "num_key_value_heads": 2, "head_dim": 64} | sizes, ((2, 200),))
    record = gpu_generate.generate(plan, "cuda", Stages())
    ways = [row["way"] for row in record["rows"]]
    assert ways == ["eager", *["eager", "in a CUDA graph"] * 2] and record["rows"][2]["host_seconds"] > 0


@pytest.mark.skipif(cuda.missing() is None, reason="there are CUDA kernels here")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(InputError, match=r'--device "cuda": '):
        gpu_generate.generate(gpu_generate.Plan(), "cuda", Stages())
    with pytest.raises(InputError, match=r'--device "cuda": '):
        gpu_run.attend([], "cuda")


@pytest.mark.parametrize(
    ("verb", "option"),
    [
        (verbs.bench_decode, {"contexts": "512"}),
        (verbs.bench_decode, {"memory": False}),
        (verbs.bench_attend, {"threads": 2}),
        (verbs.bench_encode, {"bits": 4}),
    ],
)
def test_options_that_do_not_apply_are_refused(verb: Any, option: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(option))} .* does not apply with --device cuda"):
        verb(device="cuda", **option)


@pytest.mark.gpu
@needs_gpu
def test_a_tiny_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "FLUSH", 2**20)
    monkeypatch.setattr(gpu, "COPY", 2**20)
    cases = [{"b": 2, "d": 64, "hq": 4, "h": 2, "t": 256}]
    record = gpu_run.attend([gpu_run.Grid("tiny", {"3 bits": "rotated:bits=3"}, cases, 2)], "cuda")
    names = {row["name"] for row in record["cases"][0]["rows"]}
    assert "3 bits" in names and len(names) > 1
    assert gpu_run.encode(64, 640, "cuda", 2)["rows"]

    def wrong(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = cuda.attend_pages(*arguments)
        return 1.1 * out, lse

    monkeypatch.setattr(gpu, "attend_pages", wrong)
    with pytest.raises(TersekvError, match="Parity gate"):
        gpu_run.attend([gpu_run.Grid("tiny", {"3 bits": "rotated:bits=3"}, cases, 2)], "cuda")


def test_the_dense_bound_attends_to_its_whole_cache_without_a_mask() -> None:
    config = LlamaConfig(
        vocab_size=31, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(torch.bfloat16)
    cache = gpu_dense.full(model, 2, 40)
    with torch.inference_mode(), gpu_dense.unmasked(model):
        step = gpu_dense.DenseStep(model, cache, 2, False)
        before, last = step(), cache.layers[0].k[:, :, -1].clone()
        cache.layers[0].v[:, :, 0] += 100
        assert not torch.equal(step(), before)  # the first token counts
        assert torch.equal(cache.layers[0].k[:, :, -1], last)  # the new one is the last
        assert before.shape == (2, 31)
    assert model.config._attn_implementation != gpu_dense.UNMASKED
