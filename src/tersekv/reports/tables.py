"""The tables of a record, by the depth that they show."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Column, Table

from tersekv.eval.metrics import COSINES, ERRORS
from tersekv.record import headline
from tersekv.reports.captions import caption
from tersekv.reports.cells import number_and_interval, shown
from tersekv.reports.differences import against
from tersekv.terminal import bytes_text

Record = dict[str, Any]
KERNELS = {"cpu": "CPU", "cuda": "CUDA"}  # as people call them


def _table(first: str, *columns: str, whole: bool = False) -> Table:
    """With `whole` numbers are never broken over lines: those of `quality` take 54 of 80 columns."""
    heads = [Column(name, justify="right", no_wrap=whole) for name in columns]
    return Table(Column(first, overflow="fold"), *heads, box=SIMPLE_HEAD, padding=0 if whole else (0, 1))


def quality(record: Record) -> Table:
    """Bytes and logits, of the run file's first window length."""
    table = _table("spec", "nominal", "body", "held", "ratio", "KL", "KL p99", "top-1", "perplexity", whole=True)
    for row in record["rows"]:
        table.add_row(*_cells(row).values())
    return table


def _cells(row: dict[str, Any]) -> dict[str, str]:
    x = headline(row)
    assert x is not None, "`tables` offers this table for records with logits alone"
    return {
        "spec": shown(row["spec"]),
        "nominal": f"{row['nominal_bits']:g}",
        "body": f"{row['body_bits']:.2f}",
        "held": bytes_text(x["held"]),
        "ratio": f"{x['ratio16']:.2f}",
        "KL": f"{x['kl_mean']:.4f}",
        "KL p99": f"{x['kl_p99']:.3f}",
        "top-1": f"{100 * x['top1']:.1f} %",
        "perplexity": f"{x['perplexity']:.3f}",
    }


def methods(rows: list[dict[str, Any]]) -> Table:
    """Rows of a record with the recipe, whose kernels read it, and how long fitting took, if anything was."""
    names = ("nominal", "body", "held", "ratio", "KL", "top-1")
    table = Table("spec", *(Column(name, justify="right") for name in names), "recipe", "kernels")
    fitted = any("calibration_seconds" in row for row in rows)
    if fitted:
        table.add_column("calibration", justify="right")
    for row in rows:
        cells, taken = _cells(row), [fitting(row)] if fitted else []
        table.add_row(*(cells[name] for name in ("spec", *names)), row.get("recipe", "-"), kernels(row), *taken)
    return table


def kernels(row: dict[str, Any]) -> str:
    if "kernels" not in row:
        return "torch"
    return ", ".join(KERNELS[device] for device in row["kernels"]) or "reference"


def fitting(row: dict[str, Any]) -> str:
    seconds = row.get("calibration_seconds")
    return "-" if seconds is None else f"{seconds:,.0f} s"


def uses(spec: str, method: str) -> bool:
    """Whether a spec names a codec or policy."""
    return re.search(rf"(^|[= ]){method}([: ]|$)", spec) is not None


def windows(record: Record) -> Table:
    """KL and perplexity against the dense cache for each window length, with intervals."""
    lengths = list(record["rows"][0]["logits"])
    heads = (f"{int(n):,}: {what}" for n in lengths for what in ("KL (95 %)", "max", "loss difference (95 %)"))
    table = _table("spec", *heads)
    for row in record["rows"]:
        cells: list[str] = []
        for x in row["logits"].values():
            worse = number_and_interval(x, "loss_difference", "+.4f")
            cells += [number_and_interval(x, "kl_mean", ".4f"), f"{x['kl_max']:.2f}", worse]
        table.add_row(shown(row["spec"]), *cells)
    return table


def errors(record: Record) -> Table:
    """Relative errors, the logit error in nats, and where the worst attention output is."""
    return _fidelity(record, ERRORS, "worst output at")


def cosines(record: Record) -> Table:
    return _fidelity(record, COSINES)


def _place(row: dict[str, Any]) -> str:
    at = row["tensors"]["output_error"]["where"]
    return f"layer {at['layer']}, head {at['head']}, token {at['token']:,}"


def _fidelity(record: Record, metrics: tuple[str, ...], place: str | None = None) -> Table:
    """Mean, the tail that 5 % of tokens are beyond, the mean of the worst head, and the worst token."""
    heads = [f"{name.replace('_', ' ')}: mean, 5 %, worst head, worst" for name in metrics]
    table = _table("spec", *heads, *([place] if place else []))
    for row in record["rows"]:
        found = (row["tensors"].get(name) for name in metrics)
        cells = ["-" if x is None else _four(x) for x in found]
        table.add_row(shown(row["spec"]), *cells, *([_place(row)] if place else []))
    return table


