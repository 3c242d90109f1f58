"""Saving and loading a cache: exact, and anything but the exact file is refused."""

from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import tersekv
from tersekv import CacheError, CacheFileError


@pytest.fixture
def saved(any_model: PreTrainedModel, tmp_path: Path) -> tuple[tersekv.PackedCache, Path, Tensor, Tensor]:
    """A cache of a left-padded batch, its file, and what comes next."""
    ids = torch.randint(1, 97, (2, 200))
    mask = torch.ones_like(ids)
    mask[1, :31] = 0
    cache = tersekv.cache(any_model, "rotated:bits=3 recent=32")
    with tersekv.attached(any_model):
        any_model(input_ids=ids, past_key_values=cache, attention_mask=mask)
    path = tmp_path / "cache.safetensors"
    tersekv.save(cache, path, any_model)
    return cache, path, torch.randint(1, 97, (2, 70)), torch.cat((mask, torch.ones(2, 70, dtype=torch.long)), 1)


def test_a_loaded_cache_continues_exactly(any_model: PreTrainedModel, saved: tuple) -> None:
    cache, path, more, mask = saved
    loaded = tersekv.load(path, any_model)
    assert str(loaded.spec) == str(cache.spec)
    before, after = ([x for x in c.report().layers if x.kind == "packed"] for c in (cache, loaded))
    assert before == after  # a sliding window may hold less: what was saved is no longer a view of a longer tensor
    assert loaded.report().held <= cache.report().held
    with tersekv.attached(any_model):
        first, second = (
            any_model(input_ids=more, past_key_values=x, attention_mask=mask).logits for x in (cache, loaded)
        )
    assert torch.equal(first, second)
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]


def test_one_flipped_bit_is_noticed(any_model: PreTrainedModel, saved: tuple) -> None:
    path = saved[1]
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheFileError, match="damaged"):
        tersekv.load(path, any_model)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_a_truncated_file_is_refused(any_model: PreTrainedModel, saved: tuple, keep: int) -> None:
    path = saved[1]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CacheFileError, match="cannot be read"):
        tersekv.load(path, any_model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, "not a tersekv cache"),
        ({"version": "99"}, "has version 99"),
        ({"spec": "rotated:bits=2"}, "damaged"),
        ({"sha256": ""}, "damaged"),
    ],
)
def test_changed_metadata_is_refused(
    any_model: PreTrainedModel, saved: tuple, change: dict[str, str], said: str
) -> None:
    path = saved[1]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata | change)
    with pytest.raises(CacheFileError, match=said):
        tersekv.load(path, any_model)


def test_foreign_files_and_models_are_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(3)}, foreign)
    with pytest.raises(CacheFileError, match="not a tersekv cache"):
        tersekv.load(foreign, llama)
    with pytest.raises(CacheFileError, match="cannot be read"):
        tersekv.load(tmp_path / "absent.safetensors", llama)
    cache, path = tersekv.cache(llama, "rotated:bits=4"), tmp_path / "cache.safetensors"
    with pytest.raises(CacheError, match="nothing to save"):
        tersekv.save(cache, path, llama)
    with tersekv.attached(llama):
        llama(input_ids=torch.ones(1, 5, dtype=torch.long), past_key_values=cache)
    tersekv.save(cache, path, llama)
    finetuned = make_model("llama")
    finetuned.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1e-3
    with pytest.raises(CacheFileError, match="another model"):
        tersekv.load(path, finetuned)
