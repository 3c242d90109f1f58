"""A quality run: a run file in, a run directory with every sample, and at the end one record made from it alone."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any

from tersekv.describe import Info
from tersekv.errors import InputError
from tersekv.eval.runfile import RunFile
from tersekv.eval.samples import RunDirectory
from tersekv.eval.subject import DENSE, Subject
from tersekv.hf.cost import head_dim
from tersekv.models import load
from tersekv.record import installed, provenance
from tersekv.spec import Spec, parse
from tersekv.terminal import Stages


def run(settings: RunFile, folder: Path, stages: Stages) -> dict[str, dict[str, Any]]:
    """Measure every model of the run; records by model. Each has a directory of its own in `folder`."""
    return {model: _one_model(settings, model, folder / Path(model).name, stages) for model in settings.models}


def _one_model(settings: RunFile, model: str, folder: Path, stages: Stages) -> dict[str, Any]:
    subject = _subject(settings, model, stages)
    items = {name: depth.items(subject) for name, depth in settings.depths.items()}
    directory = RunDirectory.open(folder, _manifest(settings, subject))
    for name, depth in settings.depths.items():
        missing = [item for item in items[name] if not directory.holds(name, item, subject.specs)]
        done = len(items[name]) - len(missing)
        for batch in (missing[start : start + depth.batch] for start in range(0, len(missing), depth.batch)):

            def progress(share: float, done: int = done, size: int = len(batch), name: str = name) -> None:
                total = len(items[name])
                stages(f"{model}: {name}, {done:,} of {total:,}", (done + share * size) / total)

            progress(0.0)
            for item, by_spec in depth.measure(subject, batch, progress).items():
                directory.add(name, item, by_spec)
            done += len(batch)
    return make_record(directory, settings, items, _bits(subject))


def make_record(
    directory: RunDirectory, settings: RunFile, items: dict[str, list[str]], bits: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """From the manifest and the samples alone: a run that was killed and went on gives the same record."""

    def samples(depth: str, spec: str) -> dict[str, Any]:
        return {item: directory.samples[depth, item, spec] for item in items[depth]}

    rows = [
        {"spec": spec.removesuffix(" prefill=packed")}
        | about
        | {
            name: depth.summary(samples(name, spec), samples(name, DENSE), settings.seed)
            for name, depth in settings.depths.items()
        }
        for spec, about in bits.items()
    ]
    reference = {"reference": settings.reference} if settings.reference else {}
    return directory.manifest | reference | {"rows": rows}


def _subject(settings: RunFile, model: str, stages: Stages) -> Subject:
    packed = [replace(parse(text), prefill="packed") for text in settings.specs]
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


def _bits(subject: Subject) -> dict[str, dict[str, Any]]:
    """Of packed tokens alone: nominal bits a value, bits with all scales, zeros, means and padding; what reads them."""
    d = head_dim(subject.model.config.get_text_config(decoder=True))
    return {text: _body(spec, d) for text, spec in subject.specs.items()}


def _body(spec: Spec | None, d: int) -> dict[str, Any]:
    if spec is None:
        return {"nominal_bits": 16.0, "body_bits": 16.0}
    infos = [Info(spec.at(index), d) for index in range(len(spec.layers) or 1)]
    layouts, info = [layout for one in infos for layout in one.layouts.values()], infos[0]
    nominal, body = (fmean(getattr(x, name) for x in layouts) for name in ("nominal_bits", "bits_per_value"))
    recipes = " / ".join(dict.fromkeys(recipe.name for _, recipe in info.sides.values()))
    facts: dict[str, Any] = {"nominal_bits": nominal, "body_bits": body, "recipe": recipes, "attention": info.attention}
    fits = {x.digest.split()[0]: x.seconds for x in (info.spec.k.fitted, info.spec.v.fitted) if x and x.seconds}
    return facts | ({"calibration_seconds": sum(fits.values())} if fits else {})


def _manifest(settings: RunFile, subject: Subject) -> dict[str, Any]:
    specs = "\n".join(subject.specs)
    text = {"name": subject.text_name, "sha256": sha256(subject.text.encode()).hexdigest()}
    data = {"text": text} if subject.text else {}
    for depth in settings.depths.values():
        data |= depth.data(subject)
    made = provenance(settings.device)
    if "tasks" in settings.depths:
        made["versions"] |= {"lm-eval": installed("lm-eval")}
    return {
        "run": {"model": subject.loaded.name} | {k: v for k, v in settings.settings().items() if k != "models"},
        "specs_sha256": sha256(specs.encode()).hexdigest(),
        "model": {"source": subject.loaded.source, "revision": subject.loaded.revision},
        "data": data,
    } | made
