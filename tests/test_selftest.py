"""The self-test of presets: what it measures, when it warns, and that it can be left out."""

import warnings

import pytest
from transformers import PreTrainedModel

import tersekv
from tersekv.hf import selftest
from tersekv.spec import parse


def test_fewer_bits_diverge_more_and_the_model_is_left_as_it_was(llama: PreTrainedModel) -> None:
    before = llama.config._attn_implementation
    tried = [selftest.divergence(llama, parse(f"rotated:bits={bits}")) for bits in (8, 2, 1)]
    found = [kl for kl in tried if kl is not None]
    assert len(found) == 3 and found == sorted(found)
    assert llama.config._attn_implementation == before


def test_a_preset_that_fails_says_so_each_time_and_is_tried_once(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def far(model: PreTrainedModel, spec: object) -> float:
        tried.append(str(spec))
        return 2.5

    monkeypatch.setattr(selftest, "divergence", far)
    selftest._found.pop(llama, None)
    for _ in range(2):
        with pytest.warns(UserWarning, match="terse2 fails its self-test on this model: .* 2.50 nats"):
            tersekv.cache(llama, "terse2")
    assert len(tried) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tersekv.cache(llama, "terse2", selftest=False)
        tersekv.cache(llama, "rotated:bits=2")
    selftest._found.pop(llama)


def test_a_context_in_which_nothing_is_packed_is_not_tested(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.config, "max_position_embeddings", 100)
    assert selftest.divergence(llama, parse("terse2")) is None
