"""What all depths of a run share: the model, the caches, the text in windows, the seed."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from tersekv.errors import InputError
from tersekv.models import LoadedModel
from tersekv.spec import Spec

DENSE = "dense"
Progress = Callable[[float], None]
Values = dict[str, Any]


@dataclass
class Subject:
    """`specs` by their canonical text, all with prefill=packed, "dense" (None) first."""

    loaded: LoadedModel
    specs: dict[str, Spec | None]
    seed: int
    text: str = ""
    text_name: str = ""
    data: Path | None = None

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model

    @property
    def packed(self) -> list[Spec]:
        return [spec for spec in self.specs.values() if spec is not None]

    @cached_property
    def tokens(self) -> Int[Tensor, "t"]:
        """The text without the tokens that a tokenizer puts around every text."""
        if not self.text:
            raise InputError("This run needs a text. Give a UTF-8 file with --text FILE, such as WikiText-2's test.")
        return torch.tensor(self.loaded.tokenizer(self.text, add_special_tokens=False).input_ids)

    @cached_property
    def opening(self) -> Int[Tensor, "t"]:
        """The tokens that the tokenizer puts before every text: <bos> for some models, nothing for others."""
        return torch.tensor(self.loaded.tokenizer("").input_ids, dtype=torch.int64)

    def windows(self, length: int, count: int) -> list[str]:
        """Names of `count` windows of the text, drawn without replacement; InputError if there are not enough."""
        there = len(self.tokens) // (length - len(self.opening))
        if not 0 < count <= there:
            raise InputError(
                f"{count} windows of {length:,} tokens are asked for, {self.text_name} has {there}. Ask for at least "
                "1 and at most as many, or give a longer text."
            )
        return [f"{length}/{number}" for number in sorted(Random(self.seed).sample(range(there), count))]

    def window(self, name: str) -> Int[Tensor, "1 t"]:
        """Tokens of a window, opened as the tokenizer opens every text."""
        length, number = map(int, name.split("/"))
        own = length - len(self.opening)
        part = self.tokens[number * own : (number + 1) * own]
        return torch.cat((self.opening, part))[None].to(self.model.device)


class Depth(ABC):
    """One kind of measurement. Its fields are its section of the run file."""

    batch: int = 1  # how many items `measure` takes at once

    @abstractmethod
    def items(self, subject: Subject) -> list[str]:
        """Names of all samples, in the order of the record."""

    @abstractmethod
    def measure(self, subject: Subject, items: list[str], progress: Progress) -> dict[str, dict[str, Values]]:
        """Values by item and spec, for every spec of the subject."""

    @abstractmethod
    def summary(self, samples: dict[str, Values], dense: dict[str, Values], seed: int) -> Values:
        """A row's section of the record, from one spec's samples and the dense cache's, by item, in order."""

    def data(self, subject: Subject) -> dict[str, Values]:
        """What it reads beside the run's text, by name, with hashes; for the manifest."""
        return {}
