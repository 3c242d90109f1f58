"""Several processes that measure one run: the same record as one process, also after a stop."""

import json
from collections.abc import Iterator
from multiprocessing import active_children
from os import cpu_count
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tersekv import InputError
from tersekv.cli import main
from tersekv.eval.jobs import measuring
from tersekv.eval.run import run
from tersekv.eval.runfile import RunFile, read_run
from tersekv.eval.samples import SAMPLES, RunDirectory, read_samples
from tersekv.eval.subject import Subject
from tersekv.models import LoadedModel
from tersekv.terminal import Stages

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs", "away"]
RUN = """
specs = ["rotated:bits=4", "rotated:bits=2"]
dtype = "float32"
[logits]
windows = [200, 150]
tokens = 600
"""


@pytest.fixture
def settings(tmp_path: Path) -> RunFile:
    folder, file, text = tmp_path / "model", tmp_path / "run.toml", tmp_path / "text.txt"
    make_model("llama").save_pretrained(folder)
    words = Tokenizer(WordLevel({"<unk>": 0} | {word: n for n, word in enumerate(WORDS, 1)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    file.write_text(f'model = "{folder}"\n' + RUN)
    text.write_text(" ".join(WORDS[n * n % 11] for n in range(1500)))
    return read_run(file, text=str(text))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As each of two processes has on two processors; sums of another number of threads are others."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, (cpu_count() or 1) // 2))
    yield
    torch.set_num_threads(before)


def record(settings: RunFile, folder: Path, jobs: int) -> dict[str, Any]:
    """Without what two runs of one kind differ in."""
    found = next(iter(run(settings, folder, Stages(), jobs).values()))
    del found["date"]
    for row in found["rows"]:
        for window in row["logits"].values():
            del window["seconds"]
    return found


def test_two_processes_make_the_record_of_one(settings: RunFile, tmp_path: Path) -> None:
    alone = record(settings, tmp_path / "alone", 1)
    together = record(settings, tmp_path / "together", 2)
    assert together["rows"][2]["logits"]["200"]["kl_mean"] > 0
    assert together == alone
    path = tmp_path / "together" / "model" / SAMPLES
    kept = path.read_text().splitlines(keepends=True)[:4]  # as a stop leaves it: one window whole, one in part
    path.write_text("".join(kept))
    assert record(settings, tmp_path / "together", 2) == alone


def test_an_error_in_a_process_is_the_runs_error(settings: RunFile, tmp_path: Path) -> None:
    config = Path(settings.models[0]) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 160}))
    with pytest.raises(InputError, match="context of 160"):
        record(settings, tmp_path / "broken", 2)


def test_a_process_that_is_killed(settings: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory runs out, after the first sample."""
    add = RunDirectory.add

    def add_and_kill(*given: Any) -> None:
        add(*given)
        for process in active_children():
            process.kill()

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "add", add_and_kill)
        with pytest.raises(InputError, match=r"One of the 2 processes was killed.* Samples measured so far are kept"):
            record(settings, tmp_path / "killed", 2)
    assert 0 < len(read_samples(tmp_path / "killed" / "model")) < 3 * 7
    assert record(settings, tmp_path / "killed", 2) == record(settings, tmp_path / "alone", 1)


def test_a_process_whose_gpu_is_full(settings: RunFile) -> None:
    subject = Subject(LoadedModel(None, None, "model", "", ""), {}, 0)
    with (
        pytest.raises(InputError, match=r"One of the 2 processes ran out of GPU memory.* with fewer --jobs"),
        measuring(settings, "model", subject, 2),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_jobs_that_cannot_be(settings: RunFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"--jobs 0: one or more processes"):
        record(settings, tmp_path / "none", 0)
    file = tmp_path / "run.toml"
    file.write_text(file.read_text() + "[speed]\ncontext = 150\n")
    with pytest.raises(SystemExit, match="2"):
        main(["eval", str(file), "--text", str(tmp_path / "text.txt"), "--jobs", "2"])
    assert "one alone where a run has a section [speed]" in " ".join(capsys.readouterr().err.split())
