"""Decoder layers of a few tokens in native code, in an attached model on a processor."""

from threading import Thread
from typing import Any

import pytest
import torch
from conftest import make_model
from test_native_linear import Standing
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

import tersekv
from tersekv.hf.decoder import weights_of
from tersekv.ops import native
from tersekv.ops.decoder import DecoderLayer

pytestmark = [
    pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}"),
    pytest.mark.usefixtures("inference"),
]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what layers were given in native code, but for those that try it out."""
    seen: list[tuple[int, ...]] = []
    finish = DecoderLayer.finish

    def count(self: DecoderLayer, attended: Tensor, x: Tensor, isa: str = "") -> Tensor:
        seen.append(tuple(x.shape))
        return finish(self, attended, x, isa)

    monkeypatch.setattr(DecoderLayer, "finish", count)
    return seen


def ids(model: Any, count: int, b: int = 1) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (b, count), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_an_attached_model_says_the_same(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make_model(family).to(dtype), counted(monkeypatch)
    text, logits = ids(model, 45, 2), {}
    for route in ("exact", "fused"):
        cache = tersekv.cache(model, "none")
        with tersekv.attached(model, route):
            model(text[:, :-5], past_key_values=cache)
            assert not seen
            logits[route] = [model(text[:, i : i + 1], past_key_values=cache).logits for i in (-5, -4)]
            logits[route].append(model(text[:, -3:], past_key_values=cache).logits)
    layers = model.config.num_hidden_layers
    assert seen == layers * 3 * [(2, 1, 128)] + layers * [(2, 3, 128)]  # each was tried out, once
    for ours, right in zip(logits["fused"], logits["exact"], strict=True):
        assert (ours - right).abs().max() < (1e-4 if dtype == torch.float32 else 0.05) * right.abs().max()
    assert all("forward" not in vars(module) for module in model.modules())


def test_any_cache_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make_model("llama"), counted(monkeypatch)
    text = ids(model, 7)
    right = model(text).logits
    with tersekv.attached(model):
        cache = DynamicCache(config=model.config)
        found = [model(text[:, :6], past_key_values=cache).logits, model(text[:, 6:], past_key_values=cache).logits]
        alone = model(text).logits
    assert len(seen) == 4 * model.config.num_hidden_layers and cache.get_seq_length() == 7
    assert all((one - right).abs().max() < 1e-4 * right.abs().max() for one in (torch.cat(found, 1), alone))


def test_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make_model("llama"), counted(monkeypatch)
    text, mask = ids(model, 6, 2), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    right = model(text, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    with tersekv.attached(model):
        cache = tersekv.cache(model, "none")
        for start, end in ((0, 3), (3, 6)):
            places = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end]
            given = {"attention_mask": mask[:, :end], "position_ids": places, "past_key_values": cache}
            ours = model(text[:, start:end], **given).logits
    assert seen and (ours - right[:, 3:]).abs().max() < 1e-4 * right.abs().max()


def test_layers_that_compute_something_else_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have Llama's parts, and put them together in another way."""
    model, seen = make_model("llama"), counted(monkeypatch)
    plain = modeling_llama.LlamaDecoderLayer.forward
    monkeypatch.setattr(
        modeling_llama.LlamaDecoderLayer, "forward", lambda self, x, **more: plain(self, x, **more) * 1.5
    )
    right = model(ids(model, 3)).logits
    with tersekv.attached(model):
        found = [model(ids(model, 3)).logits for _ in range(2)]
    assert len(seen) == model.config.num_hidden_layers  # each was tried out, once
    assert all((one - right).abs().max() < 1e-4 * right.abs().max() for one in found)


