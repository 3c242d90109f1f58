"""Depth `tasks`: lm-eval's tasks on items drawn at random, the same ones for every cache."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from tersekv.eval.items import load_task
from tersekv.eval.statistics import digits, mean_and_interval
from tersekv.eval.subject import Depth, Progress, Subject, Values
from tersekv.hf.cost import head_dim
from tersekv.spec import Spec
from tersekv.store import Store

# Loading a task reads and prepares all its items; a run asks for them several times.
_loaded: Callable[[str, int, Path | None], tuple[Any, dict[str, Any]]] = lru_cache(load_task)


@dataclass(frozen=True)
class Tasks(Depth):
    """`items_each` items of each task in `names`, or all if there are fewer; `rows` sequences in a forward pass."""

    names: list[str] = field(default_factory=list)
    items_each: int = 200
    shots: int = 0
    rows: int = 8
    batch = 32  # items between two looks at the disk

    def items(self, subject: Subject) -> list[str]:
        return [f"{name}/{number}" for name in self.names for number in self._drawn(subject, name)]

    def _drawn(self, subject: Subject, name: str) -> list[int]:
        there = len(_loaded(name, self.shots, subject.data)[0].eval_docs)
        return sorted(Random(f"{subject.seed}/{name}").sample(range(there), min(self.items_each, there)))

    def data(self, subject: Subject) -> dict[str, Values]:
        return {name: _loaded(name, self.shots, subject.data)[1] for name in self.names}

    def measure(self, subject: Subject, items: list[str], progress: Progress) -> dict[str, dict[str, Values]]:
        from lm_eval.evaluator import evaluate

        from tersekv.eval.harness import PackedLM

        found: dict[str, dict[str, Values]] = {item: {} for item in items}
        numbers: dict[str, list[int]] = {}
        for name, number in (item.split("/") for item in items):
            numbers.setdefault(name, []).append(int(number))
        for done, (text, spec) in enumerate(subject.specs.items()):
            model = PackedLM(subject.loaded, spec, self.rows)
            for name, drawn in numbers.items():
                task, about = _loaded(name, self.shots, subject.data)
                asked = {"tasks": {name: task}, "groups": {}, "group_map": {}}
                said: Any = evaluate(model, asked, samples={name: drawn}, bootstrap_iters=0)
                for sample in said["samples"][name]:
                    values = found[f"{name}/{sample['doc_id']}"].setdefault(text, {"version": about["version"]})
                    values |= _scores(task, sample)
                    values["saw_packed"] = _length(subject, sample) > _dense_until(subject, spec)
            progress((done + 1) / len(subject.specs))
        return found

    def summary(self, samples: dict[str, Values], dense: dict[str, Values], seed: int) -> Values:
        found = {}
        for name in self.names:
            mine = {item: values for item, values in samples.items() if item.startswith(f"{name}/")}
            first = next(iter(mine.values()))
            found[name] = {
                "version": first["version"],
                "items": len(mine),
                "saw_packed": float(np.mean([values["saw_packed"] for values in mine.values()])),
                "metrics": {
                    metric: mean_and_interval("score", [x[metric] for x in mine.values()], seed)
                    | mean_and_interval(
                        "difference", [x[metric] - dense[item][metric] for item, x in mine.items()], seed
                    )
                    | {"score_by_item": [digits(x[metric]) for x in mine.values()]}
                    for metric in first
                    if metric not in ("version", "saw_packed")
                },
            }
        return found


def _scores(task: Any, sample: dict[str, Any]) -> dict[str, float]:
    """Metrics that are a mean over items; others, such as a perplexity, are no sum of paired differences."""
    means = [name for name, how in task.aggregation().items() if getattr(how, "__name__", "") == "mean"]
    suffix = "" if sample["filter"] == "none" else f" {sample['filter']}"
    return {f"{name}{suffix}": float(sample[name]) for name in means if name in sample}


def _length(subject: Subject, sample: dict[str, Any]) -> int:
    """Tokens of an item's longest request."""
    texts = ["".join(part for part in request if isinstance(part, str)) for request in sample["arguments"]]
    return max(len(subject.loaded.tokenizer(text).input_ids) for text in texts)


def _dense_until(subject: Subject, spec: Spec | None) -> float | int:
    """How many tokens a cache takes before it packs any."""
    if spec is None:
        return float("inf")
    d = head_dim(subject.model.config.get_text_config(decoder=True))
    store = Store(spec, 1, 1, d, torch.float32, torch.device("cpu"))
    return spec.policy.room(store.tiers)
