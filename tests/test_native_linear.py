"""Linear layers of a few tokens in native code, against fp64, and in an attached model on a processor."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import make_model
from test_native_attend import RUN
from torch import Tensor, nn

import tersekv
from tersekv.errors import InputError
from tersekv.hf.linear import few_tokens
from tersekv.ops import linear, native

pytestmark = [
    pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}"),
    pytest.mark.usefixtures("inference"),
]
STEPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half of the last place


class Standing(Tensor):
    """As quantised weights of other libraries do, for a tensor that is never made."""


def layer(outputs: int, inputs: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(outputs + inputs + tokens)
    shapes = ((tokens, inputs), (outputs, inputs), (outputs,))
    x, weight, bias = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    return x, weight, bias


@pytest.mark.parametrize("isa", RUN)
@pytest.mark.parametrize("dtype", STEPS)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 16), (7, 48), (192, 576), (577, 1552), (3, 4096)])
def test_as_exact_as_the_type_allows(outputs: int, inputs: int, dtype: torch.dtype, isa: str) -> None:
    """One rounding of a sum in fp32, whose lanes, four at least, round once for each number that they add up."""
    for tokens in (1, 2, 3, 4, 5, 8):
        x, weight, bias = layer(outputs, inputs, tokens, dtype)
        truth = nn.functional.linear(x.double(), weight.double(), bias.double())
        sizes = nn.functional.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
        bound = STEPS[dtype] * truth.abs() + (inputs / 4 + 8) * 2.0**-24 * sizes
        assert (linear.linear(x, weight, bias, isa).double() - truth).abs().le(bound).all()
        assert torch.equal(linear.linear(x, weight, None, isa), linear.linear(x, weight, bias * 0, isa))


@pytest.mark.parametrize("dtype", STEPS)
def test_any_number_of_threads_and_any_company(dtype: torch.dtype) -> None:
    x, weight, bias = layer(3001, 576, 8, dtype)
    all_at_once = linear.linear(x, weight, bias)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(linear.linear(x, weight, bias), all_at_once)


def test_what_is_not_a_number_stays_so() -> None:
    for dtype in STEPS:
        x, weight, _ = layer(8, 64, 2, dtype)
        x[0, 3], weight[5, 7] = torch.nan, torch.inf
        y = linear.linear(x, weight)
        assert y[0].isnan().all() and y[1, 5].isinf() and y[1, :5].isfinite().all()
        large = linear.linear(x[1:].abs() * 3e4, weight[:4].abs())
        assert large.isinf().all() if dtype == torch.float16 else large.isfinite().all()


def test_shapes_and_strides() -> None:
    x, weight, bias = layer(24, 32, 6, torch.float32)
    right = linear.linear(x, weight, bias)
    assert torch.equal(linear.linear(x.view(2, 1, 3, 32), weight, bias), right.view(2, 1, 3, 24))
    strided = torch.cat((x, x), -1)[:, :32]
    assert not strided.is_contiguous() and torch.equal(linear.linear(strided, weight, bias), right)


def test_what_is_left_to_torch() -> None:
    x, weight, bias = layer(24, 32, 8, torch.float32)
    assert linear.takes(x, weight, bias) and linear.takes(x[:1], weight)
    assert not linear.takes(torch.cat((x, x[:1])), weight)
    assert not linear.takes(x[:0], weight)
    assert not linear.takes(x.bfloat16(), weight) and not linear.takes(x, weight, bias.half())
    assert not linear.takes(x.double(), weight.double())
    assert not linear.takes(x[:, :20], weight[:, :20].contiguous())
    assert not linear.takes(x, weight.t().contiguous().t())
    assert not linear.takes(x, weight.as_subclass(Standing))
    with torch.autocast("cpu", torch.bfloat16):
        assert not linear.takes(x, weight)
    with torch.enable_grad():
        assert not linear.takes(x, weight.clone().requires_grad_())


@pytest.mark.parametrize(
    ("weight", "bias", "said"),
    [
        (torch.ones(4, 20), None, "a multiple of 16"),
        (torch.ones(4, 32).half(), None, "of their type"),
        (torch.ones(4, 32), torch.ones(4).half(), "a number for each row"),
        (torch.ones(32, 4).t(), None, "weights contiguous"),
        (torch.ones(4, 32, device="meta"), None, "in memory"),
    ],
)
def test_bad_input_is_refused(weight: Tensor, bias: Tensor | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        linear.linear(torch.ones(1, weight.shape[1]), weight, bias)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []
    compute = linear.linear

    def count(x: Tensor, *rest: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return compute(x, *rest)

    monkeypatch.setattr(linear, "linear", count)
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without and with biases
def test_a_model_takes_a_few_tokens_to_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make_model(family), counted(monkeypatch)
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    ids = torch.randint(0, model.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    logits = {}
    for route in ("fused", "exact"):
        cache = tersekv.cache(model, "none")
        with few_tokens(model) if route == "fused" else nullcontext(), tersekv.attached(model, "exact"):
            model(ids[:, :-1], past_key_values=cache, logits_to_keep=0)
            assert not seen
            logits[route] = model(ids[:, -1:], past_key_values=cache).logits
        assert len(seen) == (len(layers) if route == "fused" else 0)
        seen.clear()
    assert (logits["fused"] - logits["exact"]).abs().max() < 1e-4 * logits["exact"].abs().max()
    assert all("forward" not in vars(module) for module in layers)


def test_layers_with_a_forward_of_their_own_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make_model("llama"), counted(monkeypatch)
    model.lm_head.forward = lambda x: nn.functional.linear(x, model.lm_head.weight)  # as hooks of accelerate do
    others = sum(type(module) is nn.Linear for module in model.modules()) - 1
    projection = model.model.layers[0].mlp.down_proj
    with few_tokens(model), few_tokens(model), tersekv.attached(model, "exact"):
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=tersekv.cache(model, "none"))
        projection.forward = hook = lambda x: x
    assert len(seen) == others and "forward" in vars(model.lm_head)
    assert vars(projection)["forward"] is hook
