"""What people see: byte counts as text, tables as plain text, and a progress bar with named stages."""

import json
from contextlib import AbstractContextManager
from io import StringIO
from types import TracebackType
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON instead of tables.")]
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def bytes_text(count: float | int) -> str:
    """Binary units with three digits: 1.44 MiB."""
    power = 0
    while count >= 1000 and power < len(UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.3g} {UNITS[power]}"


def to_text(renderable: RenderableType, width: int = 100) -> str:
    console = Console(file=StringIO(), width=width)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get().rstrip()


def show(result: Any, as_json: bool) -> None:
    """The result of a verb, on standard output."""
    if as_json:
        print(json.dumps(result.as_dict(), indent=1))
    else:
        Console().print(result)


class Stages(AbstractContextManager["Stages"]):
    """One progress line on standard error; call it with the stage's name and its share, None for unknown."""

    def __init__(self) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.progress.add_task("starting", total=None)

    def __enter__(self) -> "Stages":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def __call__(self, stage: str, share: float | None = None) -> None:
        self.progress.update(self.task, description=stage, completed=share or 0, total=None if share is None else 1)