def _four(x: dict[str, float]) -> str:
    return ", ".join(f"{x[key]:.3g}" for key in ("mean", "tail", "worst_head", "worst"))


def growth(record: Record) -> Table:
    table = _table("spec", "KL (95 %)", "first eighth", "last eighth", "top-1", "same tokens (95 %)")
    for row in record["rows"]:
        x = row["growth"]
        parts = x["kl_by_part"]
        cells = [f"{parts[0]:.4f}", f"{parts[-1]:.4f}", f"{100 * x['top1']:.1f} %"]
        same = f"{number_and_interval(x, 'same_tokens', '.0f')} of {x['new_tokens']}"
        table.add_row(shown(row["spec"]), number_and_interval(x, "kl_mean", ".4f"), *cells, same)
    return table


def needle(record: Record) -> Table:
    table = _table("spec", "found", "difference (95 %)", "log-probability difference (95 %)")
    for row in record["rows"]:
        x = row["needle"]
        lost = number_and_interval(x, "difference", "+.1f", 100, " points")
        score = number_and_interval(x, "log_probability_difference", "+.3f")
        table.add_row(shown(row["spec"]), f"{100 * x['hits']:.1f} % of {x['items']}", lost, score)
    return table


def tasks(record: Record) -> Table:
    scores = [(task, metric) for task, x in record["rows"][0]["tasks"].items() for metric in x["metrics"]]
    heads = (f"{task} {metric}{part}" for task, metric in scores for part in ("", ": difference (95 %)"))
    table = _table("spec", *heads)
    for row in record["rows"]:
        cells: list[str] = []
        for task, metric in scores:
            x = row["tasks"][task]["metrics"][metric]
            score = number_and_interval(x, "score", ".3g", 100, " %")
            cells += [score, number_and_interval(x, "difference", "+.2f", 100, " points")]
        table.add_row(shown(row["spec"]), *cells)
    return table


def speed(record: Record) -> Table:
    table = _table("spec", "prefill s", "tokens/s (p20-p80)", "times as fast as dense", "peak", "peak over model")
    for row in record["rows"]:
        x = row["speed"]
        rate, faster = x["tokens_per_second"], x["times_faster_than_dense"]
        table.add_row(
            shown(row["spec"]),
            f"{x['prefill_seconds']:.2f}",
            f"{rate['median']:.1f} ({rate['p20']:.1f}-{rate['p80']:.1f})",
            f"{faster['median']:.2f} ({faster['p20']:.2f}-{faster['p80']:.2f})",
            bytes_text(x["memory_peak"]),
            bytes_text(x["memory_over_loaded"]),
        )
    return table


def memory(record: Record) -> Table:
    """Bytes held by tier and plane at the end of the first window length."""
    table = _table("spec", "tier and plane", "bytes", "share")
    for row in record["rows"]:
        x = headline(row)
        for plane, count in (x or {}).get("planes", {}).items():
            table.add_row(shown(row["spec"]), plane, bytes_text(count), f"{100 * count / max(x['held'], 1):.1f} %")  # pyright: ignore[reportOptionalSubscript]
    return table


# Name: the section of a row that it shows, and what makes it.
TABLES: dict[str, tuple[str, Callable[[Record], Table]]] = {
    "quality": ("logits", quality),
    "windows": ("logits", windows),
    "errors": ("tensors", errors),
    "cosines": ("tensors", cosines),
    "growth": ("growth", growth),
    "needle": ("needle", needle),
    "tasks": ("tasks", tasks),
    "speed": ("speed", speed),
    "memory": ("logits", memory),
}


def tables(record: Record) -> dict[str, Table]:
    """Every table that the record has numbers for."""
    found = {name: make(record) for name, (section, make) in TABLES.items() if section in record["rows"][0]}
    if "reference" in record:
        found["against"] = against(record, record["reference"])
    if "memory" in found:
        found["memory"] = found.pop("memory")  # the longest, so the last
    return found


@dataclass(frozen=True)
class Results:
    """Records, and how people read them in a terminal; bytes by plane are left to the page."""

    records: list[Record]

    def as_dict(self) -> Any:
        return self.records[0] if len(self.records) == 1 else self.records

    def __rich__(self) -> Group:
        shown: list[Any] = []
        for record in self.records:
            found = {name: table for name, table in tables(record).items() if name != "memory"}
            for name, table in found.items():
                table.title = f"{record['run']['model']}, {record['device']}: {name}"
            shown += [*found.values(), caption(record)]
        return Group(*shown)
