"""Records as one HTML page that needs nothing else: tables, and pictures as data inside the page."""

from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.table import Column, Table

from tersekv.errors import InputError
from tersekv.eval.tensors import HEAT_MAPS
from tersekv.record import headline
from tersekv.reports.captions import caption
from tersekv.reports.cells import shown
from tersekv.reports.figures import draw_quality, picture
from tersekv.reports.heatmaps import draw_growth, draw_heads, draw_needle, size
from tersekv.reports.tables import Record, tables

TITLES = {
    "quality": "Quality and bytes",
    "windows": "By window length, with intervals",
    "errors": "Errors on the model's own tensors: mean, the 5 % tail, the worst head, the worst token",
    "cosines": "Cosines of the same",
    "growth": "Along a generated text",
    "needle": "Needle in a haystack",
    "tasks": "Tasks",
    "speed": "Speed and memory",
    "memory": "Bytes held by tier and plane",
    "against": "Differences from the reference, paired by sample",
}


@dataclass(frozen=True)
class Picture:
    """A figure of one record; `draw` gets a matplotlib figure."""

    name: str
    title: str
    draw: Callable[[Any], None]
    size: tuple[float, float] = (5.4, 4.6)  # inches; a phone shows it at two thirds


def pictures(record: Record) -> list[Picture]:
    """Every picture that the record has numbers for."""
    row, model, found = record["rows"][0], record["run"]["model"], list[Picture]()
    if "logits" in row:
        draw = partial(_on_axes, draw_quality, record)
        found.append(Picture("pareto", f"{model}: KL against bytes held; lower left is better", draw))
    if "kl_by_part" in (headline(row) or {}):
        found.append(Picture("position", f"{model}: KL along the windows", partial(_on_axes, _along_text, record)))
    if "growth" in row:
        found.append(Picture("growth", f"{model}: KL along a generated text", partial(_on_axes, _along_own, record)))
    if "tensors" in row:
        for metric in HEAT_MAPS:
            draw, title = partial(draw_heads, record=record, metric=metric), metric.replace("_", " ")
            found.append(Picture(metric, f"{model}: {title} by layer and head", draw, size(len(record["rows"]) - 1)))
    if "needle" in row:
        draw = partial(draw_needle, record=record)
        found.append(Picture("needle", f"{model}: needles found", draw, size(len(record["rows"]))))
    return found


def _on_axes(draw: Callable[[Any, Record], None], record: Record, figure: Any) -> None:
    draw(figure.add_subplot(), record)


_along_text = partial(draw_growth, section="logits")
_along_own = partial(draw_growth, section="growth")


def write_report(records: list[Record], out: Path) -> None:
    """`index.html`, and every picture once more as SVG and PNG. Raises InputError for two records of one model."""
    models = [record["run"]["model"] for record in records]
    if len(set(models)) < len(models):
        raise InputError(f"Two records are of the same model: {', '.join(models)}. Give one of each.")
    out.mkdir(parents=True, exist_ok=True)
    sections = []
    for record in records:
        shown = []
        for one in pictures(record):
            name = f"{Path(record['run']['model']).name}-{one.name}"
            drawn = {kind: picture(one.draw, caption(record), kind=kind, size=one.size) for kind in ("svg", "png")}
            for kind, content in drawn.items():
                (out / f"{name}.{kind}").write_bytes(content)
            shown.append({"title": one.title, "data": b64encode(drawn["svg"]).decode()})
        found = [{"title": TITLES[name], **_cells(table)} for name, table in tables(record).items()]
        sections.append({"record": record, "caption": caption(record), "pictures": shown, "tables": found})
    text = files("tersekv.reports").joinpath("page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(text)
    merged = _cells(models_table(records)) if len(records) > 1 else None
    (out / "index.html").write_text(template.render(sections=sections, merged=merged), encoding="utf-8")


def models_table(records: list[Record]) -> Table:
    """KL of each spec on each model, and the bytes that it held there in percent of the dense cache's."""
    heads = (f"{record['run']['model']}: {what}" for record in records for what in ("body bits", "held", "KL"))
    table = Table("spec", *(Column(head, justify="right") for head in heads))
    rows = [{row["spec"]: row for row in record["rows"]} for record in records]
    for spec in dict.fromkeys(spec for found in rows for spec in found):
        table.add_row(shown(spec), *(cell for found in rows for cell in _three(found.get(spec))))
    return table


def _three(row: dict[str, Any] | None) -> tuple[str, str, str]:
    found = headline(row) if row else None
    if not row or not found:
        return "-", "-", "-"
    return f"{row['body_bits']:.2f}", f"{100 * found['held'] / found['dense16']:.1f} %", f"{found['kl_mean']:.4f}"


def _cells(table: Table) -> dict[str, Any]:
    return {
        "heads": [column.header for column in table.columns],
        "numeric": [column.justify == "right" for column in table.columns],
        "rows": list(zip(*(column.cells for column in table.columns), strict=True)),
    }
