"""Specs: text to objects and back.

    "terse4"                                             a preset
    "rotated:bits=3"                                     one codec for keys and values
    "k=rotated:bits=4 v=rotated:bits=2 sink=4 recent=64" everything said
    "rotated layers=4/3*2,3/2*28"                        bits of keys and values for each layer of a model

`str(spec)` prints the canonical text (defaults left out) and `parse(str(spec)) == spec`.
"""

from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from itertools import groupby
from re import fullmatch
from typing import Any, get_type_hints

from tersekv.codec import Codec
from tersekv.errors import SpecError, did_you_mean
from tersekv.policy.base import Policy
from tersekv.policy.window import Window
from tersekv.registry import CODECS, POLICIES, PRESETS

PREFILL = ("exact", "packed")


@dataclass(frozen=True)
class Spec:
    """A codec for keys, one for values, the policy that says which tokens they get, and what a prefill sees."""

    k: Codec
    v: Codec
    policy: Policy = field(default_factory=Window)
    prefill: str = "exact"
    layers: tuple[tuple[int, int], ...] = ()  # bits of keys and of values by layer of the model; empty: the codecs' own

    def __post_init__(self) -> None:
        if self.prefill not in PREFILL:
            raise SpecError(f"prefill={self.prefill} is unknown. {did_you_mean(self.prefill, PREFILL)}")
        if self.prefill not in self.policy.prefills:
            allowed = ", ".join(self.policy.prefills)
            raise SpecError(
                f"policy={policy_name(self.policy)} does not take prefill={self.prefill}. Allowed: {allowed}."
            )

        for layer in range(len(self.layers)):
            self.at(layer)  # raises where a codec cannot have so many bits

    def at(self, layer: int) -> "Spec":
        """The spec of one layer of a model."""
        k, v = self.k.at(layer), self.v.at(layer)
        if self.layers:
            k, v = (codec.with_bits(bits) for codec, bits in zip((k, v), self.layers[layer], strict=True))
        return replace(self, k=k, v=v, layers=())

    def check_layers(self, count: int) -> None:
        """Raises SpecError unless the spec is for a model of so many layers."""
        if self.layers and len(self.layers) != count:
            raise SpecError(
                f"layers= names {len(self.layers)} layers, but this model has {count}. It is made for one model: "
                "tersekv calibrate budget MODEL."
            )

    def __str__(self) -> str:
        k, v = print_codec(self.k, "k"), print_codec(self.v, "v")
        words = [k] if k == v else [f"k={k}", f"v={v}"]
        name = policy_name(self.policy)
        words += [f"policy={name}"] if name != "window" else []
        options = ((f, getattr(self.policy, f.name)) for f in fields(self.policy))
        words += [f"{f.name}={option_text(x)}" for f, x in options if x != f.default]
        runs = ((bits, len(list(same))) for bits, same in groupby(self.layers))
        several = [f"{k}/{v}" + (f"*{count}" if count > 1 else "") for (k, v), count in runs]
        words += [f"layers={','.join(several)}"] if several else []
        words += [f"prefill={self.prefill}"] if self.prefill != "exact" else []
        return " ".join(words)


@cache
def codecs() -> dict[str, str]:
    """Every registered codec name and where its class is; nothing is imported."""
    return CODECS | {point.name: point.value for point in entry_points(group="tersekv.codecs")}


def codec_class(name: str) -> type[Codec]:
    if name not in codecs():
        known = did_you_mean(name, [*codecs(), *PRESETS])
        if name in PRESETS:
            known = f"It is a preset, which stands alone and first; its codec is {PRESETS[name]}."
        raise SpecError(f'Unknown codec or preset "{name}". {known} `tersekv list` shows all.')
    module, _, attribute = codecs()[name].partition(":")
    return getattr(import_module(module), attribute)


def policy_name(policy: Policy) -> str:
    """Inverse of `policy_class`."""
    where = f"{type(policy).__module__}:{type(policy).__qualname__}"
    return next(name for name, place in POLICIES.items() if place == where)


def policy_class(words: list[str]) -> type[Policy]:
    """Of the first word `policy=NAME`, or the window."""
    named = [word.removeprefix("policy=") for word in words if word.startswith("policy=")]
    name = named[0] if named else "window"
    if name not in POLICIES:
        raise SpecError(f'Unknown policy "{name}". {did_you_mean(name, POLICIES)}')
    module, _, attribute = POLICIES[name].partition(":")
    return getattr(import_module(module), attribute)


