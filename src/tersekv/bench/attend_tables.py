"""The record of `tersekv bench attend` as tables: one contestant a row for a single case, one case a row for many."""

from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from tersekv.terminal import bytes_text

Case = dict[str, Any]


@dataclass(frozen=True)
class AttendResult:
    record: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return self.record

    def __rich__(self) -> Group:
        missing = [Text(f"{name} did not take part. {why}") for name, why in self.record["absent"].items()]
        return Group(*tables(self.record).values(), *missing)


def tables(record: dict[str, Any]) -> dict[str, Table]:
    """A table for each grid of the record, by its name."""
    grids: dict[str, list[Case]] = {}
    for case in record["cases"]:
        grids.setdefault(case["grid"], []).append(case)
    absent = sorted(record["absent"])
    return {
        name: contestants(cases[0], absent) if len(cases) == 1 else summary(name, cases, absent)
        for name, cases in grids.items()
    }


def title(case: Case) -> str:
    new = f", {case['n']:,} new tokens" if case["n"] > 1 else ""
    return f"d={case['d']}, {case['hq']}/{case['h']} heads, {case['t']:,} cached tokens{new}"


def times_text(times: dict[str, float], digits: int, factor: float = 1) -> str:
    median, low, high = (f"{factor * times[part]:.{digits}f}" for part in ("median", "p20", "p80"))
    return f"{median} ({low}-{high})"


def contestants(case: Case, absent: list[str]) -> Table:
    first = case["rows"][0]
    heads = ("ms (p20-p80)", "held", "GB/s", "of memory's", "error", f"{first['name']}: x faster")
    table = Table("attention", *(Column(head, justify="right") for head in heads), title=title(case), box=SIMPLE_HEAD)
    for row in case["rows"]:
        rate, faster = row["gb_per_second"], first["times_faster_than"].get(row["name"])
        cells = (
            times_text(row["seconds"], 2, 1e3),
            bytes_text(row["bytes"]),
            f"{rate:.1f}",
            f"{100 * rate / case['bandwidth']:.0f} %",
            f"{row['error']:.1g}",
            times_text(faster, 2) if faster else "1",
        )
        table.add_row(row["name"], *cells)
    for name in absent:
        table.add_row(name, *["absent"] * len(heads))
    return table


def peers(case: Case) -> list[Case]:
    return [row for row in case["rows"] if row["kind"] != "ours"]


def shown(case: Case) -> list[str]:
    """The columns of a summary: the best instruction set in 8-bit integers, and llama.cpp."""
    return [row["name"] for row in case["rows"] if row["kind"] == "llama.cpp" or row["name"].endswith(" bits")]


def summary(name: str, cases: list[Case], absent: list[str]) -> Table:
    """Milliseconds, and how many times faster the first of ours is than the fastest peer of each case."""
    first, columns = cases[0]["rows"][0]["name"], shown(cases[0])
    changing = [letter for letter in ("d", "hq", "h", "t", "n") if len({case[letter] for case in cases}) > 1]
    heads = (*columns, "torch", *absent)
    right = (Column(head, justify="right") for head in (*changing, *heads))
    faster = Column(f"{first}: x faster", justify="right", no_wrap=True)
    table = Table(*right, faster, "than", title=f"{name}: milliseconds", box=SIMPLE_HEAD)
    for case in cases:
        rows = {row["name"]: row for row in case["rows"]}
        torch = min((row for row in peers(case) if row["kind"] == "torch"), key=_median)
        best = min(peers(case), key=_median)
        table.add_row(
            *(f"{case[letter]:,}" for letter in changing),
            *(f"{1e3 * _median(rows[column]):.2f}" for column in columns),
            f"{1e3 * _median(torch):.2f}",
            *["absent"] * len(absent),
            times_text(rows[first]["times_faster_than"][best["name"]], 2),
            best["name"],
        )
    return table


def _median(row: Case) -> float:
    return row["seconds"]["median"]
