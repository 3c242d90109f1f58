"""A decoder layer of Llama's form around its attention, for a few tokens on a processor: two calls of native code.

One by one, its norms, products, rotations and sums are some 35 operations of PyTorch, whose calls take as long as it
takes to read two thirds of the weights of a small model.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from tersekv.errors import InputError
from tersekv.ops import native

Linear = tuple[Tensor, Tensor | None]  # weight (out, in) and bias (out)


@dataclass(frozen=True)
class Weights:
    """A layer's, all of one type: y = h + down(silu(gate(n)) * up(n)), where h = x + o(attention), n = post_norm(h).

    Attention gets the heads of q, k and v of input_norm(x), of which those of q and k are normed where there are
    q_norm and k_norm, and then rotated. Norms divide by the root of the mean square, plus eps, and have (width) gains.
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    d: int  # of a head

    @property
    def tensors(self) -> list[Tensor]:
        values = [getattr(self, field.name) for field in fields(self)]
        found = [x for value in values for x in (value if isinstance(value, tuple) else (value,))]
        return [x for x in found if isinstance(x, Tensor)]


class DecoderLayer:
    """Computes in fp32, and rounds once: queries, keys and values, and the output."""

    def __init__(self, weights: Weights) -> None:
        """Raises InputError for weights that are not of one type, contiguous and in memory, or do not fit."""
        w, like = weights, weights.q[0]
        try:
            linear = [tuple(map(_array, one)) for one in (w.q, w.k, w.v, w.o, w.gate, w.up, w.down)]
            norms = [_array(one) for one in (w.input_norm, w.post_norm, w.q_norm, w.k_norm)]
            self._native = native._native.DecoderLayer(linear, norms, w.eps, w.d)
        except ValueError as error:
            raise InputError(str(error)) from None
        except (TypeError, BufferError):
            raise InputError(
                f"A native decoder layer cannot take weights such as {tuple(like.shape)} {like.dtype} on "
                f"{like.device}. Allowed: contiguous, in memory, in one of fp32, fp16 and bf16."
            ) from None
        self.d, self.heads = w.d, [x[0].shape[0] // w.d for x in (w.q, w.k, w.v)]

    def project(
        self,
        x: Float[Tensor, "b n width"],
        cos: Float[Tensor, "#b n d"],
        sin: Float[Tensor, "#b n d"],
        isa: str = "",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b, hq, n, d), keys and values (b, h, n, d)."""
        b, n, _ = x.shape
        y = x.new_empty(b, n, sum(self.heads), self.d)
        if cos.shape[0] != b:
            if cos.shape != (1, n, self.d):
                raise InputError(f"Cosines {tuple(cos.shape)}. Allowed: ({b} or 1, {n}, {self.d}).")
            cos, sin = cos.expand(b, n, self.d).contiguous(), sin.expand(b, n, self.d).contiguous()
        self._call(self._native.project, (x, cos, sin, y), isa)
        q, k, v = y.transpose(1, 2).split_with_sizes(self.heads, 1)
        return q, k, v

    def finish(
        self, attended: Float[Tensor, "b n hq d"], x: Float[Tensor, "b n width"], isa: str = ""
    ) -> Float[Tensor, "b n width"]:
        """The layer's output, from what attention gave, and from its input."""
        y = torch.empty_like(x)
        self._call(self._native.finish, (attended, x, y), isa)
        return y

    def _call(self, half: Callable[..., None], tensors: tuple[Tensor, ...], isa: str) -> None:
        try:
            half(*[native.array(x.contiguous()) for x in tensors], isa, torch.get_num_threads())
        except ValueError as error:
            raise InputError(str(error)) from None


def _array(x: Tensor | None) -> object:
    return None if x is None else native.array(x.detach())
