"""One packed attention layer as transformers sees it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from tersekv.errors import InputError, TersekvError
from tersekv.hf.checks import check_finite, check_like
from tersekv.hf.mask import Shown
from tersekv.spec import Spec
from tersekv.store import Padding, Store


@runtime_checkable
class Owner(Protocol):
    """The cache that a layer belongs to: it knows about the whole forward pass."""

    ticket: Tensor

    def begin(self, layer_idx: int, n: int) -> None: ...
    def shown(self, mask: Tensor | None, n: int) -> Shown: ...
    def finished(self, layer_idx: int) -> None: ...
    def moved(self, layer_idx: int) -> None: ...
    def watch(self, layer_idx: int, spread: Callable[[], Tensor]) -> None: ...
    def rollback(self) -> None: ...


class Slots(NamedTuple):
    """The host's view of a cache: every sequence has `total` slots, of which padding was never stored."""

    total: int = 0
    padded: tuple[tuple[int, Int[np.ndarray, "b"]], ...] = ()  # left-padded chunks: first slot, pads a sequence

    def grown(self, n: int, padding: Padding) -> "Slots":
        note = () if padding is None else ((self.total, padding),)
        return Slots(self.total + n, self.padded + note)

    def real(self, total: int, b: int) -> Int[np.ndarray, "b"]:
        """Real tokens of each sequence in its first `total` slots."""
        pads = sum(
            (np.minimum(p, max(total - start, 0)) for start, p in self.padded), start=np.zeros(b, dtype=np.int64)
        )
        return total - pads

    def cut(self, total: int) -> "Slots":
        kept = ((start, np.minimum(p, total - start)) for start, p in self.padded if start < total)
        return Slots(total, tuple(kept))

    def select(self, rows: np.ndarray) -> "Slots":
        return Slots(self.total, tuple((start, p[rows]) for start, p in self.padded))


@dataclass(frozen=True)
class Handle:
    """What the cache gives to the attention function: fresh keys and values that are not stored yet."""

    layer: "PackedLayer"
    k: Float[Tensor, "b h n d"]
    v: Float[Tensor, "b h n d"]

    @property
    def shape(self) -> tuple[int, ...]:
        """What a dense cache would have returned; some models look at it."""
        b, h, n, d = self.k.shape
        return (b, h, self.layer.slots.total + n, d)


class PackedLayer(CacheLayerMixin):
    """Keys and values of one full-attention layer in a `Store`.

    While the model's attention is tersekv's, the cache hands out a `Handle`, and storing waits for the attention
    function, which knows the padding. Otherwise `update` stores at once and returns unpacked tensors: right, but slow.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, spec: Spec, index: int, cache: Owner, room: int | None = None) -> None:
        super().__init__()
        self.spec, self.index, self.cache, self.room = spec, index, cache, room
        self.slots, self.store = Slots(), None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        b, h, _, d = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.store = Store(self.spec, b, h, d, key_states.dtype, key_states.device, self.room)
        self.is_initialized = True

    def opened(self) -> Store:
        """The store, once the layer has seen tokens."""
        if self.store is None:
            raise InputError(f"Layer {self.index} holds no tokens yet. Run the model once with this cache.")
        return self.store

    def opened_for(self, key_states: Tensor, value_states: Tensor) -> Store:
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        return self.opened()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """For a model that is not attached: store at once, and return all tokens unpacked."""
        self._check_like(key_states)
        check_finite(self.index, self.slots.total, key_states, value_states)
        store = self.opened_for(key_states, value_states)
        if self.slots.padded:
            raise InputError(
                f"Layer {self.index} holds a left-padded batch, whose padding is not stored, so it cannot be unpacked "
                "into the host's slots. Run inside `with tersekv.attached(model):`."
            )
        old = store.decoded()
        store.append(key_states, value_states, None)
        self.slots = self.slots.grown(key_states.shape[2], None)
        return torch.cat((old.k, key_states), 2), torch.cat((old.v, value_states), 2)

    def extend(
        self,
        q: Float[Tensor, "b hq n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n d"],
        mask: Tensor | None,
        scale: float,
        route: str,
    ) -> Float[Tensor, "b n hq d"]:
        """Attention output for new tokens, which are stored. `mask`: 2D, of the whole conversation.

        On an error the forward pass that this is a part of is rolled back. Raises InputError for NaN and Inf, and for
        what does not fit to what is held.
        """
        self.cache.begin(self.index, q.shape[2])
        try:
            out = self._extended(q, k, v, self.cache.shown(mask, q.shape[2]), scale, route)
        except TersekvError:
            self.cache.rollback()
            raise
        self.cache.finished(self.index)
        return out.transpose(1, 2).contiguous()  # native code has written it in this order

    def _extended(self, q: Tensor, k: Tensor, v: Tensor, shown: Shown, scale: float, route: str) -> Tensor:
        self._check_like(k)
        store = self.opened_for(k, v)
        shown.check(store)
        padding, moved = shown.padding, partial(self.cache.moved, self.index)
        out = store.step(q, k, v, scale, route, moved) if padding is None else None
        if out is None:
            check_finite(self.index, self.slots.total, k, v)
            self.cache.watch(self.index, lambda: store.spread(q, k, padding, scale))
            out = store.extend(q, k, v, padding, scale, route)
        self.slots = self.slots.grown(q.shape[2], padding)
        return out

    def _check_like(self, k: Tensor) -> None:
        if self.store is not None:
            check_like(self.index, self.store.like, k)

    def replayed(self, n: int) -> None:
        """A graph stored `n` tokens."""
        self.opened().replayed(n)
        self.slots = self.slots.grown(n, None)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.total + query_length, 0

    def get_seq_length(self) -> int:
        return self.slots.total

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` slots of every sequence (transformers counts them negatively)."""
        if tokens_to_remove > 0:
            raise InputError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number.")
        if tokens_to_remove == 0 or self.store is None:
            return
        total = max(self.slots.total + tokens_to_remove, 0)
        self.store.crop(self.slots.real(total, len(self.store.lengths)))
        self.slots = self.slots.cut(total)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.store is not None:
            self.store.select(indices.to(self.device))
            self.slots = self.slots.select(indices.cpu().numpy())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None:
            self.batch_select_indices(torch.arange(len(self.store.lengths)).repeat_interleave(repeats))

    def reset(self) -> None:
        self.slots, self.store, self.is_initialized = Slots(), None, False

    def snapshot(self) -> tuple[Any, ...]:
        """The state, by reference: nothing of it is ever changed, so `restore` is exact and costs nothing."""
        return self.slots, self.store, self.store and self.store.state

    def restore(self, state: tuple[Any, ...]) -> None:
        self.slots, store, held = state
        self.store = store and store.at(held)
        self.is_initialized = store is not None
        if store is not None:
            self.dtype, self.device = store.like.dtype, store.like.device

    def offload(self) -> None:
        raise InputError("Offloading a packed layer is not supported. Use a DynamicCache(offloading=True) instead.")

    prefetch = offload


def state_of(layer: Any) -> Any:
    """Of any layer; references suffice: neither we nor transformers' dynamic layers write into a tensor they hold."""
    return layer.snapshot() if isinstance(layer, PackedLayer) else dict(vars(layer))


def restore_layer(layer: Any, state: Any) -> None:
    if isinstance(layer, PackedLayer):
        layer.restore(state)
    else:
        vars(layer).clear()
        vars(layer).update(state)
