"""Depth `tensors`: errors of keys, values, attention output and logits on a model's own tensors, from real pages."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tersekv.eval.fidelity import Found, dense_fidelity, fidelity
from tersekv.eval.metrics import COSINES, METRICS
from tersekv.eval.statistics import digits, mean_and_interval
from tersekv.eval.subject import Depth, Progress, Subject, Values
from tersekv.hf.capture import Seen, observed

HEAT_MAPS = ("k_error", "v_error", "output_error")


@dataclass(frozen=True)
class Tensors(Depth):
    """`windows` windows of `tokens` tokens, each in one forward pass of the dense model."""

    tokens: int = 1024
    windows: int = 1

    def items(self, subject: Subject) -> list[str]:
        return subject.windows(self.tokens, self.windows)

    def measure(self, subject: Subject, items: list[str], progress: Progress) -> dict[str, dict[str, Values]]:
        layers = subject.model.config.get_text_config(decoder=True).num_hidden_layers
        found: dict[str, list[tuple[int, dict[str, Found]]]] = {spec: [] for spec in subject.specs}

        def look(seen: Seen) -> None:
            for text, spec in subject.specs.items():
                result = dense_fidelity(seen) if spec is None else fidelity(seen, spec)
                found[text].append((seen.layer, result))
            progress((seen.layer + 1) / layers)

        with observed(subject.model, look):
            subject.model(input_ids=subject.window(items[0]), use_cache=False, logits_to_keep=1)
        return {items[0]: {spec: _over_layers(results) for spec, results in found.items()}}

    def summary(self, samples: dict[str, Values], dense: dict[str, Values], seed: int) -> Values:
        names = [name for name in METRICS if all(name in values for values in samples.values())]
        return {name: _over_windows(name, samples, seed) for name in names}


def _over_layers(results: list[tuple[int, dict[str, Found]]]) -> Values:
    names = [name for name in METRICS if name in results[0][1]]
    return {name: _one_metric(name, [(layer, found[name]) for layer, found in results]) for name in names}


def _one_metric(name: str, layers: list[tuple[int, Found]]) -> dict[str, Any]:
    """Mean, tail and worst over all tokens, heads and layers; `tail` is the 5 % that a mean hides.

    `worst_head` is the mean of the head that is worst on average, `head_tail` that of the 5 % of heads.
    """
    sign = -1 if name in COSINES else 1
    values = np.stack([found.values for _, found in layers])
    by_head = values.mean(-1)
    worst = np.unravel_index(np.argmax(sign * values), values.shape)
    layer, head = int(worst[0]), int(worst[1])
    token = int(layers[layer][1].positions[head, worst[2]])
    number = {
        "mean": digits(values.mean()),
        "head_tail": digits(np.quantile(by_head, 0.05 if sign < 0 else 0.95)),
        "worst_head": digits(sign * np.max(sign * by_head)),
        "tail": digits(np.quantile(values, 0.05 if sign < 0 else 0.95)),
        "worst": digits(values[worst]),
        "where": {"layer": layers[layer][0], "head": head, "token": token},
    }
    if name in HEAT_MAPS:
        number["by_head"] = [[digits(x, 3) for x in row] for row in by_head]
        number["layers"] = [index for index, _ in layers]
    return number


def _over_windows(name: str, samples: dict[str, Values], seed: int) -> dict[str, Any]:
    found = {item: values[name] for item, values in samples.items()}
    pick = min if name in COSINES else max
    item = pick(found, key=lambda item: found[item]["worst"])
    number = mean_and_interval("mean", [x["mean"] for x in found.values()], seed)
    number |= {key: float(np.mean([x[key] for x in found.values()])) for key in ("tail", "head_tail", "worst_head")}
    number |= {"worst": found[item]["worst"], "where": {"window": item} | found[item]["where"]}
    if name in HEAT_MAPS:
        mean = np.mean([x["by_head"] for x in found.values()], axis=0)
        number |= {"by_head": [[digits(x, 3) for x in row] for row in mean], "layers": found[item]["layers"]}
    return number
