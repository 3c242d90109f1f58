"""Decoder layers of an attached model on a processor: a few tokens pass them in native code. See `ops.decoder`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tersekv.errors import InputError
from tersekv.hf.attention import Probe, is_ours
from tersekv.hf.exchange import as_made, exchanged
from tersekv.ops import linear, native
from tersekv.ops.decoder import DecoderLayer, Weights

NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("q_norm", "k_norm")
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
CLOSE = 2**-5  # to the largest number: several roundings to bf16


@contextmanager
def native_layers(model: nn.Module) -> Iterator[None]:
    """Within the block, layers of Llama's form compute what lies around attention in native code.

    Whether a layer is of that form is tried out before it counts, see `NativeForward.tried`.
    """
    with exchanged([(one.layer, one.forward) for one in NativeLayers(model).all]):
        yield


def weights_of(layer: nn.Module) -> Weights | None:
    """Those of a layer in memory that has Llama's parts, and no others; None for any other module."""
    parts: dict[str, Any] = dict(layer.named_children())
    if set(parts) != {"self_attn", "mlp", *NORMS}:
        return None
    attention, mlp = parts["self_attn"], parts["mlp"]
    d, activation = getattr(attention, "head_dim", None), getattr(mlp, "act_fn", None)
    inner: dict[str, Any] = dict(attention.named_children()) | dict(mlp.named_children())
    names = set(inner) - {"act_fn", *HEAD_NORMS}
    if d is None or names != {*ATTENTION, *MLP} or type(activation) not in (nn.SiLU, SiLUActivation):
        return None
    linears = [inner[name] for name in (*ATTENTION, *MLP)]
    norms = [(parts | inner).get(name) for name in (*NORMS, *HEAD_NORMS)]
    there = [norm for norm in norms if norm is not None]
    eps: set[Any] = {getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) for norm in there}
    simple = all(type(one) is nn.Linear for one in linears)
    if not simple or len(eps) != 1 or None in eps or any([*norm.state_dict()] != ["weight"] for norm in there):
        return None
    values: list[Any] = [(one.weight, one.bias) for one in linears] + [norm and norm.weight for norm in norms]
    weights = Weights(*values, eps=eps.pop(), d=d)
    return weights if all(type(x) is nn.Parameter and x.device.type == "cpu" for x in weights.tensors) else None


class Tried(NamedTuple):
    """A layer that computes what its former `forward` does."""

    layer: DecoderLayer
    options: dict[str, Any]  # with which it calls attention, beside those that it is called with


class NativeLayers:
    """What of a model is exchanged, and whether it may still be: all layers are looked at when a pass begins.

    One by one they would be looked at when the weights of the one before have just gone through the processor's caches,
    which takes five times as long.
    """

    def __init__(self, model: nn.Module) -> None:
        found = [] if native.missing() else [(x, weights_of(x)) for x in model.modules() if as_made(x)]
        self.all = [NativeForward(layer, weights, self) for layer, weights in found if weights is not None]
        self.parts = [part for one in self.all for part in one.layer.modules() if part is not one.layer]
        self.attributes = [vars(part) for part in self.parts]
        self.children = [x._modules for x in (*(one.layer for one in self.all), *self.parts) if x._modules]
        self.weights: list[tuple[dict[str, Any], str]] = [
            (part._parameters, name) for part in self.parts for name, _ in part.named_parameters(recurse=False)
        ]
        self.before, self.hooks, self.watched = self._exchangeable(), -1, False
        self.state: tuple[Any, tuple[Any, ...], bool] = None, (), False  # in one piece: threads share a model

    def may(self, x: Tensor, rotation: Any) -> bool:
        """Whether these tokens are few, and nobody watches parts of the layers or has exchanged them."""
        given, seen, may = self.state
        now = x.shape, x.dtype, torch.is_grad_enabled()
        if rotation is not given or seen != now:  # a pass gives all its layers the same
            may = rotation is not None and self._may(x)
            self.state = rotation, now, may
        return may

    def _may(self, x: Tensor) -> bool:
        first = self.all[0]
        attention = first.attention.config._attn_implementation
        if not linear.takes(x, first.weights.q[0]) or not is_ours(attention):
            return False
        self.attend = ALL_ATTENTION_FUNCTIONS[attention]
        if self.hooks != RemovableHandle.next_id:  # somewhere, somebody has put a new hook
            hooks = RemovableHandle.next_id
            self.watched = any(part._forward_hooks or part._forward_pre_hooks for part in self.parts)
            self.hooks = hooks
        if self.watched or any(one.layer.training for one in self.all):
            return False
        return self._exchangeable() == self.before

    def _exchangeable(self) -> tuple[list[Any], ...]:
        """What somebody may put in the place of the parts' own: what they compute, their parts, and their weights."""
        forwards = [attributes.get("forward") for attributes in self.attributes]
        children = [part for parts in self.children for part in parts.values()]
        return forwards, children, [parameters[name].data_ptr() for parameters, name in self.weights]


class NativeForward:
    """A decoder layer in native code, but for its attention."""

    def __init__(self, layer: nn.Module, weights: Weights, layers: NativeLayers) -> None:
        self.layer, self.former = layer, layer.forward
        self.attention: Any = layer.get_submodule("self_attn")
        self.weights, self.layers = weights, layers
        self.done: Tried | None = None
        self.refused = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """In place of the layer's."""
        if torch.compiler.is_compiling() or args or self.refused:
            return self.former(hidden_states, *args, **kwargs)
        if not self.layers.may(hidden_states, kwargs.get("position_embeddings")):
            return self.former(hidden_states, **kwargs)
        self.done = self.done or self.tried(hidden_states, **kwargs)
        if self.done is None:
            self.refused = True
            return self.former(hidden_states, **kwargs)
        return self._pass(self.done, hidden_states, **kwargs)

    def tried(self, like: Tensor, position_embeddings: Any = None, **kwargs: Any) -> Tried | None:
        """Passes tokens drawn at random both ways, and compares what goes into attention and what comes out.

        They are rotated at random, too: the angles of the first token of a text do not tell one rotation from another.
        """
        draw, probe = torch.Generator().manual_seed(0), Probe()
        try:
            cos, sin = (torch.randn(y.shape, generator=draw).to(y.dtype) for y in position_embeddings)
            x = torch.randn(like.shape, generator=draw).to(like.dtype) * 0.01  # so that what is added to it counts
            stead = {"position_embeddings": (cos, sin), "past_key_values": probe, "attention_mask": None}
            right = self.former(x, **kwargs | stead)
            ours = DecoderLayer(self.weights)
            found = [*ours.project(x, cos, sin), ours.finish(probe.q.transpose(1, 2), x)]
        except (InputError, AttributeError, TypeError, ValueError):  # it wants something else of its arguments
            return None
        if not all(map(_close, found, (probe.q, probe.k, probe.v, right))):
            return None
        return Tried(ours, {name: value for name, value in probe.options.items() if name not in kwargs})

    def _pass(
        self,
        tried: Tried,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        attention = self.attention
        q, k, v = tried.layer.project(x, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, attention.layer_idx)
        attended, _ = self.layers.attend(attention, q, k, v, attention_mask, **tried.options, **kwargs)
        return tried.layer.finish(attended, x)


def _close(ours: Tensor, right: Any) -> bool:
    like = isinstance(right, Tensor) and right.shape == ours.shape and right.dtype == ours.dtype
    return like and bool((ours.float() - right.float()).abs().max() <= CLOSE * right.float().abs().max())
