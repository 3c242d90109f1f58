"""`tersekv bench decode`: tokens a second of a whole model at several contexts, and the memory of the process."""

from random import Random
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from tersekv.bench.decoders import Decoder, Decoders
from tersekv.bench.machine import facts
from tersekv.bench.peak import peaks
from tersekv.bench.timing import paired, spread, torch_threads
from tersekv.errors import InputError, TersekvError
from tersekv.prompt import prompt_ids
from tersekv.terminal import Stages

KL_BOUND = 0.5  # nats at the end of the prompt, to the first contestant; other weights or a broken cache give several
MOST = 1_000_000
TURN = 8  # tokens that a contestant decodes in a row, as in use


def decode(
    model: str,
    contexts: list[int],
    specs: list[str],
    dtypes: list[str],
    stages: Stages,
    new_tokens: int = 32,
    threads: int = 1,
    memory: bool = True,
    llama_cpp: bool = True,
) -> dict[str, Any]:
    """The record. Each context is read but for `new_tokens`, which all contestants then decode, TURN in a row."""
    if threads < 1 or new_tokens < 1 or min(contexts) <= new_tokens:
        raise InputError(
            f"contexts {contexts}, new tokens {new_tokens}, threads {threads}: at least one thread and one new token, "
            "and contexts longer than the new tokens."
        )
    with torch_threads(threads), torch.inference_mode():
        decoders = Decoders(model, dtypes, specs, threads, llama_cpp, stages)
        try:
            limit = getattr(decoders.packed.config, "max_position_embeddings", MOST)
            if max(contexts) > limit:
                raise InputError(f"Context {max(contexts)}: {model} takes at most {limit} tokens.")
            rows = [row for context in contexts for row in _at(decoders, context, new_tokens, stages)]
        finally:
            decoders.close()
    settings = {"model": model, "source": decoders.source, "contexts": contexts, "new_tokens": new_tokens}
    settings |= {"specs": specs, "dtypes": dtypes, "threads": threads}
    held = peaks(model, dtypes[0], specs, max(contexts) - new_tokens, threads, stages) if memory else []
    return {"bench": "decode", "settings": settings, "absent": decoders.absent, "rows": rows, "memory": held} | facts()


def _text(tokenizer: Any, count: int) -> Tensor:
    """The default prompt of `tersekv try`, over and over."""
    ids = prompt_ids(tokenizer, None)[0]
    return ids.repeat(-(-count // len(ids)))[:count]


def _at(decoders: Decoders, context: int, new_tokens: int, stages: Stages) -> list[dict[str, Any]]:
    tokens = _text(decoders.tokenizer, context)
    with decoders.at(context) as found:
        prefill = _read_all(found, tokens[:-new_tokens], stages)
        seconds: dict[str, list[float]] = {one.name: [] for one in found}
        order = Random(0)  # drawn anew for each turn, because who comes after llama.cpp is slower
        for turn in tokens[-new_tokens:].split(TURN):
            for one in order.sample(found, len(found)):
                for token in turn:
                    began = perf_counter()
                    one.read(token[None])
                    seconds[one.name].append(perf_counter() - began)
            stages(f"decode at {context:,}", len(seconds[found[0].name]) / new_tokens)
    return [_row(context, one, found, prefill, seconds) for one in found]


def _read_all(found: list[Decoder], prompt: Tensor, stages: Stages) -> dict[str, tuple[float, float]]:
    """Seconds of each contestant's prefill, and its divergence, which must be small, from the first one's."""
    measured, first = {}, None
    for one in found:
        stages(f"{one.name}: prefill of {len(prompt):,} tokens")
        began = perf_counter()
        logits = one.read(prompt)
        seconds = perf_counter() - began
        said = torch.log_softmax(logits.double(), -1)
        first = said if first is None else first
        kl = float((first.exp() * (first - said)).sum())
        if not kl <= KL_BOUND:
            raise TersekvError(
                f"Parity gate: {one.name} says something else than {found[0].name} after {len(prompt):,} tokens, KL "
                f"{kl:.2g}, allowed is {KL_BOUND}. No timing."
            )
        measured[one.name] = seconds, max(kl, 0.0)
    return measured


def _row(
    context: int,
    one: Decoder,
    found: list[Decoder],
    prefill: dict[str, tuple[float, float]],
    seconds: dict[str, list[float]],
) -> dict[str, Any]:
    faster = {
        peer.name: paired(seconds[peer.name], seconds[one.name])
        for peer in found
        if one.kind == "ours" and peer.name != one.name
    }
    about = {"context": context, "name": one.name, "kind": one.kind, "prefill_seconds": prefill[one.name][0]}
    about |= {"kl": prefill[one.name][1], "tokens_per_second": spread([1 / s for s in seconds[one.name]])}
    return about | ({"times_faster_than": faster} if faster else {})
