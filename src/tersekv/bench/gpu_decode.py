"""`tersekv bench decode --device cuda`: a layer's step, a whole model's step, and how many tokens fit.

The model has the shape of Llama-3-8B and random weights; caches are filled with pages of random tokens, not by reading
a text (see `gpu_fill`). What is timed is a replay of a graph unless the name of the row says otherwise.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import tersekv
from tersekv.bench import gpu_dense, gpu_fill
from tersekv.bench.gpu import PEERS, Cold, Within
from tersekv.bench.gpu_dense import Captured, steps_of_dense
from tersekv.bench.timing import paired, spread
from tersekv.errors import InputError
from tersekv.hf.cost import sequence_bytes
from tersekv.ops import cuda
from tersekv.record import provenance
from tersekv.spec import parse
from tersekv.store import Store
from tersekv.terminal import Stages

SPECS = {"4 bits": "rotated:bits=4", "3 bits": "rotated:bits=3", "2 bits": "rotated:bits=2", "1 bit": "rotated:bits=1"}
LLAMA = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 500_000.0,
    "max_position_embeddings": 2**20,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is run. `layer`, `model`: sequences and tokens of each. `fit`: tokens of a sequence, and bytes in all."""

    llama: dict[str, Any] = field(default_factory=lambda: LLAMA)
    layer: tuple[tuple[int, int], ...] = ((1, 4096), (1, 32_768), (16, 8192))
    model: tuple[tuple[int, int], ...] = ((1, 32_768), (16, 8192), (64, 16_384))
    specs: tuple[str, ...] = ("4 bits", "2 bits")  # of layers and models; all of SPECS are filled
    fit: tuple[int, float] = (32_768, 80e9)
    layers: int = 8  # of a graph, which is timed as a whole
    rounds: int = 21
    warm: int = 3


def decode(plan: Plan, device: str, stages: Stages) -> dict[str, Any]:
    """The record."""
    if why := cuda.missing():
        raise InputError(f'--device "{device}": {why}')
    torch.manual_seed(0)
    with torch.inference_mode():
        cold = Cold(device)
        layer = [row for b, t in plan.layer for row in _layer(plan, b, t, cold, device, stages)]
        del cold
        _free()
        model = random_model(plan.llama, device)
        weights = torch.cuda.memory_allocated()
        rows = [row for b, t in plan.model for row in _model(plan, model, b, t, stages)]
        fits = [_fit(plan, model, name, stages) for name in ("dense bf16", *SPECS)]
    made = provenance(device)
    made["versions"] |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    settings = asdict(plan) | {"specs": SPECS, "weights": weights}
    return {"bench": "decode cuda", "settings": settings, "layer": layer, "model": rows, "fit": fits} | made


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


# A layer's step: append, pack when due (not among those timed), sink, recent, pages, join.


