"""The linear layers of an attached model on a processor: a few tokens go to native code. See `ops.linear`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tersekv.hf.exchange import as_made, exchanged
from tersekv.ops import linear


@contextmanager
def few_tokens(model: nn.Module) -> Iterator[None]:
    """Within the block, whatever `ops.linear` takes does not go to PyTorch. Subclasses, and layers whose `forward`
    somebody else has exchanged, are left alone."""
    with exchanged([(x, _forward(x)) for x in model.modules() if type(x) is nn.Linear and as_made(x)]):
        yield


def _forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight, bias = layer.weight, layer.bias
        if not linear.takes(x, weight, bias):
            return nn.functional.linear(x, weight, bias)
        compute = linear.compiled if torch.compiler.is_compiling() else linear.linear
        return compute(x, weight, bias)

    return forward
