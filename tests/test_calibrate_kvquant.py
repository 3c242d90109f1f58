"""Fitted levels: what k-means is for, keys before RoPE at their positions, a stopped run, and files for one model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hosting import forward
from torch import Tensor
from transformers import PreTrainedModel

import tersekv
from tersekv import CacheFileError, InputError, SpecError
from tersekv.calibrate.kvquant import FittedLevels, Shape, calibrate, key_levels, value_levels
from tersekv.calibrate.session import Settings
from tersekv.calibrate.windows import Sample
from tersekv.codecs.books import Books
from tersekv.codecs.kvquant import KVQuant
from tersekv.errors import ModelError
from tersekv.hf.capture import Seen, observed
from tersekv.hf.rope import frequencies
from tersekv.layout import BLOCK
from tersekv.ops.rope import turned
from tersekv.spec import parse
from tersekv.store import Store
from tersekv.terminal import Stages
from tersekv.testing import check_codec

SHAPE = Shape(bits=3, rounds=8)


def run(calibration: Settings, folder: Path, out: Path, shape: Shape = SHAPE) -> FittedLevels:
    with Stages() as stages:
        return calibrate(calibration, shape, folder, out, stages)


@pytest.fixture
def books(calibration: Settings, tmp_path: Path) -> FittedLevels:
    return run(calibration, tmp_path / "run", tmp_path / "books.safetensors")


def test_frequencies_are_those_of_the_model(any_model: PreTrainedModel) -> None:
    """Keys that are turned back are what the layer's projection gave."""
    found, projected, seen = frequencies(any_model), dict[int, Tensor](), dict[int, Seen]()
    ids = torch.randint(1, 97, (1, 200))
    layers = any_model.get_decoder().layers
    hooks = []
    for index in found:
        last = getattr(layers[index].self_attn, "k_norm", layers[index].self_attn.k_proj)
        hooks.append(last.register_forward_hook(lambda _m, _i, out, index=index: projected.__setitem__(index, out)))
    with observed(any_model, lambda one: seen.__setitem__(one.layer, one)):
        any_model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    assert found.keys() == seen.keys() and found
    for index, one in seen.items():
        before = turned(one.k, torch.arange(200), found[index], back=True)
        own = projected[index] if projected[index].ndim == 4 else projected[index].unflatten(-1, (2, -1))
        own = own if own.shape == before.shape else own.transpose(1, 2)
        assert torch.allclose(before, own, atol=1e-4)
        assert torch.allclose(turned(before, torch.arange(200), found[index], back=False), one.k, atol=1e-5)


