"""Depth `needle`: a sentence with a number, hidden in a text at some depth, and asked for at its end.

Asked as the sentence itself, so that a small model without instructions answers too: it must find where it has read
these words and go on as it went on there. A hit is a number whose every token is the most likely one.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
from torch import Tensor

from tersekv.errors import InputError
from tersekv.eval.logits import arms, forward
from tersekv.eval.statistics import mean_and_interval
from tersekv.eval.subject import Depth, Progress, Subject, Values

NAMES = ("Quito", "Oslo", "Hanoi", "Lima", "Accra", "Doha", "Turin", "Perth", "Cusco", "Bergen", "Osaka", "Tunis")
SENTENCE = " The secret number of {name} is"


@dataclass(frozen=True)
class Needle(Depth):
    """`repeats` needles for each length in tokens and depth in percent (0: at the start of the text)."""

    lengths: list[int] = field(default_factory=lambda: [1024, 2048])
    depths: list[int] = field(default_factory=lambda: [0, 25, 50, 75, 100])
    repeats: int = 4
    chunk: int = 512

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 128 or not all(0 <= depth <= 100 for depth in self.depths):
            raise InputError(
                f"[needle] lengths = {self.lengths}, depths = {self.depths}. Allowed: lengths of 128 tokens and more, "
                "depths from 0 to 100 percent."
            )

    def items(self, subject: Subject) -> list[str]:
        grid = ((length, depth) for length in self.lengths for depth in self.depths)
        return [f"{length}/{depth}/{number}" for length, depth in grid for number in range(self.repeats)]

    def measure(self, subject: Subject, items: list[str], progress: Progress) -> dict[str, dict[str, Values]]:
        ids, answer = haystack(subject, items[0])
        rows = {}
        chosen = arms(subject.model, subject.packed)
        for number, (spec, arm) in enumerate(zip(subject.specs, chosen, strict=True)):
            logits = torch.cat(
                [forward(subject.model, part, arm)[-answer:] for part in ids[:, :-1].split(self.chunk, 1)]
            )
            rows[spec] = _asked(logits[-answer:], ids[0, -answer:]) | {"tokens": arm.cache.get_seq_length()}
            progress((number + 1) / len(chosen))
        return {items[0]: rows}

    def summary(self, samples: dict[str, Values], dense: dict[str, Values], seed: int) -> Values:
        """Share of hits, its paired difference from the dense cache, and hits by length and depth."""
        cells: dict[str, list[int]] = defaultdict(list)
        for item, values in samples.items():
            cells[item.rpartition("/")[0]].append(values["hit"])
        lost = [values["hit"] - dense[item]["hit"] for item, values in samples.items()]
        score = [values["log_probability"] - dense[item]["log_probability"] for item, values in samples.items()]
        return {
            "items": len(samples),
            "hits": float(np.mean([values["hit"] for values in samples.values()])),
            "hit_by_item": [values["hit"] for values in samples.values()],
            **mean_and_interval("difference", lost, seed),
            **mean_and_interval("log_probability_difference", score, seed),
            "cells": {cell: float(np.mean(hits)) for cell, hits in cells.items()},
        }


def haystack(subject: Subject, item: str) -> tuple[Tensor, int]:
    """Tokens (1, t) of text, needle and question with the answer at the end, and how many tokens the answer has."""
    length, depth = map(int, item.split("/")[:2])
    draw = Random(f"{subject.seed}/{item}")
    sentence, secret = SENTENCE.format(name=draw.choice(NAMES)), f" {draw.randrange(10_000, 100_000)}"

    def tokens(text: str) -> Tensor:
        return torch.tensor(subject.loaded.tokenizer(text, add_special_tokens=False).input_ids)

    question, answer, needle = tokens(sentence), tokens(secret), tokens(f"{sentence}{secret}.")
    room = length - len(subject.opening) - len(needle) - len(question) - len(answer)
    if len(subject.tokens) < room:
        raise InputError(f"A haystack of {length:,} tokens needs a longer text than {subject.text_name}.")
    start = draw.randrange(len(subject.tokens) - room + 1)
    text = subject.tokens[start : start + room]
    cut = room * depth // 100
    parts = (subject.opening, text[:cut], needle, text[cut:], question, answer)
    return torch.cat(parts)[None].to(subject.model.device), len(answer)


def _asked(logits: Tensor, answer: Tensor) -> Values:
    log_probability = logits.float().log_softmax(-1).gather(-1, answer[:, None]).sum().item()
    return {"hit": int((logits.argmax(-1) == answer).all()), "log_probability": log_probability}
