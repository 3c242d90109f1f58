"""lm-eval's model interface over our caches. Tested with lm-eval 0.4.13. Needs the extra `eval`."""

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from tersekv.hf import attached, cache
from tersekv.models import LoadedModel
from tersekv.spec import Spec

# lm-eval's decorators hide from a type checker what the class has.
Base: Any = HFLM


class PackedLM(Base):
    """lm-eval's own transformers model, but every forward pass reads a fresh cache of `spec`; None: the dense one.

    Batches are padded at their right for scores, where nobody sees the padding, and at their left for generation.
    """

    def __init__(self, loaded: LoadedModel, spec: Spec | None, batch: int) -> None:
        self.spec = spec
        super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if self.spec is None:
            return super()._model_call(inps, attn_mask, labels)
        model: Any = self.model
        with torch.no_grad(), attached(model):
            return model(inps, past_key_values=cache(model, self.spec)).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **more: Any) -> Tensor:
        if self.spec is None:
            return super()._model_generate(context, max_length, stop, **more)
        model: Any = self.model
        with attached(model):
            return super()._model_generate(context, max_length, stop, past_key_values=cache(model, self.spec), **more)
