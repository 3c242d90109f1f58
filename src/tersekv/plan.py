"""`tersekv plan`: how many tokens, or users, of each cache fit into a memory, from a model's configuration alone."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Column, Table

from tersekv.errors import InputError
from tersekv.record import ROOT, headline
from tersekv.registry import PRESETS
from tersekv.spec import Spec, parse
from tersekv.terminal import UNITS, bytes_text

MEMORY = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B", re.IGNORECASE)
# Presets measured on several models, a record each: those of a checkout, or those that came with the package.
RECORDS = (ROOT / "results" / "models", Path(__file__).parent / "_results" / "models")

MOST = 2**40  # tokens; a cache that keeps a fixed number of them never fills its memory


def memory_bytes(text: str) -> int:
    """Bytes of "80GB" (decimal) or "80GiB" (binary). Raises InputError for anything else."""
    found = MEMORY.fullmatch(text.strip())
    if not found:
        raise InputError(f'--memory "{text}" is no amount of memory. Give a number and a unit, such as 80GB or 24GiB.')
    number, prefix, binary = found.groups()
    power = [unit[0] for unit in UNITS].index((prefix or "B").upper())
    return int(float(number) * (1024 if binary else 1000) ** power)


@dataclass(frozen=True)
class Room:
    """What one cache can hold: tokens of a single user, users at the context, and each one's tokens if they share."""

    spec: str
    user_bytes: int  # at the context
    one_user_tokens: int
    users: int
    shared_tokens: int
    kl: dict[str, float]  # by the model it was measured on


@dataclass(frozen=True)
class Plan:
    model: str
    memory: int
    reserve: float
    weights: int
    weight_bits: float
    context: int
    users: int
    limit: int | None
    rooms: list[Room]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Group:
        free = int(self.memory * (1 - self.reserve)) - self.weights
        head = (
            f"{self.model} in {bytes_text(self.memory)}: {bytes_text(self.weights)} of weights at {self.weight_bits:g} "
            f"bits, {100 * self.reserve:.0f} % kept free, {bytes_text(max(free, 0))} for the cache."
        )
        if self.limit:
            head += f" The model takes {self.limit:,} tokens; more fit where a number is larger."
        records = sorted({name for room in self.rooms for name in room.kl})
        heads = (f"a user of {self.context:,}", "one user", "users", f"tokens of {self.users:,} users")
        columns = [Column(text, justify="right") for text in (*heads, *(f"KL {name}" for name in records))]
        table = Table("cache", *columns)
        for room in self.rooms:
            kl = (f"{room.kl[name]:.4f}" if name in room.kl else "-" for name in records)
            numbers = (f"{x:,}" for x in (room.one_user_tokens, room.users, room.shared_tokens))
            table.add_row(room.spec, bytes_text(room.user_bytes), *numbers, *kl)
        return Group(head, table, f"one user: tokens that fit; users: how many with {self.context:,} tokens each.")


def plan(
    name: str, memory: str, context: int | None, users: int, weight_bits: float, reserve: float, progress: Any = None
) -> Plan:
    """Raises InputError for options out of range, or if the weights alone do not fit; ModelError for the model."""
    from tersekv.hf.cost import checked_context, context_limit, sequence_bytes, weight_count
    from tersekv.models import config

    total = memory_bytes(memory)
    if users < 1 or not 0 <= reserve < 1 or not 0 < weight_bits <= 32:
        raise InputError(
            f"--users {users}, --reserve {reserve:g}, --weight-bits {weight_bits:g}. Allowed: at least 1 user, a "
            "reserve from 0 to below 1, and 1 to 32 bits."
        )
    whole = config(name, progress)
    limit, weights = context_limit(whole), round(weight_count(whole) * weight_bits / 8)
    tokens = checked_context(whole, context)
    free = int(total * (1 - reserve)) - weights
    if free <= 0:
        raise InputError(
            f"{name} needs {bytes_text(weights)} for its weights at {weight_bits:g} bits, but {memory} with "
            f"{100 * reserve:.0f} % kept free is {bytes_text(total * (1 - reserve))}. Give more memory or fewer bits."
        )
    measured = _measured()
    rooms = [
        _room(text, lambda count, spec: sequence_bytes(whole, spec, count), tokens, free, users, measured)
        for text in ("none", *PRESETS)
    ]
    return Plan(name, total, reserve, weights, weight_bits, tokens, users, limit, rooms)


def _room(
    text: str,
    cost: Callable[[int, Spec], int],
    tokens: int,
    free: int,
    users: int,
    measured: dict[str, dict[str, float]],
) -> Room:
    spec = parse(text)
    one = cost(tokens, spec)
    alone, shared = (largest(lambda count: cost(count, spec), free // sharing) for sharing in (1, users))
    label = "none (16 bits)" if text == "none" else text
    return Room(label, one, alone, free // one, shared, measured.get(str(spec), {}))


def largest(needs: Callable[[int], int], free: int) -> int:
    """The largest number of tokens that need at most `free` bytes, up to `MOST`: a policy may keep a fixed number."""
    low, high = 0, 1
    while high <= MOST and needs(high) <= free:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needs(middle) <= free else (low, middle)
    return low


def _measured() -> dict[str, dict[str, float]]:
    """KL to the dense cache by spec and model, from the records of quality at hand."""
    found: dict[str, dict[str, float]] = {}
    folders = [folder for folder in RECORDS if folder.is_dir()]
    for path in sorted(path for folder in folders[:1] for path in folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        for row in record["rows"]:
            if logits := headline(row):
                found.setdefault(row["spec"], {})[path.stem] = logits["kl_mean"]
    return found
