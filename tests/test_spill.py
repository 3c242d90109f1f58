"""An idle cache goes to a file and comes back: memory is freed, what follows is the same, damage is noticed."""

import ctypes
import gc
import platform
from pathlib import Path

import pytest
import torch
from conftest import make_model
from hosting import forward
from transformers import PreTrainedModel

import tersekv
from tersekv import CacheError, CacheFileError, PackedCache

SPECS = ["rotated:bits=3 recent=32", "rotated:bits=4 policy=hotcold hot=64 promote=yes", "none", "kivi:bits=2"]


def filled(model: PreTrainedModel, spec: str, b: int = 2, n: int = 300) -> PackedCache:
    cache = tersekv.cache(model, spec)
    with tersekv.attached(model), torch.inference_mode():
        forward(model, cache, torch.randint(1, 97, (b, n)))
    return cache


def resident() -> int:
    """Anonymous memory in bytes that this process uses: none of mapped files, none that the C library keeps."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


@pytest.mark.parametrize("spec", SPECS)
def test_a_restored_cache_continues_exactly(spec: str, any_model: PreTrainedModel, tmp_path: Path) -> None:
    cache = filled(any_model, spec)
    stays, report = cache.copy(), cache.report()
    path = cache.spill(tmp_path / "idle", any_model)
    assert path.parent == tmp_path / "idle" and path.stat().st_size > 0
    assert cache.report().held == 0
    cache.restore(any_model)
    packed = [x for x in report.layers if x.kind == "packed"]
    assert [x for x in cache.report().layers if x.kind == "packed"] == packed
    assert not path.exists()
    more = torch.randint(1, 97, (2, 70))
    with tersekv.attached(any_model):
        for ids in (more, more[:, :1]):
            assert torch.equal(forward(any_model, cache, ids), forward(any_model, stays, ids))


def test_room_that_was_asked_for_is_still_asked_for(tmp_path: Path) -> None:
    model = make_model("llama")
    cache = tersekv.cache(model, "rotated:bits=3", room=500)
    with tersekv.attached(model), torch.inference_mode():
        forward(model, cache, torch.randint(1, 97, (1, 100)))
    cache.spill(tmp_path, model)
    cache.restore(model)
    for one in (cache, cache.copy()):
        assert [layer.opened().room for layer in one.layers] == [500] * len(one.layers)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads /proc, and asks glibc to give back free memory")
def test_spilling_gives_memory_back(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache = filled(llama, "none:dtype=fp32", 64, 700)
    held, before = cache.report().held, resident()
    assert held > 50e6
    cache.spill(tmp_path, llama)
    freed = before - resident()
    assert freed > 0.9 * held, f"{held:,} bytes were held, {freed:,} came back"
    cache.restore(llama)
    assert cache.report().held == pytest.approx(held, rel=0.01)


def test_a_spilled_cache_says_where_it_is(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache = filled(llama, "rotated:bits=4")
    path = cache.spill(tmp_path, llama)
    for use in (
        lambda: forward(llama, cache, torch.ones(2, 1, dtype=torch.long)),
        lambda: cache.crop(-3),
        cache.copy,
        lambda: cache.spill(tmp_path, llama),
    ):
        with pytest.raises(CacheError, match=r"was spilled to .*\. Call cache.restore\(model\)"):
            use()
    assert tersekv.load(path, llama).get_seq_length() == 300, "another process can read the file"
    cache.reset()
    with tersekv.attached(llama):
        forward(llama, cache, torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(CacheError, match="not spilled"):
        cache.restore(llama)


def test_a_damaged_or_missing_file_is_refused_and_can_be_put_right(llama: PreTrainedModel, tmp_path: Path) -> None:
    cache = filled(llama, "rotated:bits=3")
    path = cache.spill(tmp_path, llama)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[-50] ^= 4
    for content, said in ((bytes(damaged), "damaged"), (whole[:-1], "cannot be read"), (b"", "cannot be read")):
        path.write_bytes(content)
        with pytest.raises(CacheFileError, match=said):
            cache.restore(llama)
    path.unlink()
    with pytest.raises(CacheFileError, match="cannot be read"):
        cache.restore(llama)
    path.write_bytes(whole)
    other = make_model("llama")
    other.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 1e-3
    with pytest.raises(CacheFileError, match="another model"):
        cache.restore(other)
    cache.restore(llama)
    assert cache.get_seq_length() == 300


def test_a_spill_that_fails_leaves_the_cache(llama: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="nothing to save"):
        tersekv.cache(llama, "rotated:bits=4").spill(tmp_path, llama)
    cache = filled(llama, "rotated:bits=4")
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheFileError, match=r"cannot be written.*another folder"):
        cache.spill(tmp_path / "file", llama)
    assert cache.get_seq_length() == 300
    with tersekv.attached(llama):
        forward(llama, cache, torch.ones(2, 1, dtype=torch.long))
