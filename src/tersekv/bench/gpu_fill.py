"""Caches of any length on a GPU without reading a text: pages of random tokens, each used many times."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tersekv
from tersekv.dense_tier import DenseTier
from tersekv.hf.layer import PackedLayer, Slots
from tersekv.ops import encode
from tersekv.packed_tier import PackedTier
from tersekv.policy.window import Window
from tersekv.spec import Spec
from tersekv.tiers import Evicted, Tiers

DISTINCT = 2**12  # pages that are encoded; pools are filled by drawing from them


def _tokens(b: int, h: int, t: int, d: int, first: int, device: str) -> DenseTier:
    k, v = (torch.randn(b, h, t, d, device=device, dtype=torch.bfloat16) for _ in range(2))
    positions = (first + torch.arange(t, dtype=torch.int32, device=device)).expand(b, h, t).contiguous()
    return DenseTier(k, v, positions, np.full((b, h), t))


def tiers(spec: Spec, b: int, h: int, t: int, d: int, device: str) -> Tiers:
    """Of `t` tokens for each sequence, in bf16, as the policy `window` would have left them."""
    policy, block = spec.policy, spec.k.layout(d).block
    assert isinstance(policy, Window)
    sink, blocks = min(policy.sink, t), policy.blocks(t, block)
    rest = t - sink - blocks * block
    empty = PackedTier.empty(spec.k, spec.v, DenseTier.empty(b, h, d, torch.bfloat16, torch.device(device)))
    starts = sink + block * torch.arange(blocks, dtype=torch.int32, device=device)
    packed = replace(
        empty,
        pool=_pool(empty, b * h * blocks, device),
        table=torch.arange(b * h * blocks, dtype=torch.int32, device=device).view(b, h, blocks),
        starts=starts.expand(b, h, blocks).contiguous(),
        lengths=np.full((b, h), blocks * block),
    )
    dense = {"sink": _tokens(b, h, sink, d, 0, device), "recent": _tokens(b, h, rest, d, t - rest, device)}
    return Tiers(dense, {"packed": packed}, Evicted.none(packed.lengths))


def _pool(like: PackedTier, pages: int, device: str) -> Tensor:
    count, split = min(DISTINCT, pages), like.layouts[0].nbytes
    distinct = torch.empty(count, like.pool.shape[1], dtype=torch.uint8, device=device)
    for codec, layout, out in zip(
        (like.k, like.v), like.layouts, (distinct[:, :split], distinct[:, split:]), strict=True
    ):
        encode(codec, torch.randn(count, like.block, like.d, device=device, dtype=torch.bfloat16), layout, out)
    pool = torch.empty(pages, like.pool.shape[1], dtype=torch.uint8, device=device)
    return torch.index_select(distinct, 0, torch.randint(count, (pages,), device=device), out=pool)


def cache(model: PreTrainedModel, spec: Spec, b: int, t: int, room: int) -> tersekv.PackedCache:
    """A cache of `model` with `t` tokens in each of `b` sequences."""
    config = model.config
    h, d, device = config.num_key_value_heads, config.head_dim, str(model.device)
    made = tersekv.cache(model, spec, room)
    like = torch.empty(b, h, 0, d, dtype=torch.bfloat16, device=device)
    for layer in made.layers:
        assert isinstance(layer, PackedLayer)
        layer.opened_for(like, like).tiers = tiers(spec, b, h, t, d, device)
        layer.slots = Slots(t)
    return made
