"""What a fitted codec's errors cost on held-out windows, beside those of a codec that needs no fitting."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tersekv.calibrate.measuring import SINK
from tersekv.calibrate.windows import Sample
from tersekv.codec import Codec
from tersekv.layout import BLOCK
from tersekv.terminal import Stages


def blocks(x: Float[Tensor, "1 h n d"]) -> Float[Tensor, "h blocks block d"]:
    """Whole blocks, as a cache packs them."""
    return x[0, :, : x.shape[2] // BLOCK * BLOCK].unflatten(1, (-1, BLOCK)).float()


def compared(samples: list[Sample], side: str, codec: Callable[[int], Codec], plain: Codec, stages: Stages) -> float:
    """sum (g' e)^2 of the errors e of `codec(layer)` and the gradients g, over that of `plain`, over all layers."""
    sums, layers = [0.0, 0.0], samples[0].layers
    for number, layer in enumerate(layers):
        stages(f"held-out windows, {side}", number / len(layers))
        for sample in samples:
            x, g = blocks(sample.values(layer, side)), blocks(sample.beside(layer, side, "gradient")).flatten(1, 2)
            seen = g.mT @ g
            starts = torch.arange(x.shape[1], dtype=torch.int32).expand(1, *x.shape[:2]) * BLOCK + SINK
            for index, each in enumerate((codec(layer), plain)):
                packed = each.encode_at(x[None], starts) if each.positional else each.encode(x[None])
                e = (each.decode(packed)[0] - x).flatten(1, 2)
                sums[index] += float(((e @ seen) * e).sum())
    return sums[0] / sums[1]
