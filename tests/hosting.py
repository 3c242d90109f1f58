"""What the tests of the transformers host share."""

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

import tersekv

PROMPT = 300


def forward(model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(input_ids=ids, past_key_values=cache, attention_mask=mask).logits


def dense(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return forward(model, DynamicCache(config=model.config), ids, mask)


def tolerance(logits: Tensor) -> float:
    """A few hundred fp32 roundings of the largest logit: what another summation order may change in three layers."""
    return 500 * torch.finfo(torch.float32).eps * logits.abs().max().item()


def lengths(cache: tersekv.PackedCache) -> list[int]:
    return [layer.get_seq_length() for layer in cache.layers]
