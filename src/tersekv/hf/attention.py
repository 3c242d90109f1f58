"""The attention and mask functions that transformers calls while a model is attached. Tested with transformers 5.23."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from tersekv.errors import InputError, ModelError, did_you_mean
from tersekv.hf.layer import Handle
from tersekv.hf.rating import rated
from tersekv.store import Padding, Store

# Attention functions are named ROUTE:FORMER.
ROUTES = {"fused": "tersekv", "exact": "tersekv_exact", "decoded": "tersekv_decoded"}


def is_ours(attention: str | None) -> bool:
    """Whether a model's attention implementation is one that `attached` has set."""
    return (attention or "").partition(":")[0] in ROUTES.values()


class ChunkMask:
    """A causal mask that is only written out for layers that stay dense; packed layers need the padding alone."""

    def __init__(self, write: Callable[..., Any], arguments: dict[str, Any]) -> None:
        self.write, self.arguments = write, arguments

    @cached_property
    def dense(self) -> Any:
        return self.write(**self.arguments)

    @cached_property
    def padding(self) -> Padding:
        """Tokens at the left of the chunk that the host masks out, for each sequence; None if it masks out none."""
        mask, n = self.arguments["attention_mask"], self.arguments["q_length"]
        if mask is None:
            return None
        fresh = mask[:, -n:].bool().cpu().numpy()
        padding = n - fresh.sum(-1)
        if not (fresh == (np.arange(n) >= padding[:, None])).all():
            raise InputError(
                "The attention mask hides tokens in the middle or at the right of the new ones. A packed cache takes "
                'left padding only: use tokenizer.padding_side = "left".'
            )
        return padding if padding.any() else None

    @cached_property
    def shown(self) -> np.ndarray | None:
        """Stored tokens that the mask does not hide, for each sequence; one look at it serves all layers."""
        mask, n = self.arguments["attention_mask"], self.arguments["q_length"]
        return None if mask is None else mask[:, : mask.shape[1] - n].sum(-1).cpu().numpy()

    def check(self, store: Store) -> None:
        """Raise InputError if the mask hides other stored tokens than those that were padding when they came."""
        if self.shown is not None and not np.array_equal(self.shown, store.lengths):
            raise InputError(
                f"The attention mask shows {self.shown.tolist()} stored tokens, but the cache holds "
                f"{store.lengths.tolist()}. "
                "Pass the mask of the whole conversation, unchanged for the part already seen."
            )


def _mask(former: str, **arguments: Any) -> Any:
    """A plain causal mask stays unwritten; any other (sliding window, prefix) is what the former attention gets."""
    write = AttentionMaskInterface()[former]
    function: Callable[..., Any] = arguments["mask_function"]
    plain = getattr(function, "__name__", "") == "causal_mask_function" and not arguments.get("use_vmap")
    return ChunkMask(write, arguments) if plain else write(**arguments)


def former_attention(module: torch.nn.Module, former: str) -> Callable[..., Any]:
    """What the model used before: layers that are not packed must not notice that it is attached."""
    if former == "eager":
        return import_module(type(module).__module__).eager_attention_forward
    return AttentionInterface()[former]


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


def _forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | Handle,
    value: Tensor | Handle,
    attention_mask: ChunkMask | Tensor | None,
    former: str,
    route: str,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer: (b, n, hq, d). Layers that are not packed go to the model's former attention."""
    if not isinstance(key, Handle):
        mask = attention_mask.dense if isinstance(attention_mask, ChunkMask) else attention_mask
        return former_attention(module, former)(module, query, key, value, mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    try:
        padding = _padding(key, attention_mask, kwargs)
        out = key.layer.extend(query, key, padding, scale, route)
    except InputError:
        key.layer.cache.rollback()
        raise
    if query.requires_grad and torch.is_grad_enabled():
        out = _NoGradient.apply(out, query)
    return out.transpose(1, 2).contiguous(), None  # native code has written it in this order


def _padding(key: Handle, mask: ChunkMask | Tensor | None, kwargs: dict[str, Any]) -> Padding:
    """The chunk's left padding. Raises InputError for what packed attention does not compute."""
    for name in ("softcap", "s_aux", "position_bias", "sliding_window"):
        if kwargs.get(name) is not None:
            raise InputError(f"Layer {key.layer.index} uses {name}, which packed attention does not compute.")
    if mask is None:
        return None
    if isinstance(mask, ChunkMask):
        mask.check(key.layer.opened_for(key.k, key.v))
        return mask.padding
    raise InputError(
        f"Layer {key.layer.index} was given a custom attention mask of shape {tuple(mask.shape)}. Packed attention is "
        "causal with left padding: pass a 2D mask, or run the model without tersekv.attached."
    )


@contextmanager
def attached(model: PreTrainedModel, route: str = "fused") -> Iterator[PreTrainedModel]:
    """Within the block, `model` attends to packed caches where they lie; afterwards it is as before.

    Kernels may multiply codes of up to 4 bits as 8-bit integers; `route="exact"` has them compute in fp32.
    `route="decoded"` unpacks the history at every step instead: the slow check on the other two.
    Raises ModelError if the model's attention cannot be exchanged.
    """
    if route not in ROUTES:
        raise InputError(f'Unknown route "{route}". {did_you_mean(route, ROUTES)}')
    before = model.config._attn_implementation or "eager"
    name = f"{ROUTES[route]}:{before}"
    AttentionInterface.register(name, partial(_forward, former=before, route=route))
    AttentionMaskInterface.register(name, partial(_mask, before))
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ModelError(
            f"{type(model).__name__} does not use transformers' attention interface, so its attention cannot be "
            "exchanged. Use the cache without tersekv.attached: it then unpacks at every step."
        )
    try:
        with rated(model):
            yield model
    finally:
        model.set_attn_implementation(before)
