"""What a model says of its tokens at the end of a forward pass, for a policy that routes them by it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tersekv.files import fingerprint
from tersekv.policy.adaptive import Adaptive
from tersekv.policy.controller import Controller, rarity
from tersekv.spec import Spec

TILE = 256  # tokens whose logits are held at a time


@runtime_checkable
class Rated(Protocol):
    """A cache that wants to know what the model said."""

    def rate(self, model: PreTrainedModel, ids: Tensor | None, hidden: Tensor) -> None: ...


def controller_of(model: PreTrainedModel, spec: Spec) -> Controller | None:
    """The controller that the spec's policy names. Raises CacheFileError unless it was trained on this model."""
    policy = spec.policy
    if not isinstance(policy, Adaptive) or not policy.learned:
        return None
    return Controller.load(policy.router, fingerprint(model)).to(model.device)


@torch.inference_mode()
def signals(
    model: PreTrainedModel,
    ids: Int[Tensor, "b n"],
    hidden: Float[Tensor, "b n width"],
    spread: Float[Tensor, "b n"],
    counts: Int[Tensor, "vocabulary"],
) -> Float[Tensor, "b n 4"]:
    """The features of arXiv 2604.04722, in the order of `FEATURES`: all of the past, nothing of what follows a token.

    Entropy (nats) and confidence are of the distribution after the token; variance is the logarithm of that of its
    attention weights in the last layer, which spans decades. Hosts compute logits only where they are asked for, so
    they are computed here, in tiles: one output projection more for each token.
    """
    head: Any = model.get_output_embeddings()
    entropy, confidence = [], []
    for start in range(0, hidden.shape[1], TILE):
        logs = head(hidden[:, start : start + TILE]).float().log_softmax(-1)
        entropy.append(-(logs.exp() * logs).sum(-1))
        confidence.append(logs.amax(-1).exp())
    parts = torch.cat(entropy, 1), rarity(ids, counts), spread.clamp(min=1e-12).log(), torch.cat(confidence, 1)
    return torch.stack([part.float() for part in parts], -1)


@contextmanager
def rated(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, a cache that wants to know is told at the end of each forward pass."""

    def after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, Rated):
            cache.rate(model, args[0] if args else kwargs.get("input_ids"), output.last_hidden_state)

    handle = model.get_decoder().register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
