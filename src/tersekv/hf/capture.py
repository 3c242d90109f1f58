"""Looking at a model's own queries, keys and values, layer by layer, while it runs as it always does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from tersekv.errors import ModelError
from tersekv.hf.attention import former_attention
from tersekv.ops import attend_causal


@dataclass
class Seen:
    """One full-attention layer of one forward pass, as its attention was called, and what it answered."""

    layer: int
    q: Float[Tensor, "b hq n d"]
    k: Float[Tensor, "b h n d"]
    v: Float[Tensor, "b h n d"]
    scale: float
    out: Float[Tensor, "b hq n d"]

    @cached_property
    def exact(self) -> Float[Tensor, "b hq n d"]:
        """The same attention in fp32: the yardstick of every cache, and of the model's own kernel."""
        return attend_causal(self.q, self.k, self.v, torch.zeros(len(self.q), dtype=torch.int64), self.scale)[0]


@contextmanager
def observed(model: PreTrainedModel, look: Callable[[Seen], None]) -> Iterator[PreTrainedModel]:
    """Within the block, `look` is shown every layer that a packed cache would pack; afterwards all is as before.

    Nothing is kept, so memory is that of one layer. Run the model without a cache: a layer then has all its tokens.
    Raises ModelError if the model's attention cannot be exchanged.
    """
    with torch.inference_mode(), watched(model, look):
        yield model


@contextmanager
def watched(model: PreTrainedModel, look: Callable[[Seen], None]) -> Iterator[PreTrainedModel]:
    """As `observed`, but gradients are followed if torch does, so that `look` may keep what they are asked of."""
    before = model.config._attn_implementation or "eager"
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    packable = {index for index, layer in enumerate(layers) if type(layer) is DynamicLayer}

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, scaling: float | None = None, **more: Any
    ) -> tuple[Tensor, Tensor | None]:
        out, weights = former_attention(module, before)(module, query, key, value, *args, scaling=scaling, **more)
        if module.layer_idx in packable:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            look(Seen(module.layer_idx, query, key, value, scale, out.transpose(1, 2)))
        return out, weights

    name = f"tersekv_observed:{before}"
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, AttentionMaskInterface()[before])
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ModelError(
            f"{type(model).__name__} does not use transformers' attention interface, so nobody can look at its keys."
        )
    try:
        yield model
    finally:
        model.set_attn_implementation(before)
