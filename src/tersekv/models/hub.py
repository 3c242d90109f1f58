"""Files of a model on the Hugging Face hub, without waiting long for a hub that cannot be reached."""

import io
from collections.abc import Callable
from pathlib import Path
from threading import Thread

from tersekv.errors import ModelError

Progress = Callable[[str, float | None], None]
CONFIG_ONLY = ("config.json",)
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
# Subfolders hold other formats (onnx, original); Mistral's consolidated files repeat the weights.
IGNORED = ("*/*", "consolidated*")
# Where names do not resolve, the hub library retries one file for 23 s; resolving has no timeout of its own.
PATIENCE_SECONDS = 4.0


def snapshot(repo: str, report: Progress, files: tuple[str, ...] = MODEL_FILES) -> Path:
    """A folder named by its commit: the newest or, when the hub is out of reach, the one kept."""
    report(f"asking the hub for {repo}", None)
    try:
        _reach(repo)
    except ModelError:
        kept = _kept_snapshot(repo, files)
        if kept is None:
            raise
        return kept
    return _download(repo, report, files)


def _reach(repo: str) -> None:
    answers: list[Exception | None] = []
    asking = Thread(target=lambda: answers.append(_ask(repo)), daemon=True)
    asking.start()
    asking.join(PATIENCE_SECONDS)
    if not answers:
        raise ModelError(_unreachable(repo, f"no answer within {PATIENCE_SECONDS:.0f} s"))
    if answers[0] is not None:
        raise ModelError(_explain(repo, answers[0])) from answers[0]


def _ask(repo: str) -> Exception | None:
    from huggingface_hub import HfApi

    # Any exception is an answer: its class depends on which HTTP library this version of the hub's uses.
    try:
        HfApi().model_info(repo, timeout=PATIENCE_SECONDS)
    except Exception as error:
        return error
    return None


def _kept_snapshot(repo: str, files: tuple[str, ...]) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, local_files_only=True, allow_patterns=list(files)))
    except (OSError, ValueError):
        return None
    # An earlier call may have fetched the configuration alone.
    wanted = "config.json" if files == CONFIG_ONLY else "*.safetensors"
    return folder if any(folder.glob(wanted)) else None


def _download(repo: str, report: Progress, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo,
            allow_patterns=list(files),
            ignore_patterns=list(IGNORED),
            tqdm_class=_reporting_bar(f"downloading {repo}", report),
        )
    except Exception as error:  # see _ask
        raise ModelError(_explain(repo, error)) from error
    return Path(folder)


def _reporting_bar(stage: str, report: Progress) -> type:
    """The hub library reports through a tqdm class only; this one draws nothing and passes the bytes on."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **{**options, "file": io.StringIO(), "disable": False})

        def display(self, *_, **__):
            if self.unit == "B" and self.total:
                report(stage, min(self.n / self.total, 1.0))

    return Bar


def _explain(repo: str, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return f'Hub model "{repo}" is gated: accept its licence on its page, then run "hf auth login".'
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return f'"{repo}" is no folder here and no model on the hub, or a private one: run "hf auth login".'
    first_line = str(error).strip().partition("\n")[0]
    return _unreachable(repo, f"{type(error).__name__}: {first_line}")


def _unreachable(repo: str, why: str) -> str:
    return (
        f'"{repo}" is no folder here, and the hub cannot be reached ({why.rstrip(": .")}). '
        "Give a local folder, a .gguf file or one of the short names, or try again with a network."
    )
