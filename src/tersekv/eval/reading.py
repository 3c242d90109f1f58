"""What a run file names, read: the model, the caches, the text."""

from dataclasses import replace
from pathlib import Path

from tersekv.errors import InputError
from tersekv.eval.runfile import RunFile
from tersekv.eval.subject import DENSE, Subject
from tersekv.models import load
from tersekv.spec import Spec, parse
from tersekv.terminal import Stages


def read_subject(settings: RunFile, model: str, stages: Stages) -> Subject:
    """Raises InputError for specs named twice and a text that cannot be read, and what loading the model raises.

    {model} in a spec is the model's name: files that are fitted to each.
    """
    packed = [replace(parse(text.replace("{model}", Path(model).name)), prefill="packed") for text in settings.specs]
    specs: dict[str, Spec | None] = {DENSE: None} | {str(spec): spec for spec in packed}
    if len(specs) <= len(packed):
        raise InputError(f"Two of the specs {', '.join(settings.specs)} are the same. Name each once.")
    text = _read_text(settings.text) if settings.text else ""
    data = Path(settings.data) if settings.data else None
    loaded = load(model, settings.dtype, stages, settings.device)
    return Subject(loaded, specs, settings.seed, text, Path(settings.text or "").name, data)


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}. Give a UTF-8 file with --text FILE.") from error
