"""Keys and values of windows of a text, and the gradients of the model's loss with respect to them.

Labels are drawn from the model's own distribution, so that sums of squared gradients are Fisher information: what an
error of a key or value does to the distribution of the next token, to second order.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tersekv.calibrate.session import Session
from tersekv.calibrate.windows import bf16, kept
from tersekv.hf.capture import Seen, watched

METHOD = "gradients"  # the name of such windows: all methods that need gradients share them


def read(session: Session, item: str) -> dict[str, Tensor]:
    """By layer and side keys or values and their `gradient`; of keys also `queries`, (1, h, d, d) sums of q' q."""
    model: Any = session.subject.model
    seen: list[Seen] = []
    ids = session.subject.window(item)
    with torch.inference_mode(False), torch.enable_grad(), watched(model, seen.append):
        opening = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=opening, use_cache=False).logits[0]
        generator = torch.Generator(logits.device).manual_seed(session.settings.seed)
        labels = torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator)[:, 0]
        sides = [x for one in seen for x in (one.k, one.v)]
        gradients = iter(torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), sides))
    found: dict[str, Tensor] = {}
    for one in seen:
        for side, x in (("k", one.k), ("v", one.v)):
            name = f"{one.layer}.{side}"
            found[name] = bf16(kept(x.detach()))
            found[f"{name}.gradient"] = bf16(kept(next(gradients)))
        q = one.q.detach().unflatten(1, (one.k.shape[1], -1)).flatten(2, 3)
        found[f"{one.layer}.k.queries"] = (q.mT @ q).contiguous()
    return found
