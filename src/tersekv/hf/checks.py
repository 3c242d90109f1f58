"""Checks on what a model hands to the cache. Each error names the layer and says what to do."""

from math import isfinite

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tersekv.errors import CacheFileError, InputError
from tersekv.files import fingerprint
from tersekv.spec import Spec


def check_finite(layer: int, start: int, k: Tensor, v: Tensor) -> None:
    """Raise InputError naming layer, side and position of the first NaN or Inf."""
    # One look for both: a product can overflow, but never hide a NaN or Inf.
    if isfinite(torch.dot(k.detach().flatten(), v.detach().flatten())):
        return
    for side, x in (("keys", k), ("values", v)):
        if torch.isfinite(x).all():
            continue
        b, h, t, c = (~torch.isfinite(x)).nonzero()[0].tolist()
        raise InputError(
            f"Layer {layer}: {side} hold {x[b, h, t, c].item()} at sequence {b}, head {h}, position {start + t}, "
            f"channel {c}. The cache is unchanged; look for an overflow in the model (fp16?) or in its input."
        )


def check_fitted(model: PreTrainedModel, spec: Spec) -> None:
    """Raise CacheFileError where a codec was fitted to another model."""
    for codec in (spec.k, spec.v):
        if codec.fitted is not None and codec.fitted.fingerprint != fingerprint(model):
            raise CacheFileError(
                f"{spec} was fitted to another model ({codec.fitted.model}), whose keys and values are not this one's. "
                "Fit to this: tersekv calibrate METHOD MODEL --text FILE."
            )


def check_like(layer: int, held: Tensor, given: Tensor) -> None:
    """Raise InputError unless the new tensor has the batch, heads, head dim, dtype and device of those held."""
    (b, h, _, d), (given_b, given_h, _, given_d) = held.shape, given.shape
    if (b, h, d, held.dtype, held.device) == (given_b, given_h, given_d, given.dtype, given.device):
        return
    facts = {
        "sequences": (held.shape[0], given.shape[0]),
        "KV heads": (held.shape[1], given.shape[1]),
        "head dim": (held.shape[3], given.shape[3]),
        "dtype": (held.dtype, given.dtype),
        "device": (held.device, given.device),
    }
    for what, (has, got) in facts.items():
        if has != got:
            raise InputError(
                f"Layer {layer}: this cache holds {what} {has}, but was given {got}. The cache is unchanged; "
                "call cache.reset() or make a new cache for another batch or model."
            )
