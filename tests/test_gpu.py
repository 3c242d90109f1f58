"""The reference on a GPU: the same bytes as on the CPU, and attention as exact. `pytest -m gpu` on a GPU machine."""

import numpy as np
import pytest
import torch
from conftest import FAMILIES, make_model
from test_conformance import CONFIGURATIONS

import tersekv
from tersekv.codecs.rotated import Rotated
from tersekv.ops import feedback
from tersekv.spec import parse, parse_codec
from tersekv.store import Store
from tersekv.testing import HEAD_DIMS, sample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("text", CONFIGURATIONS)
def test_bytes_are_those_of_the_cpu(text: str) -> None:
    """Bit for bit: every sum has one order, and no step depends on how a device divides or rounds."""
    codec = parse_codec(text, "k")
    for d in HEAD_DIMS:
        for seed in range(8):
            x = sample(d, 16, seed)
            packed = codec.encode(x.cuda())
            assert torch.equal(packed.data.cpu(), codec.encode(x).data), f"d={d} seed={seed}"
            assert torch.equal(codec.decode(packed).cpu(), codec.decode(codec.encode(x))), f"d={d} seed={seed}"


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_codes_with_feedback_are_those_of_the_reference(d: int, bits: int) -> None:
    """From the same matrices; those themselves are factored by another library."""
    codec, z = parse_codec(f"rotated:bits={bits}", "k"), torch.randn(3, 2, 5, 64, d, device="cuda")
    assert isinstance(codec, Rotated)
    coder, passed = codec.coder(d, z.device), torch.randn(3, 2, 1, d, d, device="cuda").triu(1) / d
    assert isinstance(coder, feedback.Nearest) and feedback.cuda.steers(z)
    found = feedback.cuda.codes(z, passed, coder.thresholds, coder.table)
    assert torch.equal(found, feedback._in_turn(z, passed, coder)[0])


@pytest.mark.parametrize(
    "spec",
    [
        "rotated:bits=3",
        "rotated:bits=2 policy=queryaware",
        "k=rotated:bits=2 v=trellis:bits=1 policy=queryaware",
        "k=intn:bits=2,axis=channel v=lloydmax:bits=4",
        "none:dtype=fp32",
    ],
)
def test_store_agrees_with_the_cpu(spec: str) -> None:
    outputs = []
    for device in ("cpu", "cuda"):
        store, generator = (
            Store(parse(spec), 2, 2, 64, torch.float32, torch.device(device)),
            torch.Generator().manual_seed(0),
        )
        padding = np.array([0, 30])
        for n in (200, 1, 1, 130):
            q, k, v = (torch.randn(2, h, n, 64, generator=generator).to(device) for h in (6, 2, 2))
            outputs.append(store.extend(q, k, v, np.minimum(padding, n), 0.125, "exact").cpu())
            padding = np.maximum(padding - n, 0)
        store.select(torch.tensor([1, 1, 0], device=device))
        store.crop(np.array([150, 120, 90]))
        outputs.append(store.decoded().k[:, :, :90].cpu())
    half = len(outputs) // 2
    for cpu, gpu in zip(outputs[:half], outputs[half:], strict=True):
        assert torch.allclose(cpu, gpu, atol=3e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_generate_the_same_on_both_routes(family: str) -> None:
    model, texts = make_model(family).cuda(), []
    ids = torch.randint(1, 97, (2, 300), device="cuda")
    for route in ("fused", "decoded"):
        with tersekv.attached(model, route):
            cache = tersekv.cache(model, "rotated:bits=3")
            texts.append(model.generate(ids, past_key_values=cache, max_new_tokens=30, do_sample=False))
    assert torch.equal(*texts)
    assert cache.report().ratio > 1
