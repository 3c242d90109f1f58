"""`tersekv bench generate`: the time of a token of transformers' `generate`, eagerly and as it is by itself.

The model has the shape of Llama-3-8B and random weights. A token's time is from one to the next, as a streamer hears
them, so all that `generate` does is in it. The same command checks that both ways say the same tokens.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import tersekv
from tersekv.bench.gpu_decode import LLAMA, SPECS, random_model
from tersekv.bench.timing import spread
from tersekv.errors import InputError, TersekvError
from tersekv.hf.graph import GraphedForward
from tersekv.ops import cuda
from tersekv.record import provenance
from tersekv.terminal import Stages


@dataclass(frozen=True)
class Plan:
    """What is run. `cases`: sequences, and tokens of each prompt."""

    llama: dict[str, Any] = field(default_factory=lambda: LLAMA)
    cases: tuple[tuple[int, int], ...] = ((1, 4096), (16, 1024))
    specs: tuple[str, ...] = ("4 bits", "2 bits")
    new: int = 48  # tokens, of which the first few are not timed: they make room, and capture
    warm: int = 6


class _Clock(BaseStreamer):
    def __init__(self) -> None:
        self.marks: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.marks.append(perf_counter())

    def end(self) -> None: ...


def generate(plan: Plan, device: str, stages: Stages) -> dict[str, Any]:
    """The record."""
    if why := cuda.missing():
        raise InputError(f'--device "{device}": {why}')
    torch.manual_seed(0)
    model, rows = random_model(plan.llama, device), list[dict[str, Any]]()
    for b, t in plan.cases:
        ids = torch.randint(1, plan.llama["vocab_size"], (b, t), device=device)
        makers: dict[str, Callable[[], Cache]] = {"dense, DynamicCache": partial(DynamicCache, config=model.config)}
        for name in plan.specs:  # with the same room, on which the order of sums depends
            makers[name] = partial(tersekv.cache, model, SPECS[name], t + plan.new)
        for name, make in makers.items():
            stages(f"{name}, b={b} t={t:,}")
            rows += [{"b": b, "t": t, "name": name} | row for row in _rows(plan, model, ids, make)]
    settings = asdict(plan) | {"specs": {name: SPECS[name] for name in plan.specs}}
    return {"bench": "generate cuda", "settings": settings, "rows": rows} | provenance(device)


def _rows(plan: Plan, model: PreTrainedModel, ids: torch.Tensor, make: Callable[[], Cache]) -> list[dict[str, Any]]:
    """Of one kind of cache: eager, and where it is ours also as it is by itself."""
    rows, texts = [], []
    for eager in (True, False) if isinstance(make(), tersekv.PackedCache) else (True,):
        _told(plan, model, ids, make(), eager, 4)  # kernels are compiled, memory is taken
        cache = make()
        text, marks = _told(plan, model, ids, cache, eager, plan.new)
        times = [later - mark for mark, later in pairwise(marks[1:])]  # the first one was the prompt
        way = "eager" if eager else getattr(cache, "decoding", "")
        rows.append({"way": way, "seconds": spread(times[plan.warm :]), "first": times[: plan.warm]})
        texts.append(text)
    if not all(torch.equal(texts[0], text) for text in texts):
        raise TersekvError("Eager decoding and graphs said different tokens, so their times do not compare.")
    if len(rows) > 1:
        rows[1]["host_seconds"] = _host(plan, model, ids, make())
    return rows


def _told(
    plan: Plan, model: PreTrainedModel, ids: torch.Tensor, cache: Cache, eager: bool, new: int
) -> tuple[torch.Tensor, list[float]]:
    clock = _Clock()
    with tersekv.attached(model):
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        says: Any = model.generate
        text = says(ids, past_key_values=cache, streamer=clock, disable_compile=eager, **options)
    return text, clock.marks


@torch.no_grad()
def _host(plan: Plan, model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> float:
    """Seconds of Python and the driver in a replayed step with a mask, of a device that waits."""
    assert isinstance(cache, tersekv.PackedCache)
    mask, seconds = torch.ones_like(ids), list[float]()
    with tersekv.attached(model):
        model(input_ids=ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
        forward = GraphedForward(model, cache)
        for number in range(plan.new):
            mask = torch.cat((mask, mask[:, :1]), 1)
            positions = torch.full_like(ids[:, :1], ids.shape[1] + number)
            torch.cuda.synchronize()
            began = perf_counter()
            forward(input_ids=ids[:, :1], attention_mask=mask, position_ids=positions, past_key_values=cache)
            seconds.append(perf_counter() - began)
    return median(seconds[plan.warm :])
