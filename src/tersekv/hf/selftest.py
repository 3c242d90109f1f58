"""The self-test of a preset: whether it falls off a cliff on a model, before anybody relies on it.

The model reads random tokens with the dense cache and with the preset. Their keys have the biases and the strong
channels of any text's, which is what breaks a codec. The number is no measure of quality: for that, `tersekv eval`.
"""

import warnings
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from tersekv.errors import InputError, ModelError
from tersekv.hf.attach import attached
from tersekv.hf.cache import PackedCache
from tersekv.spec import Spec

TOKENS, SCORED = 384, 128
MOST = 1.0  # nats; of presets on three models at most 0.4, of codecs that keys break more
_found: WeakKeyDictionary[PreTrainedModel, dict[str, float | None]] = WeakKeyDictionary()


def warn_if_failed(model: PreTrainedModel, name: str, spec: Spec) -> None:
    """Tests a preset once a process and model, and warns each time if it failed."""
    known = _found.setdefault(model, {})
    if name not in known:
        known[name] = divergence(model, spec)
    kl = known[name]
    if kl is not None and not kl <= MOST:  # NaN too
        warnings.warn(
            f"{name} fails its self-test on this model: on random tokens it changes what the model says next by "
            f"{kl:.2f} nats (KL), more than {MOST:g}. Take more bits, such as terse8, and measure: tersekv eval.",
            stacklevel=3,
        )


@torch.inference_mode()
def divergence(model: PreTrainedModel, spec: Spec) -> float | None:
    """KL(dense || packed) in nats, mean over the last tokens; None where packed attention does not run.

    None too for a context in which nothing would be packed.
    """
    config = model.config.get_text_config(decoder=True)
    count = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
    if count < SCORED + 64:
        return None
    ids = torch.randint(config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0)).to(model.device)
    try:
        cache = PackedCache(model.config, replace(spec, prefill="packed"))
        with attached(model):
            packed = model(input_ids=ids, past_key_values=cache, logits_to_keep=SCORED).logits
    except (InputError, ModelError):  # who uses the cache is told why, if it matters then
        return None
    dense = model(input_ids=ids, use_cache=False, logits_to_keep=SCORED).logits
    p, q = (logits[0].float().log_softmax(-1) for logits in (dense, packed))
    return float((p.exp() * (p - q)).sum(-1).mean())
