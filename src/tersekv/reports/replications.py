"""Published tables beside ours: `runs/published.toml` has theirs with sources, records have ours."""

import json
import tomllib
from functools import reduce
from math import exp
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from tersekv.errors import InputError, did_you_mean
from tersekv.record import headline
from tersekv.reports.cells import number_and_interval, of_any
from tersekv.spec import parse

PUBLISHED = "runs/published.toml"
Rows = dict[str, dict[str, Any]]  # of a record, by spec


def replication(root: Path, name: str) -> tuple[Table, str]:
    """The published table `name`, a row a method, a column a number of theirs or of ours; and its source.

    Raises InputError for a table that is not there, and for a record without the number that a column asks for.
    """
    tables = tomllib.loads((root / PUBLISHED).read_text(encoding="utf-8"))
    if name not in tables:
        raise InputError(f'{PUBLISHED} has no table "{name}". {did_you_mean(name, tables)}')
    columns = tables[name]["columns"]
    files = {column["record"] for column in columns if "record" in column}
    records = {file: _rows(root / file) for file in files}
    table = Table("published as", "here", *(Column(column["head"], justify="right") for column in columns))
    for row in tables[name]["rows"]:
        cells = (_ours(column, row, records) if "record" in column else _theirs(column, row) for column in columns)
        table.add_row(row["name"], row.get("here", row.get("spec", "-")), *cells)
    return table, tables[name]["source"]


def _rows(path: Path) -> Rows:
    """With what papers print and records do not: ratios to 16 bits, bits with everything counted, of perplexities.

    By spec, and where one names a file for each model, by the spec of any model as well.
    """
    if not path.is_file():
        return {}
    found: Rows = {}
    record = json.loads(path.read_text(encoding="utf-8"))
    for row in record["rows"]:
        more, x = {"body_ratio": 16 / row["body_bits"]}, headline(row)
        if x:
            more |= {"held_bits": 16 * x["held"] / x["dense16"], "perplexity_ratio": exp(x["loss_difference"])}
        found[row["spec"]] = found[of_any(row["spec"], record)] = row | more
    return found


def _theirs(column: dict[str, Any], row: dict[str, Any]) -> str:
    key = column["theirs"]
    return f"{row[key]:{column['form']}}" if key in row else "-"


def _ours(column: dict[str, Any], row: dict[str, Any], records: dict[str, Rows]) -> str:
    rows = records[column["record"]]
    if "spec" not in row or not rows:
        return "-"
    spec = row["spec"] if row["spec"] in rows or "{model}" in row["spec"] else str(parse(row["spec"]))
    if spec not in rows:
        raise InputError(f'{column["record"]} has no row "{spec}". {did_you_mean(spec, rows)}')
    *path, name = column["ours"].split(".")
    x = reduce(lambda found, key: found.get(key, {}), path, rows[spec])
    if name not in x and spec != "dense":
        raise InputError(f"{column['record']} has no {column['ours']} of {spec}. Change the column in {PUBLISHED}.")
    return number_and_interval(x, name, column["form"], column.get("times", 1))
