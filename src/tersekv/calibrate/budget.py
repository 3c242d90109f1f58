"""`tersekv calibrate budget`: how many bits each layer's keys and values are worth, from what each costs alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.console import Group
from rich.table import Column, Table

from tersekv.calibrate.measuring import Change, Prefix
from tersekv.calibrate.session import Session, Settings
from tersekv.errors import InputError
from tersekv.layout import BLOCK
from tersekv.policy.allocate import allocate
from tersekv.spec import Spec
from tersekv.terminal import Stages

LEVELS = np.array([2, 3, 4, 5, 6])
CONTROLS = 3  # specs with the same bits, dealt to layers and sides at random
DEAREST = 8  # heads that are printed
SIDES = "kv"


@dataclass(frozen=True)
class Allocation:
    """What was found; printed without its specs, which are longer than a line of a terminal and are to be copied.

    `kl` is the cost of each layer (by index), side and level alone, in nats; `heads` that of each KV head at the fewest
    bits, which no spec can tell apart; `foreseen` sums of `kl` by spec.
    """

    spec: str
    controls: list[str]
    levels: list[int]
    kl: dict[int, dict[str, list[float]]]
    heads: dict[int, dict[str, list[float]]]
    foreseen: dict[str, float]
    about: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        names = ("spec", "controls", "levels", "foreseen", "kl", "heads")
        return {"calibrate": "budget"} | self.about | {name: getattr(self, name) for name in names}

    def __rich__(self) -> Group:
        table = Table("layer", "side", *(Column(f"{bits} bits", justify="right") for bits in self.levels))
        table.title = "KL of one side of one layer, 1e-4 nats"
        for layer, sides in self.kl.items():
            for side, row in sides.items():
                table.add_row(f"{layer}", side, *(f"{1e4 * x:.3f}" for x in row))
        sums = "\n".join(f"{name}: sum of KL {value:.5f}" for name, value in self.foreseen.items())
        return Group(table, self._dearest_heads(), sums)

    def _dearest_heads(self) -> Table:
        table = Table("layer", "side", "KV head", *(Column(head, justify="right") for head in ("KL", "share of all")))
        table.title = f"the {DEAREST} dearest heads, {self.levels[0]} bits for one alone, 1e-4 nats"
        every = [(x, layer, side, n) for layer, y in self.heads.items() for side in y for n, x in enumerate(y[side])]
        total = sum(x for x, *_ in every)
        for x, layer, side, n in sorted(every, reverse=True)[:DEAREST]:
            table.add_row(f"{layer}", side, f"{n}", f"{1e4 * x:.3f}", f"{100 * x / total:.1f} %")
        return table


def calibrate(settings: Settings, bits: float, folder: Path, stages: Stages) -> Allocation:
    """`bits` is the nominal average over layers, keys and values. Raises InputError where levels do not reach it."""
    if not LEVELS[0] <= bits <= LEVELS[-1]:
        raise InputError(f"--bits {bits:g}: the average must be from {LEVELS[0]} to {LEVELS[-1]}.")
    session = Session.open(settings, stages)
    samples = session.measured("budget", folder, _measure)
    layers = [int(layer) for layer in samples[0]["levels"]]

    def means(name: str) -> dict[int, dict[str, list[float]]]:
        return {x: {y: np.mean([s[name][str(x)][y] for s in samples], 0).tolist() for y in SIDES} for x in layers}

    kl, heads = means("levels"), means("heads")
    loss = np.array([[kl[layer][side] for side in SIDES] for layer in layers]).reshape(-1, len(LEVELS))
    chosen = allocate(-loss[None], LEVELS, round(bits * len(loss)))[0]
    dealt = [np.random.default_rng(seed).permutation(chosen) for seed in range(1, CONTROLS + 1)]
    count = session.subject.model.config.get_text_config(decoder=True).num_hidden_layers

    def spec(levels: Int[np.ndarray, "n"]) -> str:
        return str(_spec(session.spec, LEVELS[levels].reshape(-1, len(SIDES)), layers, count, round(bits)))

    foreseen = {"as measured": _sum(loss, chosen)} | {"the same bits, dealt at random": _mean_sum(loss, chosen)}
    if bits in LEVELS:
        foreseen[f"{bits:g} bits everywhere"] = _sum(loss, np.full_like(chosen, list(LEVELS).index(bits)))
    about = session.about | {"bits": bits}
    return Allocation(spec(chosen), [spec(x) for x in dealt], LEVELS.tolist(), kl, heads, foreseen, about)


def _spec(given: Spec, bits: Int[np.ndarray, "n 2"], packed: list[int], count: int, base: int) -> Spec:
    """Layers that are not packed need an entry too; it is never read."""
    layers = [(base, base)] * count
    for layer, (k, v) in zip(packed, bits.tolist(), strict=True):
        layers[layer] = (k, v)
    return replace(given, layers=tuple(layers))


def _measure(prefix: Prefix, progress: Callable[[float], None]) -> dict[str, Any]:
    tokens = slice(prefix.blocks.start, min(prefix.blocks.stop, prefix.ids.shape[1] - BLOCK))
    layers = prefix.layers()
    heads = range(next(iter(layers.values())).keys.shape[1])
    places = [(layer, side) for layer in layers for side in SIDES]
    changes = [Change(bits, tokens, *place) for place in places for bits in LEVELS.tolist()]
    changes += [Change(LEVELS.tolist()[0], tokens, *place, head) for place in places for head in heads]
    found = np.array(prefix.divergences(changes, lambda count: progress(count / len(changes))))
    whole = len(places) * len(LEVELS)
    parts = {"levels": found[:whole], "heads": found[whole:]}
    return {name: _by_place(x.reshape(len(layers), len(SIDES), -1), list(layers)) for name, x in parts.items()}


def _by_place(table: Float[np.ndarray, "layers sides n"], layers: list[int]) -> dict[str, dict[str, list[float]]]:
    return {str(x): dict(zip(SIDES, rows, strict=True)) for x, rows in zip(layers, table.tolist(), strict=True)}


def _sum(loss: Float[np.ndarray, "n levels"], chosen: Int[np.ndarray, "n"]) -> float:
    return float(loss[np.arange(len(loss)), chosen].sum())


def _mean_sum(loss: Float[np.ndarray, "n levels"], chosen: Int[np.ndarray, "n"]) -> float:
    """Over all ways to deal the same levels: each place gets each level as often as it occurs."""
    return float(loss.mean(0)[chosen].sum())
