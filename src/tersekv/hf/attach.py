"""Attaching tersekv to a model: what transformers calls within the `with` block. Tested with transformers 5.23."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig, PreTrainedModel

from tersekv.errors import InputError, ModelError, did_you_mean
from tersekv.hf.attention import ROUTES, attend, mask_of
from tersekv.hf.cache import PackedCache
from tersekv.hf.decoder import native_layers
from tersekv.hf.graph import GraphedForward, refusal
from tersekv.hf.linear import few_tokens
from tersekv.hf.rating import rated
from tersekv.ops import Implementation, cuda, native
from tersekv.ops.linear import FEW

# What transformers asks a model before it decodes: whether to do it compiled, and the compiled forward pass.
CRITERIA, COMPILED = "_valid_auto_compile_criteria", "get_compiled_call"
NOT_ASKED = f"This version of transformers does not ask a model for {COMPILED}: generate decodes eagerly."


@contextmanager
def attached(model: PreTrainedModel, route: str = "fused") -> Iterator[PreTrainedModel]:
    """Within the block, `model` attends to packed caches where they lie; afterwards it is as before.

    Kernels may multiply codes of up to 4 bits as 8-bit integers; `route="exact"` has them compute in fp32.
    `route="decoded"` unpacks the history at every step instead: the slow check on the other two.
    With the fused route, and on a processor, what lies around attention runs in native code, too, for a few tokens:
    decoder layers of Llama's form (`ops.decoder`), and other linear layers (`ops.linear`).
    Raises ModelError if the model's attention cannot be exchanged.
    """
    if route not in ROUTES:
        raise InputError(f'Unknown route "{route}". {did_you_mean(route, ROUTES)}')
    before = model.config._attn_implementation or "eager"
    name = f"{ROUTES[route]}:{before}"
    AttentionInterface.register(name, partial(attend, former=before, route=route))
    AttentionMaskInterface.register(name, partial(mask_of, before))
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ModelError(
            f"{type(model).__name__} does not use transformers' attention interface, so its attention cannot be "
            "exchanged. Use the cache without tersekv.attached: it then unpacks at every step."
        )
    try:
        with rated(model), offering_graphs(model), in_native_code(model) if route == "fused" else nullcontext():
            yield model
    finally:
        model.set_attn_implementation(before)


def explain() -> list[Implementation]:
    """How transformers decodes with a packed cache, and why not otherwise."""
    graph = cuda.missing() or ("" if hasattr(PreTrainedModel, COMPILED) else NOT_ASKED)
    offered = "model.generate replays one for each token, unless disable_compile is set; cache.report() says if it did."
    traced = "Attention to packed pages is one operation of a compiled model's graph, tersekv::extend."
    layers = f"On a processor, of up to {FEW} tokens: decoder layers of Llama's form, and other models' linear layers."
    why = native.missing()
    return [
        Implementation("CUDA graph", not graph, graph or offered),
        Implementation("torch.compile", True, traced),
        Implementation("native layers", not why, why or layers),
    ]


@contextmanager
def in_native_code(model: PreTrainedModel) -> Iterator[None]:
    """On a processor, of a few tokens."""
    with few_tokens(model), native_layers(model):
        yield


@contextmanager
def offering_graphs(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, `generate` decodes packed caches in graphs wherever it would decode static caches compiled."""
    criteria, compiled = (getattr(model, name, None) for name in (CRITERIA, COMPILED))
    if criteria is None or compiled is None:
        yield
        return
    offered: list[Callable[..., Any]] = []  # between transformers' two questions

    def wants(arguments: dict[str, Any], config: GenerationConfig) -> bool:
        cache = arguments.get("past_key_values")
        if not isinstance(cache, PackedCache) or model.device.type == "cpu":
            return criteria(arguments, config)
        why = refusal(model, cache)
        if not why and not criteria({"past_key_values": SimpleNamespace(is_compileable=True)}, config):
            why = "disable_compile is set, or transformers does not compile this model"
        if why:
            cache.decoding = f"eager: {why}"
            return False
        offered.append(GraphedForward(model, cache, config.max_length or 0))
        return True

    def call(config: Any) -> Callable[..., Any]:
        return offered.pop() if offered else compiled(config)

    with _set(model, CRITERIA, wants), _set(model, COMPILED, call):
        yield


@contextmanager
def _set(model: PreTrainedModel, name: str, value: Any) -> Iterator[None]:
    """An attribute of this object alone, as it was afterwards."""
    before = vars(model).get(name)
    setattr(model, name, value)
    try:
        yield
    finally:
        delattr(model, name)
        if before is not None:
            setattr(model, name, before)
