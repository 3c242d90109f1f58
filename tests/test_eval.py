"""Metrics against hand-computed values, a run on a tiny model, and what happens to it when it is killed or damaged."""

import json
from dataclasses import replace
from math import exp, log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Letters, make_model
from transformers import PreTrainedModel

from tersekv import InputError, parse
from tersekv.cli import main
from tersekv.errors import CacheFileError, RecordError
from tersekv.eval import samples
from tersekv.eval.fidelity import Found, cosine, fidelity, logit_error, relative_error
from tersekv.eval.logits import Divergence, arms, compare
from tersekv.eval.run import run
from tersekv.eval.runfile import RunFile, read_run
from tersekv.eval.samples import RunDirectory, read_samples
from tersekv.eval.statistics import difference, interval
from tersekv.eval.tensors import _one_metric
from tersekv.hf.capture import Seen, observed
from tersekv.models import LoadedModel
from tersekv.record import write
from tersekv.reports.differences import against
from tersekv.reports.replications import PUBLISHED
from tersekv.reports.tables import Results, models, tables
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


RUN = """
model = "tiny"
specs = ["rotated:bits=4", "rotated:bits=2"]
dtype = "float32"
[tensors]
tokens = 200
[logits]
windows = [200, 300]
tokens = 600
[growth]
prompts = 1
prompt_tokens = 100
new_tokens = 40
[needle]
lengths = [200]
depths = [0, 100]
repeats = 1
"""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFile:
    loaded = LoadedModel(make_model("llama"), Letters(), "tiny", "random weights", "none")
    monkeypatch.setattr("tersekv.eval.reading.load", lambda *_: loaded)
    text, file = tmp_path / "text.txt", tmp_path / "run.toml"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    file.write_text(RUN)
    return read_run(file, text=str(text))


def measured(settings: RunFile, folder: Path) -> dict[str, Any]:
    with Stages() as stages:
        return run(settings, folder, stages)["tiny"]


def without_seconds(record: Any) -> Any:
    if isinstance(record, dict):
        return {name: without_seconds(value) for name, value in record.items() if name != "seconds"}
    return [without_seconds(value) for value in record] if isinstance(record, list) else record


def test_a_run_is_a_record(settings: RunFile, tmp_path: Path) -> None:
    record = json.loads(json.dumps(measured(settings, tmp_path / "run")))
    assert [row["spec"] for row in record["rows"]] == ["dense", "rotated:bits=4", "rotated:bits=2"]
    dense, four, two = record["rows"]
    assert four["nominal_bits"] == 4 < four["body_bits"] < 5
    assert list(four["logits"]) == ["200", "300"] and four["logits"]["200"]["windows"] == 3
    for length in four["logits"]:
        a, b = four["logits"][length], two["logits"][length]
        assert dense["logits"][length]["kl_mean"] == 0 < a["kl_mean"] < b["kl_mean"] and a["held"] > b["held"]
        assert a["held"] == sum(a["planes"].values())
    assert dense["tensors"]["output_error"]["worst"] < 1e-4 < four["tensors"]["output_error"]["worst"]
    for metric in ("k_error", "v_error", "output_error", "logit_error"):
        a, b = four["tensors"][metric], two["tensors"][metric]
        assert a["mean"] < b["mean"] and a["mean"] < a["tail"] <= a["worst"]
        assert 0 <= a["where"]["layer"] < 3 and 0 <= a["where"]["token"] < 200
    assert four["tensors"]["k_cosine"]["worst"] <= four["tensors"]["k_cosine"]["tail"] < 1
    assert len(four["tensors"]["output_error"]["by_head"]) == 3 and len(four["tensors"]["k_error"]["by_head"][0]) == 2
    assert dense["growth"]["same_tokens"] == 40 and dense["needle"]["difference"] == 0
    assert record["run"]["model"] == "tiny" and record["data"]["text"]["name"] == "text.txt"
    assert record["model"] == {"source": "random weights", "revision": "none"}
    assert "rotated:bits=4" in to_text(Results([record]).__rich__(), width=80)
    assert "reference" not in record and "against" not in tables(record)
    again = measured(replace(settings, reference="rotated:bits=4"), tmp_path / "run")
    assert without_seconds(again) == without_seconds(record) | {"reference": "rotated:bits=4"}, "and no sample is new"
    names = [column.header for column in tables(again)["against"].columns]
    heads = ["200: KL", "200: loss", "300: KL", "300: loss", "growth: KL", "needle"]
    assert names == ["less rotated:bits=4", "body", *(f"{head} (95 %)" for head in heads)]
    lost = difference(*(row["logits"]["200"]["loss_by_window"] for row in (two, dense)))
    assert two["logits"]["200"]["loss_difference"] == pytest.approx(lost["difference"], abs=1e-6)


