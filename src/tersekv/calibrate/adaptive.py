"""`tersekv calibrate adaptive`: what each precision of a token costs, measured, and a controller that foresees it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import torch
from rich.console import Group
from rich.table import Column, Table

from tersekv.calibrate.measuring import SINK, Change, Prefix
from tersekv.calibrate.session import Session, Settings
from tersekv.calibrate.training import DEFAULT_WEIGHTS, Outcome, Weights, train
from tersekv.hf.rating import signals
from tersekv.layout import BLOCK
from tersekv.policy.adaptive import BITS, Adaptive
from tersekv.policy.controller import Controller
from tersekv.spec import Spec
from tersekv.terminal import Stages


@dataclass(frozen=True)
class Trained:
    """Where the controller is, and what it is worth on tokens that it was not trained on."""

    path: str
    spec: str
    seconds: float
    outcome: Outcome

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Group:
        table = Table("bits go to", Column("KL, 1e-6 nats a token", justify="right"), title="held-out tokens")
        for name, value in self.outcome.held_out.items():
            table.add_row(name, f"{1e6 * value:.3f}")
        words = (
            f"{self.outcome.trained_on:,} tokens for training, {self.outcome.tested_on:,} held out; labels "
            + ", ".join(f"{bits} bits: {count}" for bits, count in self.outcome.labels.items())
            + f"\nwritten: {self.path}, {self.seconds:.0f} s; use it: {self.spec}"
        )
        return Group(table, words)


def calibrate(
    settings: Settings, tokens: int, folder: Path, out: Path, stages: Stages, terms: Weights = DEFAULT_WEIGHTS
) -> Trained:
    """`tokens` tokens of each window are measured: every precision of each, alone, all layers and sides at once."""
    session = Session.open(settings, stages)
    model, ids = session.subject.model, session.subject.tokens
    counts = torch.bincount(ids, minlength=model.config.get_text_config(decoder=True).vocab_size)
    counts = counts.to(torch.int32).to(model.device)
    session.about["measured_tokens"] = tokens

    def measure(prefix: Prefix, progress: Callable[[float], None]) -> dict[str, Any]:
        return _measure(prefix, counts, tokens, settings.seed, progress)

    samples = session.measured("adaptive", folder, measure)
    features = torch.tensor([row for sample in samples for row in sample["features"]])
    loss = torch.tensor([[*row, 0.0] for sample in samples for row in sample["kl"]], dtype=torch.float64)
    stages("training")
    start = perf_counter()
    average = sum(getattr(codec, "bits") for codec in (session.spec.k, session.spec.v)) / 2  # noqa: B009
    weights, outcome = train(features, loss, average, settings.seed, terms)
    seconds = sum(sample["seconds"] for sample in samples) + perf_counter() - start
    about = session.about | {"average_bits": average, "weights": asdict(terms), "outcome": asdict(outcome)}
    about |= {"seconds": seconds}
    Controller(weights | {"counts": counts.cpu()}, about).save(out)
    return Trained(str(out), str(Spec(session.spec.k, session.spec.v, Adaptive(router=str(out)))), seconds, outcome)


def _measure(
    prefix: Prefix, counts: torch.Tensor, tokens: int, seed: int, progress: Callable[[float], None]
) -> dict[str, Any]:
    last = min(prefix.blocks.stop, prefix.ids.shape[1] - BLOCK)  # the newest would still be dense
    drawn = sorted(Random(seed).sample(range(SINK, last), min(tokens, last - SINK)))
    changes = [Change(bits, slice(at, at + 1)) for at in drawn for bits in BITS[:-1]]
    kl = prefix.divergences(changes, lambda count: progress(count / len(changes)))
    found = signals(prefix.model, prefix.ids, prefix.hidden, prefix.spread, counts)[0, drawn]
    levels = len(BITS) - 1
    return {
        "positions": drawn,
        "features": found.tolist(),
        "kl": [[max(x, 0.0) for x in kl[at : at + levels]] for at in range(0, len(kl), levels)],
    }
