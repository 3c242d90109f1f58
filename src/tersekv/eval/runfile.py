"""A run file: which caches, on which models, measured how deep. A section for each depth; an absent one is not run."""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from tersekv.errors import InputError, did_you_mean
from tersekv.eval.subject import Depth

# One line a depth: its section of a run file, and the class whose fields that section may have. Cheap ones first.
DEPTHS = {
    "tensors": "tersekv.eval.tensors:Tensors",
    "logits": "tersekv.eval.windows:Logits",
    "growth": "tersekv.eval.growth:Growth",
    "needle": "tersekv.eval.needle:Needle",
    "tasks": "tersekv.eval.tasks:Tasks",
    "speed": "tersekv.eval.speed:Speed",
}


LOCAL = ("text", "data", "reference", "depths")  # what a manifest has otherwise, or not


@dataclass(frozen=True)
class RunFile:
    """`models` is what --model takes, one or several; `text` a UTF-8 file; `data` a folder with the tasks' items.

    `reference`: the spec that reports show the others' differences from. It changes no sample, so no manifest has it.
    """

    models: list[str]
    specs: list[str]
    text: str | None = None
    data: str | None = None
    reference: str | None = None
    seed: int = 0
    dtype: str = "bfloat16"
    device: str = "cpu"
    depths: dict[str, Depth] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """What a manifest says of it: depths with all their fields, and no paths of this machine."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in LOCAL}
        return plain | {name: asdict(depth) for name, depth in self.depths.items()}  # pyright: ignore[reportArgumentType]


def read_run(path: str | Path, **overrides: Any) -> RunFile:
    """Raises InputError for a file that is no TOML, or has an unknown, missing or ill-typed field."""
    try:
        given = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a run file: {error}.") from error
    depths = {name: _depth(path, name, given.pop(name)) for name in DEPTHS if name in given}
    given |= {name: value for name, value in overrides.items() if value is not None}
    if "model" in given:
        given["models"] = [given.pop("model")]  # of the file, or the only one asked for
    run = _filled(RunFile, given | {"depths": depths}, f"{path}", {*DEPTHS, "model"})
    if not depths:
        raise InputError(f"{path} measures nothing. Add a section: {', '.join(f'[{name}]' for name in DEPTHS)}.")
    if run.reference is not None and run.reference not in run.specs:
        raise InputError(
            f'{path}: reference = "{run.reference}" is none of specs. {did_you_mean(run.reference, run.specs)}'
        )
    return run


def _depth(path: str | Path, name: str, section: Any) -> Depth:
    module, _, attribute = DEPTHS[name].partition(":")
    if not isinstance(section, Mapping):
        raise InputError(f"{path}: {name} is a section: [{name}] and its fields below.")
    return _filled(getattr(import_module(module), attribute), dict(section), f"{path}, [{name}]", set())


def _filled(cls: Any, given: dict[str, Any], where: str, more: set[str]) -> Any:
    known = {f.name: f for f in fields(cls)}
    for name, value in given.items():
        if name not in known:
            raise InputError(f'{where}: unknown field "{name}". {did_you_mean(name, {*known, *more})}')
        kind = known[name].type
        if not _fits(value, kind):
            raise InputError(f"{where}: {name} = {value!r} is no {getattr(kind, '__name__', kind)}.")
    missing = [name for name in ("models", "specs", "names") if name in known and not given.get(name)]
    if missing:
        raise InputError(f"{where}: {', '.join(missing)} missing. Add them to the file.")
    return cls(**given)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a TOML value is of a field's type; lists by their elements."""
    if get_origin(kind) is list:
        return isinstance(value, list) and bool(value) and all(type(x) is get_args(kind)[0] for x in value)
    if get_origin(kind) is UnionType:
        return any(_fits(value, one) for one in get_args(kind))
    return isinstance(value, get_origin(kind) or kind) and not (kind is int and isinstance(value, bool))