def parse(text: str) -> Spec:
    """The spec of a text. Raises SpecError for an unknown preset, codec, option or value."""
    words = text.split()
    if not words:
        raise SpecError('The spec is empty. Give a preset such as "terse4" or a codec such as "rotated:bits=3".')
    # A preset is a start that later words may change; otherwise each thing is said once.
    settings: dict[str, Any] = {}
    cls = policy_class(words + (start := PRESETS.get(words[0], "").split()))
    for word in start:
        _set(settings, word, cls)
    preset, said = dict(settings), set[str]()
    for word in words[1:] if preset else words:
        for key in _set(settings, word, cls):
            if key in said:
                raise SpecError(f'"{text}" says {key} twice. Say it once.')
            said.add(key)
    for side in ("k", "v"):
        if side not in settings:
            raise SpecError(f'"{text}" names no codec for {side}. Add {side}=CODEC, or {side}=none to leave it dense.')
    policy = cls(**{f.name: settings.pop(f.name) for f in fields(cls) if f.name in settings})
    return Spec(policy=policy, **settings)


def _set(settings: dict[str, Any], word: str, cls: type[Policy]) -> list[str]:
    """Put what a word says into the settings; returns their names."""
    key, equals, value = word.partition("=")
    policy = {f.name: get_type_hints(cls)[f.name] for f in fields(cls)}
    if not equals or ":" in key:
        settings |= {"k": parse_codec(word, "k"), "v": parse_codec(word, "v")}
        return ["k", "v"]
    if key in ("k", "v"):
        settings[key] = parse_codec(value, key)
    elif key == "prefill":
        settings[key] = value
    elif key == "layers":
        settings[key] = parse_layers(value)
    elif key == "policy":
        pass  # known before any other word, since they are its options
    elif key in policy:
        settings[key] = convert(key, value, policy[key])
    else:
        raise SpecError(
            f'Unknown setting "{key}". {did_you_mean(key, ["k", "v", "prefill", "policy", "layers", *policy])}'
        )
    return [key]


def parse_layers(text: str) -> tuple[tuple[int, int], ...]:
    """`4/3*2,3/2`: two layers with keys in 4 and values in 3 bits, and one with 3 and 2."""
    layers: list[tuple[int, int]] = []
    for word in text.split(","):
        found = fullmatch(r"(\d+)/(\d+)(?:\*(\d+))?", word)
        if not found:
            raise SpecError(
                f'layers="{text}": "{word}" is no layer. Give bits of keys/values*layers, such as 4/3*2,3/2.'
            )
        layers += [(int(found[1]), int(found[2]))] * int(found[3] or 1)
    return tuple(layers)


def parse_codec(text: str, side: str) -> Codec:
    """`name[:option=value[,option=value]]` for one side ("k" or "v"), whose defaults may differ."""
    name, _, rest = text.partition(":")
    cls = codec_class(name)
    types = {f.name: get_type_hints(cls)[f.name] for f in fields(cls)}
    given: dict[str, Any] = {}
    for word in rest.split(",") if rest else []:
        option, _, value = word.partition("=")
        if option not in types:
            raise SpecError(f'Codec "{name}" has no option "{option}". {did_you_mean(option, types)}')
        if option in given:
            raise SpecError(f'Codec "{name}": "{text}" says {option} twice. Say it once.')
        given[option] = convert(option, value, types[option])
    try:
        return cls(**(cls.side_defaults.get(side, {}) | given))
    except SpecError as error:
        raise SpecError(f'Codec "{name}": {error}') from None


def print_codec(codec: Codec, side: str) -> str:
    """Inverse of `parse_codec`."""
    cls = type(codec)
    names = {where: name for name, where in codecs().items()}
    where = f"{cls.__module__}:{cls.__qualname__}"
    if where not in names:
        raise SpecError(f"{where} is not registered. Add it to the entry-point group tersekv.codecs.")
    default = replace(cls(), **cls.side_defaults.get(side, {}))
    values = {f.name: getattr(codec, f.name) for f in fields(codec)}
    said = [f"{name}={option_text(x)}" for name, x in values.items() if x != getattr(default, name) or name == "bits"]
    return ":".join([names[where], *([",".join(said)] if said else [])])


def convert(name: str, text: str, kind: type) -> Any:
    """An option's text as its type: whole number, yes/no, or word."""
    if kind is bool and text in ("yes", "no"):
        return text == "yes"
    if kind is int and fullmatch(r"-?[0-9]+", text):
        return int(text)
    if kind is str and text:
        return text
    wanted = {int: "a whole number", bool: "yes or no", str: "a word"}[kind]
    raise SpecError(f'{name}="{text}": {wanted} is needed.')


def option_text(value: Any) -> str:
    """Inverse of `convert`."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
