"""What a context costs on a model, from its configuration alone."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from tersekv.errors import InputError
from tersekv.layout import BLOCK
from tersekv.models.conversion import quiet
from tersekv.spec import Spec

BF16 = 2  # bytes
TABLES = 8  # bytes of a block's entries: its page and its position


def head_dim(config: Any) -> int:
    """Of the text decoder; configs such as Qwen2's leave it to be derived."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def context_limit(whole: PreTrainedConfig) -> int | None:
    return getattr(whole.get_text_config(decoder=True), "max_position_embeddings", None)


def checked_context(whole: PreTrainedConfig, context: int | None) -> int:
    """`context`, or what a model takes up to 32,768 tokens. Raises InputError for one that the model does not have."""
    limit = context_limit(whole)
    tokens = min(limit or 32_768, 32_768) if context is None else context
    if tokens < 1 or (limit and tokens > limit):
        most = f"{limit} tokens (max_position_embeddings)" if limit else "any number of tokens"
        raise InputError(f"--context {tokens}: this model takes 1 to {most}.")
    return tokens


def weight_count(whole: PreTrainedConfig) -> int:
    """Weights of the model, shared ones once, without making room for them."""
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(whole)
    return sum(weight.numel() for weight in model.parameters())


def sequence_bytes(whole: PreTrainedConfig, spec: Spec, tokens: int) -> int:
    """Bytes of one sequence: packed layers with their dense tiers and page tables, other layers in bf16.

    What a cache also holds is small: the positions of dense tokens and the lengths of tiers.
    """
    costs = _costs(whole, spec, tokens)
    return costs["packed"] + costs["window"] + costs["tables"]


def model_cost(whole: PreTrainedConfig, spec: Spec, context: int | None = None) -> dict[str, Any]:
    """Bytes of one sequence of `context` tokens, dense in bf16 and packed, page tables and lengths not included.

    Raises InputError for a context that the model does not have.
    """
    tokens = checked_context(whole, context)
    return {name: count for name, count in _costs(whole, spec, tokens).items() if name != "tables"}


def packed_specs(config: PreTrainedConfig, spec: Spec) -> list[Spec]:
    """Of each layer that is packed; those with a sliding window are not. Raises SpecError for another model's spec."""
    layers = DynamicCache(config=config).layers
    spec.check_layers(len(layers))
    return [spec.at(index) for index, layer in enumerate(layers) if type(layer) is DynamicLayer]


def _costs(whole: PreTrainedConfig, spec: Spec, tokens: int) -> dict[str, int]:
    config: Any = whole.get_text_config(decoder=True)
    d, heads = head_dim(config), int(config.num_key_value_heads or config.num_attention_heads)
    layers: list[Any] = DynamicCache(config=config).layers
    packed = packed_specs(config, spec)
    pages = [(one.k.layout(d), one.v.layout(d)) for one in packed]
    block = pages[0][0].block if pages else BLOCK
    token = 2 * heads * d * BF16
    window = sum(min(layer.sliding_window - 1, tokens) for layer in layers if getattr(layer, "is_sliding", False))
    held = spec.policy.held(tokens)
    blocks = spec.policy.blocks(held, block)
    bytes_packed = blocks * heads * sum(k.nbytes + v.nbytes for k, v in pages)
    bytes_packed += sum(x.nbytes for one in packed for x in (one.k.fitted, one.v.fitted) if x is not None)
    return {
        "context": tokens,
        "head_dim": d,
        "packed_layers": len(packed),
        "other_layers": len(layers) - len(packed),
        "dense": len(packed) * tokens * token,
        "packed": bytes_packed + len(packed) * ((held - blocks * block) * token + heads * spec.policy.beside(d)),
        "window": window * token,
        "tables": len(packed) * blocks * heads * TABLES,
    }
