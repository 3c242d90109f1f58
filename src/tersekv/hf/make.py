"""A new cache for a model, after the checks that concern both."""

from transformers import PreTrainedModel

from tersekv.errors import InputError, ModelError
from tersekv.hf.cache import PackedCache
from tersekv.hf.checks import check_fitted
from tersekv.hf.rating import controller_of
from tersekv.hf.selftest import warn_if_failed
from tersekv.registry import PRESETS
from tersekv.spec import Spec, parse


def cache(
    model: PreTrainedModel, spec: str | Spec = "terse4", room: int | None = None, selftest: bool = True
) -> PackedCache:
    """An empty packed cache for `model`. A preset is tried on it once a process and warns if it fails: `hf.selftest`.

    `room`: tokens that a sequence may come to have. A GPU takes memory for them at the first decoding step, so that it
    is not copied again, and a captured step serves all of them. More are taken all the same.
    Raises SpecError for a bad spec, InputError for a room that is none, ModelError for a model without KV cache.
    """
    if room is not None and room < 1:
        raise InputError(f"room={room}: a number of tokens, 1 or more, or None.")
    chosen = parse(spec) if isinstance(spec, str) else spec
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise ModelError(
            f"{type(model).__name__} does not generate text with a decoder-only KV cache, so there is nothing to pack. "
            "Use a causal language model such as LlamaForCausalLM."
        )
    check_fitted(model, chosen)
    if selftest and isinstance(spec, str) and spec in PRESETS:
        warn_if_failed(model, spec, chosen)
    return PackedCache(model.config, chosen, controller_of(model, chosen), room)
