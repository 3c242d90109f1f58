"""A quality run: a run file in, a run directory with every sample, and at the end one record made from it alone."""

from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedConfig

from tersekv.describe import Info
from tersekv.eval.jobs import check_jobs, measuring
from tersekv.eval.reading import read_subject
from tersekv.eval.runfile import RunFile
from tersekv.eval.samples import RunDirectory
from tersekv.eval.subject import DENSE, Subject
from tersekv.hf.cost import head_dim, packed_specs
from tersekv.ops import KERNELS, refusals
from tersekv.record import installed, provenance
from tersekv.spec import Spec
from tersekv.terminal import Stages


def run(settings: RunFile, folder: Path, stages: Stages, jobs: int = 1) -> dict[str, dict[str, Any]]:
    """Measure every model of the run with so many processes; records by model, each from a directory in `folder`."""
    check_jobs(settings, jobs)
    return {model: _one_model(settings, model, folder / Path(model).name, stages, jobs) for model in settings.models}


def _one_model(settings: RunFile, model: str, folder: Path, stages: Stages, jobs: int) -> dict[str, Any]:
    subject = read_subject(settings, model, stages)
    items = {name: depth.items(subject) for name, depth in settings.depths.items()}
    directory = RunDirectory.open(folder, _manifest(settings, subject))
    with measuring(settings, model, subject, jobs) as measure:
        for name, depth in settings.depths.items():
            missing = [item for item in items[name] if not directory.holds(name, item, subject.specs)]
            total, done = len(items[name]), len(items[name]) - len(missing)
            batches = [missing[start : start + depth.batch] for start in range(0, len(missing), depth.batch)]

            def progress(
                share: float, name: str = name, total: int = total, done: int = done, size: int = depth.batch
            ) -> None:
                reached = min(done + share * size, total)
                stages(f"{model}: {name}, {int(reached):,} of {total:,}", reached / total)

            for found in measure(name, batches, progress):
                for item, by_spec in found.items():
                    directory.add(name, item, by_spec)
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


def _bits(subject: Subject) -> dict[str, dict[str, Any]]:
    config = subject.model.config.get_text_config(decoder=True)
    return {text: bits_of(spec, config) for text, spec in subject.specs.items()}


def bits_of(spec: Spec | None, config: PreTrainedConfig) -> dict[str, Any]:
    """Of packed tokens: nominal bits, bits with all scales, zeros, means and padding, and whose kernels read them."""
    if spec is None:
        return {"nominal_bits": 16.0, "body_bits": 16.0}
    infos = [Info(one, head_dim(config)) for one in packed_specs(config, spec)]
    layouts, info = [layout for one in infos for layout in one.layouts.values()], infos[0]
    nominal, body = (fmean(getattr(x, name) for x in layouts) for name in ("nominal_bits", "bits_per_value"))
    recipes = " / ".join(dict.fromkeys(recipe.name for _, recipe in info.sides.values()))
    readers = [device for device in KERNELS if not any(refusals(one.sides, device) for one in infos)]
    readers = [] if spec.policy.evaluation_only else readers
    facts: dict[str, Any] = {"nominal_bits": nominal, "body_bits": body, "recipe": recipes, "kernels": readers}
    fits = {x.digest.split()[0]: x.seconds for x in (info.spec.k.fitted, info.spec.v.fitted) if x and x.seconds}
    fits |= {"policy": seconds} if (seconds := spec.policy.calibration_seconds) else {}
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
