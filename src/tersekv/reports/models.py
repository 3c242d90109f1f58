"""Records of one run on several models, side by side: tables, and a picture of quality against bits."""

import re
from collections import defaultdict
from itertools import cycle
from typing import Any

from rich.table import Column, Table

from tersekv.record import headline
from tersekv.registry import PRESETS
from tersekv.reports.cells import number_and_interval, of_any, shown
from tersekv.reports.tables import Record, fitting, kernels, uses
from tersekv.spec import parse
from tersekv.terminal import bytes_text

PLAIN = re.compile(r"[a-z]+(:bits=\d)?")  # a codec as it comes
MOST_BITS = 5.2  # of the picture: above, nothing can be told from the dense cache
PRESETS_LINE = "terse"
TICKS = (1.5, 2, 2.5, 3, 4, 5)
COLOURS, MARKERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), "osD^vPX*<>ph"


def models(records: list[Record], method: str | None = None) -> Table:
    """All rows, or those of a method; the first model's recipe."""
    heads = [f"{x['run']['model']}: {what}" for x in records for what in ("body", "held", "KL (95 %)", "top-1")]
    columns = (Column(head, justify="right") for head in ("nominal", *heads))
    table = Table("spec", *columns, "recipe", "kernels")
    fitted = any("calibration_seconds" in row for record in records for row in record["rows"])
    if fitted:
        table.add_column("calibration", justify="right")
    for rows in zip(*(record["rows"] for record in records), strict=True):
        first, (spec,) = rows[0], {of_any(row["spec"], x) for row, x in zip(rows, records, strict=True)}
        if method is None or uses(spec, method):
            cells = [f"{first['nominal_bits']:g}", *(cell for row in rows for cell in _of_one(row))]
            about = [first.get("recipe", "-"), kernels(first), *([fitting(first)] if fitted else [])]
            table.add_row(shown(spec), *cells, *about)
    return table


def _logits(row: dict[str, Any]) -> dict[str, Any]:
    x = headline(row)
    assert x is not None, "a folder's table is of logits"
    return x


def _of_one(row: dict[str, Any]) -> tuple[str, ...]:
    x = _logits(row)
    kl = number_and_interval(x, "kl_mean", ".5f")
    return f"{row['body_bits']:.2f}", bytes_text(x["held"]), kl, f"{100 * x['top1']:.1f} %"


def plain(spec: str) -> bool:
    """Whether it is a preset, or a codec as it comes: what one chooses first from."""
    return shown(spec) in PRESETS or PLAIN.fullmatch(spec) is not None


def by_bits(records: list[Record]) -> Table:
    """Presets, in bold, and codecs as they come, by bits: the bits of packed tokens, and KL, on each model."""
    heads = (f"{x['run']['model']}: {what}" for x in records for what in ("bits", "KL"))
    table = Table("spec", *(Column(head, justify="right") for head in heads))
    rows = [rows for rows in zip(*(x["rows"] for x in records), strict=True) if plain(rows[0]["spec"])]
    for same in sorted(rows, key=lambda rows: -sum(row["body_bits"] for row in rows)):
        name = shown(same[0]["spec"])
        cells = [cell for row in same for cell in (f"{row['body_bits']:.2f}", _digits(row))]
        table.add_row(f"**{name}**" if name in PRESETS else name, *cells)
    return table


def _digits(row: dict[str, Any]) -> str:
    kl = _logits(row)["kl_mean"]
    return f"{kl:.2g}" if kl >= 1e-4 else f"{kl:.6f}"


def draw_models(figure: Any, records: list[Record]) -> None:
    """Bits of packed tokens against KL, one panel a model: presets as a line, the others as marks."""
    axes = figure.subplots(1, len(records), sharey=True, squeeze=False)[0]
    panels = [_points(record) for record in records]
    styles = _styles({name for points in panels for name in points})
    lines: dict[str, Any] = {}
    for place, record, points in zip(axes, records, panels, strict=True):
        for name, found in points.items():
            (lines[name],) = place.plot(*zip(*sorted(found), strict=True), markersize=5, **styles[name])
        place.set(xscale="log", yscale="log", title=record["run"]["model"], xlabel="bits a value, all counted")
        place.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        place.minorticks_off()
        place.grid(alpha=0.3, linewidth=0.5)
    axes[0].set_ylabel("KL to the dense cache, nats")
    names = sorted(lines)
    figure.legend([lines[name] for name in names], names, loc="outside lower center", ncols=6, frameon=False)


def _points(record: Record) -> dict[str, list[tuple[float, float]]]:
    """Bits and KL of each family; what is as good as dense has no place on a logarithm."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in record["rows"]:
        kl = _logits(row)["kl_mean"]
        if kl > 0 and plain(row["spec"]) and row["body_bits"] <= MOST_BITS:
            points[_family(row["spec"])].append((row["body_bits"], kl))
    return points


def _styles(names: set[str]) -> dict[str, dict[str, Any]]:
    """The same in every panel; a colour and a marker together tell families apart."""
    looks = zip(sorted(names - {PRESETS_LINE}), cycle(COLOURS), cycle(MARKERS), strict=False)
    styles = {x: {"color": colour, "marker": marker, "linewidth": 0.5, "alpha": 0.8} for x, colour, marker in looks}
    return styles | {PRESETS_LINE: {"color": "k", "marker": "o", "linewidth": 2}}


def _family(spec: str) -> str:
    return PRESETS_LINE if shown(spec) in PRESETS else str(parse(spec)).partition(":")[0]
