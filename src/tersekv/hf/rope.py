"""How a model turns its keys, found in the model and tried on it."""

from typing import Any

import torch
from transformers import PreTrainedModel

from tersekv.errors import ModelError
from tersekv.hf.capture import Seen, observed
from tersekv.ops.rope import turned

SEEN = 130  # tokens that frequencies are tried on


def frequencies(model: PreTrainedModel) -> dict[int, tuple[float, ...]]:
    """Radians a token of each pair of channels, by packable layer.

    Raises ModelError for a model without them, or whose keys do not follow them: equal tokens that see equal tokens
    differ in nothing but their position, so turned back their keys are all the same.
    """
    rotary: Any = getattr(model.get_decoder(), "rotary_emb", None)
    if rotary is None:
        raise ModelError(f"{type(model).__name__} has no rotary positions to turn back. Use --rope after.")
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    found: dict[int, tuple[float, ...]] = {}

    def look(seen: Seen) -> None:
        kind = kinds[seen.layer] if seen.layer < len(kinds) else ""
        own = getattr(rotary, f"{kind}_inv_freq", getattr(rotary, "inv_freq", None))
        if own is None:
            return
        found[seen.layer] = tuple(own.double().tolist())
        k = turned(seen.k.float(), torch.arange(SEEN, device=seen.k.device), found[seen.layer], back=True)
        if (k - k[:, :, :1]).norm() > 0.02 * k.norm():
            raise ModelError(
                f"Layer {seen.layer} of {type(model).__name__} does not turn keys by its frequencies, in pairs of "
                "halves. Use --rope after."
            )

    with observed(model, look):
        model(input_ids=torch.full((1, SEEN), 11, device=model.device), use_cache=False)
    if not found:
        raise ModelError(f"The frequencies of {type(model).__name__}'s positions are not known. Use --rope after.")
    return found
