"""A transformers cache whose full-attention layers are packed; the others are what transformers would use."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from tersekv import files
from tersekv.errors import CacheError, InputError, ModelError, TersekvError
from tersekv.hf.attention import is_ours
from tersekv.hf.compiled import ticket_for, untraced
from tersekv.hf.layer import Handle, PackedLayer, restore_layer, state_of
from tersekv.hf.mask import Shown
from tersekv.hf.rating import signals
from tersekv.hf.report import cache_report
from tersekv.policy.adaptive import Adaptive
from tersekv.policy.controller import Controller
from tersekv.report import CacheReport
from tersekv.spec import Spec


class PackedCache(Cache):
    """Pass it as `past_key_values`. Either every layer takes a forward pass's tokens, or none does."""

    def __init__(
        self, config: PreTrainedConfig, spec: Spec, controller: Controller | None = None, room: int | None = None
    ) -> None:
        self.config, self.spec, self.controller = config.get_text_config(decoder=True), spec, controller
        self.room, self.ticket = room, ticket_for(self)
        self._spread: Tensor | None = None  # of the forward pass under way, for the controller
        self._before: dict[int, Any] = {}  # what each layer was before the forward pass under way
        self._shown: Shown | None = None  # what that pass's mask shows
        self.decoding = ""  # how `generate` decodes with this cache, once it was asked: see `hf.attach`
        self._warned = False
        self._spilled: Path | None = None
        dense = DynamicCache(config=self.config).layers
        spec.check_layers(len(dense))
        layers = [
            PackedLayer(spec.at(index), index, self, room) if type(layer) is DynamicLayer else layer
            for index, layer in enumerate(dense)
        ]
        if not any(isinstance(layer, PackedLayer) for layer in layers):
            kinds = sorted({type(layer).__name__ for layer in layers})
            raise ModelError(
                f"{self.config.model_type} has no full-attention layer to pack; its cache is "
                f"{', '.join(kinds) or 'empty'}. Use a decoder with full attention, such as Llama, Qwen or Gemma."
            )
        super().__init__(layers=layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedCache":
        return self.copy()  # with a ticket of its own

    def attached(self) -> bool:
        """Whether the model's attention reads packed layers; if not, warn once that they will be unpacked."""
        if is_ours(self.config._attn_implementation):
            return True
        if not self._warned:
            warnings.warn(
                "This model is not attached: the packed cache is unpacked at every step, which is slow and needs the "
                "dense memory for a moment. Run inside `with tersekv.attached(model):`.",
                stacklevel=2,
            )
            self._warned = True
        return False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        layer = self.layers[layer_idx]
        if isinstance(layer, PackedLayer) and self.attached():
            handle = Handle(layer, key_states, value_states)  # stored by the attention function, which has the mask
            return handle, handle
        return self._stored(key_states, value_states, layer_idx, *args, **kwargs)

    @untraced  # tensors grow and lengths change at each step
    def _stored(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.begin(layer_idx, key_states.shape[2])
        try:
            k, v = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except TersekvError:
            self.rollback()
            raise
        self.finished(layer_idx)
        return k, v

    def begin(self, layer_idx: int, n: int) -> None:
        """A layer is about to take `n` tokens. With the first one a forward pass starts."""
        if layer_idx == next(iter(self._before), layer_idx):  # the layer with which the pass under way began
            self.check_next(n)
            self._shown = None
        self._before[layer_idx] = state_of(self.layers[layer_idx])

    def check_next(self, n: int) -> None:
        """Before a forward pass: the last one must have reached every layer, and the context must suffice."""
        self._refuse_spilled()
        if self._before:
            raise CacheError(
                f"The last forward pass stopped after layer {max(self._before)}, so the layers hold different tokens. "
                "Call cache.rollback() to return to the state before it."
            )
        total, limit = self.get_seq_length() + n, getattr(self.config, "max_position_embeddings", None)
        if limit is not None and total > limit:
            raise InputError(
                f"{total} tokens are more than this model's context of {limit} (max_position_embeddings). "
                "The cache is unchanged; shorten the prompt or crop the cache."
            )

    def expect(self, room: int | None) -> None:
        """Room for what a host says it will come to, unless the user has asked for some."""
        if self.room is None:
            for layer in self._packed:
                layer.opened().room = room

    def shown(self, mask: Tensor | None, n: int) -> Shown:
        """What a pass's mask shows. One look at it serves all layers."""
        if self._shown is None or self._shown.mask is not mask:
            self._shown = Shown(mask, n)
        return self._shown

    def finished(self, layer_idx: int) -> None:
        """A layer has stored its tokens; after the last one the forward pass can no longer be rolled back."""
        if layer_idx == self._last:
            self._before, self._shown = {}, None

    def moved(self, layer_idx: int) -> None:
        """A layer's tokens lie elsewhere now: a rollback returns there, so that their old memory is free at once."""
        self._before[layer_idx] = state_of(self.layers[layer_idx])

    @cached_property
    def _last(self) -> int:
        """DummyLayer (transformers 5.18) stands for layers that read another layer's cache and never store."""
        return max(i for i, layer in enumerate(self.layers) if type(layer).__name__ != "DummyLayer")

    def watch(self, layer_idx: int, spread: Callable[[], Tensor]) -> None:
        """A layer is about to store tokens. Of the last packed one a controller wants to know how attention lies."""
        if self.controller is not None and layer_idx == self._packed[-1].index:
            self._spread = spread()

    def rate(self, model: PreTrainedModel, ids: Tensor | None, hidden: Tensor) -> None:
        """A forward pass is over: where a controller routes tokens, tell it what the model said of the new ones."""
        policy = self.spec.policy
        if self.controller is None or self._spread is None or not isinstance(policy, Adaptive):
            return
        if ids is None:
            raise InputError(f"router={policy.router} needs token ids. Give the model input_ids, not inputs_embeds.")
        found = signals(model, ids, hidden, self._spread, self.controller.counts)
        utility, self._spread = self.controller.utility(found), None
        for layer in self._packed:
            store = layer.opened()
            store.tiers = policy.rated(store.tiers, utility)

    @cached_property
    def _packed(self) -> list[PackedLayer]:
        return [layer for layer in self.layers if isinstance(layer, PackedLayer)]

    def pass_limit(self) -> int | None:
        """How many tokens a forward pass may have, so that each sees what decoding one by one would show it.

        None: any, because prefill=packed sees to it. Only a controller, which decides after a pass, sets a bound.
        """
        policy = self.spec.policy
        if self.controller is None or not isinstance(policy, Adaptive):
            return None
        stores = [layer.store for layer in self._packed if layer.store is not None]
        return min((policy.room(store.tiers) for store in stores), default=policy.first)

    def rollback(self) -> None:
        """Undo a forward pass that stopped half-way: every layer returns to its state before it, exactly."""
        for index, state in self._before.items():
            restore_layer(self.layers[index], state)
        self._before = {}

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forget the newest `-tokens_to_remove` slots of every sequence, in every layer or, on an error, in none."""
        self._refuse_spilled()
        before = [state_of(layer) for layer in self.layers]
        try:
            super().crop(int(tokens_to_remove))  # from assisted decoding on a GPU it is a tensor
        except Exception:
            for layer, state in zip(self.layers, before, strict=True):
                restore_layer(layer, state)
            raise

    def reset(self) -> None:
        self._before, self._spilled = {}, None
        super().reset()

    def spill(self, folder: str | Path, model: PreTrainedModel) -> Path:
        """Write the cache to a new file in `folder` and let go of its memory. `restore` brings it back, bit for bit.

        Pages that a copy or another beam shares are freed when that lets go of them too. Returns the file, which
        `tersekv.load` reads as well, in any process. Raises CacheError for a cache that is empty, spilled, or in the
        middle of a forward pass, and CacheFileError where the file cannot be written; the cache is then unchanged.
        """
        self._refuse_spilled()
        if self._before:
            raise CacheError("The last forward pass stopped half-way. Call cache.rollback() first.")
        path = files.spill(self, folder, model)
        self._become(PackedCache(self.config, self.spec))
        self._spilled = path
        return path

    def restore(self, model: PreTrainedModel) -> None:
        """Bring back a spilled cache, if its file has the hash that it was written with, and delete the file.

        Raises CacheFileError for a damaged or missing file or another model; the cache then stays spilled.
        """
        if self._spilled is None:
            raise CacheError("This cache is not spilled: there is nothing to restore. Go on with it.")
        path = self._spilled
        self._become(files.load(path, model))
        self._spilled = None
        path.unlink()

    def _refuse_spilled(self) -> None:
        if self._spilled is not None:
            raise CacheError(f"This cache was spilled to {self._spilled}. Call cache.restore(model) to go on with it.")

    def _become(self, other: "PackedCache") -> None:
        for mine, its in zip(self.layers, other.layers, strict=True):
            restore_layer(mine, state_of(its))
            if isinstance(mine, PackedLayer) and mine.store is not None:
                mine.store.room = mine.room  # which a file does not know

    def copy(self, prefill: str | None = None) -> "PackedCache":
        """A second cache with the same tokens, which then goes its own way; pages are shared, so it costs nothing.

        `prefill` replaces the spec's ("exact" or "packed") for what the copy will be given.
        """
        self._refuse_spilled()
        spec = self.spec if prefill is None else replace(self.spec, prefill=prefill)
        fork = PackedCache(self.config, spec, self.controller, self.room)
        for mine, its in zip(self.layers, fork.layers, strict=True):
            if isinstance(mine, PackedLayer) and mine.store is not None:
                mine.store.kept()
            restore_layer(its, state_of(mine))
            if isinstance(its, PackedLayer) and its.store is not None:
                its.store.spec = its.spec
        return fork

    def report(self) -> CacheReport:
        """Bytes held by tier, plane and layer beside what a dense cache would hold."""
        return cache_report(str(self.spec), self.layers, self.decoding)