def test_a_model_that_turns_otherwise_is_refused(llama: PreTrainedModel) -> None:
    rotary = llama.get_decoder().rotary_emb
    own = rotary.inv_freq
    try:
        rotary.inv_freq = own.clone()
        rotary.forward, former = (lambda x, position_ids: former(x, position_ids // 2)), rotary.forward
        with pytest.raises(ModelError, match="does not turn keys by its frequencies"):
            frequencies(llama)
    finally:
        rotary.inv_freq = own
        del rotary.forward


def skewed() -> tuple[Sample, Sample]:
    """Two windows of keys and values with gradients that are large where they are large."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        tensors: dict[str, Tensor] = {}
        for side in ("k", "v"):
            x = torch.randn(1, 2, 40 * BLOCK, 32) ** 3
            tensors |= {f"0.{side}": x.bfloat16(), f"0.{side}.gradient": (x.abs() * torch.randn_like(x)).bfloat16()}
        found.append(Sample(tensors))
    return found[0], found[1]


@pytest.mark.parametrize("side", ["k", "v"])
def test_weights_move_levels_to_where_errors_count(side: str, tmp_path: Path) -> None:
    """On a window that they were not fitted to, each is the better one by its own measure, and both beat a normal."""
    train, test = skewed()
    x = test.values(0, side)[:, :, : 40 * BLOCK].float().unflatten(2, (-1, BLOCK))
    g = test.beside(0, side, "gradient").float().unflatten(2, (-1, BLOCK))
    lost: dict[str, tuple[float, float]] = {}
    for weights in ("fisher", "none"):
        shape = Shape(2, 0, "after", weights)
        fit = key_levels(shape, [train], 0, None, 0) if side == "k" else value_levels(shape, [train], 0, 0)
        about = {"calibrate": "kvquant", "codecs": {side: shape.options(side)}}
        Books("", about, {f"0.{side}.0": fit}).save(tmp_path / weights)
        axis = "channel" if side == "k" else "token"
        codec = KVQuant(2, axis, 0, books=str(tmp_path / weights), side=side)
        e = codec.decode(codec.encode(x)) - x
        lost[weights] = float((e * g).square().sum()), float(e.square().sum())
    plain = KVQuant(2, "channel" if side == "k" else "token", 0)
    e = plain.decode(plain.encode(x)) - x
    assert lost["fisher"][0] < 0.9 * lost["none"][0] and lost["none"][1] < 0.9 * lost["fisher"][1]
    assert lost["fisher"][0] < 0.9 * float((e * g).square().sum()) and lost["none"][1] < float(e.square().sum())


def test_a_stopped_calibration_goes_on_and_gives_the_same(calibration: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(calibration, folder, tmp_path / "one.x")
    lines = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "samples.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:30])
    run(calibration, folder, tmp_path / "two.x")
    run(calibration, folder, tmp_path / "after.x", replace(SHAPE, rope="after"))
    one, two, after = (Books.load(tmp_path / f"{name}.x").tensors for name in ("one", "two", "after"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["0.k.0"], after["0.k.0"]) and "0.rope" not in after


def test_fitted_levels_pass_the_conformance_list(calibration: Settings, tmp_path: Path) -> None:
    spec = parse(run(calibration, tmp_path / "run", tmp_path / "x", replace(SHAPE, rope="after")).spec)
    for side, codec in (("k", spec.k), ("v", spec.v)):
        check_codec(codec.at(2), side, (32,))


def test_keys_before_rope_in_a_model(books: FittedLevels, llama: PreTrainedModel, tmp_path: Path) -> None:
    """Padding is no position, a crop through a block and a saved cache change nothing; bytes are counted."""
    about = Books.load(books.path).about
    assert {"model", "text", "seed", "versions", "commit", "seconds", "fit", "fingerprint"} <= set(about)
    ids = torch.randint(1, 97, (2, 300))
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    more = torch.cat((mask, torch.ones(2, 1, dtype=torch.int64)), 1)
    with tersekv.attached(llama):
        cache, exact = (tersekv.cache(llama, f"{spec} recent=32") for spec in (books.spec, "none"))
        near = [forward(llama, some, ids, mask)[:, 40:] for some in (cache, exact)]
        assert (near[0] - near[1]).norm() < 0.1 * near[1].norm()
        planes = cache.report().planes()
        assert planes["codec", "k.fitted"] == 3 * (2 * 32 * 8 * 2 + 16 * 8)
        assert planes["codec", "v.fitted"] == 3 * 8 * 2
        tersekv.save(cache, tmp_path / "cache.safetensors", llama)
        again = tersekv.load(tmp_path / "cache.safetensors", llama)
        said = [forward(llama, some, ids[:, :1], more) for some in (cache, again, exact)]
        assert torch.equal(said[0], said[1])
        for some in (cache, exact):
            some.crop(-130)
        said = [forward(llama, some, ids[:, :1], more[:, :172]) for some in (cache, exact)]
        assert (said[0] - said[1]).norm() < 0.1 * said[1].norm()


def test_each_block_is_turned_by_its_own_positions(books: FittedLevels) -> None:
    """A key is stored at its position wherever its row begins, and comes back there."""
    spec, x = parse(f"{books.spec} recent=0 sink=0").at(1), torch.randn(2, 2, 2, 300, 32)
    together, alone = (Store(spec, b, 2, 32, torch.float32, torch.device("cpu")) for b in (2, 1))
    together.append(*x, np.array([140, 0]))
    alone.append(*x[:, :1, :, 140:], None)
    mine, its = together.decoded(), alone.decoded()
    assert its.k.shape[2] == 160 and torch.equal(mine.k[:1, :, :160], its.k) and torch.equal(mine.v[:1, :, :160], its.v)
    codec, constant = spec.k, torch.randn(1, 2, 1, 1, 32).expand(1, 2, 3, BLOCK, 32)
    assert isinstance(codec, KVQuant)
    starts = torch.tensor([4, 68, 1028], dtype=torch.int32).expand(1, 2, 3)
    at = starts[..., None] + torch.arange(BLOCK)
    packed = codec.encode_at(turned(constant, at, codec.frequencies, back=False), starts)
    back = turned(codec.decode(packed), at, codec.frequencies, back=True)
    other = (back - back.median(-2, keepdim=True).values).abs() > 1e-3
    assert (other.sum(-2) <= 1).all(), "one key before RoPE is one key again, but for the outlier of each channel"


def test_what_is_refused(
    calibration: Settings, books: FittedLevels, any_model: PreTrainedModel, tmp_path: Path
) -> None:
    if any_model.config.model_type != "llama":
        with pytest.raises(CacheFileError, match=r"fitted to another model \(tiny\)"):
            tersekv.cache(any_model, books.spec)
    with pytest.raises(SpecError, match="rope=before needs books=FILE"):
        parse("kvquant:rope=before")
    with pytest.raises(SpecError, match="was made for rope=before, not after"):
        parse(books.spec.replace("rope=before", "rope=after"))
    with pytest.raises(SpecError, match="was made for bits=3, not 2"):
        parse(books.spec.replace("bits=3", "bits=2"))
    with pytest.raises(SpecError, match=r"head_dim 64: .* is for 32"):
        parse(books.spec).k.layout(64)
    with pytest.raises(SpecError, match="where their positions are known"):
        parse(books.spec).k.encode(torch.randn(1, 2, 1, BLOCK, 32))
    with pytest.raises(InputError, match="--rounds 0"):
        Shape(rounds=0)


def test_blocks_with_gaps_are_refused(books: FittedLevels, llama: PreTrainedModel) -> None:
    """Anchor tokens leave a block, so that those behind them are not where its start says."""
    with tersekv.attached(llama):
        cache = tersekv.cache(llama, f"{books.spec} policy=anchors recent=32")
        with pytest.raises(SpecError, match="in blocks of consecutive tokens"):
            forward(llama, cache, torch.randint(1, 97, (1, 400)))
