"""Next-token distributions with packed caches against the dense cache, over the same text, in one pass.

All caches advance together, chunk by chunk, so the dense logits are never kept and every cache sees the same text.
With `prefill=packed` in a spec each token sees what decoding token by token would show it, whatever the chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from tersekv.errors import InputError
from tersekv.hf import PackedCache, attached, cache
from tersekv.hf.report import cache_report
from tersekv.spec import Spec


@dataclass
class Divergence:
    """Per scored position: KL(dense || packed) in nats, top-1 agreement, and the loss of the true next token."""

    kl: list[Tensor] = field(default_factory=list)
    agree: list[Tensor] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)

    def add(self, dense: Float[Tensor, "n vocab"], packed: Float[Tensor, "n vocab"], target: Int[Tensor, "n"]) -> None:
        p, q = dense.float().log_softmax(-1), packed.float().log_softmax(-1)
        self.kl.append((p.exp() * (p - q)).sum(-1).cpu())
        self.agree.append((p.argmax(-1) == q.argmax(-1)).float().cpu())
        self.loss.append(-q.gather(-1, target[:, None])[:, 0].cpu())

    def parts(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return self.kl, self.agree, self.loss

    def summary(self) -> dict[str, float]:
        """Mean, standard error over positions and 99th percentile of KL; top-1 agreement; perplexity."""
        kl, agree, loss = map(torch.cat, self.parts())
        return {
            "kl_mean": kl.mean().item(),
            "kl_standard_error": (kl.std() / len(kl) ** 0.5).item() if len(kl) > 1 else 0.0,
            "kl_p99": kl.quantile(0.99).item(),
            "kl_max": kl.max().item(),
            "top1": agree.mean().item(),
            "perplexity": loss.mean().exp().item(),
            "positions": len(kl),
        }


@dataclass
class Arm:
    """One cache under test; `spec` None is the dense cache of transformers."""

    spec: Spec | None
    cache: Cache
    divergence: Divergence = field(default_factory=Divergence)
    seconds: float = 0.0

    def bytes(self) -> dict[str, Any]:
        report = cache_report("dense", self.cache.layers)
        return report.totals()


def arms(model: PreTrainedModel, specs: list[Spec]) -> list[Arm]:
    dense = Arm(None, DynamicCache(config=model.config.get_text_config(decoder=True)))
    return [dense, *(Arm(spec, cache(model, spec)) for spec in specs)]


def compare(
    model: PreTrainedModel,
    ids: Int[Tensor, "1 t"],
    chosen: list[Arm],
    chunk: int = 512,
    score_from: int = 128,
    progress: Callable[[float], None] = lambda share: None,
) -> None:
    """Run `ids` through every arm, the dense one first, and score positions from `score_from` on.

    Raises InputError if no position is left to score.
    """
    t = ids.shape[1]
    if t < score_from + 2:
        raise InputError(f"{t} tokens leave nothing to score from position {score_from} on. Give a longer text.")
    for step, (start, stop) in enumerate(_chunks(t - 1, chunk)):
        dense: Tensor | None = None
        first = max(score_from - start, 0)
        for number, arm in enumerate(chosen):
            logits = forward(model, ids[:, start:stop], arm)[first:]
            dense = logits if dense is None else dense
            if len(logits):
                arm.divergence.add(dense, logits, ids[0, start + first + 1 : stop + 1])
            progress((step + (number + 1) / len(chosen)) / len(range(0, t - 1, chunk)))


def _chunks(t: int, chunk: int) -> Iterator[tuple[int, int]]:
    for start in range(0, t, chunk):
        yield start, min(start + chunk, t)


def forward(model: PreTrainedModel, ids: Int[Tensor, "1 n"], arm: Arm) -> Float[Tensor, "n vocab"]:
    """The logits of all positions; adds to the arm's seconds."""
    began = perf_counter()
    logits = read(model, ids, arm.cache)[0]
    if logits.is_cuda:
        torch.cuda.synchronize()
    arm.seconds += perf_counter() - began
    return logits


@torch.inference_mode()
def read(model: PreTrainedModel, ids: Int[Tensor, "b n"], into: Cache, keep: int = 0) -> Float[Tensor, "b kept vocab"]:
    """In one pass, or in as many as let each token see what decoding would show it.

    Logits of all positions, or of the last `keep` of each pass.
    """
    parts, start = [], 0
    with attached(model):  # whatever the cache, so that what else is faster then is nobody's gain
        while start < ids.shape[1]:
            stop = start + ((into.pass_limit() if isinstance(into, PackedCache) else None) or ids.shape[1])
            parts.append(model(input_ids=ids[:, start:stop], past_key_values=into, logits_to_keep=keep).logits)
            start = stop
    return torch.cat(parts, 1)
