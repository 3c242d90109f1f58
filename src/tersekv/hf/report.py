"""What a transformers cache holds, layer by layer."""

from collections.abc import Iterable
from typing import Any

from tersekv.accounting import storage_bytes, tier_bytes
from tersekv.hf.layer import PackedLayer
from tersekv.ops import implementation, implementation_of
from tersekv.report import CacheReport, LayerReport


def cache_report(spec: str, layers: Iterable[Any], decoding: str = "") -> CacheReport:
    """Bytes of every layer beside those of a dense cache; layers that are not packed say what they are."""
    rows = [_packed(x) if isinstance(x, PackedLayer) else _dense(i, x) for i, x in enumerate(layers)]
    stores = [x.store for x in layers if isinstance(x, PackedLayer) and x.store is not None]
    tokens = max((x.slots.total for x in layers if isinstance(x, PackedLayer)), default=0)
    sequences = len(stores[0].lengths) if stores else 0
    readers = {implementation_of(tier.pages) for store in stores for tier in store.state[0].packed.values()}
    return CacheReport(spec, tokens, sequences, rows, "; ".join(sorted(readers)) or implementation(), decoding)


def _packed(layer: PackedLayer) -> LayerReport:
    if layer.store is None:
        return LayerReport(layer.index, "packed", 0, 0, 0)
    tiers, tail, _ = layer.store.state  # as they are: what waits in a tail keeps waiting, and its room is counted
    planes = {name: tier_bytes(tier) for name, tier in tiers.held().items()}
    if tail is not None:
        planes["tail"] = tail.planes()
    if more := tiers.tensors():
        planes["policy"] = {name: storage_bytes(x) for name, x in more.items()}
    spec = layer.store.spec  # what was fitted is one for all caches of a process, and counted in each
    if fitted := {f"{side}.fitted": x.nbytes for side, x in (("k", spec.k.fitted), ("v", spec.v.fitted)) if x}:
        planes["codec"] = fitted
    k = tiers.dense["recent"].k
    b, h, _, d = k.shape
    values = 2 * b * h * layer.slots.total * d
    held = sum(sum(tier.values()) for tier in planes.values())
    return LayerReport(layer.index, "packed", values * k.element_size(), values * 2, held, planes, tiers.statistics())


def _dense(index: int, layer: Any) -> LayerReport:
    """A layer that transformers keeps; a view counts as the whole tensor that it holds."""
    tensors = [x for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if x is not None]
    held = storage_bytes(*tensors)
    half = sum(2 * held // (len(tensors) * x.element_size()) for x in tensors)
    window = getattr(layer, "sliding_window", None)
    kind = f"dense: sliding window of {window}" if window else f"dense: {type(layer).__name__}"
    return LayerReport(index, kind, held, half, held)
