"""Who measures the items of a depth: this process, or several that each have the model and take batch after batch."""

from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from os import cpu_count
from typing import Any, Protocol

import torch

from tersekv.errors import InputError
from tersekv.eval.reading import read_subject
from tersekv.eval.runfile import RunFile
from tersekv.eval.subject import Progress, Subject, Values
from tersekv.terminal import Stages

Found = dict[str, dict[str, Values]]  # values by item and spec
ALONE = "speed"  # its numbers would be those of processes that wait for each other


class Measure(Protocol):
    def __call__(self, name: str, batches: list[list[str]], progress: Progress) -> Iterator[Found]:
        """Values of the depth's batches as they come; `progress` is told how many batches are done, in part too."""
        ...


def check_jobs(settings: RunFile, jobs: int) -> None:
    """Raises InputError for less than one process, and for more where speed is measured."""
    if jobs < 1 or (jobs > 1 and ALONE in settings.depths):
        raise InputError(f"--jobs {jobs}: one or more processes, and one alone where a run has a section [{ALONE}].")


@contextmanager
def measuring(settings: RunFile, model: str, subject: Subject, jobs: int) -> Iterator[Measure]:
    """Raises InputError where a process is killed."""
    if jobs == 1:
        yield _Here(settings, subject)
        return
    threads = max(1, (cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (settings, model, threads)) as pool:
        try:
            yield _Elsewhere(pool)
        except (BrokenProcessPool, torch.OutOfMemoryError) as error:
            pool.shutdown(wait=False, cancel_futures=True)
            gpu = isinstance(error, torch.OutOfMemoryError)
            what = "ran out of GPU memory" if gpu else "was killed, most likely because memory ran out"
            raise InputError(
                f"One of the {jobs} processes {what}. Samples measured so far are kept: run the command again with "
                "fewer --jobs, or fewer specs in the run file."
            ) from error
        except BaseException:  # a key pressed or an error: what waits is not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@dataclass(frozen=True)
class _Here:
    settings: RunFile
    subject: Subject

    def __call__(self, name: str, batches: list[list[str]], progress: Progress) -> Iterator[Found]:
        for done, batch in enumerate(batches):
            progress(float(done))
            yield self.settings.depths[name].measure(
                self.subject, batch, lambda share, done=done: progress(done + share)
            )


@dataclass(frozen=True)
class _Elsewhere:
    pool: Executor

    def __call__(self, name: str, batches: list[list[str]], progress: Progress) -> Iterator[Found]:
        progress(0.0)
        waiting = [self.pool.submit(_measured, name, batch) for batch in batches]
        for done, future in enumerate(as_completed(waiting), 1):
            yield future.result()
            progress(float(done))


# In such a process.

_given: tuple[RunFile, str, int]


def _begin(*given: Any) -> None:
    global _given
    _given = given


@cache
def _subject() -> Subject:
    """Read with the first batch, whose error it then is; an error in `_begin` would only be a broken pool."""
    settings, model, threads = _given
    torch.set_num_threads(threads)
    return read_subject(settings, model, Stages())  # which nobody started, so it shows nothing


def _measured(name: str, items: list[str]) -> Found:
    return _given[0].depths[name].measure(_subject(), items, lambda _: None)
