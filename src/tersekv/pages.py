"""Generated blocks of README and docs: `tersekv report` writes them, `tersekv report --check` exits 1 if stale.

A block stands between `<!-- generated: SOURCE -->` and `<!-- /generated -->`. SOURCE is a committed record,
its caption alone (`results/choices.json#caption`), one table of a record that has several
(`results/attend.json#long`; an evaluation's first without a name), the rows of a method
(`results/methods.json#kivi`), the records of a folder side by side (`results/models#models`, the rows of a method,
`results/models#kivi`, or presets and plain codecs by bits, `results/models#by-bits`), differences from a row
(`results/models/smollm2.json#against=kivi:bits=4`), a published table beside ours (`runs/published.toml#antkv`), or a
table of the registry: codecs, presets, bytes.
"""

import json
import re
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from tersekv.bench import attend_tables, decode_tables, gpu_tables
from tersekv.bench.encode import EncodeBench
from tersekv.describe import Info, listing
from tersekv.errors import InputError, SpecError, did_you_mean
from tersekv.registry import POLICIES
from tersekv.reports.captions import caption
from tersekv.reports.differences import against
from tersekv.reports.figures import is_fresh, svg
from tersekv.reports.models import by_bits, models
from tersekv.reports.replications import PUBLISHED, replication
from tersekv.reports.tables import methods, uses
from tersekv.reports.tables import tables as quality_tables
from tersekv.spec import codecs, parse

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(?=<!-- /generated -->)", re.DOTALL)
FIGURES = {"docs/images/models.svg": "results/models", "docs/images/speed.svg": "results/attend.json"}


def markdown(table: Table) -> str:
    """A rich table as Markdown, so that what the terminal and the pages show is written once."""
    columns = [[c.header, "---:" if c.justify == "right" else "---", *c.cells] for c in table.columns]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in zip(*columns, strict=True))


def bytes_table() -> Table:
    """What packed tokens cost with each codec; sinks, recent tokens and page tables come on top."""
    options = {row["name"]: row["options"] for row in listing().codecs}
    specs = [f"{name}:bits={bits}" for name in options if "bits" in options[name] for bits in (8, 4, 3, 2, 1)]
    specs = [spec for spec in specs if _is_spec(spec)]
    specs += ["vq:dim=4", "vq", "vq:index=6", "vq:dim=16", "vq:dim=16,index=6"]
    heads = [f"d={d}: {what}" for d in (64, 128) for what in ("bits K, V", "bytes a token", "ratio")]
    table = Table("spec", *(Column(head, justify="right") for head in heads))
    for spec in ["none", *specs, "k=rotated:bits=4 v=rotated:bits=2"]:
        table.add_row(spec, *(cell for d in (64, 128) for cell in _costs(spec, d)))
    return table


def _is_spec(text: str) -> bool:
    """Not every codec takes every number of bits."""
    try:
        parse(text)
    except SpecError:
        return False
    return True


def _costs(spec: str, d: int) -> tuple[str, ...]:
    facts = Info(parse(spec), d).as_dict()
    bits, held = facts["bits_per_value"], facts["bytes_per_token"]
    return f"{bits['k']:.3f}, {bits['v']:.3f}", f"{held:.2f}", f"{4 * d / held:.2f}"


PARTS = {
    "attend": attend_tables.tables,
    "decode": decode_tables.tables,
    "attend cuda": gpu_tables.tables,
    "encode cuda": gpu_tables.tables,
    "decode cuda": gpu_tables.tables,
    "generate cuda": gpu_tables.tables,
}  # records of several tables, and what makes them


def _parts(record: dict[str, Any]) -> dict[str, Table]:
    """Every table of a record by name; the one that stands without a name as ""."""
    if "bench" in record:
        return PARTS[record["bench"]](record)
    if "run" in record:
        found = quality_tables(record)
        return {"": next(iter(found.values()))} | found | _by_method(record)
    return {"": EncodeBench(**{f.name: record[f.name] for f in fields(EncodeBench)}).__rich__()}


def _by_method(record: dict[str, Any]) -> dict[str, Table]:
    """Of an evaluation: `methods` has all rows, and the name of a codec or policy the rows that use it."""
    rows = [row for row in record["rows"] if "logits" in row]
    named = {name: [row for row in rows if uses(row["spec"], name)] for name in (*codecs(), *POLICIES)}
    return {name: methods(found) for name, found in {"methods": rows, **named}.items()}


def content(source: str, root: Path) -> str:
    """The text of a block. Raises InputError for a source that does not exist."""
    registry, _, presets = listing().__rich__().renderables
    tables = {"codecs": lambda: registry, "presets": lambda: presets, "bytes": bytes_table}
    if source in tables:
        return markdown(tables[source]())
    name, _, part = source.partition("#")
    if name == PUBLISHED:
        table, said = replication(root, part)
        return f"{markdown(table)}\n\nTheirs: {said}."
    if not name.startswith("results/"):
        raise InputError(f'No block "{source}". {did_you_mean(source, tables)} Or results/NAME.json[#PART].')
    if (root / name).is_dir() and part in {"models", "by-bits", *codecs(), *POLICIES}:
        records = [json.loads(path.read_text()) for path in sorted((root / name).glob("*.json"))]
        return markdown(by_bits(records) if part == "by-bits" else models(records, None if part == "models" else part))
    if not (root / name).is_file():
        return "Not measured yet."
    record = json.loads((root / name).read_text())
    if part == "caption":
        return caption(record)
    if part.startswith("against="):
        return markdown(against(record, part.removeprefix("against=")))
    parts = _parts(record)
    if part not in parts:
        raise InputError(f'{name} has no table "{part}". {did_you_mean(part, [*parts, "caption"])}')
    return markdown(parts[part]) if part else f"{markdown(parts[part])}\n\n{caption(record)}"


def outdated(root: Path = ROOT) -> dict[Path, Callable[[], bytes]]:
    """Every page and picture that is not what records and registry say, and what makes it so."""
    found: dict[Path, Callable[[], bytes]] = {}
    for page in [*root.glob("*.md"), *root.glob("docs/**/*.md")]:
        text = page.read_text(encoding="utf-8")
        fresh = BLOCK.sub(lambda block: f"{block[1]}{content(block[2], root)}\n", text)
        if fresh != text:
            found[page] = fresh.encode
    for picture, name in FIGURES.items():
        if (root / name).exists() and not is_fresh(root / picture, root / name):
            found[root / picture] = partial(svg, root / name)
    return found


def update(check: bool, root: Path = ROOT) -> int:
    """Name what is stale and, unless this is a check, write it; the exit status."""
    for path, make in (stale := outdated(root)).items():
        print(f"{'stale' if check else 'written'}: {path}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make())
    return 1 if stale and check else 0
