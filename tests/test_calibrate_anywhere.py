"""Tables fitted to models whose first layer is not packed, and on a GPU: made, loaded, used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Letters, make_model
from hosting import forward

import tersekv
from tersekv.calibrate import klt, kvquant, vq
from tersekv.calibrate.session import Settings
from tersekv.eval.run import bits_of
from tersekv.models import LoadedModel
from tersekv.ops import cuda
from tersekv.spec import parse
from tersekv.terminal import Stages

Fit = Callable[[Settings, Path, Path], str]


def fit_klt(settings: Settings, folder: Path, out: Path) -> str:
    return klt.calibrate(settings, 8, "fisher", folder, out, Stages()).spec


def fit_kvquant(settings: Settings, folder: Path, out: Path) -> str:
    return kvquant.calibrate(settings, kvquant.Shape(bits=2, rounds=3), folder, out, Stages()).spec


def fit_before_rope(settings: Settings, folder: Path, out: Path) -> str:
    return vq.calibrate(settings, vq.Shape(dim=4, index=4, rope="before", rounds=3), folder, out, Stages()).spec


def fit_vq(settings: Settings, folder: Path, out: Path) -> str:
    return vq.calibrate(settings, vq.Shape(dim=4, index=4, rounds=3), folder, out, Stages()).spec


FITS = pytest.mark.parametrize(
    "fit", [fit_klt, fit_kvquant, fit_vq, fit_before_rope], ids=["klt", "kvquant", "vq", "before"]
)
GPU = [pytest.mark.gpu, pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@FITS
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["gemma3", "qwen2"])
def test_a_fit_is_one_of_the_model(
    fit: Fit, device: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = make_model(family)
    model.to(device)
    loaded = LoadedModel(model, Letters(), "tiny", "random weights", "none")
    monkeypatch.setattr("tersekv.calibrate.session.load", lambda *_: loaded)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, and runs. " * 30)
    settings = Settings("tiny", text, "none", windows=3, tokens=260, follow=1, device=device)
    spec = parse(f"{fit(settings, tmp_path / 'run', tmp_path / 'out.safetensors')} prefill=packed")
    ids = torch.randint(1, 97, (1, 200), device=device)
    cache = tersekv.cache(model, spec)
    with tersekv.attached(model):
        logits = forward(model, cache, ids)
    assert torch.isfinite(logits).all() and cache.report().held < cache.report().dense
    assert bits_of(spec, model.config)["body_bits"] < 16, "a record names the bits of the layers that are packed"
    dense = model(input_ids=ids).logits
    assert 0 < (logits - dense).norm() < 0.5 * dense.norm()
