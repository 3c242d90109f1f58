"""Numbers as tables show them."""

from functools import cache
from typing import Any

from tersekv.registry import PRESETS
from tersekv.spec import parse


def number_and_interval(x: dict[str, Any], name: str, form: str, times: float | int = 1, unit: str = "") -> str:
    """`.0130 (.0121-.0140)`: a mean and its interval, or the mean alone where one sample allows no interval."""
    if name not in x:
        return "-"
    text = f"{times * x[name]:{form}}{unit}"
    found = x.get(f"{name}_interval")
    return text if not found else f"{text} ({times * found[0]:{form}} to {times * found[1]:{form}})"


def of_any(spec: str, record: dict[str, Any]) -> str:
    """A spec as its run file has it, where it names a file for each model."""
    return spec.replace(record["run"]["model"], "{model}")


def shown(spec: str) -> str:
    """The name of the preset that a spec is, or the spec."""
    return _presets().get(spec, spec)


@cache
def _presets() -> dict[str, str]:
    return {str(parse(name)): name for name in PRESETS}
