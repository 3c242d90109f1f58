"""The native kernels are there, and are what runs: in the ops and under transformers."""

import os

import pytest
import torch
from hosting import PROMPT, forward
from native_cases import make_case
from torch import Tensor
from transformers import PreTrainedModel

import tersekv
from tersekv import ops
from tersekv.ops import native

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


@needs_native
@pytest.mark.usefixtures("reference_raises")
def test_ops_run_the_kernels() -> None:
    case = make_case("3 normal scale:log8 channel_zero:int8", "3 normal scale:log8", 64, 2, 1, [[130, 1]])
    whole = ops.attend_pages(case.q, case.native, case.scale)
    assert torch.equal(whole[0], native.attend_pages(case.q, case.native, case.scale)[0])
    with pytest.raises(AssertionError, match="the reference ran"):  # what the kernels cannot read still goes there
        ops.attend_pages(case.q, case.linear, case.scale)


@needs_native
@pytest.mark.parametrize("spec", ["terse4", "terse3", "k=intn:bits=8,axis=channel v=none"])
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
