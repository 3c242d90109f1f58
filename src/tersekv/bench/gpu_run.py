"""`tersekv bench attend --device cuda` and `bench encode --device cuda`: what is run, and the records."""

import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tersekv import ops
from tersekv.bench.attend import grid_of as grid_of_lists
from tersekv.bench.gpu import Case, Cold, measure
from tersekv.bench.timing import spread
from tersekv.errors import InputError, TersekvError
from tersekv.layout import BLOCK
from tersekv.ops import cuda
from tersekv.packed import repack
from tersekv.record import provenance
from tersekv.spec import parse, parse_codec
from tersekv.terminal import Stages


@dataclass(frozen=True)
class Grid:
    """Every case for every cache of `specs` (name to spec)."""

    name: str
    specs: dict[str, str]
    cases: list[dict[str, int]]
    rounds: int = 21


def read_grids(path: Path) -> list[Grid]:
    """The `[[grid]]` tables of a run file. Raises InputError for one that cannot be read."""
    try:
        return [Grid(**table) for table in tomllib.loads(path.read_text(encoding="utf-8"))["grid"]]
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no run file for a GPU ({error}). See runs/attend-cuda.toml.") from error


def grid_of(lists: dict[str, str], rounds: int) -> Grid:
    """Of the lists of the command line: `rotated` at these bits, one sequence."""
    whole = grid_of_lists(lists, rounds)
    cases = [{"b": 1, **asdict(case)} for case in whole.cases()]
    return Grid("main", {f"{bits} bits": f"rotated:bits={bits}" for bits in whole.bits}, cases, rounds)


def _check(device: str) -> None:
    if why := cuda.missing():
        raise InputError(f'--device "{device}": {why}')


def attend(grids: list[Grid], device: str, stages: Stages | None = None) -> dict[str, Any]:
    """For each case every contestant's time, bytes and error, after each has passed its parity gate."""
    _check(device)
    cases = []
    with torch.inference_mode():
        cold = Cold(device)
        for grid in grids:
            specs = {name: parse(text) for name, text in grid.specs.items()}
            for number, fields in enumerate(grid.cases):
                if stages:
                    stages(grid.name, number / len(grid.cases))
                case = Case(**fields)
                cases.append({"grid": grid.name} | measure(case, specs, grid.rounds, cold, device))
                torch.cuda.empty_cache()
    settings = {"grids": [asdict(grid) for grid in grids]}
    return _record("attend cuda", device, cold, settings) | {"cases": cases}


CODECS = {  # and the sides that kernels write
    "rotated:bits=4": "kv",
    "rotated:bits=3": "kv",
    "rotated:bits=2": "kv",
    "lloydmax:bits=3": "kv",
    "intn:bits=4": "kv",
    "trellis:bits=2": "v",
    "trellis:bits=1": "v",
}


def encode(d: int, vectors: int, device: str, rounds: int = 11) -> dict[str, Any]:
    """Vectors a second from bf16 into pages that are there already; bytes must be the reference's."""
    _check(device)
    cold, rows = Cold(device), []
    x = torch.randn(vectors // BLOCK, BLOCK, d, device=device, dtype=torch.bfloat16)
    for text, sides in CODECS.items():
        for side in sides:
            run, nbytes = _encoder(text, side, x)
            seconds = spread(cold.turns({text: run}, rounds)[text])
            moved = 2 * x.numel() + nbytes
            rate = moved / seconds["median"] / 1e9
            row = {"codec": text, "side": side, "vectors_per_second": len(x) * BLOCK / seconds["median"]}
            rows.append(row | {"seconds": seconds, "gb_per_second": rate, "share_of_copy": rate / cold.gb_per_second})
    return _record("encode cuda", device, cold, {"d": d, "vectors": len(x) * BLOCK, "rounds": rounds}) | {"rows": rows}


def _encoder(text: str, side: str, x: torch.Tensor) -> tuple[Callable[[], Any], int]:
    codec = parse_codec(text, side)
    layout = ops.ordered(codec.layout(x.shape[-1]), codec.recipe(x.shape[-1]), side, x.device)
    some = x[:256]
    if not torch.equal(ops.encode(codec, some, layout).data.cpu(), repack(codec.encode(some.cpu()), layout.order).data):
        raise TersekvError(f"Parity gate: the bytes of {text} differ from the reference's. No timing.")
    pages = torch.empty(len(x), layout.nbytes, dtype=torch.uint8, device=x.device)
    return partial(ops.encode, codec, x, layout, pages), pages.nbytes


def _record(bench: str, device: str, cold: Cold, settings: dict[str, Any]) -> dict[str, Any]:
    made = provenance(device)
    made["versions"] |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    return {"bench": bench, "settings": settings, "copy_gb_per_second": cold.gb_per_second} | made
