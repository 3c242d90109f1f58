"""Calibration: what is measured is what it says, a stopped run goes on, and training learns what there is to learn."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from transformers.cache_utils import DynamicCache

import tersekv
from tersekv import InputError, SpecError
from tersekv.calibrate.adaptive import calibrate
from tersekv.calibrate.budget import calibrate as budget
from tersekv.calibrate.measuring import Change, Prefix
from tersekv.calibrate.session import Settings
from tersekv.calibrate.training import Weights, train
from tersekv.errors import RecordError
from tersekv.eval.run import bits_of
from tersekv.hf.cost import sequence_bytes
from tersekv.policy.controller import Controller
from tersekv.spec import parse
from tersekv.terminal import Stages, to_text

HEADS = 2  # of keys and values in a layer of the test models


@pytest.fixture
def prefix() -> Prefix:
    spec = parse("rotated:bits=3")
    ids = torch.randint(1, 97, (1, 280))

    def codecs(bits: int) -> Any:
        return spec.k.with_bits(bits), spec.v.with_bits(bits)

    with torch.inference_mode():
        return Prefix(make_model("llama"), ids[:, :260], ids[:, 260:], codecs)


def test_a_change_costs_what_the_model_says_differently(prefix: Prefix) -> None:
    one = Change(2, slice(40, 41), layer=1, sides="v")
    found = prefix.divergences([one])[0]
    with torch.inference_mode():
        cache = DynamicCache(config=prefix.model.config)
        prefix.model(input_ids=prefix.ids, past_key_values=cache)
        layers: list[Any] = cache.layers
        dense = prefix.model(input_ids=prefix.follow, past_key_values=cache).logits.double().log_softmax(-1)
        cache.crop(-20)
        stored = parse("rotated:bits=2").v
        block = layers[1].values[:, :, 4:68]
        layers[1].values[:, :, 40] = stored.decode(stored.encode(block))[:, :, 36]
        other = prefix.model(input_ids=prefix.follow, past_key_values=cache).logits.double().log_softmax(-1)
    assert found == pytest.approx((dense.exp() * (dense - other)).sum(-1).mean().item(), rel=0.05)


def test_fewer_bits_and_more_of_a_cache_cost_more(prefix: Prefix) -> None:
    whole = prefix.blocks
    assert (whole.start, whole.stop) == (4, 260)
    every = prefix.divergences([Change(bits, whole) for bits in (2, 4, 8)])
    assert every[0] > every[1] > every[2] > 0
    assert prefix.divergences([Change(2, slice(4, 68))])[0] < every[0]
    layers = prefix.divergences([Change(2, whole, layer, side) for layer in range(3) for side in "kv"])
    assert all(0 < part < every[0] for part in layers)
    heads = prefix.divergences([Change(2, whole, 1, "k", head) for head in range(HEADS)])
    assert len(set(heads)) == HEADS and all(0 < part < 3 * layers[2] for part in heads)


def test_training_learns_which_tokens_are_worth_their_bits() -> None:
    features = torch.randn(1000, 4)
    worth = (2 * features[:, 2]).exp().double()
    loss = worth[:, None] * torch.tensor([1e-4, 1e-5, 1e-7, 0.0], dtype=torch.float64)
    weights, outcome = train(features, loss, 3.0, 0)
    mine, drawn, ideal = outcome.held_out.values()
    assert ideal <= mine < ideal + 0.3 * (drawn - ideal)
    assert outcome.tested_on == 200 and sum(outcome.labels.values()) == 1000
    again, _ = train(features, loss, 3.0, 0)
    assert all(torch.equal(weights[name], again[name]) for name in weights), "seeds decide everything"


def test_weights_of_the_objective() -> None:
    features, loss = torch.randn(400, 4), torch.rand(400, 4, dtype=torch.float64).sort(descending=True).values
    cheap, dear = (train(features, loss, 3.0, 0, Weights(cost=cost))[0] for cost in (0.0, 100.0))
    assert not all(torch.equal(cheap[name], dear[name]) for name in cheap)
    for wrong in ({"cost": -1.0}, {"quality": float("nan")}):
        with pytest.raises(InputError, match="0 or more"):
            Weights(**wrong)


def test_training_on_noise_does_not_pretend() -> None:
    features, worth = torch.randn(1500, 4), torch.randn(1500).exp().double()
    loss = worth[:, None] * torch.tensor([1e-4, 1e-5, 1e-7, 0.0], dtype=torch.float64)
    mine, drawn, ideal = train(features, loss, 3.0, 0)[1].held_out.values()
    assert ideal < 0.8 * drawn and mine > 0.8 * drawn


def without_times(line: bytes) -> Any:
    times = ("seconds", "crc32")
    return json.loads(line, object_hook=lambda x: {name: value for name, value in x.items() if name not in times})


@pytest.fixture
def settings(calibration: Settings) -> Settings:
    return replace(calibration, spec="rotated:bits=3", tokens=200, follow=8)


def test_a_stopped_calibration_goes_on_and_gives_the_same(settings: Settings, tmp_path: Path) -> None:
    with Stages() as stages:
        done = calibrate(settings, 70, tmp_path / "whole", tmp_path / "whole.safetensors", stages)
    lines = (tmp_path / "whole" / "samples.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "samples.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:50])
    (tmp_path / "half" / "manifest.json").write_bytes((tmp_path / "whole" / "manifest.json").read_bytes())
    with Stages() as stages:
        again = calibrate(settings, 70, tmp_path / "half", tmp_path / "half.safetensors", stages)
    assert again.outcome == done.outcome
    measured = (tmp_path / "half" / "samples.jsonl").read_bytes().splitlines(keepends=True)
    assert measured[:2] == lines[:2] and list(map(without_times, measured)) == list(map(without_times, lines))
    assert json.dumps(done.as_dict())
    with Stages() as stages, pytest.raises(RecordError, match="another measured_tokens"):
        calibrate(settings, 71, tmp_path / "half", tmp_path / "half.safetensors", stages)


def test_a_controller_says_where_it_comes_from_and_works(settings: Settings, tmp_path: Path) -> None:
    out, model = tmp_path / "c.safetensors", make_model("llama")
    with Stages() as stages:
        done = calibrate(settings, 70, tmp_path / "run", out, stages)
    with tersekv.attached(model):
        cache = tersekv.cache(model, done.spec)
        model(input_ids=torch.randint(1, 97, (1, 300)), past_key_values=cache)
    assert cache.report().planes()["bits2", "k.codes"] > 0
    about = Controller.load(out, cache.controller.about["fingerprint"]).about
    assert {"model", "text", "seed", "versions", "commit", "spec", "windows", "outcome"} <= set(about)
    assert about["seconds"] == done.seconds == parse(done.spec).policy.calibration_seconds
    assert bits_of(parse(done.spec), model.config)["calibration_seconds"] == done.seconds > 0


def test_too_little_is_refused(settings: Settings, tmp_path: Path) -> None:
    with Stages() as stages, pytest.raises(InputError, match="20 measured tokens are too few: at least 320"):
        calibrate(settings, 4, tmp_path / "run", tmp_path / "c.safetensors", stages)
    with pytest.raises(InputError, match="Give at least 1 window, 192 tokens"):
        Settings("tiny", settings.text, "rotated:bits=3", windows=1, tokens=100)


def test_a_budget_goes_where_it_was_measured_to_help(settings: Settings, tmp_path: Path) -> None:
    settings, model = replace(settings, spec="rotated", windows=2), make_model("llama")
    with Stages() as stages:
        found = budget(settings, 3.5, tmp_path / "run", stages)
        again = budget(settings, 2.5, tmp_path / "run", stages)
    for allocation, average in ((found, 3.5), (again, 2.5)):
        for text in (allocation.spec, *allocation.controls):
            layers = parse(text).layers
            assert len(layers) == 3 and sum(map(sum, layers)) == 6 * average
        assert allocation.foreseen["as measured"] < allocation.foreseen["the same bits, dealt at random"]
        assert all(sides[side][0] > sides[side][-1] for sides in allocation.kl.values() for side in "kv")
        heads = [x for sides in allocation.heads.values() for side in "kv" for x in sides[side]]
        assert len(heads) == 2 * HEADS * len(allocation.kl) and min(heads) > 0
        assert "dearest heads" in to_text(allocation)
    assert len((tmp_path / "run" / "samples.jsonl").read_bytes().splitlines()) == 2, "measured once"
    held = []
    with tersekv.attached(model):
        for text in (found.spec, *found.controls):
            cache = tersekv.cache(model, text)
            model(input_ids=torch.randint(1, 97, (1, 300)), past_key_values=cache)
            held.append(cache.report().held)
        tersekv.save(cache, tmp_path / "cache.safetensors", model)
    assert len(set(held)) == 1, "the controls hold the same bytes"
    assert tersekv.load(tmp_path / "cache.safetensors", model).report().held == held[-1]
    assert json.loads(json.dumps(found.as_dict()))["spec"] == found.spec and "as measured" in to_text(found)
    with Stages() as stages, pytest.raises(InputError, match="--bits 9: the average must be from 2 to 6"):
        budget(settings, 9.0, tmp_path / "run", stages)


def test_bits_by_layer_are_for_one_model_and_each_layer_has_its_own() -> None:
    model, spec = make_model("llama"), "rotated layers=4/3,2/2,6/5"
    with tersekv.attached(model):
        cache = tersekv.cache(model, spec)
        model(input_ids=torch.randint(1, 97, (1, 300)), past_key_values=cache)
        fork = cache.copy("packed")
    for one in (cache, fork):
        for layer, (k, v) in zip(one.layers, ((4, 3), (2, 2), (6, 5)), strict=True):
            tier = layer.store.tiers.packed["packed"]
            assert (tier.k.bits, tier.v.bits) == (layer.store.spec.k.bits, layer.store.spec.v.bits) == (k, v)
    page = parse("rotated:bits=4").k.layout(32).nbytes + parse("rotated:bits=3").v.layout(32).nbytes
    costs = [sequence_bytes(model.config, parse(f"rotated layers={x}*3"), 300) for x in ("4/3", "2/2")]
    blocks, heads, layers = 3, 2, 3  # of 300 tokens, 4 are sinks and 64 recent
    tables, dense = 8 * blocks * heads * layers, (300 - 64 * blocks) * heads * layers * 2 * 32 * 2
    assert costs[0] == page * blocks * heads * layers + dense + tables
    assert costs[0] > sequence_bytes(model.config, parse("rotated layers=4/3,2/2,4/3"), 300) > costs[1]
    with pytest.raises(SpecError, match="layers= names 2 layers, but this model has 3"):
        tersekv.cache(model, "rotated layers=4/3*2")
