"""Depth `logits`: what the model says with each cache beside what it says with the dense one, in windows of a text."""

from dataclasses import dataclass, field
from math import exp
from typing import Any

import numpy as np

from tersekv.errors import InputError
from tersekv.eval.logits import Arm, arms, compare
from tersekv.eval.statistics import digits, mean_and_interval
from tersekv.eval.subject import DENSE, Depth, Progress, Subject, Values
from tersekv.hf.report import cache_report

PARTS = 8  # of a window, to see whether errors grow along it


@dataclass(frozen=True)
class Logits(Depth):
    """For each length in `windows`: as many windows as `tokens` holds, scored from position `score_from` on."""

    windows: list[int] = field(default_factory=lambda: [1024])
    tokens: int = 8192
    chunk: int = 512
    score_from: int = 128

    def __post_init__(self) -> None:
        if not self.windows or min(self.windows) < self.score_from + 2 or max(self.windows) > self.tokens:
            raise InputError(
                f"[logits] windows = {self.windows} with score_from = {self.score_from} and tokens = {self.tokens}. "
                f"Each length must be from score_from + 2 to tokens."
            )

    def items(self, subject: Subject) -> list[str]:
        return [item for length in self.windows for item in subject.windows(length, self.tokens // length)]

    def measure(self, subject: Subject, items: list[str], progress: Progress) -> dict[str, dict[str, Values]]:
        chosen = arms(subject.model, subject.packed)
        compare(subject.model, subject.window(items[0]), chosen, self.chunk, self.score_from, progress)
        return {items[0]: dict(zip(subject.specs, map(_sample, chosen), strict=True))}

    def summary(self, samples: dict[str, Values], dense: dict[str, Values], seed: int) -> Values:
        """{window length: numbers}, in the order of the run file."""
        found = {}
        for length in self.windows:
            mine = [values for item, values in samples.items() if item.startswith(f"{length}/")]
            paired = [dense[item] for item in samples if item.startswith(f"{length}/")]
            found[str(length)] = _one_length(mine, paired, seed)
        return found


def divergence_values(arm: Arm) -> Values:
    """KL of every scored position, top-1 agreement and the mean loss of the true next token."""
    kl, agree, loss = (np.concatenate([x.numpy() for x in part]) for part in arm.divergence.parts())
    return {
        "kl": [digits(max(float(x), 0.0)) for x in kl],
        "top1": float(agree.mean()),
        "loss": float(loss.mean()),
    }


def _sample(arm: Arm) -> Values:
    report = cache_report(DENSE if arm.spec is None else str(arm.spec), arm.cache.layers)
    planes = {f"{tier} {plane}": count for (tier, plane), count in report.planes().items()}
    about = {"planes": planes, "attention": report.implementation if arm.spec else "transformers"}
    return divergence_values(arm) | report.totals() | about | {"seconds": arm.seconds}


def _one_length(mine: list[Values], dense: list[Values], seed: int) -> dict[str, Any]:
    kl = np.concatenate([x["kl"] for x in mine])
    by_window = [float(np.mean(x["kl"])) for x in mine]
    losses = [x["loss"] - y["loss"] for x, y in zip(mine, dense, strict=True)]
    parts = zip(*(np.array_split(x["kl"], PARTS) for x in mine), strict=True)
    return {
        "windows": len(mine),
        "positions": len(kl),
        **mean_and_interval("kl_mean", by_window, seed),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "kl_max": float(kl.max()),
        "top1": float(np.mean([x["top1"] for x in mine])),
        "perplexity": exp(float(np.mean([x["loss"] for x in mine]))),
        # In nats, paired by window; its exponential is the ratio of the perplexities.
        **mean_and_interval("loss_difference", losses, seed),
        "kl_by_window": [digits(x) for x in by_window],
        "loss_by_window": [digits(x["loss"], 7) for x in mine],
        "kl_by_part": [digits(float(np.mean(np.concatenate(part)))) for part in parts],
        # Of one window: all windows of a length hold the same.
        **{name: mine[0][name] for name in ("held", "dense", "dense16", "ratio", "ratio16", "planes", "attention")},
        "seconds": sum(x["seconds"] for x in mine),
    }
