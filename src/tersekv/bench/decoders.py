"""Who takes part in `tersekv bench decode`: one model with one cache each, in transformers or in llama.cpp."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache
from transformers.utils.import_utils import is_optimum_quanto_available

import tersekv
from tersekv.bench.ggml import INSTALL, KINDS
from tersekv.errors import ModelError
from tersekv.hf.cost import head_dim
from tersekv.models import load
from tersekv.models.carriers import CARRIERS, fetch
from tersekv.models.hub import Progress

NO_QUANTO = 'optimum-quanto is not installed: pip install "tersekv[peers]".'
PLAIN = "f16 without flash attention"
BATCH = 512  # tokens that llama.cpp reads at a time, its default


@dataclass(frozen=True)
class Decoder:
    """`read` takes tokens into the cache and returns the logits (vocab) of the next one."""

    name: str
    kind: str  # ours, transformers or llama.cpp
    read: Callable[[Tensor], Tensor]


class Decoders:
    """Models are loaded once; every context makes its caches anew."""

    def __init__(
        self, name: str, dtypes: list[str], specs: list[str], threads: int, llama_cpp: bool, report: Progress
    ) -> None:
        self.specs, self.threads, self.resources = specs, threads, ExitStack()
        loaded = [load(name, dtype, report) for dtype in dtypes]
        self.source, self.tokenizer = loaded[0].source, loaded[0].tokenizer
        self.dense = {dtype: one.model for dtype, one in zip(dtypes, loaded, strict=True)}
        # A second copy of the first: a model is attached or not, and attaching it for every token would be timed.
        self.packed, self.dtype = load(name, dtypes[0], report).model, dtypes[0]
        self.resources.enter_context(tersekv.attached(self.packed))
        self.absent: dict[str, str] = {} if is_optimum_quanto_available() else {"quanto 4 bits": NO_QUANTO}
        self.gguf = self._gguf(name, llama_cpp, report)

    def _gguf(self, name: str, wanted: bool, report: Progress) -> Path | None:
        """The file that the weights in transformers came from, so that llama.cpp computes with the same."""
        why = "Left out by --no-llama-cpp." if not wanted else None if find_spec("llama_cpp") else INSTALL
        if Path(name).suffix == ".gguf":
            path = Path(name)
        elif name in CARRIERS and not why:
            path = fetch(CARRIERS[name], Path(self.resources.enter_context(TemporaryDirectory())), report)
        else:
            path, why = None, why or f"Only {', '.join(CARRIERS)} or a GGUF file is at hand as a GGUF file, not {name}."
        self.absent |= {f"llama.cpp {kind}": why for kind in (*KINDS, PLAIN) if why}
        return None if why else path

    @contextmanager
    def at(self, context: int) -> Iterator[list[Decoder]]:
        """Everyone, with an empty cache."""
        found = [
            _in_transformers(f"dense {dtype}", model, DynamicCache(config=model.config))
            for dtype, model in self.dense.items()
        ]
        if "quanto 4 bits" not in self.absent:
            model = self.dense[self.dtype]
            try:
                found.append(_in_transformers("quanto 4 bits", model, _quanto(model.config)))
            except ValueError as error:  # it takes no sliding windows
                self.absent["quanto 4 bits"] = str(error)
        for spec in self.specs:
            found.append(_in_transformers(spec, self.packed, tersekv.cache(self.packed, spec), "ours"))
        with ExitStack() as opened:
            if self.gguf:
                for kind in KINDS:
                    found.append(_in_llama_cpp(self.gguf, kind, True, context, self.threads, opened))
                found.append(_in_llama_cpp(self.gguf, "f16", False, context, self.threads, opened))
            yield found

    def close(self) -> None:
        self.resources.close()


def _quanto(config: Any) -> Cache:
    """Its groups must divide the values of any number of tokens: 64, its default, or what divides one token's."""
    token = head_dim(config) * (config.num_key_value_heads or config.num_attention_heads)
    return QuantizedCache("quanto", config, nbits=4, q_group_size=gcd(64, token))


def _in_transformers(name: str, model: Any, cache: Cache, kind: str = "transformers") -> Decoder:
    def read(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens[None], past_key_values=cache, logits_to_keep=1).logits[0, -1]

    return Decoder(name, kind, read)


def _in_llama_cpp(path: Path, kind: str, flash: bool, context: int, threads: int, opened: ExitStack) -> Decoder:
    llama: Any = import_module("llama_cpp").Llama(
        str(path), n_ctx=context, n_batch=BATCH, n_threads=threads, n_threads_batch=threads, type_k=KINDS[kind],
        type_v=KINDS[kind], flash_attn=flash, verbose=False,
    )  # fmt: skip
    opened.callback(llama.close)
    name = f"llama.cpp {kind if flash else PLAIN}"

    def read(tokens: Tensor) -> Tensor:
        llama.eval(tokens.tolist())
        if not (logits := llama._ctx.get_logits()):
            raise ModelError(f"{name} gave no logits.")
        return torch.from_numpy(np.ctypeslib.as_array(logits, (llama.n_vocab(),)).copy())

    return Decoder(name, "llama.cpp", read)
