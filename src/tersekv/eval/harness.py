"""lm-eval's model interface over our caches. Tested with lm-eval 0.4.13. Needs the extra `eval`."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Float
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache

from tersekv.eval.logits import read
from tersekv.hf import PackedCache, attached, cache
from tersekv.models import LoadedModel
from tersekv.spec import Spec

# lm-eval's decorators hide from a type checker what the class has.
Base: Any = HFLM
Request = tuple[Any, list[int], list[int]]  # text, tokens of the context, tokens of the continuation


class PackedLM(Base):
    """lm-eval's own transformers model, but every forward pass reads a cache of `spec`; None: the dense one.

    Batches are padded at their right for scores, where nobody sees the padding, and at their left for generation.
    """

    def __init__(self, loaded: LoadedModel, spec: Spec | None, batch: int) -> None:
        self.spec = spec
        super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch)

    def _loglikelihood_tokens(self, requests: Sequence[Request], **more: Any) -> list[tuple[float, bool]]:
        """A context is read once for all its continuations, and what all contexts begin with once for all of them."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, _) in enumerate(requests):
            by_context.setdefault(tuple(context), []).append(number)
        fits = all(len(context) + len(answer) <= self.max_length + 1 for _, context, answer in requests)
        if not fits or len(by_context) == len(requests):
            return super()._loglikelihood_tokens(requests, **more)  # it cuts long ones, and has batches of contexts
        shared = min(_common(by_context), min(map(len, by_context)) - 1)
        begun = self._fresh()
        if shared:
            self._read(requests[0][1][:shared], begun)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for context, numbers in by_context.items():
            answers = [requests[number][2] for number in numbers]
            for number, score in zip(numbers, self._scores(_copy(begun), context[shared:], answers), strict=True):
                found[number] = score
        return found

    def _scores(self, own: Cache, context: Sequence[int], answers: list[list[int]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each answer behind the context, and whether greedy search would give it."""
        first = self._read(context, own)[:, -1:].expand(len(answers), -1, -1)
        padded = pad_sequence([torch.tensor(answer) for answer in answers], batch_first=True).to(self.device)
        logits = first
        if padded.shape[1] > 1:
            own.batch_repeat_interleave(len(answers))
            logits = torch.cat((first, read(self.model, padded[:, :-1], own)), 1)
        chosen = logits.float().log_softmax(-1).gather(-1, padded[..., None])[..., 0]
        greedy = logits.argmax(-1) == padded
        lengths = map(len, answers)
        return [(chosen[row, :n].sum().item(), bool(greedy[row, :n].all())) for row, n in enumerate(lengths)]

    def _read(self, tokens: Sequence[int], into: Cache) -> Float[Tensor, "1 n vocab"]:
        return read(self.model, torch.tensor([tokens], device=self.device), into, keep=1)

    def _fresh(self) -> Cache:
        model: Any = self.model
        return cache(model, self.spec) if self.spec else DynamicCache(config=model.config.get_text_config(decoder=True))

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if self.spec is None:
            return super()._model_call(inps, attn_mask, labels)
        return read(self.model, inps, self._fresh())

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **more: Any) -> Tensor:
        if self.spec is None:
            return super()._model_generate(context, max_length, stop, **more)
        model: Any = self.model
        with attached(model):
            return super()._model_generate(context, max_length, stop, past_key_values=cache(model, self.spec), **more)


def _common(contexts: Iterable[tuple[int, ...]]) -> int:
    """How many tokens all of them begin with: as many as the first and the last in order do."""
    ends = min(contexts), max(contexts)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False)))


def _copy(begun: Cache) -> Cache:
    return begun.copy() if isinstance(begun, PackedCache) else deepcopy(begun)
