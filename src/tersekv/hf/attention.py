"""The attention and mask functions that transformers calls while a model is attached. Tested with transformers 5.23."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from tersekv.errors import InputError
from tersekv.hf import compiled
from tersekv.hf.layer import Handle
from tersekv.hf.mask import ChunkMask

# Attention functions are named ROUTE:FORMER.
ROUTES = {"fused": "tersekv", "exact": "tersekv_exact", "decoded": "tersekv_decoded"}


def is_ours(attention: str | None) -> bool:
    """Whether a model's attention implementation is one that `attached` has set."""
    return (attention or "").partition(":")[0] in ROUTES.values()


def mask_of(former: str, **arguments: Any) -> Any:
    """A plain causal mask stays unwritten; any other (sliding window, prefix) is what the former attention gets."""
    function: Callable[..., Any] = arguments["mask_function"]
    plain = getattr(function, "__name__", "") == "causal_mask_function" and not arguments.get("use_vmap")
    return ChunkMask(former, arguments) if plain else AttentionMaskInterface()[former](**arguments)


def former_attention(module: torch.nn.Module, former: str) -> Callable[..., Any]:
    """What the model used before: layers that are not packed must not notice that it is attached."""
    if former == "eager":
        return import_module(type(module).__module__).eager_attention_forward
    return AttentionInterface()[former]


class Probe:
    """Stands for a cache and for what it returns, and remembers what a layer's attention is called with."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple["Probe", "Probe"]:
        self.k, self.v = k, v
        return self, self

    def answer(self, q: Tensor, **options: Any) -> tuple[Tensor, None]:
        """The queries themselves, as if they were what was attended to."""
        self.q, self.options = q, options
        return q.transpose(1, 2).contiguous(), None


class _NoGradient(torch.autograd.Function):
    """Lets a model that was not told to leave gradients out go on, until somebody asks for one."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise InputError(
            "Attention to a packed cache has no gradient: what is stored is rounded. Train with a DynamicCache, or "
            "without a cache."
        )


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | Handle | Probe,
    value: Tensor | Handle | Probe,
    attention_mask: ChunkMask | Tensor | None,
    former: str,
    route: str,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer: (b, n, hq, d). Layers that are not packed go to the model's former attention."""
    if isinstance(key, Probe):
        return key.answer(query, scaling=scaling, **kwargs)
    if not isinstance(key, Handle):
        mask = attention_mask.dense if isinstance(attention_mask, ChunkMask) else attention_mask
        return former_attention(module, former)(module, query, key, value, mask, scaling=scaling, **kwargs)
    _refuse_other_arithmetic(key, attention_mask, kwargs)
    tokens = attention_mask.tokens if isinstance(attention_mask, ChunkMask) else None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.requires_grad and torch.is_grad_enabled():
        return _without_gradient(key, query, tokens, scale, route), None
    if torch.compiler.is_compiling():
        ticket, layer, held = key.layer.cache.ticket, key.layer.index, key.layer.slots.total
        return compiled.extend(ticket, query, key.k, key.v, tokens, layer, held, scale, route), None
    return key.layer.extend(query, key.k, key.v, tokens, scale, route), None


@compiled.untraced  # no operation with a side effect has a gradient that raises an error of ours
def _without_gradient(key: Handle, query: Tensor, tokens: Tensor | None, scale: float, route: str) -> Tensor:
    return _NoGradient.apply(key.layer.extend(query, key.k, key.v, tokens, scale, route), query)


def _refuse_other_arithmetic(key: Handle, mask: ChunkMask | Tensor | None, kwargs: dict[str, Any]) -> None:
    """Raise InputError for what packed attention does not compute."""
    why = ""
    for name in ("softcap", "s_aux", "position_bias", "sliding_window"):
        if kwargs.get(name) is not None:
            why = f"Layer {key.layer.index} uses {name}, which packed attention does not compute."
    if isinstance(mask, Tensor):
        why = (
            f"Layer {key.layer.index} was given a custom attention mask of shape {tuple(mask.shape)}. Packed attention "
            "is causal with left padding: pass a 2D mask, or run the model without tersekv.attached."
        )
    if why:
        key.layer.cache.rollback()
        raise InputError(why)
