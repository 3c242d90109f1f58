"""What it costs to store a part of a cache in fewer bits, measured on what the model says next."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from tersekv.codec import Codec
from tersekv.hf.capture import Seen, observed
from tersekv.layout import BLOCK
from tersekv.ops import attend_causal
from tersekv.ops.attention import weight_variance

SINK = 4  # tokens that every policy keeps dense, and so does every change
BATCH = 16


@dataclass(frozen=True)
class Change:
    """These tokens (a slice of positions), in a layer, KV head (None: all) and sides, as `bits` would store them."""

    bits: int
    tokens: slice
    layer: int | None = None
    sides: str = "kv"
    head: int | None = None

    @property
    def heads(self) -> slice:
        return slice(None) if self.head is None else slice(self.head, self.head + 1)


@dataclass
class Prefix:
    """A dense cache of the first tokens of a window, and the tokens that follow. Its blocks begin behind the sink."""

    model: PreTrainedModel
    ids: Int[Tensor, "1 t"]
    follow: Int[Tensor, "1 m"]
    codecs: Callable[[int], tuple[Codec, Codec]]  # of keys and values, by bits
    cache: DynamicCache = field(init=False)
    hidden: Float[Tensor, "1 t width"] = field(init=False)
    spread: Float[Tensor, "1 t"] = field(init=False)

    def __post_init__(self) -> None:
        self.cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        last: list[Seen] = []
        with observed(self.model, lambda seen: last.__setitem__(slice(None), [seen])):
            decoder: Any = self.model.get_decoder()
            self.hidden = decoder(input_ids=self.ids, past_key_values=self.cache).last_hidden_state
        self.spread = _spread(last[0])
        self._coded: dict[int, dict[int, dict[str, Tensor]]] = {}

    @property
    def blocks(self) -> slice:
        """Positions of all whole blocks."""
        return slice(SINK, SINK + (self.ids.shape[1] - SINK) // BLOCK * BLOCK)

    def layers(self) -> dict[int, Any]:
        """Those that a packed cache would pack, by index."""
        every: list[Any] = self.cache.layers
        return {index: layer for index, layer in enumerate(every) if type(layer) is DynamicLayer}

    def coded(self, bits: int) -> dict[int, dict[str, Tensor]]:
        """Keys and values of every layer as `bits` would store its blocks."""
        if bits not in self._coded:
            k, v = self.codecs(bits)
            self._coded[bits] = {
                index: {"k": self._stored(k, layer.keys), "v": self._stored(v, layer.values)}
                for index, layer in self.layers().items()
            }
        return self._coded[bits]

    def _stored(self, codec: Codec, x: Float[Tensor, "1 h t d"]) -> Float[Tensor, "1 h t d"]:
        blocks = x[:, :, self.blocks].unflatten(2, (-1, BLOCK))
        whole = x.clone()
        whole[:, :, self.blocks] = codec.decode(codec.encode(blocks)).flatten(2, 3).to(x.dtype)
        return whole

    @torch.inference_mode()
    def divergences(
        self, changes: Sequence[Change], progress: Callable[[int], None] = lambda count: None
    ) -> list[float]:
        """KL(dense || changed) of the next-token distribution in nats, mean over the tokens that follow, by change.

        It is the loss increase that a change causes, in expectation over next tokens drawn from the model itself.
        """
        found: list[float] = []
        for some in (changes[start : start + BATCH] for start in range(0, len(changes), BATCH)):
            cache = deepcopy(self.cache)
            cache.batch_repeat_interleave(1 + len(some))
            layers: list[Any] = cache.layers
            for row, change in enumerate(some, 1):
                for index, coded in self.coded(change.bits).items():
                    if change.layer not in (None, index):
                        continue
                    for side, x in (("k", layers[index].keys), ("v", layers[index].values)):
                        if side in change.sides:
                            x[row, change.heads, change.tokens] = coded[side][0, change.heads, change.tokens]
            logits = self.model(input_ids=self.follow.expand(1 + len(some), -1), past_key_values=cache).logits
            logs = logits.double().log_softmax(-1)  # in fp32 the sum below has the size of one token's share
            found += (logs[0].exp() * (logs[0] - logs[1:])).sum(-1).mean(-1).tolist()
            progress(len(found))
        return found


def _spread(seen: Seen) -> Float[Tensor, "1 t"]:
    none = torch.zeros(len(seen.q), dtype=torch.int64)
    lse, doubled = (attend_causal(seen.q, seen.k, seen.k, none, scale)[1] for scale in (seen.scale, 2 * seen.scale))
    return weight_variance(lse, doubled, torch.arange(1, seen.q.shape[2] + 1, device=seen.q.device)[None])
