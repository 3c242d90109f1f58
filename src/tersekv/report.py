"""What a cache holds, counted from the tensors that are alive: by tier, plane and layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from torch import Tensor

from tersekv.terminal import bytes_text, to_text
from tersekv.tiers import DenseTier, PackedTier

if TYPE_CHECKING:
    from tersekv.hf.cache import PackedCache


@dataclass(frozen=True)
class LayerReport:
    """Bytes of one layer: {tier: {plane: bytes}}; `dense` is what transformers' own cache would hold for it."""

    index: int
    kind: str
    dense: int
    held: int
    tiers: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheReport:
    """`print` it for tables; `as_dict` for JSON."""

    spec: str
    tokens: int
    sequences: int
    layers: list[LayerReport]
    implementation: str

    @property
    def dense(self) -> int:
        return sum(layer.dense for layer in self.layers)

    @property
    def held(self) -> int:
        return sum(layer.held for layer in self.layers)

    @property
    def ratio(self) -> float:
        return self.dense / self.held if self.held else 1.0

    def planes(self) -> dict[tuple[str, str], int]:
        """Bytes by (tier, plane), summed over layers."""
        total: dict[tuple[str, str], int] = {}
        for layer in self.layers:
            for tier, planes in layer.tiers.items():
                for plane, count in planes.items():
                    total[tier, plane] = total.get((tier, plane), 0) + count
        return total

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"dense": self.dense, "held": self.held, "ratio": self.ratio}

    def __str__(self) -> str:
        return to_text(self.__rich__())

    def __rich__(self) -> Group:
        head = (
            f"{self.spec}: {self.tokens:,} tokens in {self.sequences} sequence(s), {bytes_text(self.held)} held, "
            f"{bytes_text(self.dense)} dense, ratio {self.ratio:.2f}, attention by {self.implementation}"
        )
        return Group(head, self._by_plane(), self._by_layer())

    def _by_plane(self) -> Table:
        table = Table("tier", "plane", "bytes", "share", title="by tier and plane")
        for (tier, plane), count in self.planes().items():
            table.add_row(tier, plane, bytes_text(count), f"{100 * count / max(self.held, 1):.1f} %")
        return table

    def _by_layer(self) -> Table:
        table = Table("layers", "kind", "held each", "dense each", "ratio", title="by layer")
        for first, last, layer in _runs(self.layers):
            span = f"{first}" if first == last else f"{first}-{last}"
            ratio = f"{layer.dense / layer.held:.2f}" if layer.held else "-"
            table.add_row(span, layer.kind, bytes_text(layer.held), bytes_text(layer.dense), ratio)
        return table


def _runs(layers: list[LayerReport]) -> list[tuple[int, int, LayerReport]]:
    """Neighbouring layers that hold the same, as (first, last, one of them)."""
    runs: list[tuple[int, int, LayerReport]] = []
    for layer in layers:
        if runs and (runs[-1][2].kind, runs[-1][2].held) == (layer.kind, layer.held):
            runs[-1] = (runs[-1][0], layer.index, layer)
        else:
            runs.append((layer.index, layer.index, layer))
    return runs


def storage_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the distinct storages behind the tensors: a view counts as all that it keeps alive."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x is not None}
    return sum(storages.values())


def tier_bytes(tier: DenseTier | PackedTier) -> dict[str, int]:
    """Bytes of a tier by plane, everything counted: {plane: bytes}."""
    planes = {name: storage_bytes(x) for name, x in tier.tensors().items()} | {"lengths": tier.lengths.nbytes}
    if isinstance(tier, PackedTier):
        pages = len(tier.pool)
        total = planes.pop("pool")
        inside = {
            f"{side}.{plane.name}": plane.nbytes * pages
            for side, layout in zip("kv", tier.layouts, strict=True)
            for plane in layout.planes
        }
        planes = inside | {"padding": total - sum(inside.values())} | planes
    return planes


def cache_report(cache: PackedCache) -> CacheReport:
    from tersekv.hf.layer import PackedLayer
    from tersekv.ops import explain

    layers, sequences = [], 0
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, PackedLayer):
            held = storage_bytes(getattr(layer, "keys", None), getattr(layer, "values", None))
            window = getattr(layer, "sliding_window", None)
            kind = f"dense: sliding window of {window}" if window else f"dense: {type(layer).__name__}"
            layers.append(LayerReport(index, kind, held, held))
            continue
        if layer.store is None:
            layers.append(LayerReport(index, "packed", 0, 0))
            continue
        tiers = {name: tier_bytes(tier) for name, tier in layer.store.tiers.all().items()}
        any_dense = next(iter(layer.store.tiers.dense.values())).k
        sequences = len(layer.store.lengths)
        dense = 2 * sequences * layer.slots.total * any_dense[0, :, :1].numel() * any_dense.element_size()
        layers.append(LayerReport(index, "packed", dense, sum(sum(t.values()) for t in tiers.values()), tiers))
    runs = explain(next((x.device.type for x in cache.layers if getattr(x, "device", None)), "cpu"))[0]
    return CacheReport(str(cache.spec), cache.get_seq_length(), sequences, layers, runs.name)
