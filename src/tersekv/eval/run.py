"""A quality run: a TOML file in, one JSON record out."""

import tomllib
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from tersekv.describe import Info
from tersekv.errors import InputError, did_you_mean
from tersekv.eval.logits import Arm, arms, compare
from tersekv.hf.cost import head_dim
from tersekv.models import LoadedModel, load
from tersekv.record import provenance
from tersekv.spec import parse
from tersekv.terminal import Stages, bytes_text


@dataclass(frozen=True)
class Run:
    """The fields of a run file. `text` is a UTF-8 file; `tokens` its first tokens, one text, no windows."""

    model: str
    text: str
    specs: list[str]
    tokens: int = 4096
    chunk: int = 512
    score_from: int = 128
    dtype: str = "bfloat16"
    device: str = "cpu"


def read_run(path: str | Path, **overrides: Any) -> Run:
    """Raises InputError for a file that is no TOML or has an unknown or missing field."""
    try:
        given = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a run file: {error}.") from error
    given |= {name: value for name, value in overrides.items() if value is not None}
    names = [f.name for f in fields(Run)]
    for name in given:
        if name not in names:
            raise InputError(f'{path}: unknown field "{name}". {did_you_mean(name, names)}')
    missing = [name for name in ("model", "text", "specs") if name not in given]
    if missing:
        raise InputError(f"{path}: {', '.join(missing)} missing. Add them to the file, or give --text FILE.")
    return Run(**given)


def run(settings: Run, stages: Stages) -> dict[str, Any]:
    """Measure every spec of the run beside the dense cache, as decoding would see it; returns the record."""
    specs = [replace(parse(text), prefill="packed") for text in settings.specs]
    text = _read_text(settings.text)
    loaded = load(settings.model, settings.dtype, stages, settings.device)
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids[:, : settings.tokens].to(settings.device)
    if ids.shape[1] < settings.tokens:
        raise InputError(f"{settings.text} has only {ids.shape[1]} tokens, {settings.tokens} are asked for.")
    chosen = arms(loaded.model, specs)
    manifest = _manifest(settings, loaded, text)
    compare(
        loaded.model,
        ids,
        chosen,
        settings.chunk,
        settings.score_from,
        lambda share: stages(f"{len(chosen)} caches, {settings.tokens:,} tokens", share),
    )
    d = head_dim(loaded.model.config.get_text_config(decoder=True))
    return manifest | {"rows": [_body(arm, d) | arm.summary() for arm in chosen]}


def _body(arm: Arm, d: int) -> dict[str, Any]:
    """Of packed tokens alone: nominal bits a value, bits with all scales, zeros, means and padding; what reads them."""
    if arm.spec is None:
        return {"nominal_bits": 16.0, "body_bits": 16.0}
    info = Info(arm.spec, d)
    nominal, body = (
        sum(getattr(x, name) for x in info.layouts.values()) / 2 for name in ("nominal_bits", "bits_per_value")
    )
    recipes = " / ".join(dict.fromkeys(recipe.name for _, recipe in info.sides.values()))
    return {"nominal_bits": nominal, "body_bits": body, "recipe": recipes, "attention": info.attention}


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}. Give a UTF-8 file with --text FILE.") from error


def _manifest(settings: Run, loaded: LoadedModel, text: str) -> dict[str, Any]:
    return {
        "run": asdict(settings) | {"text": Path(settings.text).name},
        "model": {"source": loaded.source, "revision": loaded.revision},
        "text_sha256": sha256(text.encode()).hexdigest(),
    } | provenance(settings.device)


@dataclass(frozen=True)
class Result:
    """A record and how people read it."""

    record: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return self.record

    def __rich__(self) -> Table:
        settings = self.record["run"]
        title = f"{settings['model']}, {settings['tokens']:,} tokens of {settings['text']}, {self.record['device']}"
        what = "nominal and body: bits a value; ratio: to a dense cache in 16 bits"
        # No padding: the numbers take 54 of 80 columns and are never cut, so the rest belongs to the spec.
        table = Table(title=title, caption=what, box=SIMPLE_HEAD, padding=0)
        table.add_column(COLUMNS[0], overflow="fold")
        for name in COLUMNS[1:]:
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.record["rows"]:
            table.add_row(*cells(row))
        return table


def methods_table(rows: list[dict[str, Any]]) -> Table:
    """Rows of a record with the recipe and whether the kernels read it."""
    table = Table("spec", *(Column(name, justify="right") for name in METHOD_COLUMNS), "recipe", "kernels")
    for row in rows:
        known = "recipe" in row
        readers = ("reference" if row["attention"].startswith("reference") else "native") if known else "torch"
        picked = [cells(row)[("spec", *COLUMNS[1:]).index(name)] for name in ("spec", *METHOD_COLUMNS)]
        table.add_row(*picked, row.get("recipe", "-"), readers)
    return table


METHOD_COLUMNS = ("nominal", "body", "held", "ratio", "KL", "top-1")
COLUMNS = ("spec", "nominal", "body", "held", "ratio", "KL", "KL p99", "top-1", "perplexity")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row of a record as text, in the order of COLUMNS."""
    return (
        row["spec"].removesuffix(" prefill=packed"),
        f"{row['nominal_bits']:g}",
        f"{row['body_bits']:.2f}",
        bytes_text(row["held"]),
        f"{row['ratio16']:.2f}",
        f"{row['kl_mean']:.4f}",
        f"{row['kl_p99']:.3f}",
        f"{100 * row['top1']:.1f} %",
        f"{row['perplexity']:.3f}",
    )
