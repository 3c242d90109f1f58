"""The records of the GPU benchmarks as tables."""

from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Column, Table

from tersekv.terminal import bytes_text

Case = dict[str, Any]


@dataclass(frozen=True)
class GpuResult:
    record: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return self.record

    def __rich__(self) -> Group:
        return Group(*tables(self.record).values())


def tables(record: dict[str, Any]) -> dict[str, Table]:
    """A table for each grid of an attention record, by its name; "encode"; "layer", "model", "fit" of decoding;
    "generate".
    """
    if record["bench"] == "encode cuda":
        return {"encode": _encoding(record)}
    if record["bench"] == "decode cuda":
        return {"layer": _layer(record), "model": _model(record), "fit": _fit(record)}
    if record["bench"] == "generate cuda":
        return {"generate": _generate(record)}
    grids: dict[str, list[Case]] = {}
    for case in record["cases"]:
        grids.setdefault(case["grid"], []).append(case)
    return {name: _attention(name, cases) for name, cases in grids.items()}


def _table(title: str, first: list[str], numbers: list[str]) -> Table:
    return Table(*first, *(Column(head, justify="right") for head in numbers), title=title, box=SIMPLE_HEAD)


def _microseconds(times: dict[str, float]) -> str:
    median, low, high = (f"{1e6 * times[part]:.1f}" for part in ("median", "p20", "p80"))
    return f"{median} ({low}-{high})"


def _attention(name: str, cases: list[Case]) -> Table:
    numbers = ["us (p20-p80)", "held", "GB/s", "of a copy's", "error", "bf16's error", "x faster than bf16"]
    table = _table(name, ["case", "attention"], numbers)
    for case in cases:
        label = f"b={case['b']} t={case['t']:,} d={case['d']} {case['hq']}/{case['h']}"
        label += f" n={case['n']}" if case["n"] > 1 else ""
        for row in case["rows"]:
            faster, half = row.get("times_faster"), row["error_of_bf16"]
            table.add_row(
                label,
                row["name"],
                _microseconds(row["seconds"]),
                bytes_text(row["bytes"]),
                f"{row['gb_per_second']:,.0f}",
                f"{100 * row['share_of_copy']:.0f} %",
                "" if row["error"] is None else f"{row['error']:.2g}",
                "" if half is None else f"{half:.2g}",
                f"{faster:.2f}" if faster else "",
            )
    return table


def _encoding(record: dict[str, Any]) -> Table:
    settings = record["settings"]
    title = f"encode {settings['vectors']:,} bf16 vectors, d={settings['d']}"
    table = _table(title, ["codec", "side"], ["us (p20-p80)", "billion vectors/s", "GB/s", "of a copy's"])
    for row in record["rows"]:
        table.add_row(
            row["codec"],
            "keys" if row["side"] == "k" else "values",
            _microseconds(row["seconds"]),
            f"{row['vectors_per_second'] / 1e9:.2f}",
            f"{row['gb_per_second']:,.0f}",
            f"{100 * row['share_of_copy']:.0f} %",
        )
    return table


def _layer(record: dict[str, Any]) -> Table:
    table = _table("a layer's step", ["case", "cache"], ["us (p20-p80)", "x faster than dense"])
    for row in record["layer"]:
        faster = row["times_faster"]
        said = f"{faster['median']:.2f} ({faster['p20']:.2f}-{faster['p80']:.2f})" if faster else ""
        table.add_row(f"b={row['b']} t={row['t']:,}", row["name"], _microseconds(row["seconds"]), said)
    return table


def _model(record: dict[str, Any]) -> Table:
    table = _table("a model's step", ["case", "cache"], ["ms (p20-p80)", "tokens a second", "allocated", "peak"])
    for row in record["model"]:
        label = f"b={row['b']} t={row['t']:,}"
        if "absent" in row:
            table.add_row(label, row["name"], row["absent"], "", "", "")
            continue
        median, low, high = (f"{1e3 * row['seconds'][part]:.2f}" for part in ("median", "p20", "p80"))
        sizes = bytes_text(row["allocated"]), bytes_text(row["peak"])
        table.add_row(label, row["name"], f"{median} ({low}-{high})", f"{row['tokens_per_second']:,.0f}", *sizes)
    return table


def _generate(record: dict[str, Any]) -> Table:
    heads = ["ms a token (p20-p80)", "tokens a second", "host us of a replay"]
    table = _table("a token of generate", ["case", "cache", "decoding"], heads)
    for row in record["rows"]:
        median, low, high = (f"{1e3 * row['seconds'][part]:.2f}" for part in ("median", "p20", "p80"))
        host = f"{1e6 * row['host_seconds']:.0f}" if "host_seconds" in row else ""
        speed = f"{row['b'] / row['seconds']['median']:,.0f}"
        table.add_row(f"b={row['b']} t={row['t']:,}", row["name"], row["way"], f"{median} ({low}-{high})", speed, host)
    return table


def _fit(record: dict[str, Any]) -> Table:
    t, limit = record["settings"]["fit"]
    heads = ["sequences", "tokens", "GB allocated", "ms of a step"]
    table = _table(f"sequences of {t:,} tokens in {limit / 1e9:.0f} GB", ["cache"], heads)
    for row in record["fit"]:
        sizes = f"{row['allocated'] / 1e9:.1f}", f"{1e3 * row['seconds']:.0f}"
        table.add_row(row["name"], f"{row['sequences']:,}", f"{row['tokens']:,}", *sizes)
    return table
