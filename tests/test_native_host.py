"""The native kernels are there, and are what runs: in the ops and under transformers."""

import os

import numpy as np
import pytest
import torch
from hosting import PROMPT, forward
from native_cases import make_case
from torch import Tensor
from transformers import PreTrainedModel

import tersekv
from tersekv import ops
from tersekv.describe import Info
from tersekv.ops import native
from tersekv.spec import parse
from tersekv.store import Store

WITHOUT = "TERSEKV_WITHOUT_NATIVE"
needs_native = pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")


def test_the_native_core_is_built() -> None:
    """Fails rather than skips: without it most of this package's tests would pass on the reference alone."""
    if os.environ.get(WITHOUT) == "1":
        pytest.skip(f"{WITHOUT}=1: this run is about the install without a compiler")
    assert native.missing() is None, f"{native.missing()} Set {WITHOUT}=1 to test an install without a compiler."


@pytest.fixture
def reference_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the reference ran where the native kernels should have")

    for name in ("attend_pages", "attend_dense", "attend_causal", "merge"):
        monkeypatch.setattr(ops.reference, name, refuse)
    monkeypatch.setattr(Store, "extend", refuse)  # a step is one native call


@needs_native
@pytest.mark.usefixtures("reference_raises")
def test_ops_run_the_kernels() -> None:
    case = make_case("3 normal scale:log8 channel_zero:int8", "3 normal scale:log8", 64, 2, 1, [[130, 1]])
    whole = ops.attend_pages(case.q, case.native, case.scale)
    assert torch.equal(whole[0], native.attend_pages(case.q, case.native, case.scale)[0])
    with pytest.raises(AssertionError, match="the reference ran"):  # what the kernels cannot read still goes there
        ops.attend_pages(case.q, case.linear, case.scale)


@needs_native
@pytest.mark.parametrize(
    "spec",
    [
        "rotated:bits=4",
        "rotated:bits=3",
        "trellis:bits=2",
        "k=intn:bits=8,axis=channel v=none",
        "kivi:bits=2,group=16",
        "direction",
        "vq:dim=4",
    ],
)
def test_transformers_decodes_with_the_kernels(
    spec: str, any_model: PreTrainedModel, ids: Tensor, request: pytest.FixtureRequest
) -> None:
    with tersekv.attached(any_model):
        cache = tersekv.cache(any_model, spec)
        forward(any_model, cache, ids)
        request.getfixturevalue("reference_raises")
        for token in ids[:, :20].split(1, 1):  # a block becomes due meanwhile
            assert torch.isfinite(forward(any_model, cache, token)).all()
    assert cache.get_seq_length() == PROMPT + 20


@needs_native
def test_the_report_says_what_reads_a_cache(llama: PreTrainedModel, ids: Tensor) -> None:
    for spec, said in (("rotated:bits=4", "native "), ("intn:bits=5", "reference (keys: 5 bits at head dim")):
        with tersekv.attached(llama):
            forward(llama, cache := tersekv.cache(llama, spec), ids)
        assert cache.report().implementation.startswith(said)
        assert f"attention by {said}" in " ".join(str(cache.report()).split())


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("direction", ""),
        ("k=direction:bits=2,norm=log8 v=direction:bits=8", ""),
        ("direction:codebook=shared", ""),
        ("turboquant", ""),
        ("turboquant:form=prod", "recipe grid + grid"),
        ("outliers", "recipe split"),
        ("polar", "recipe polar"),
        ("qjl:bits=1", ""),
        ("qjl", "128 codes a token: they read one for each of the 64 channels"),
        ("twoaxis", ""),
        ("trellis", ""),
        ("trellis:bits=4", ""),
        ("kvquant", "recipe grid with outliers"),
        ("kvquant:outliers=0", ""),
        ("vq", ""),
        ("vq:dim=16,index=6,stages=2", ""),
        ("k=vq:dim=4,mean=none v=vq:mean=block", ""),
        ("kivi", ""),
        ("k=kivi:bits=4,group=16 v=kivi:bits=3,group=16", ""),
        ("k=kivi:axis=token v=kivi:axis=channel", ""),
        ("k=kivi:group=8 v=kivi", "keys: plane channel_scale is in groups of 8 tokens: they read groups of 16"),
        ("k=kivi v=intn:bits=4,group=8", "values: plane scale is in groups of 8 channels: they read groups of 16"),
        ("k=kivi:group=64 v=kivi:group=64", ""),
        ("k=intn:bits=5 v=rotated:bits=4", "keys: 5 bits"),
        ("k=rotated:bits=4 v=intn:bits=4,group=16", ""),
    ],
)
def test_what_the_kernels_read_is_what_the_pages_of_the_methods_say(spec: str, why: str) -> None:
    said = Info(parse(spec), 64).attention
    assert why in said if why else said == ops.implementation("cpu")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 200, 64) for h in (4, 2, 2))
    outputs = []
    for route in ("exact", "decoded"):
        store, none = Store(parse(spec), 1, 2, 64, torch.float32, torch.device("cpu")), np.zeros(1, dtype=np.int64)
        store.append(k, v, none)
        outputs.append(store.extend(q[:, :, :1], k[:, :, :1], v[:, :, :1], none, 0.125, route))
    assert (outputs[0] - outputs[1]).abs().max() <= 256 * torch.finfo(torch.float32).eps * v.abs().max()


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("rotated", ""),
        ("k=rotated:bits=2 v=trellis:bits=2", ""),
        ("kivi", "keys: "),
        ("trellis", "keys: "),
        ("none", ""),
        ("k=none v=trellis:bits=1", ""),
        ("k=none v=none:dtype=fp16", "values: stored in fp16: the CUDA kernels read bf16"),
        ("polar", "recipe polar"),
    ],
)
def test_info_says_who_reads_pages_on_a_gpu_without_one(spec: str, why: str) -> None:
    found = Info(parse(spec), 128)
    said = found.attention_cuda
    assert said.startswith("reference (") and why in said if why else said == "CUDA"
    assert found.as_dict()["attention_cuda"] == said


def test_a_head_dim_beyond_the_kernels_scratch_runs_on_the_reference() -> None:
    d, none = 576, np.zeros(1, dtype=np.int64)
    outputs = []
    for route in ("fused", "decoded"):
        torch.manual_seed(0)
        store = Store(parse("rotated:bits=4"), 1, 1, d, torch.float32, torch.device("cpu"))
        for n in (200, 1):
            q, k, v = (torch.randn(1, h, n, d) for h in (2, 1, 1))
            outputs.append(store.extend(q, k, v, none, d**-0.5, route))
    assert torch.allclose(outputs[1], outputs[3], atol=2e-5)
    assert "head dim 576" in ops.implementation_of(store.tiers.packed["packed"].pages)
