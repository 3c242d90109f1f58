"""Depth `speed`: prefill time, tokens a second and peak memory of each cache, on the machine of the run."""

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from tersekv.bench.peak import peaks
from tersekv.bench.timing import paired, spread
from tersekv.eval.logits import Arm, arms, forward
from tersekv.eval.subject import Depth, Progress, Subject, Values


@dataclass(frozen=True)
class Speed(Depth):
    """A context of `context` tokens is read in chunks, then its last `new_tokens` are decoded by all caches in turn.

    With prefill=exact, as users have it. Peak memory comes from processes of their own, one for each cache, because a
    process has only one peak.
    """

    context: int = 2048
    new_tokens: int = 16
    chunk: int = 512

    def items(self, subject: Subject) -> list[str]:
        return subject.windows(self.context, 1)

    def measure(self, subject: Subject, items: list[str], progress: Progress) -> dict[str, dict[str, Values]]:
        ids, model = subject.window(items[0]), subject.model
        specs = [replace(spec, prefill="exact") for spec in subject.packed]
        chosen = arms(model, specs)
        for part in ids[:, : -self.new_tokens].split(self.chunk, 1):
            for arm in chosen:
                forward(model, part, arm)
        prefill = [arm.seconds for arm in chosen]
        progress(0.4)
        steps = [[_seconds(model, token, arm) for arm in chosen] for token in ids[:, -self.new_tokens :].split(1, 1)]
        progress(0.6)
        dtype, threads = str(model.dtype).removeprefix("torch."), torch.get_num_threads()
        names = [str(spec) for spec in specs]
        memory = peaks(subject.loaded.name, dtype, names, self.context, threads, lambda _: None, str(model.device))
        return {
            items[0]: {
                spec: {
                    "prefill_seconds": prefill[number],
                    "step_seconds": [step[number] for step in steps],
                    "memory_loaded": memory[number]["loaded"],
                    "memory_peak": memory[number]["peak"],
                }
                for number, spec in enumerate(subject.specs)
            }
        }

    def summary(self, samples: dict[str, Values], dense: dict[str, Values], seed: int) -> Values:
        (mine,), (its,) = samples.values(), dense.values()
        return {
            "context": self.context,
            "prefill_seconds": mine["prefill_seconds"],
            "tokens_per_second": spread([1 / seconds for seconds in mine["step_seconds"]]),
            "times_faster_than_dense": paired(its["step_seconds"], mine["step_seconds"]),
            "memory_peak": mine["memory_peak"],
            "memory_over_loaded": mine["memory_peak"] - mine["memory_loaded"],
        }


def _seconds(model: PreTrainedModel, token: torch.Tensor, arm: Arm) -> float:
    before = arm.seconds
    forward(model, token, arm)
    return arm.seconds - before