def test_a_killed_run_goes_on_where_it_was(settings: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(settings, tmp_path / "whole")
    calls, write_line = [], samples.line

    def killed(*arguments: Any) -> str:
        calls.append(arguments)
        if len(calls) == 8:  # between two specs of one window
            raise KeyboardInterrupt
        return write_line(*arguments)

    folder = tmp_path / "killed"
    monkeypatch.setattr(samples, "line", killed)
    with pytest.raises(KeyboardInterrupt):
        measured(settings, folder)
    monkeypatch.undo()
    monkeypatch.setattr(
        "tersekv.eval.reading.load",
        lambda *_: LoadedModel(make_model("llama"), Letters(), "tiny", "random weights", "none"),
    )
    manifest = json.loads((folder / "tiny" / "manifest.json").read_text())
    assert manifest["run"]["tensors"] == {"tokens": 200, "windows": 1}
    path = folder / "tiny" / "samples.jsonl"
    path.write_text(path.read_text() + '{"depth": "logits", "it')  # a line torn in the middle
    before = len(read_samples(path.parent))
    assert 0 < before < len(read_samples(tmp_path / "whole" / "tiny"))
    assert without_seconds(measured(settings, folder)) == without_seconds(whole)
    assert (
        path.read_text().count("\n") == len(read_samples(path.parent)) == len(read_samples(tmp_path / "whole" / "tiny"))
    )
    assert measured(settings, folder)["rows"], "a finished run measures nothing and gives its record again"


def test_a_damaged_line_is_refused_and_named(tmp_path: Path) -> None:
    directory = RunDirectory.open(tmp_path, {"run": {}})
    for number in range(3):
        directory.add("logits", str(number), {"dense": {"kl": [0.25, number]}})
    path = tmp_path / "samples.jsonl"
    intact = path.read_text()
    for damaged in (
        intact.replace("0.25, 1", "0.35, 1"),
        intact.replace('{"depth": "logits", "item": "1"', '{"depth"'),
    ):
        path.write_text(damaged)
        with pytest.raises(RecordError, match=r"samples\.jsonl, line 2 is damaged"):
            RunDirectory.open(tmp_path, {"run": {}})
    path.write_text(intact + intact.splitlines()[0] + "\n")
    with pytest.raises(RecordError, match="line 4: logits 0 dense is there twice"):
        RunDirectory.open(tmp_path, {"run": {}})
    path.write_text(intact)
    with pytest.raises(RecordError, match=r"another run \(run: \{\}, now"):
        RunDirectory.open(tmp_path, {"run": {"seed": 1}})


def test_windows_are_drawn_once_and_opened_as_the_tokenizer_does(settings: RunFile) -> None:
    from tersekv.eval.subject import Subject

    class Opened(Letters):
        def __call__(self, text: str, add_special_tokens: bool = True) -> object:
            ids = [ord(c) % 96 + 1 for c in text]
            return type("Encoding", (), {"input_ids": [7, *ids] if add_special_tokens else ids})()

    subject = Subject(LoadedModel(make_model("llama"), Opened(), "t", "", ""), {"dense": None}, 3, "abcdefgh" * 50, "x")
    names = subject.windows(41, 5)
    assert len(set(names)) == 5 and names == subject.windows(41, 5)
    assert subject.window("41/2")[0].tolist() == [7, *subject.tokens[80:120].tolist()]
    with pytest.raises(InputError, match="11 windows of 41 tokens are asked for, x has 10"):
        subject.windows(41, 11)


def test_a_report_is_one_page_that_needs_nothing_else(
    settings: RunFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(measured(settings, tmp_path / "run"), tmp_path / "tiny.json")
    with pytest.raises(SystemExit) as done:
        main(["report", str(tmp_path / "tiny.json"), "--out", str(tmp_path / "report")])
    assert not done.value.code, capsys.readouterr()
    page = (tmp_path / "report" / "index.html").read_text()
    for name in ("pareto", "position", "growth", "k_error", "output_error", "needle"):
        for kind in ("svg", "png"):
            assert (tmp_path / "report" / f"tiny-{name}.{kind}").stat().st_size > 1000
    assert page.count('src="data:image/svg+xml') == 7
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    assert "rotated:bits=2" in page and 'name="viewport"' in page


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model = 3 = 4", "is not a run file"),
        ('model = "x"\nmodle = "x"', 'unknown field "modle". Did you mean "model"'),
        ('model = "x"\n[logits]', "specs missing"),
        ('model = "x"\nspecs = ["rotated:bits=4"]', r"measures nothing. Add a section: \[tensors\]"),
        (
            'model = "x"\nspecs = ["rotated:bits=4"]\n[logits]\nchunks = 3',
            r'\[logits\]: unknown field "chunks". Did you mean "chunk"',
        ),
        ('model = "x"\nspecs = ["rotated:bits=4"]\n[logits]\nwindows = ["a"]', r"windows = \['a'\] is no list"),
        (
            'model = "x"\nspecs = ["rotated:bits=4"]\nreference = "rotated:bits=3"\n[tensors]',
            'reference = "rotated:bits=3" is none of specs. Did you mean "rotated:bits=4"',
        ),
        ('model = "x"\nspecs = ["rotated:bits=4"]\n[logits]\nwindows = [99]', "Each length must be from score_from"),
    ],
)
def test_bad_run_files(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(content)
    with pytest.raises(InputError, match=said):
        read_run(file)


@pytest.mark.parametrize(
    "path",
    sorted(set((Path(__file__).parents[1] / "runs").glob("*.toml")) - {Path(__file__).parents[1] / PUBLISHED}),
    ids=lambda path: path.stem,
)
def test_run_files_of_the_project_can_be_read(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fitted = {"codebooks": "vq", "codebooks-rope": "vq", "klt": "klt", "kvquant": "kvquant"}
    if path.stem in fitted:  # its books are fitted first
        said = rf'cannot be read.* "tersekv calibrate {fitted[path.stem]} MODEL --text FILE"'
        with pytest.raises(CacheFileError, match=said):
            [parse(spec) for spec in read_run(path).specs]
    elif not path.stem.startswith("attend"):
        assert all(parse(spec) for spec in read_run(path).specs)


def test_a_spec_may_name_a_file_for_each_model(settings: RunFile, tmp_path: Path) -> None:
    with pytest.raises(CacheFileError, match=r"books/tiny-lost\.safetensors cannot be read"):
        measured(replace(settings, models=["models/tiny"], specs=["vq:books=books/{model}-lost.safetensors"]), tmp_path)


def test_records_of_a_folder_stand_side_by_side(settings: RunFile, tmp_path: Path) -> None:
    record = measured(settings, tmp_path)
    other = json.loads(json.dumps(record).replace('"tiny"', '"small"'))
    record["rows"][1]["spec"], other["rows"][1]["spec"] = "vq:books=tiny.safetensors", "vq:books=small.safetensors"
    found = {c.header: list(c.cells) for c in models([record, other]).columns}
    assert found["spec"] == ["dense", "vq:books={model}.safetensors", "rotated:bits=2"]
    assert found["tiny: KL (95 %)"] == found["small: KL (95 %)"] and found["tiny: body"][0] == "16.00"
    assert found["kernels"] == ["torch", "CPU", "CPU"]  # head dim 32 is not one of the GPU's
    other["rows"][2]["spec"] = "rotated:bits=3"
    with pytest.raises(ValueError, match="unpack"):
        models([record, other])
