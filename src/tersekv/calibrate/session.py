"""What both calibrations share: a model in fp32, windows of a text, measurements that go on where they were stopped."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from tersekv.calibrate.measuring import Prefix
from tersekv.errors import InputError
from tersekv.eval.samples import RunDirectory
from tersekv.eval.subject import Subject
from tersekv.files import fingerprint
from tersekv.models import load
from tersekv.record import provenance
from tersekv.spec import Spec, parse
from tersekv.terminal import Stages


@dataclass(frozen=True)
class Settings:
    """`windows` windows of `tokens` tokens, each judged by the `follow` tokens after it."""

    model: str
    text: Path
    spec: str
    windows: int
    tokens: int
    follow: int = 32
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if min(self.windows, self.follow) < 1 or self.tokens < 192:
            raise InputError(
                f"{self.windows} windows of {self.tokens} tokens, judged by {self.follow}. Give at least 1 window, 192 "
                "tokens (two blocks and a recent window) and 1 token that follows."
            )


@dataclass
class Session:
    settings: Settings
    spec: Spec
    subject: Subject
    about: dict[str, Any]  # provenance
    stages: Stages

    @staticmethod
    def open(settings: Settings, stages: Stages) -> "Session":
        """Weights as a bfloat16 model has them, arithmetic in fp32: one token's share is below bfloat16's noise."""
        try:
            text = settings.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--text {settings.text} cannot be read as text: {error}. Give a UTF-8 file.") from error
        loaded = load(settings.model, "bfloat16", stages, settings.device)
        about = {
            "fingerprint": fingerprint(loaded.model),
            "model": {"name": loaded.name, "source": loaded.source, "revision": loaded.revision},
            "text": {"name": settings.text.name, "sha256": sha256(text.encode()).hexdigest()},
            "spec": settings.spec,
            **{name: getattr(settings, name) for name in ("windows", "tokens", "follow", "seed")},
        } | provenance(settings.device)
        loaded.model.float()
        subject = Subject(loaded, {}, settings.seed, text, settings.text.name)
        return Session(settings, parse(settings.spec), subject, about, stages)

    def measured(
        self, name: str, folder: Path, measure: Callable[[Prefix, Callable[[float], None]], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """What `measure` says of each window, and how long that took, kept in `folder` line by line."""
        directory = RunDirectory.open(folder, {"calibrate": name} | self.about)
        items = self.subject.windows(self.settings.tokens + self.settings.follow, self.settings.windows)
        for number, item in enumerate(items):
            if directory.holds(name, item, [self.settings.spec]):
                continue

            def progress(share: float, number: int = number) -> None:
                self.stages(f"window {number + 1} of {len(items)}", (number + share) / len(items))

            progress(0.0)
            start = perf_counter()
            values = measure(self._prefix(item), progress)
            directory.add(name, item, {self.settings.spec: values | {"seconds": perf_counter() - start}})
        return [directory.samples[name, item, self.settings.spec] for item in items]

    @torch.inference_mode()
    def _prefix(self, item: str) -> Prefix:
        ids, spec = self.subject.window(item), self.spec
        split = ids.shape[1] - self.settings.follow
        return Prefix(
            self.subject.model,
            ids[:, :split],
            ids[:, split:],
            lambda bits: (spec.k.with_bits(bits), spec.v.with_bits(bits)),
        )
