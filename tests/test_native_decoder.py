"""Decoder layers of a few tokens in native code, against fp64, and in an attached model on a processor."""

from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from conftest import make_model
from test_native_attend import RUN
from test_native_linear import Standing
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

import tersekv
from tersekv.errors import InputError
from tersekv.hf.decoder import weights_of
from tersekv.ops import native
from tersekv.ops.decoder import DecoderLayer, Weights

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")
STEPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half of the last place
EPS = 1e-5


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    before = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def weights(hq: int, h: int, d: int, width: int, inner: int, dtype: torch.dtype, full: bool = False) -> Weights:
    """`full`: with biases and norms of heads."""
    draw = torch.Generator().manual_seed(hq + d + width)
    shapes = [(hq * d, width), (h * d, width), (h * d, width), (width, hq * d), (inner, width), (inner, width)]
    linear = [torch.randn(shape, generator=draw) / shape[1] ** 0.5 for shape in [*shapes, (width, inner)]]
    biases = [torch.randn(x.shape[0], generator=draw).to(dtype) if full else None for x in linear]
    gains = [1 + 0.1 * torch.randn(n, generator=draw) for n in (width, width, d, d)]
    norms: list[Any] = [x.to(dtype) for x in (gains if full else gains[:2])] + ([] if full else [None, None])
    return Weights(*zip([x.to(dtype) for x in linear], biases, strict=True), *norms, EPS, d)


