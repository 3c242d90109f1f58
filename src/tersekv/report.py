"""What a cache holds, counted from the tensors that are alive: by tier, plane and layer."""

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table

from tersekv.terminal import bytes_text, to_text


@dataclass(frozen=True)
class LayerReport:
    """Bytes of one layer, and by tier and plane: {tier: {plane: bytes}}.

    `dense` is what transformers' own cache would hold for it in the model's dtype, `dense16` the same in 16 bits.
    """

    index: int
    kind: str
    dense: int
    dense16: int
    held: int
    tiers: dict[str, dict[str, int]] = field(default_factory=dict)
    statistics: dict[str, int] = field(default_factory=dict)  # what the policy counted


@dataclass(frozen=True)
class CacheReport:
    """`print` it for tables; `as_dict` for JSON."""

    spec: str
    tokens: int
    sequences: int
    layers: list[LayerReport]
    implementation: str
    decoding: str = ""  # how `generate` decoded, where it had a choice

    @property
    def dense(self) -> int:
        return sum(layer.dense for layer in self.layers)

    @property
    def held(self) -> int:
        return sum(layer.held for layer in self.layers)

    @property
    def dense16(self) -> int:
        return sum(layer.dense16 for layer in self.layers)

    @property
    def ratio(self) -> float:
        """Against the dense cache in the model's dtype; an fp32 model flatters it, see `ratio16`."""
        return self.dense / self.held if self.held else 1.0

    @property
    def ratio16(self) -> float:
        return self.dense16 / self.held if self.held else 1.0

    def planes(self) -> dict[tuple[str, str], int]:
        """Bytes by (tier, plane), summed over layers."""
        total: dict[tuple[str, str], int] = {}
        for layer in self.layers:
            for tier, planes in layer.tiers.items():
                for plane, count in planes.items():
                    total[tier, plane] = total.get((tier, plane), 0) + count
        return total

    def statistics(self) -> dict[str, int]:
        """What the policy counted, summed over layers; empty if it counts nothing."""
        total: dict[str, int] = {}
        for layer in self.layers:
            for name, count in layer.statistics.items():
                total[name] = total.get(name, 0) + count
        return total

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | self.totals() | ({"statistics": x} if (x := self.statistics()) else {})

    def totals(self) -> dict[str, Any]:
        names = ("held", "dense", "dense16", "ratio", "ratio16")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        return to_text(self.__rich__())

    def __rich__(self) -> Group:
        head = (
            f"{self.spec}: {self.tokens:,} tokens in {self.sequences} sequence(s), {bytes_text(self.held)} held, "
            f"{bytes_text(self.dense)} dense, ratio {self.ratio:.2f} ({self.ratio16:.2f} against 16 bits), "
            f"attention by {self.implementation}"
        )
        counted = ", ".join(f"{name} {count:,}" for name, count in self.statistics().items())
        lines = [head, f"counted by the policy: {counted}"] if counted else [head]
        lines += [f"decoded by generate {self.decoding}"] if self.decoding else []
        return Group(*lines, self._by_plane(), self._by_layer())

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
