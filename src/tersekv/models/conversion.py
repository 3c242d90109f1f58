"""A GGUF file becomes safetensors once, in the user's cache folder: loading from there is much faster."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from platformdirs import user_cache_path

from tersekv.errors import ModelError
from tersekv.models.hub import Progress

RECORD = "source.json"


def converted_folder(stem: str, digest: str) -> Path:
    """Where the converted copy is or will be; the hash keeps two files of one name apart."""
    chosen = os.environ.get("TERSEKV_CACHE")
    cache = Path(chosen).expanduser() if chosen else user_cache_path("tersekv")
    return cache / "models" / f"{stem}-{digest[:12]}"


def is_converted(folder: Path) -> bool:
    return (folder / RECORD).is_file()


def convert_once(target: Path, source: str, digest: str, gguf_file: Callable[[Path], Path], report: Progress) -> Path:
    """`gguf_file` gets a work folder, deleted afterwards, and says where the GGUF file is."""
    if is_converted(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # On the target's own disk, so that the last step is a rename: a folder of that name is complete.
        with TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
            finished = Path(work) / "finished"
            gguf = gguf_file(Path(work))
            report("converting to safetensors, once", None)
            _convert(gguf, finished)
            _write_record(finished, source, digest)
            _publish(finished, target)
    except OSError as error:
        raise ModelError(
            f"{target} could not be written ({error}). Free some space there, or set TERSEKV_CACHE to another folder."
        ) from error
    return target


def _convert(gguf: Path, target: Path) -> None:
    command = [sys.executable, "-m", "tersekv.models.gguf_to_safetensors", str(gguf), str(target)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise ModelError(
            f"Converting {gguf.name} was stopped by signal {-done.returncode}, mostly for lack of memory: "
            "it takes some six times the size of the file. Choose a smaller model or a safetensors folder."
        )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:]
        raise ModelError(f"transformers cannot convert {gguf.name}: {' '.join(said)} Give a model in safetensors form.")


def _write_record(folder: Path, source: str, digest: str) -> None:
    versions = {name: version(name) for name in ("torch", "transformers", "gguf")}
    record = {"source": source, "sha256": digest, "versions": versions}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _publish(finished: Path, target: Path) -> None:
    try:
        finished.rename(target)
    except OSError:
        # Another process was faster, and its copy is as good as ours.
        if not is_converted(target):
            raise


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own bars and notices, which would break the caller's progress display."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
