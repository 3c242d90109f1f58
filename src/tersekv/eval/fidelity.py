"""How near one layer's stored keys, values and attention are to its own: each number for each head and token."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tersekv.errors import InputError
from tersekv.hf.capture import Seen
from tersekv.ops import attend_causal
from tersekv.spec import Spec
from tersekv.store import Store

Queries = Float[Tensor, "hq n d"]


@dataclass(frozen=True)
class Found:
    """Values of one metric in one layer, and the position of each."""

    values: Float[np.ndarray, "heads tokens"]
    positions: Int[np.ndarray, "heads tokens"]


def relative_error(x: Float[Tensor, "*lead d"], got: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead"]:
    """|got - x| / |x|, in fp32; a zero vector that stayed zero has no error."""
    x, got = x.float(), got.float()
    wrong, size = (got - x).norm(dim=-1), x.norm(dim=-1)
    return torch.where(wrong == 0, 0, wrong / size)


def cosine(x: Float[Tensor, "*lead d"], got: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead"]:
    return torch.nn.functional.cosine_similarity(x.float(), got.float(), -1)


def logit_error(
    logits: Float[Tensor, "*lead t"], got: Float[Tensor, "*lead t"], seen: Tensor
) -> Float[Tensor, "*lead"]:
    """Standard deviation of the logits' errors over the tokens seen, weighted by the exact attention, in nats.

    A constant added to all logits of a query changes nothing in a softmax, so the weighted mean is taken off. To second
    order KL(exact attention || got) is half the square of this.
    """
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    wrong = (got - logits).masked_fill(~seen, 0)
    shift = (weights * wrong).sum(-1, keepdim=True)
    return (weights * (wrong - shift).square()).sum(-1).sqrt()


def dense_fidelity(seen: Seen) -> dict[str, Found]:
    """The yardstick: the model's own attention against fp32, on the same keys and values."""
    return _outputs(seen.exact[0], seen.out[0], torch.arange(seen.k.shape[2]))


def fidelity(seen: Seen, spec: Spec) -> dict[str, Found]:
    """One sequence through a store as decoding would do it, in pieces that end where a block becomes due.

    Keys and values: every packed token. Attention output and logits: every query that sees a packed token, with the
    model's own queries and the kernels that a host uses; the yardstick is attention in fp32 on the dense ones.
    """
    _, h, n, d = seen.k.shape
    store = Store(spec.at(seen.layer), 1, h, d, seen.k.dtype, seen.k.device)
    if len(store.tiers.packed) > 1:
        raise InputError(f"[tensors] looks at one packed tier, and {spec} has several. Leave out that section or spec.")
    outputs, logits, first = [], [], n
    for start, stop in store.pieces(n):
        q, k, v = (x[:, :, start:stop] for x in (seen.q, seen.k, seen.v))
        sees_packed = any(tier.rounded and tier.lengths.any() for tier in store.tiers.all().values())
        if sees_packed:
            first = min(first, start)
            logits.append(_logit_errors(store, seen, start, stop))
        out = store.extend(q, k, v, None, seen.scale)
        outputs += [out[0]] if sees_packed else []
    found = _stored(store, seen) | _by_own_keys(store, seen)
    if outputs:
        positions = torch.arange(first, n)
        found |= _outputs(seen.exact[0, :, first:], torch.cat(outputs, 1), positions)
        found["logit_error"] = _found(torch.cat(logits, 1), positions)
    return found


def _logit_errors(store: Store, seen: Seen, start: int, stop: int) -> Float[Tensor, "hq n"]:
    """Of the queries `start` to `stop`, over what the store holds and the piece itself, which is dense."""
    history = store.decoded()
    kept = history.positions[0, :, :, None].long().expand(-1, -1, seen.k.shape[3])
    own = seen.k[0, :, start:stop].float()
    true = torch.cat((seen.k[0].float().gather(1, kept), own), 1)
    got = torch.cat((history.k[0].float(), own), 1)
    positions = torch.cat((history.positions[0], torch.arange(start, stop).expand(len(own), -1).to(kept.device)), 1)
    q = seen.q[0, :, start:stop].float().unflatten(0, (len(own), -1)) * seen.scale
    visible = positions[:, None, None] <= torch.arange(start, stop, device=kept.device)[:, None]
    exact, packed = (torch.einsum("hgnd,htd->hgnt", q, k) for k in (true, got))
    return logit_error(exact, packed, visible).flatten(0, 1)


def _stored(store: Store, seen: Seen) -> dict[str, Found]:
    """Errors of all packed keys and values, as the store decodes them."""
    every = zip(store.tiers.all().values(), store.tiers.decoded(), strict=True)
    tiers = [read for tier, read in every if tier.rounded and tier.lengths.any()]
    found: dict[str, Found] = {}
    for side in ("k", "v") if tiers else ():
        parts = []
        for tier in tiers:
            where = tier.positions[0].long()
            true = getattr(seen, side)[0].gather(1, where[..., None].expand(-1, -1, seen.k.shape[3]))
            parts.append((true, getattr(tier, side)[0], where))
        true, got, positions = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
        found[f"{side}_error"] = _found(relative_error(true, got), positions)
        found[f"{side}_cosine"] = _found(cosine(true, got), positions)
    return found


def _by_own_keys(store: Store, seen: Seen) -> dict[str, Found]:
    """The metric of nd-kv-quant: cosine of attention whose queries are the keys, stored keys those of stored ones.

    Of the whole sequence at its end, where a cache still holds every token. A key is nearest to itself, so this sees
    less than the model's queries do.
    """
    held, (n, d) = store.decoded(), seen.k.shape[2:]
    if (held.lengths < n).any():
        return {}
    start, scale = torch.zeros(1, dtype=torch.int64), d**-0.5
    exact, got = (attend_causal(k, k, v, start, scale)[0][0] for k, v in ((seen.k, seen.v), (held.k, held.v)))
    return {"self_cosine": _found(cosine(exact, got), torch.arange(n))}


def _outputs(exact: Queries, got: Queries, positions: Tensor) -> dict[str, Found]:
    return {
        "output_error": _found(relative_error(exact, got), positions),
        "output_cosine": _found(cosine(exact, got), positions),
    }


def _found(values: Float[Tensor, "heads tokens"], positions: Tensor) -> Found:
    return Found(values.double().cpu().numpy(), positions.expand_as(values).cpu().numpy())