def test_another_rotation_is_found_out_at_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its angles are 0, whichever channels are turned together."""

    def by_neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, ...]:
        half = cos.shape[-1] // 2
        cos, sin = (y[..., :half].repeat_interleave(2, -1).unsqueeze(unsqueeze_dim) for y in (cos, sin))
        turned = [torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2) for y in (q, k)]
        return q * cos + turned[0] * sin, k * cos + turned[1] * sin

    model = make_model("llama")
    text = ids(model, 12)
    for rotate, more in ((by_neighbours, False), (modeling_llama.apply_rotary_pos_emb, True)):
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate)
        right, cache = model(text).logits, tersekv.cache(model, "none")
        with tersekv.attached(model), monkeypatch.context() as patch:
            seen = counted(patch)
            found = [model(text[:, i : i + 1], past_key_values=cache).logits for i in range(12)]
        assert (torch.cat(found, 1) - right).abs().max() < 1e-4 * right.abs().max()
        assert (len(seen) > model.config.num_hidden_layers) == more


def watching(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda *args: None)


def exchanging_forward(model: Any) -> None:
    norm = model.model.layers[1].input_layernorm
    norm.forward = type(norm).forward.__get__(norm)


def exchanging_weights(model: Any) -> None:
    projection = model.model.layers[1].self_attn.q_proj
    projection.weight.data = projection.weight.data.clone()


def exchanging_a_part(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    attention.o_proj = nn.Sequential(attention.o_proj)


def training(model: Any) -> None:
    model.train()


@pytest.mark.parametrize("change", [watching, exchanging_forward, exchanging_weights, exchanging_a_part, training])
def test_what_changes_while_attached_is_noticed(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make_model("llama"), counted(monkeypatch)
    cache = tersekv.cache(model, "none")
    with tersekv.attached(model):
        model(ids(model, 1), past_key_values=cache)
        before = len(seen)
        change(model)
        model(ids(model, 1), past_key_values=cache)
        assert len(seen) == before > 0


def test_gradients_autocast_and_many_tokens_are_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make_model("llama"), counted(monkeypatch)
    with tersekv.attached(model):
        model(ids(model, 9))
        with torch.autocast("cpu", torch.bfloat16):
            model(ids(model, 1))
        model.requires_grad_(True)
        with torch.enable_grad():
            assert model(ids(model, 2)).logits.requires_grad
    assert not seen


def test_attentions_are_still_to_be_had() -> None:
    model = make_model("llama")
    model.set_attn_implementation("eager")
    with tersekv.attached(model):
        plain = model(ids(model, 4))
        shown = model(ids(model, 4), output_attentions=True, output_hidden_states=True)
    assert len(shown.attentions) == len(shown.hidden_states) - 1 == model.config.num_hidden_layers
    assert (plain.logits - shown.logits).abs().max() < 1e-4 * plain.logits.abs().max()


def test_who_has_the_form() -> None:
    for family, taken in (("llama", True), ("qwen2", True), ("qwen3", True), ("mistral", True), ("gemma3", False)):
        layers = [weights_of(layer) is not None for layer in make_model(family).model.layers]
        assert layers == [taken] * len(layers)
    other = make_model("llama").model.layers[0]
    other.mlp.up_proj.weight = nn.Parameter(other.mlp.up_proj.weight.as_subclass(Standing), requires_grad=False)
    assert weights_of(other) is None and weights_of(make_model("llama").model.layers[0].to("meta")) is None
    gelu = make_model("llama")
    gelu.model.layers[0].mlp.act_fn = nn.GELU()
    assert weights_of(gelu.model.layers[0]) is None


def test_threads_may_share_a_model() -> None:
    """One decodes, the other reads prompts; each with a cache of its own."""
    model = make_model("llama")
    text = ids(model, 40)
    right = model(text).logits[:, -1]
    found: list[Tensor] = []

    def prompts() -> None:
        with torch.no_grad():
            found.extend(model(text, past_key_values=tersekv.cache(model, "none")).logits[:, -1] for _ in range(10))

    with tersekv.attached(model):
        other = Thread(target=prompts)
        other.start()
        cache = tersekv.cache(model, "none")
        ours = [model(text[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(40)][-1]
        other.join()
    assert len(found) == 10
    assert all((one - right).abs().max() < 1e-4 * right.abs().max() for one in (ours, *found))
