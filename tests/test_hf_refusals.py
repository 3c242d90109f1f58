"""What the transformers host refuses, and that a refused or interrupted forward pass changes nothing."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from conftest import make_model
from hosting import PROMPT, forward, lengths
from torch import Tensor
from transformers import PreTrainedModel

import tersekv
from tersekv import CacheError, InputError, ModelError


@pytest.mark.parametrize(("projection", "side"), [("k_proj", "keys"), ("v_proj", "values")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("is_attached", [True, False])
def test_nan_names_layer_and_position_and_changes_nothing(
    family_model: PreTrainedModel, ids: Tensor, projection: str, side: str, value: float, is_attached: bool
) -> None:
    """The broken layer comes after others that have stored their tokens: those are rolled back."""
    model = family_model
    with warnings.catch_warnings(), tersekv.attached(model) if is_attached else nullcontext():
        warnings.simplefilter("ignore" if not is_attached else "error", UserWarning)
        cache = tersekv.cache(model, "rotated:bits=3")
        forward(model, cache, ids[:, :200])
        bad = ids[:, 200:].clone()
        bad[1, 7] = 96
        broken = [i for i, layer in enumerate(cache.layers) if type(layer).__name__ == "PackedLayer"][-1]
        layer = model.model.layers[broken].self_attn
        hook = getattr(layer, projection).register_forward_hook(
            lambda m, i, o: o.clone().index_fill_(1, torch.tensor(7), value)
        )
        states = [vars(x).copy() for x in cache.layers]
        try:
            with pytest.raises(InputError, match=f"Layer {broken}: {side} hold .*position 207"):
                forward(model, cache, bad)
        finally:
            hook.remove()
        assert lengths(cache) == [200] * 3
        for layer_state, x in zip(states, cache.layers, strict=True):
            if "keys" in layer_state and layer_state["keys"] is not None:
                assert torch.equal(layer_state["keys"], x.keys)
        expected = forward(model, cache.copy(), ids[:, 200:])
        assert torch.isfinite(expected).all()


@pytest.fixture(params=["llama", "gemma3"])
def family_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


def test_an_interrupted_pass_is_noticed_and_rolled_back(llama: PreTrainedModel, ids: Tensor) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with tersekv.attached(llama):
        cache = tersekv.cache(llama, "rotated:bits=3")
        forward(llama, cache, ids[:, :200])
        expected = forward(llama, cache.copy(), ids[:, 200:])
        hook = llama.model.layers[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            forward(llama, cache, ids[:, 200:])
        hook.remove()
        assert lengths(cache) == [300, 300, 200]
        with pytest.raises(CacheError, match=r"stopped after layer 1.*rollback"):
            forward(llama, cache, ids[:, 200:])
        reset = cache.copy()
        reset._before = dict(cache._before)
        reset.reset()
        forward(llama, reset, ids)
        cache.rollback()
        assert lengths(cache) == [200] * 3
        assert torch.equal(forward(llama, cache, ids[:, 200:]), expected)


def test_mismatched_input_is_refused(llama: PreTrainedModel, ids: Tensor) -> None:
    with tersekv.attached(llama):
        cache = tersekv.cache(llama, "rotated:bits=3")
        forward(llama, cache, ids)
        with pytest.raises(InputError, match="holds sequences 2, but was given 1"):
            forward(llama, cache, ids[:1])
        x = torch.zeros(2, 2, 1, 32)
        for bad, said in ((x.double(), "dtype"), (x[..., :16], "head dim"), (x[:, :1], "KV heads")):
            with pytest.raises(InputError, match=said):
                cache.layers[0].extend(bad, bad, bad, None, 1.0, "fused")
            with pytest.raises(InputError, match=said):
                cache.layers[0].update(bad, bad)
        with pytest.raises(InputError, match="device"):
            cache.layers[0].update(x.to("meta"), x.to("meta"))
        assert lengths(cache) == [PROMPT] * 3


def test_masks_that_packed_attention_cannot_compute(llama: PreTrainedModel, ids: Tensor) -> None:
    right, other = torch.ones_like(ids), torch.ones_like(ids)
    right[0, -5:] = 0
    with tersekv.attached(llama):
        cache = tersekv.cache(llama, "rotated:bits=3")
        with pytest.raises(InputError, match="left padding"):
            forward(llama, cache, ids, right)
        with pytest.raises(InputError, match="custom attention mask"):
            forward(llama, cache, ids, torch.ones(2, 1, PROMPT, PROMPT, dtype=torch.bool))
        assert lengths(cache) == [0] * 3
        other[1, :10] = 0
        forward(llama, cache, ids, other)
        with pytest.raises(InputError, match=r"\[300, 300\] stored tokens, but the cache holds \[300, 290\]"):
            forward(llama, cache, ids[:, :3], torch.ones(2, PROMPT + 3, dtype=torch.long))
        assert lengths(cache) == [PROMPT] * 3


def test_a_padded_cache_needs_an_attached_model(llama: PreTrainedModel, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1, :77] = 0
    cache = tersekv.cache(llama, "rotated:bits=3")
    with tersekv.attached(llama):
        forward(llama, cache, ids, mask)
    with pytest.warns(UserWarning, match="not attached"), pytest.raises(InputError, match="left-padded batch"):
        forward(llama, cache, ids[:, :2], torch.ones(2, PROMPT + 2, dtype=torch.long))
    assert lengths(cache) == [PROMPT] * 3


def test_context_limit(llama: PreTrainedModel) -> None:
    with tersekv.attached(llama):
        cache = tersekv.cache(llama, "rotated:bits=3")
        forward(llama, cache, torch.ones(1, 1024, dtype=torch.long))
        with pytest.raises(InputError, match="1025 tokens are more than this model's context of 1024"):
            forward(llama, cache, torch.ones(1, 1, dtype=torch.long))
        assert lengths(cache) == [1024] * 3


def test_models_without_a_cache_to_pack() -> None:
    from transformers import BertConfig, BertModel, MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

    small = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 50}
    models = [
        BertModel(BertConfig(**small, num_attention_heads=2, intermediate_size=32)),
        MambaForCausalLM(MambaConfig(**small, state_size=4)),
        T5ForConditionalGeneration(T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, vocab_size=50)),
    ]
    for model in models:
        with pytest.raises(ModelError):
            tersekv.cache(model, "rotated:bits=4")
