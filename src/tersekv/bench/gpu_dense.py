"""What packed caches are compared with on a GPU: 16-bit caches, and the fastest that attention to one can be."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin

FASTEST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
UNMASKED = "tersekv_bench_unmasked"


def _unmasked(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Without a mask, which transformers writes while a graph is captured even where all tokens are seen."""
    return sdpa(q, k, v, scale=scaling, enable_gqa=True).transpose(1, 2).contiguous(), None


@contextmanager
def unmasked(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model attends to all of its cache, with the fastest kernels there are."""
    AttentionInterface.register(UNMASKED, _unmasked)
    AttentionMaskInterface.register(UNMASKED, lambda **_: None)
    before = model.config._attn_implementation or "eager"
    model.set_attn_implementation(UNMASKED)
    try:
        with sdpa_kernel(FASTEST, set_priority=True) if model.device.type == "cuda" else nullcontext():
            yield
    finally:
        model.set_attn_implementation(before)


class FullLayer(CacheLayerMixin):
    """All slots count, so no mask is needed and the fastest kernel runs: a new token takes the place of the last one.

    No cache that grows can be faster. It is a bound, not something to decode with.
    """

    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, b: int, h: int, t: int, d: int, device: str) -> None:
        super().__init__()
        self.k, self.v = (torch.randn(b, h, t, d, device=device, dtype=torch.bfloat16) for _ in range(2))
        self.last = torch.full((1,), t - 1, device=device)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.k.index_copy_(2, self.last, key_states)
        self.v.index_copy_(2, self.last, value_states)
        return self.k, self.v

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.k.shape[2], 0

    def get_seq_length(self) -> int:
        return self.k.shape[2] - 1

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


def shape(model: PreTrainedModel) -> tuple[int, int, int]:
    config = model.config
    return config.num_hidden_layers, config.num_key_value_heads, config.head_dim


def full(model: PreTrainedModel, b: int, t: int) -> Cache:
    layers, h, d = shape(model)
    return Cache(layers=[FullLayer(b, h, t, d, str(model.device)) for _ in range(layers)])


def dynamic(model: PreTrainedModel, b: int, t: int) -> DynamicCache:
    layers, h, d = shape(model)
    made = DynamicCache()
    for index in range(layers):
        k, v = (torch.randn(b, h, t - 1, d, device=model.device, dtype=torch.bfloat16) for _ in range(2))
        made.update(k, v, index)
    return made


def static(model: PreTrainedModel, b: int, t: int) -> StaticCache:
    layers, h, d = shape(model)
    made = StaticCache(config=model.config, max_cache_len=t + 64)
    for index in range(layers):
        k, v = (torch.randn(b, h, t - 1, d, device=model.device, dtype=torch.bfloat16) for _ in range(2))
        made.update(k, v, index)
    return made


class DenseStep:
    """One token into a dense cache; captured if `graph`."""

    def __init__(self, model: PreTrainedModel, cache: Cache, b: int, graph: bool) -> None:
        self.model, self.cache = model, cache
        self.ids = torch.zeros(b, 1, dtype=torch.int64, device=model.device)
        self.positions = torch.full_like(self.ids, int(cache.get_seq_length()))
        self.graph: torch.cuda.CUDAGraph | None = None
        self.forward()
        if graph:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self.forward()

    def __call__(self) -> Tensor:
        if self.graph is None:
            return self.forward()
        self.graph.replay()
        return self.logits

    def forward(self) -> Tensor:
        return self.model(
            input_ids=self.ids, position_ids=self.positions, past_key_values=self.cache, logits_to_keep=1
        ).logits[:, -1]


class Captured:
    """A call as a graph. It keeps the call, and with it the memory that the graph works on."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run, self.graph = run, torch.cuda.CUDAGraph()
        run()
        with torch.cuda.graph(self.graph):
            run()

    def __call__(self) -> None:
        self.graph.replay()


def steps_of_dense(new: list[Tensor], layers: list[Tensor], last: Tensor, scale: float) -> None:
    q, k, v = new
    for keys, values in layers:
        keys.index_copy_(2, last, k)
        values.index_copy_(2, last, v)
        sdpa(q, keys, values, scale=scale, enable_gqa=True)