def tokens(w: Weights, b: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, cosines and sines, and what was attended to."""
    draw, dtype = torch.Generator().manual_seed(b + n), w.input_norm.dtype
    x = torch.randn(b, n, w.input_norm.shape[0], generator=draw)
    angles = torch.randn(b, n, w.d // 2, generator=draw).repeat(1, 1, 2)
    attended = torch.randn(b, n, w.q[0].shape[0] // w.d, w.d, generator=draw)
    return x.to(dtype), angles.cos().to(dtype), angles.sin().to(dtype), attended.to(dtype)


def norm(x: Tensor, gain: Tensor | None) -> Tensor:
    return x if gain is None else x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * gain.double()


def linear(x: Tensor, layer: tuple[Tensor, Tensor | None]) -> Tensor:
    return nn.functional.linear(x, layer[0].double(), None if layer[1] is None else layer[1].double())


def expected(w: Weights, x: Tensor, cos: Tensor, sin: Tensor, attended: Tensor) -> list[Tensor]:
    """Queries, keys, values, and the output, in fp64."""
    x, cos, sin, attended = (one.double() for one in (x, cos, sin, attended))
    into = norm(x, w.input_norm)
    q, k, v = (linear(into, one).unflatten(-1, (-1, w.d)).transpose(1, 2) for one in (w.q, w.k, w.v))
    q, k = norm(q, w.q_norm), norm(k, w.k_norm)
    turned = [
        y * cos[:, None] + torch.cat((-y[..., w.d // 2 :], y[..., : w.d // 2]), -1) * sin[:, None] for y in (q, k)
    ]
    h = x + linear(attended.flatten(2), w.o)
    n = norm(h, w.post_norm)
    return [*turned, v, h + linear(nn.functional.silu(linear(n, w.gate)) * linear(n, w.up), w.down)]


def both(w: Weights, given: tuple[Tensor, Tensor, Tensor, Tensor], isa: str = "") -> list[Tensor]:
    x, cos, sin, attended = given
    layer = DecoderLayer(w)
    return [*layer.project(x, cos, sin, isa), layer.finish(attended, x, isa)]


SHAPES = [(9, 3, 64, 576, 1536), (4, 4, 80, 320, 48), (2, 1, 96, 64, 16), (8, 1, 128, 1024, 2832), (1, 1, 256, 16, 32)]


@pytest.mark.parametrize("isa", RUN)
@pytest.mark.parametrize("dtype", STEPS)
@pytest.mark.parametrize(("hq", "h", "d", "width", "inner"), SHAPES)
def test_as_exact_as_the_type_allows(
    hq: int, h: int, d: int, width: int, inner: int, dtype: torch.dtype, isa: str
) -> None:
    for full, b, n in ((False, 1, 1), (True, 1, 3), (True, 2, 4), (False, 5, 1)):
        w = weights(hq, h, d, width, inner, dtype, full)
        given = tokens(w, b, n)
        for ours, truth in zip(both(w, given, isa), expected(w, *given), strict=True):
            assert ours.shape == truth.shape and ours.dtype == dtype
            bound = STEPS[dtype] * truth.abs() + 4e-6 * truth.abs().max()
            assert (ours.double() - truth).abs().le(bound).all()


def test_any_number_of_threads_and_any_company() -> None:
    w = weights(9, 3, 64, 576, 1536, torch.bfloat16)
    given = tokens(w, 2, 4)
    alone = both(w, given)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, both(w, given), alone))


def test_one_rotation_for_all_sequences_and_strided_input() -> None:
    w = weights(2, 1, 64, 64, 32, torch.float32)
    x, cos, sin, attended = tokens(w, 3, 2)
    layer = DecoderLayer(w)
    same = [one[:1].expand(3, 2, 64).contiguous() for one in (cos, sin)]
    right = layer.project(x, *same)
    assert all(map(torch.equal, layer.project(x, cos[:1], sin[:1]), right))
    strided = torch.cat((x, x), -1)[..., :64]
    assert all(map(torch.equal, layer.project(strided, *same), right))
    crossed = attended.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(layer.finish(crossed, x), layer.finish(attended, x))


def test_what_is_not_a_number_stays_with_its_token() -> None:
    w = weights(2, 1, 64, 64, 32, torch.bfloat16)
    x, cos, sin, attended = tokens(w, 1, 2)
    clean = both(w, (x, cos, sin, attended))
    x[0, 0, 3] = torch.nan
    for ours, right in zip(both(w, (x, cos, sin, attended))[:3], clean, strict=False):
        assert ours[:, :, 0].isnan().all() and torch.equal(ours[:, :, 1], right[:, :, 1])
    out = DecoderLayer(w).finish(attended, x)
    assert out[0, 0].isnan().all() and torch.equal(out[0, 1], clean[3][0, 1])


def changed(**parts: Any) -> Weights:
    w = weights(2, 1, 64, 64, 32, torch.float32)
    return Weights(**(vars(w) | parts))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"k": (torch.ones(32, 64), None)}, "Queries or keys|do not fit"),
        ({"up": (torch.ones(16, 64), None)}, "do not fit"),
        ({"down": (torch.ones(48, 32), None)}, "vectors of 64"),
        ({"o": (torch.ones(64, 128).half(), None)}, "several types"),
        ({"post_norm": torch.ones(48)}, "A norm's weights"),
        ({"d": 24}, "multiples of 16"),
        ({"v": (torch.ones(64, 64, device="meta"), None)}, "in memory"),
        ({"gate": (torch.ones(64, 32).t(), None)}, "contiguous"),
    ],
)
def test_weights_that_do_not_fit_are_refused(parts: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        DecoderLayer(changed(**parts))


def test_tokens_that_do_not_fit_are_refused() -> None:
    w = weights(2, 1, 64, 64, 32, torch.float32)
    x, cos, sin, attended = tokens(w, 1, 2)
    layer = DecoderLayer(w)
    for given, said in (
        ((x.half(), cos, sin), "Inputs"),
        ((x[..., :48], cos, sin), "Inputs"),
        ((x, cos.half(), sin.half()), "Cosines"),
    ):
        with pytest.raises(InputError, match=said):
            layer.project(*given)
    y = x.new_empty(1, 2, 4, 64)
    for half, arrays, said in (  # what annotations would not let through here
        ("project", (x, cos[:, :1], sin, y), "Cosines"),
        ("project", (x, cos, sin, y[:, :1]), "Outputs"),
        ("finish", (attended[:, :1], x, x.clone()), "attended"),
        ("finish", (attended, x, x[:, :1].clone()), "Outputs"),
    ):
        with pytest.raises(InputError, match=said):
            layer._call(getattr(layer._native, half), arrays, "")


# In a model.


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
    text = ids(model, 6)
    right = model(text).logits
    with tersekv.attached(model):
        cache = DynamicCache(config=model.config)
        found = [model(text).logits, model(text, past_key_values=cache).logits]
        found.append(torch.cat((found[1], model(text[:, :1], past_key_values=cache).logits), 1)[:, :6])
    assert len(seen) == 4 * model.config.num_hidden_layers and cache.get_seq_length() == 7
    assert all((one - right).abs().max() < 1e-4 * right.abs().max() for one in found)


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


def test_what_wants_gradients_or_is_much_goes_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make_model("llama"), counted(monkeypatch)
    with tersekv.attached(model):
        model(ids(model, 9))
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
