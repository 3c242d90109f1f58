"""Decoder layers of an attached model on a processor: a few tokens pass them in native code. See `ops.decoder`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tersekv.errors import InputError
from tersekv.hf.attention import Probe, is_ours
from tersekv.ops import linear, native
from tersekv.ops.decoder import DecoderLayer, Weights

NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("q_norm", "k_norm")
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
CLOSE = 2**-5  # to the largest number: several roundings to bf16


@contextmanager
def native_layers(model: nn.Module) -> Iterator[None]:
    """Within the block, layers of Llama's form compute what lies around attention in native code.

    Whether a layer is of that form is tried out before it counts, see `Passing.tried`.
    """
    found = [] if native.missing() else [(one, weights_of(one)) for one in model.modules() if "forward" not in vars(one)]
    exchanged = [(vars(layer), _forward(layer, weights)) for layer, weights in found if weights is not None]
    for attributes, forward in exchanged:
        attributes["forward"] = forward
    try:
        yield
    finally:
        for attributes, forward in exchanged:
            if attributes.get("forward") is forward:  # and not what was put there meanwhile
                del attributes["forward"]


def weights_of(layer: nn.Module) -> Weights | None:
    """Those of a layer that has Llama's parts, and no others; None for any other module."""
    parts = dict(layer.named_children())
    if set(parts) != {"self_attn", "mlp", *NORMS}:
        return None
    attention, mlp = parts["self_attn"], parts["mlp"]
    d, activation = getattr(attention, "head_dim", None), getattr(mlp, "act_fn", None)
    inner = dict(attention.named_children()) | dict(mlp.named_children())
    names = set(inner) - {"act_fn", *HEAD_NORMS}
    if d is None or names != {*ATTENTION, *MLP} or type(activation) not in (nn.SiLU, SiLUActivation):
        return None
    linears = [inner[name] for name in (*ATTENTION, *MLP)]
    norms = [(parts | inner).get(name) for name in (*NORMS, *HEAD_NORMS)]
    there = [norm for norm in norms if norm is not None]
    eps = {getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) for norm in there}
    simple = all(type(one) is nn.Linear for one in linears)
    if not simple or len(eps) != 1 or None in eps or any([*norm.state_dict()] != ["weight"] for norm in there):
        return None
    gains: list[Any] = [norm and norm.weight for norm in norms]
    return Weights(*((one.weight, one.bias) for one in linears), *gains, *eps, d)


def _forward(layer: nn.Module, weights: Weights) -> Callable[..., Any]:
    passing = Passing(layer, weights)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or args or not passing.takes(hidden_states, **kwargs):
            return passing.former(hidden_states, *args, **kwargs)
        return passing(hidden_states, **kwargs)

    return forward


class Tried(NamedTuple):
    """A layer that computes what its former `forward` does."""

    layer: DecoderLayer
    options: dict[str, Any]  # with which it calls attention, beside those that it is called with


class Passing:
    """A decoder layer in native code, but for its attention."""

    def __init__(self, layer: nn.Module, weights: Weights) -> None:
        self.layer, self.former, self.attention = layer, layer.forward, layer.get_submodule("self_attn")
        self.weights, parts = weights, [*layer.modules()][1:]
        held = [(part._parameters, name) for part in parts for name, x in part._parameters.items() if x is not None]
        self.places = [(parameters, name, parameters[name].data_ptr()) for parameters, name in held]
        self.hooks = [hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self.forwards = [(vars(part), vars(part).get("forward")) for part in parts]
        self.done: Tried | None = None
        self.refused = False

    def takes(self, x: Tensor, position_embeddings: Any = None, **kwargs: Any) -> bool:
        """Whether to compute these tokens: few, and nobody watches the parts of the layer or has exchanged them."""
        if self.refused or not linear.takes(x, self.weights.q[0]) or self.layer.training or any(self.hooks):
            return False
        if any(attributes.get("forward") is not forward for attributes, forward in self.forwards):
            return False
        if not is_ours(self.attention.config._attn_implementation):
            return False
        if any(parameters[name].data_ptr() != place for parameters, name, place in self.places):
            return False
        if self.done is None:
            self.done = self.tried(x, position_embeddings, kwargs)
            self.refused = self.done is None
        return self.done is not None

    def tried(self, like: Tensor, rotation: Any, kwargs: dict[str, Any]) -> Tried | None:
        """Passes tokens drawn at random both ways, and compares what goes into attention and what comes out."""
        x = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).mul_(0.01).to(like.dtype)
        probe = Probe()
        given = kwargs | {"position_embeddings": rotation, "past_key_values": probe, "attention_mask": None}
        try:
            right = self.former(x, **given)
            ours = DecoderLayer(self.weights)
            found = [*ours.project(x, *rotation), ours.finish(probe.q.transpose(1, 2), x)]
        except (InputError, AttributeError, TypeError):  # it wants something else of its cache, or of its arguments
            return None
        if not all(map(_close, found, (probe.q, probe.k, probe.v, right))):
            return None
        return Tried(ours, {name: value for name, value in probe.options.items() if name not in kwargs})

    def __call__(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        assert self.done is not None  # for the type checker: `takes` was asked
        ours, attention = self.done.layer, self.attention
        q, k, v = ours.project(x, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, attention.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
        attended, _ = attend(attention, q, k, v, attention_mask, **self.done.options, **kwargs)
        return ours.finish(attended, x)


def _close(ours: Tensor, right: Any) -> bool:
    like = isinstance(right, Tensor) and right.shape == ours.shape and right.dtype == ours.dtype
    return like and bool((ours.float() - right.float()).abs().max() <= CLOSE * right.float().abs().max())
