"""Differences of a record's rows from one of them, the reference, paired by window, text, needle or item."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.table import Column, Table

from tersekv.errors import InputError, did_you_mean
from tersekv.eval.statistics import difference
from tersekv.reports.cells import number_and_interval, shown
from tersekv.spec import parse

Record = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """A column: its head, a row's samples, and how a difference is written."""

    head: str
    samples: Callable[[dict[str, Any]], list[float]]
    form: str = "+.4f"
    times: float | int = 1
    unit: str = ""


def measures(record: Record) -> list[Measure]:
    """What the record has a number of for each sample."""
    row, found = record["rows"][0], list[Measure]()
    for n, x in row.get("logits", {}).items():
        for name, key in (("KL", "kl_by_window"), ("loss", "loss_by_window")):
            if key in x:
                found.append(Measure(f"{int(n):,}: {name}", lambda row, n=n, key=key: row["logits"][n][key]))
    if "kl_by_text" in row.get("growth", {}):
        found.append(Measure("growth: KL", lambda row: row["growth"]["kl_by_text"]))
    if "hit_by_item" in row.get("needle", {}):
        found.append(Measure("needle", lambda row: row["needle"]["hit_by_item"], "+.1f", 100, " points"))
    for task, x in row.get("tasks", {}).items():
        for metric, scores in x["metrics"].items():
            if "score_by_item" in scores:

                def items(row: dict[str, Any], task: str = task, metric: str = metric) -> list[float]:
                    return row["tasks"][task]["metrics"][metric]["score_by_item"]

                found.append(Measure(f"{task} {metric}", items, "+.2f", 100, " points"))
    return found


def against(record: Record, reference: str) -> Table:
    """Every row less the row `reference`, with 95 % bootstrap intervals over the samples that both have.

    Raises InputError for a reference that is not in the record, or a record without samples.
    """
    columns, rows = measures(record), {row["spec"]: row for row in record["rows"]}
    name = reference if reference in rows else str(parse(reference))
    if name not in rows:
        raise InputError(f'No row "{name}" to compare with. {did_you_mean(name, rows)}')
    if not columns:
        raise InputError(f"This record of {', '.join(record['run'])} holds no samples to pair. Measure it again.")
    heads = (Column(f"{measure.head} (95 %)", justify="right") for measure in columns)
    table = Table(f"less {shown(name)}", Column("body", justify="right"), *heads)
    for spec, row in rows.items():
        if spec != name:
            cells = (_cell(measure, row, rows[name], record["run"]["seed"] or 0) for measure in columns)
            table.add_row(shown(spec), f"{row['body_bits']:.2f}", *cells)
    return table


def _cell(measure: Measure, row: dict[str, Any], other: dict[str, Any], seed: int) -> str:
    found = difference(measure.samples(row), measure.samples(other), seed)
    return number_and_interval(found, "difference", measure.form, measure.times, measure.unit)
