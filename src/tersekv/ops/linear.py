"""Linear layers of a few tokens on a processor: they take as long as it takes to read their weights.

PyTorch takes two to three times as long: it arranges bf16 weights anew for every product, and reads fp32 ones slowly.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tersekv.errors import InputError
from tersekv.ops import native

FEW = 8  # vectors up to which one pass over the weights is faster than PyTorch's products of matrices
PLAIN = (Tensor, torch.nn.Parameter)  # and not what stands for numbers that are stored otherwise
MULTIPLE = 16  # of the inputs of a layer, the floats of the widest register


def takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `linear` computes this product, and nobody wants its gradient."""
    like = x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in native.DTYPES and type(weight) in PLAIN
    if not like or not 0 < x.numel() <= FEW * weight.shape[1] or weight.shape[1] % MULTIPLE or native.missing():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    return weight.is_contiguous() and (bias is None or bias.dtype == x.dtype) and not torch.is_autocast_enabled("cpu")


def linear(
    x: Float[Tensor, "*tokens inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, "outputs"] | None = None,
    isa: str = "",
) -> Float[Tensor, "*tokens outputs"]:
    """x weight^T + bias, in fp32, rounded once to the type of all three.

    Any number of vectors; up to FEW are fast. Raises InputError for other types, for weights that are not contiguous,
    and for inputs that are no multiple of MULTIPLE.
    """
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    try:
        given = [x if x is None else native.array(x.detach()) for x in (x.contiguous(), weight, bias)]
        native._native.linear(*given, native.array(y), isa, torch.get_num_threads())
    except ValueError as error:
        raise InputError(str(error)) from None
    except (TypeError, BufferError):
        shown = (f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in (x, weight, bias) if x is not None)
        raise InputError(
            f"A native linear layer cannot take {', '.join(shown)}. Allowed: inputs, weights and bias in memory, in "
            "one of fp32, fp16 and bf16, weights contiguous."
        ) from None
    return y


# `linear` as one operation of a graph that `torch.compile` makes. (torch.library.custom_op costs 15 us a call more.)
_library = torch.library.Library("tersekv", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("linear", linear, "CPU")
compiled = torch.ops.tersekv.linear.default


@torch.library.register_fake("tersekv::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