def _layer(plan: Plan, b: int, t: int, cold: Cold, device: str, stages: Stages) -> list[dict[str, Any]]:
    stages(f"a layer, b={b} t={t:,}")
    hq, h, d = (plan.llama[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    new = [torch.randn(b, x, 1, d, device=device, dtype=torch.bfloat16) for x in (hq, h, h)]
    runs: dict[str, Callable[[], Any]] = {}
    for name, backend in PEERS.items():
        kv = [torch.randn(2, b, h, t, d, device=device, dtype=torch.bfloat16) for _ in range(plan.layers)]
        last = torch.full((1,), t - 1, device=device)
        with sdpa_kernel(backend):
            runs[f"dense bf16, {name}"] = Captured(partial(steps_of_dense, new, kv, last, d**-0.5))
    for name in plan.specs:
        runs[name] = _our_steps(plan, name, new, b, h, t, d, device)
    seconds = cold.turns(runs, plan.rounds)
    dense = min((name for name in runs if name.startswith("dense")), key=lambda name: spread(seconds[name])["median"])
    rows = []
    for name, values in seconds.items():
        times = spread([value / plan.layers for value in values])
        faster = None if name.startswith("dense") else paired(seconds[dense], values)
        rows.append({"b": b, "t": t, "name": name, "seconds": times, "times_faster": faster})
    runs.clear()
    _free()
    return rows


def _our_steps(
    plan: Plan, name: str, new: list[Tensor], b: int, h: int, t: int, d: int, device: str
) -> Callable[[], None]:
    """A graph of a step of each of several layers. The host is not told of replays: fewer than make a block due."""
    spec = parse(SPECS[name])
    stores = [Store(spec, b, h, d, torch.bfloat16, torch.device(device), t + 128) for _ in range(plan.layers)]
    for store in stores:
        store.tiers = gpu_fill.tiers(spec, b, h, t // 64 * 64 + 4, d, device)  # no token beyond those that stay dense
    (q, k, v), scale = new, d**-0.5

    def steps() -> None:
        for store in stores:
            store.extend(q, k, v, None, scale)

    return Captured(steps)


# A whole model.


def random_model(config: dict[str, Any], device: str) -> PreTrainedModel:
    """In bf16, for inference."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**config), attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def _contestants(plan: Plan, model: PreTrainedModel, b: int, t: int) -> Iterator[tuple[str, Callable[[], Any], Within]]:
    """Names, what makes a step of each, and where it runs; the memory goes with what is made."""
    alone = partial(gpu_dense.unmasked, model)
    for name, make, graph, within in (
        ("dense, DynamicCache, no graph", gpu_dense.dynamic, False, nullcontext),
        ("dense, StaticCache", gpu_dense.static, True, nullcontext),
        ("dense, no room to grow", gpu_dense.full, True, alone),
    ):
        yield name, partial(_dense_model, model, make, b, t, graph), within
    for name in plan.specs:
        yield name, partial(_our_model, model, name, b, t - 1, t + 512), partial(tersekv.attached, model)


def _dense_model(model: PreTrainedModel, make: Callable[..., Any], b: int, t: int, graph: bool) -> Callable[[], Any]:
    return gpu_dense.DenseStep(model, make(model, b, t), b, graph)


def _our_model(model: PreTrainedModel, name: str, b: int, t: int, room: int) -> Callable[[], Any]:
    cache = gpu_fill.cache(model, parse(SPECS[name]), b, t, room)
    step = tersekv.GraphedStep(model, cache)
    return partial(step, torch.zeros(b, dtype=torch.int64, device=model.device))


def _model(plan: Plan, model: PreTrainedModel, b: int, t: int, stages: Stages) -> list[dict[str, Any]]:
    """One contestant after the other, since a cache may need all the memory."""
    rows = []
    for name, make, within in _contestants(plan, model, b, t):
        stages(f"{name}, b={b} t={t:,}")
        row: dict[str, Any] = {"b": b, "t": t, "name": name}
        try:
            with within():
                rows.append(row | _timed(plan, make, b))
        except torch.OutOfMemoryError:
            rows.append(row | {"absent": "does not fit"})
        _free()
    return rows


def _timed(plan: Plan, make: Callable[[], Any], b: int) -> dict[str, Any]:
    run = make()
    for _ in range(plan.warm):
        run()
    _free()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(plan.rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    seconds = spread([one.elapsed_time(next_one) / 1e3 for one, next_one in pairwise(marks)])
    held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    return {"seconds": seconds, "tokens_per_second": b / seconds["median"], "allocated": held, "peak": peak}


# How many tokens fit.


def _fit(plan: Plan, model: PreTrainedModel, name: str, stages: Stages) -> dict[str, Any]:
    """The most whole sequences whose cache and the weights are within the bytes; each count is filled, and decodes."""
    t, limit = plan.fit
    b = max(1, _guess(plan, name, int(limit - torch.cuda.memory_allocated())))
    while True:
        stages(f"{name}: {b} sequences of {t:,}")
        try:
            held = _filled(plan, model, name, b)
        except torch.OutOfMemoryError:
            held = {"allocated": float("inf")}
        _free()
        if held["allocated"] <= limit:
            return {"name": name, "sequences": b, "tokens": b * t} | held
        b -= 1


def _guess(plan: Plan, name: str, room: int) -> int:
    config = LlamaConfig(**plan.llama)
    dense = 4 * plan.llama["num_hidden_layers"] * plan.llama["num_key_value_heads"] * plan.llama["head_dim"]
    each = plan.fit[0] * dense if name.startswith("dense") else sequence_bytes(config, parse(SPECS[name]), plan.fit[0])
    return room // each


def _filled(plan: Plan, model: PreTrainedModel, name: str, b: int) -> dict[str, Any]:
    """Bytes held with the weights while a token is decoded, and the seconds of one step."""
    t = plan.fit[0]
    dense = name.startswith("dense")
    with gpu_dense.unmasked(model) if dense else tersekv.attached(model):
        run = _dense_model(model, gpu_dense.full, b, t, False) if dense else _our_model(model, name, b, t - 1, t)
        run()
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
    return {"allocated": held, "seconds": begin.elapsed_time(end) / 1e3}
