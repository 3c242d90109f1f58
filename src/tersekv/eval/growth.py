"""Depth `growth`: whether errors grow along a text that the model itself generated, far from any prompt.

The dense cache generates greedily; every cache is then shown that text. Up to the first position where another token
is the most likely one, this is what the cache would have generated itself: `same_tokens` counts them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tersekv.eval.logits import arms, compare
from tersekv.eval.statistics import digits, mean_and_interval
from tersekv.eval.subject import Depth, Progress, Subject, Values
from tersekv.eval.windows import PARTS, divergence_values


@dataclass(frozen=True)
class Growth(Depth):
    """`prompts` windows of `prompt_tokens` tokens, each continued by `new_tokens`."""

    prompts: int = 4
    prompt_tokens: int = 256
    new_tokens: int = 256
    chunk: int = 512

    def items(self, subject: Subject) -> list[str]:
        return subject.windows(self.prompt_tokens, self.prompts)

    def measure(self, subject: Subject, items: list[str], progress: Progress) -> dict[str, dict[str, Values]]:
        prompt = subject.window(items[0])
        # A model that stops early would leave nothing to measure.
        lengths = {"min_new_tokens": self.new_tokens, "max_new_tokens": self.new_tokens}
        mask = torch.ones_like(prompt)
        model: Any = subject.model  # its generate is untyped
        with torch.inference_mode():
            text = model.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)
        progress(0.5)
        chosen = arms(subject.model, subject.packed)
        first = prompt.shape[1] - 1  # its logits choose the first generated token
        compare(subject.model, text, chosen, self.chunk, first, lambda share: progress(0.5 + share / 2))
        rows = {}
        for spec, arm in zip(subject.specs, chosen, strict=True):
            agree = torch.cat(arm.divergence.agree)
            same = int(agree.cumprod(0).sum())
            rows[spec] = divergence_values(arm) | {"same_tokens": same}
        return {items[0]: rows}

    def summary(self, samples: dict[str, Values], dense: dict[str, Values], seed: int) -> Values:
        mine = list(samples.values())
        parts = zip(*(np.array_split(x["kl"], PARTS) for x in mine), strict=True)
        return {
            "texts": len(mine),
            "new_tokens": self.new_tokens,
            **mean_and_interval("kl_mean", [float(np.mean(x["kl"])) for x in mine], seed),
            **mean_and_interval("same_tokens", [x["same_tokens"] for x in mine], seed),
            "top1": float(np.mean([x["top1"] for x in mine])),
            "kl_by_text": [digits(float(np.mean(x["kl"]))) for x in mine],
            "kl_by_part": [digits(float(np.mean(np.concatenate(part)))) for part in parts],
        }
