"""`tersekv bench attend`: one layer's attention of a decoding step over cached tokens, ours beside what people use."""

import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tersekv.bench import ggml
from tersekv.bench.contestants import Contestant, all_of
from tersekv.bench.data import Case, Drawn, draw, error, exact
from tersekv.bench.machine import facts
from tersekv.bench.timing import FLUSH, Cold, paired, spread, take_turns, torch_threads
from tersekv.errors import InputError, did_you_mean
from tersekv.ops import native
from tersekv.terminal import Stages

REHEARSED = 320  # tokens of the call before each timed one: the code is at hand, as in layer after layer; no data are


@dataclass(frozen=True)
class Prepare:
    """Before a timed call: caches without its data, but with its code."""

    cold: Cold
    rehearsals: dict[str, Callable[[], Any]]

    def __call__(self, name: str) -> None:
        self.cold()
        self.rehearsals[name]()


@dataclass(frozen=True)
class Grid:
    """Every combination of these is a case. `heads`: query heads / KV heads, such as 32/8.

    `bits` are those of `rotated`, `trellis_bits` those of `trellis`.
    """

    name: str = "main"
    bits: tuple[int, ...] = (4, 3, 2)
    d: tuple[int, ...] = (128,)
    heads: tuple[str, ...] = ("32/8",)
    tokens: tuple[int, ...] = (32_768,)
    new_tokens: tuple[int, ...] = (1,)
    rounds: int = 11
    trellis_bits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not set(self.trellis_bits) <= {1, 2, 3, 4}:
            raise InputError(f"trellis_bits {self.trellis_bits}: bits of 1, 2, 3 and 4.")
        if self.rounds < 1 or not set(self.bits) <= {1, 2, 3, 4, 8} or not self.bits:
            raise InputError(f"bits {self.bits}, rounds {self.rounds}: bits of 1, 2, 3, 4, 8, and at least one round.")

    def specs(self) -> dict[str, str]:
        """What takes part of ours, by the names in tables."""
        return {f"{bits} bits": f"rotated:bits={bits}" for bits in self.bits} | {
            f"{bits} bits trellis": f"trellis:bits={bits}" for bits in self.trellis_bits
        }

    def cases(self) -> list[Case]:
        found = []
        for d, heads, t, n in product(self.d, self.heads, self.tokens, self.new_tokens):
            hq, _, h = heads.partition("/")
            if not (hq.isdigit() and h.isdigit() and int(h)):
                raise InputError(f'heads "{heads}": query heads / KV heads, for example 32/8.')
            found.append(Case(d, int(hq), int(h), t, n))
        return found


def grid_of(lists: dict[str, str], rounds: int) -> Grid:
    """A grid from the options of the command line, each a list with commas."""
    values: dict[str, Any] = {name: whole_numbers(name, text) for name, text in lists.items() if name != "heads"}
    return Grid(**values, heads=tuple(map(str.strip, lists.get("heads", "32/8").split(","))), rounds=rounds)


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(map(str.isdigit, words)):
        flag = option.replace("_", "-")
        raise InputError(f'--{flag} "{text}": whole numbers with commas between them, for example 1024,4096.')
    return tuple(map(int, words))


def read_grids(path: Path) -> list[Grid]:
    """The `[[grid]]` tables of a run file. Raises InputError for what cannot be read or is no field of Grid."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))["grid"]
        for table in tables:
            for option in set(table) - set(Grid.__dataclass_fields__):
                raise InputError(
                    f'{path}: unknown option "{option}". {did_you_mean(option, Grid.__dataclass_fields__)}'
                )
        return [_grid(table) for table in tables]
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no run file of grids ({error}). See runs/attend.toml.") from error


def _grid(table: dict[str, Any]) -> Grid:
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in table.items()}
    return Grid(**values)


def instruction_sets(asked: list[str]) -> list[str]:
    """Those to time, the fastest first: what was asked for, or the best one and AVX2."""
    runs = [name for name, can, _ in native.isas() if can]
    for name in asked:
        if name not in runs:
            raise InputError(f'Instruction set "{name}" does not run here. Allowed: {", ".join(runs)}.')
    return asked or [runs[0], *({"avx2"} & set(runs[1:]))]


def attend(
    grids: list[Grid],
    threads: int = 1,
    isas: list[str] | None = None,
    stages: Stages | None = None,
    flush: int = FLUSH,
    kernel: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """The record: for each case every contestant's time, bytes and error, after each has passed its parity gate."""
    if threads < 1:
        raise InputError(f"--threads {threads}: at least 1.")
    with torch_threads(threads), torch.inference_mode():
        cold = Cold(threads, flush)
        chosen = instruction_sets(isas or [])
        cases = []
        for grid in grids:
            for case in grid.cases():
                label = f"{grid.name}: d={case.d} {case.hq}/{case.h} t={case.t:,}"
                drawn, short = draw(case), draw(replace(case, t=REHEARSED))
                found, rehearsed = (all_of(one, grid.specs(), chosen, threads, kernel) for one in (drawn, short))
                report = _reporter(stages, label)
                report(0.0)
                prepare = Prepare(cold, {one.name: one.run for one in rehearsed})
                rows = _measure(drawn, found, grid.rounds, prepare, report)
                cases.append({"grid": grid.name} | asdict(case) | {"bandwidth": cold.gb_per_second, "rows": rows})
    missing = {f"llama.cpp {kind}": why for kind in ggml.KINDS if (why := ggml.absent())}
    settings = {"threads": threads, "isas": chosen, "flush": flush, "grids": [asdict(grid) for grid in grids]}
    return {"bench": "attend", "settings": settings, "absent": missing, "cases": cases} | facts()


def _reporter(stages: Stages | None, label: str) -> Callable[[float], None]:
    return (lambda share: stages(label, share)) if stages else lambda _: None


def _measure(
    drawn: Drawn, found: list[Contestant], rounds: int, prepare: Callable[[str], None], report: Callable[[float], None]
) -> list[dict[str, Any]]:
    errors = {one.name: one.checked() for one in found}
    truth = exact(drawn.q, *drawn.undamaged, drawn.case.scale)
    whole = {one.name: error(one.run().float(), truth) for one in found}
    del drawn.__dict__["undamaged"]  # the peers hold copies of their own
    seconds = take_turns({one.name: one.run for one in found}, rounds, prepare, report)
    rows = []
    for one in found:
        times = spread(seconds[one.name])
        # Each of ours beside every peer, the first also beside the others of ours.
        rivals = [peer for peer in found if peer.kind != "ours" or one is found[0]] if one.kind == "ours" else []
        faster = {x.name: paired(seconds[x.name], seconds[one.name]) for x in rivals if x is not one}
        about = {"name": one.name, "kind": one.kind, "bytes": one.nbytes, "error": errors[one.name]}
        about |= {"error_to_undamaged": whole[one.name], "gb_per_second": one.nbytes / times["median"] / 1e9}
        rows.append(about | {"seconds": times} | ({"times_faster_than": faster} if faster else {}))
    return rows
