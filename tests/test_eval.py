"""A run on a tiny model, what happens to it when it is killed or damaged, and what is made of its record."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Letters, make_model

from tersekv import InputError
from tersekv.cli import main
from tersekv.errors import CacheFileError, RecordError
from tersekv.eval import samples
from tersekv.eval.run import run
from tersekv.eval.runfile import RunFile, read_run
from tersekv.eval.samples import RunDirectory, read_samples
from tersekv.eval.statistics import difference
from tersekv.models import LoadedModel
from tersekv.record import write
from tersekv.reports.models import models
from tersekv.reports.tables import Results, tables
from tersekv.terminal import Stages, to_text

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


def test_two_processes_do_not_share_a_directory(tmp_path: Path) -> None:
    first, second = (RunDirectory.open(tmp_path, {"run": {}}) for _ in range(2))
    first.add("logits", "0", {"dense": {"kl": 0.25}})
    with pytest.raises(RecordError, match="another process"):
        second.add("logits", "0", {"dense": {"kl": 0.25}})
    first.add("logits", "1", {"dense": {"kl": 0.5}})
    third = RunDirectory.open(tmp_path, {"run": {}})
    third.add("logits", "2", {"dense": {"kl": 0.75}})
    assert [item for _, item, _ in read_samples(tmp_path)] == ["0", "1", "2"]


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
