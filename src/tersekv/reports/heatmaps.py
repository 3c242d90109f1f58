"""Pictures of where errors are: by layer and head, along a text, and by length and depth of a needle."""

from textwrap import fill
from typing import Any

import numpy as np

from tersekv.reports.cells import shown

Record = dict[str, Any]
ACROSS = 2  # maps in a row


def draw_heads(figure: Any, record: Record, metric: str) -> None:
    """Mean error of every layer and head, one map a spec, all with one colour scale."""
    from matplotlib.colors import LogNorm

    rows = [(row["spec"], row["tensors"][metric]) for row in record["rows"] if metric in row["tensors"]]
    rows = [(spec, found) for spec, found in rows if spec != "dense"]
    values = {spec: np.asarray(found["by_head"], dtype=float) for spec, found in rows}
    positive = np.concatenate([x[x > 0] for x in values.values()])
    norm = LogNorm(max(positive.min(), 1e-4), max(positive.max(), 2e-4))
    axes, image = _maps(figure, len(rows)), None
    for place, (spec, found) in zip(axes, rows, strict=True):
        image = place.imshow(values[spec].T, aspect="auto", norm=norm, cmap="viridis", interpolation="nearest")
        layers = found["layers"]
        ticks = range(0, len(layers), max(1, len(layers) // 5))
        place.set_xticks(list(ticks), [layers[n] for n in ticks])
        heads = len(found["by_head"][0])
        place.set_yticks(range(0, heads, max(1, heads // 4)))
        _head(place, spec, "layer", "query head" if metric == "output_error" else "KV head")
    figure.colorbar(image, ax=axes, shrink=0.8, label=metric.replace("_", " "))


def draw_needle(figure: Any, record: Record) -> None:
    """Share of needles found for every length and depth, one map a spec."""
    asked = record["run"]["needle"]
    axes, image = _maps(figure, len(record["rows"])), None
    for place, row in zip(axes, record["rows"], strict=True):
        cells = row["needle"]["cells"]
        grid = [[100 * cells[f"{length}/{depth}"] for length in asked["lengths"]] for depth in asked["depths"]]
        image = place.imshow(grid, aspect="auto", vmin=0, vmax=100, cmap="cividis")
        place.set_xticks(range(len(asked["lengths"])), [f"{n:,}" for n in asked["lengths"]])
        place.set_yticks(range(len(asked["depths"])), [f"{n} %" for n in asked["depths"]])
        for (y, x), found in np.ndenumerate(grid):
            place.text(x, y, f"{found:.0f}", ha="center", va="center", fontsize=7, color="w" if found < 60 else "k")
        _head(place, row["spec"], "tokens", "depth")
    figure.colorbar(image, ax=axes, shrink=0.8, label="found, %")


def draw_growth(axes: Any, record: Record, section: str) -> None:
    """KL along the windows of a text ("logits") or along a generated text ("growth"), one line a spec."""
    for row in record["rows"]:
        found = next(iter(row["logits"].values())) if section == "logits" else row["growth"]
        parts = found.get("kl_by_part", [])
        if parts and max(parts) > 0:
            axes.plot(range(1, len(parts) + 1), parts, marker="o", markersize=4, linewidth=1, label=shown(row["spec"]))
    where = "windows of the text" if section == "logits" else "text that the dense cache generated"
    axes.set(yscale="log", xlabel=f"eighth of the {where}", ylabel="mean KL to the dense cache, nats")
    axes.grid(alpha=0.3, linewidth=0.5)
    # Below the axes: inside, many lines leave it no room.
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def size(count: int) -> tuple[float, float]:
    """Of a figure of `count` maps, in inches."""
    return (5.4, 0.4 + 2.0 * -(-count // ACROSS))


def _maps(figure: Any, count: int) -> list[Any]:
    across = min(ACROSS, count)
    axes = figure.subplots(-(-count // across), across, squeeze=False).flatten()
    for place in axes[count:]:
        place.set_axis_off()
    return list(axes[:count])


def _head(place: Any, spec: str, x: str, y: str) -> None:
    place.set_title(fill(shown(spec), 36), fontsize=7)
    place.set_xlabel(x, fontsize=7)
    place.set_ylabel(y, fontsize=7)
    place.tick_params(labelsize=7)
