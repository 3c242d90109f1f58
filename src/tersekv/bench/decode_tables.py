"""The record of `tersekv bench decode` as tables: tokens a second, prefill, memory."""

from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from tersekv.bench.attend_tables import times_text
from tersekv.terminal import bytes_text


@dataclass(frozen=True)
class DecodeResult:
    record: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return self.record

    def __rich__(self) -> Group:
        missing = [Text(f"{name} did not take part. {why}") for name, why in self.record["absent"].items()]
        return Group(*tables(self.record).values(), *missing)


def tables(record: dict[str, Any]) -> dict[str, Table]:
    memory = {"memory": _memory(record)} if record["memory"] else {}
    return {
        "tokens": _by_context(record, "tokens a second", lambda row: times_text(row["tokens_per_second"], 1)),
        "prefill": _by_context(record, "seconds of the prefill", lambda row: f"{row['prefill_seconds']:.1f}"),
        "faster": _faster(record),
    } | memory


def _by_context(record: dict[str, Any], title: str, cell: Any) -> Table:
    contexts = record["settings"]["contexts"]
    heads = (Column(f"{context:,}", justify="right") for context in contexts)
    table = Table("cache", *heads, title=f"{record['settings']['model']}: {title}", box=SIMPLE_HEAD)
    for name in dict.fromkeys(row["name"] for row in record["rows"]):
        cells = {row["context"]: cell(row) for row in record["rows"] if row["name"] == name}
        table.add_row(name, *(cells[context] for context in contexts))
    for name in record["absent"]:
        table.add_row(name, *["absent"] * len(contexts))
    return table


def _faster(record: dict[str, Any]) -> Table:
    """The first of our caches against everyone else."""
    ours = next(row["name"] for row in record["rows"] if row["kind"] == "ours")
    by_context = {row["context"]: row["times_faster_than"] for row in record["rows"] if row["name"] == ours}
    heads = (Column(f"{context:,}", justify="right") for context in by_context)
    table = Table(f"{ours} against", *heads, title="times faster", box=SIMPLE_HEAD)
    for peer in next(iter(by_context.values())):
        table.add_row(peer, *(times_text(faster[peer], 2) for faster in by_context.values()))
    return table


def _memory(record: dict[str, Any]) -> Table:
    heads = ("tokens", "before the prompt", "peak", "grew by", "cache holds")
    table = Table("cache", *(Column(head, justify="right") for head in heads), title="process memory", box=SIMPLE_HEAD)
    for row in record["memory"]:
        sizes = (row["loaded"], row["peak"], row["peak"] - row["loaded"], row["held"])
        table.add_row(f"{row['name']} {row['dtype']}", f"{row['tokens']:,}", *map(bytes_text, sizes))
    return table
