"""Every error that tersekv raises.

TersekvError
├── SpecError        a spec, codec or option that does not exist or does not fit the head dim
├── InputError       keys, values, masks or prompts that a cache cannot take; the cache is unchanged
├── CacheError       a call that the cache cannot carry out in its present state
├── CacheFileError   a file that is damaged, foreign, or of another version
├── RecordError      a run directory or record that is damaged or belongs to another run
└── ModelError       a model that cannot be found, loaded, or has no attention cache
"""

from collections.abc import Iterable
from difflib import get_close_matches


class TersekvError(Exception):
    """Base of all errors of this package."""


class SpecError(TersekvError, ValueError):
    pass


class InputError(TersekvError, ValueError):
    pass


class CacheError(TersekvError, RuntimeError):
    pass


class CacheFileError(TersekvError, ValueError):
    pass


class RecordError(TersekvError, ValueError):
    pass


class ModelError(TersekvError, ValueError):
    pass


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """A sentence that names the nearest allowed word, or lists them all."""
    names = sorted(allowed)
    close = get_close_matches(given, names, n=1)
    return f'Did you mean "{close[0]}"?' if close else f"Allowed: {', '.join(names)}."
