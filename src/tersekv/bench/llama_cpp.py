"""A whole model in llama.cpp, for `tersekv bench decode`: the file its weights are in, and kinds of its cache."""

import ctypes
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tersekv.bench.ggml import INSTALL, KINDS
from tersekv.errors import ModelError
from tersekv.models.carriers import CARRIERS, fetch
from tersekv.models.hub import Progress

BATCH = 512  # tokens that llama.cpp reads at a time, its default
MOSTLY_F16 = 1  # llama_ftype


class Kind(NamedTuple):
    """A cache of llama.cpp's: its type, whether attention is fused, and whether weights are widened to fp16."""

    cache: str
    flash: bool = True
    wide: bool = False

    @property
    def name(self) -> str:
        flash = "" if self.flash else " without flash attention"
        return f"llama.cpp {self.cache}{flash}{', weights in f16' if self.wide else ''}"


ALL = [*(Kind(name) for name in KINDS), Kind("f16", flash=False), Kind("f16", wide=True), Kind("f16", False, True)]


def weights(name: str, wanted: bool, held: ExitStack, report: Progress) -> tuple[dict[bool, Path], str]:
    """The file that the weights in transformers came from, and one with the same in fp16 instead of 4 bits, as wide as
    transformers has them; or none, and why."""
    why = "Left out by --no-llama-cpp." if not wanted else "" if find_spec("llama_cpp") else INSTALL
    if not why and Path(name).suffix != ".gguf" and name not in CARRIERS:
        why = f"Only {', '.join(CARRIERS)} or a GGUF file is at hand as a GGUF file, not {name}."
    if why:
        return {}, why
    folder = Path(held.enter_context(TemporaryDirectory()))
    path = fetch(CARRIERS[name], folder, report) if name in CARRIERS else Path(name)
    return {False: path, True: _widened(path, folder / "f16.gguf")}, ""


def _widened(path: Path, to: Path) -> Path:
    library: Any = import_module("llama_cpp")
    how = library.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize = MOSTLY_F16, True
    if library.llama_model_quantize(str(path).encode(), str(to).encode(), ctypes.byref(how)):
        raise ModelError(f"llama.cpp could not write the weights of {path.name} in fp16. Is there room in {to.parent}?")
    return to


def reader(path: Path, kind: Kind, context: int, threads: int, opened: ExitStack) -> Callable[[Tensor], Tensor]:
    """Takes tokens into an empty cache, and returns the logits (vocab) of the next one."""
    llama: Any = import_module("llama_cpp").Llama(
        str(path), n_ctx=context, n_batch=BATCH, n_threads=threads, n_threads_batch=threads, type_k=KINDS[kind.cache],
        type_v=KINDS[kind.cache], flash_attn=kind.flash, verbose=False,
    )  # fmt: skip
    opened.callback(llama.close)

    def read(tokens: Tensor) -> Tensor:
        llama.eval(tokens.tolist())
        if not (logits := llama._ctx.get_logits()):
            raise ModelError(f"{kind.name} gave no logits.")
        return torch.from_numpy(np.ctypeslib.as_array(logits, (llama.n_vocab(),)).copy())

    return read
