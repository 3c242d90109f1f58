"""A cache as one safetensors file: planes in the linear order, with version, spec, model and a hash of the content."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from tersekv.dense_tier import DenseTier
from tersekv.errors import CacheError, CacheFileError
from tersekv.sealed import Sealed
from tersekv.tiers import Evicted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tersekv.hf.cache import PackedCache
    from tersekv.hf.layer import PackedLayer

# Version 2: `trellis` has other tables. 3: `queryaware` has factors of channels. 4: `twoaxis` has other keys.
FILE = Sealed("tersekv-cache", 4, ("spec", "model", "layers"), "Use a whole file that `save` wrote, or prefill again.")


def fingerprint(model: PreTrainedModel) -> str:
    """Tells models apart, fine-tunes included: a hash over each parameter's name, shape and first 64 numbers."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        head = parameter.detach().flatten()[:64].float().cpu().numpy()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + head.tobytes())
    return digest.hexdigest()


def save(cache: PackedCache, path: str | Path, model: PreTrainedModel) -> None:
    """Write `cache` to `path`; the file appears whole or not at all. Raises CacheError for an empty cache."""
    from tersekv.hf.layer import PackedLayer

    if cache.get_seq_length() == 0:
        raise CacheError("This cache is empty: there is nothing to save. Run the model with it first.")
    tensors: dict[str, Tensor] = {}
    notes: dict[str, Any] = {}
    for index, layer in enumerate(cache.layers):
        state = _packed_state(layer) if isinstance(layer, PackedLayer) else _dense_state(index, layer)
        notes[str(index)] = state[1]
        tensors |= {f"{index}.{name}": x.contiguous().cpu() for name, x in state[0].items()}
    about = {"spec": str(cache.spec), "model": fingerprint(model), "layers": json.dumps(notes)}
    FILE.write(Path(path), tensors, about)


def spill(cache: PackedCache, folder: str | Path, model: PreTrainedModel) -> Path:
    """As `save`, in a new file of the folder, which is made if need be. Returns its path."""
    path = Path(folder) / f"{uuid4().hex}.safetensors"
    save(cache, path, model)
    return path


def load(path: str | Path, model: PreTrainedModel) -> PackedCache:
    """The cache that `save` wrote, for the same model. Raises CacheFileError if the file is not exactly that."""
    from tersekv.hf.layer import PackedLayer
    from tersekv.hf.make import cache as new_cache

    tensors, metadata = FILE.read(Path(path))
    if metadata["model"] != fingerprint(model):
        raise CacheFileError(f"{path} was saved with another model. Load the model it belongs to, or prefill again.")
    cache = new_cache(model, metadata["spec"])
    notes, device = json.loads(metadata["layers"]), model.device
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        prefix = f"{index}."
        # Copied: the file is mapped, and may be deleted or written over while the cache lives.
        state = {n.removeprefix(prefix): x.to(device, copy=True) for n, x in tensors.items() if n.startswith(prefix)}
        if isinstance(layer, PackedLayer):
            _restore_packed(layer, state, notes[str(index)])
        elif state:
            layer.lazy_initialization(state["keys"], state["values"])
            vars(layer).update(state, **notes[str(index)])
    return cache


def _packed_state(layer: PackedLayer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tiers = layer.opened().tiers
    tensors = {f"{name}.{plane}": x for name, tier in tiers.held().items() for plane, x in tier.tensors().items()}
    tensors |= {f"{name}.pool": tier.linear_pool() for name, tier in tiers.packed.items()} | tiers.tensors()
    tensors |= {f"{name}.lengths": torch.from_numpy(tier.lengths) for name, tier in tiers.held().items()}
    padded = [[start, pads.tolist()] for start, pads in layer.slots.padded]
    evicted = {"evicted": [tiers.evicted.count.tolist(), tiers.evicted.below.tolist()]}
    notes = {"slots": layer.slots.total, "padded": padded}
    notes |= {"fitted": digests} if any(digests := _digests(layer)) else {}
    return tensors, notes | (evicted if tiers.evicted.count.any() else {})


def _digests(layer: PackedLayer) -> list[str]:
    """Which fitted books the codes of keys and of values index, if any."""
    codecs = (layer.spec.k, layer.spec.v)
    return ["" if codec.fitted is None else codec.fitted.digest for codec in codecs]


def _restore_packed(layer: PackedLayer, state: dict[str, Tensor], notes: dict[str, Any]) -> None:
    from tersekv.hf.layer import Slots

    if notes.get("fitted", ["", ""]) != _digests(layer):
        raise CacheFileError(f"Layer {layer.index} was saved with other books than {layer.spec} has. {FILE.instead}")
    empty = state["recent.k"][:, :, :0]
    layer.lazy_initialization(empty, empty)
    store = layer.opened()

    def restored(name: str, tier: Any) -> Any:
        lengths = state[f"{name}.lengths"].cpu().numpy()
        planes = {plane: state[f"{name}.{plane}"] for plane in tier.tensors()}
        if isinstance(tier, DenseTier):
            return replace(tier, **planes, lengths=lengths)
        return replace(tier, **planes | {"pool": tier.pool_of(planes["pool"])}, lengths=lengths, whole=False)

    dense = {name: restored(name, tier) for name, tier in store.tiers.dense.items()}
    packed = {name: restored(name, tier) for name, tier in store.tiers.packed.items()}
    gone = (np.array(x, dtype=np.int64) for x in notes["evicted"]) if "evicted" in notes else None
    evicted = Evicted(*gone) if gone else Evicted.none(dense["recent"].lengths)
    more = {name: state[name].cpu() for name in store.tiers.tensors()}
    store.tiers = replace(store.tiers, dense=dense, packed=packed, evicted=evicted, **more)
    padded = tuple((start, np.array(pads, dtype=np.int64)) for start, pads in notes["padded"])
    layer.slots = Slots(notes["slots"], padded)


def _dense_state(index: int, layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Keys and values of a layer that transformers keeps, such as a sliding window."""
    if getattr(layer, "keys", None) is None:
        if type(layer).__name__ == "DummyLayer":
            return {}, {}
        raise CacheError(f"Layer {index} is a {type(layer).__name__}, whose state cannot be saved.")
    notes = {"cumulative_length": layer.cumulative_length} if hasattr(layer, "cumulative_length") else {}
    return {"keys": layer.keys, "values": layer.values}, notes
