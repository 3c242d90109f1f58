"""Who takes part in `tersekv bench decode`: one model with one cache each, in transformers or in llama.cpp."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import gcd
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache
from transformers.utils.import_utils import is_optimum_quanto_available

import tersekv
from tersekv.bench import llama_cpp as llama
from tersekv.hf.cost import head_dim
from tersekv.models import load
from tersekv.models.hub import Progress

NO_QUANTO = 'optimum-quanto is not installed: pip install "tersekv[peers]".'


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
        self.gguf, why = llama.weights(name, llama_cpp, self.resources, report)
        self.absent |= {kind.name: why for kind in llama.ALL if why}

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
        # What of the gain is the cache's: our layers, and a dense cache.
        attached = DynamicCache(config=self.packed.config)
        found.append(_in_transformers(f"dense {self.dtype}, attached", self.packed, attached))
        for spec in self.specs:
            found.append(_in_transformers(spec, self.packed, tersekv.cache(self.packed, spec), "ours"))
        with ExitStack() as opened:
            for kind in llama.ALL if self.gguf else []:
                read = llama.reader(self.gguf[kind.wide], kind, context, self.threads, opened)
                found.append(Decoder(kind.name, "llama.cpp", read))
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
