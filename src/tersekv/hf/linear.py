"""The linear layers of an attached model on a processor: a few tokens go to native code. See `ops.linear`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tersekv.ops import linear


@contextmanager
def few_tokens(model: nn.Module) -> Iterator[None]:
    """Within the block, whatever `ops.linear` takes does not go to PyTorch. Subclasses, and layers whose `forward`
    somebody else has exchanged, are left alone."""
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and "forward" not in vars(layer)]
    ours = [(vars(layer), _forward(layer)) for layer in layers]
    for attributes, forward in ours:
        attributes["forward"] = forward
    try:
        yield
    finally:
        for attributes, forward in ours:
            if attributes.get("forward") is forward:  # and not what was put there meanwhile
                del attributes["forward"]


def _forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight, bias = layer.weight, layer.bias
        if not linear.takes(x, weight, bias):
            return nn.functional.linear(x, weight, bias)
        compute = linear.compiled if torch.compiler.is_compiling() else linear.linear
        return compute(x, weight, bias)

    return forward
