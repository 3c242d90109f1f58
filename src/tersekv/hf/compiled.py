"""Attention to a packed cache as one operation of a graph that `torch.compile` makes.

What a cache holds, and where, changes at every step, in Python. So a compiled graph does not look into it: it is given
the cache's ticket, a number in a tensor, by which the cache is found when the operation runs. The ticket is declared
to be written to, because storing tokens is an effect: no compiler may leave out, repeat or exchange two calls.

A model asks a cache for its length when it is traced, and the operation stores tokens when it runs. So a graph holds
one forward pass with a cache; a second one would take its positions from the length before the first.
"""

from collections.abc import Callable
from itertools import count
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tersekv.errors import CacheError

F = TypeVar("F", bound=Callable[..., Any])
_numbers = count()
_caches: WeakValueDictionary[int, Any] = WeakValueDictionary()


def untraced(function: F) -> F:
    """What a compiler does not look into: a break in its graph."""
    return cast("F", torch.compiler.disable(function))


def ticket_for(cache: Any) -> Int[Tensor, ""]:
    """A ticket by which `extend` finds a cache for as long as it lives."""
    number = next(_numbers)
    _caches[number] = cache
    with torch.inference_mode(False):  # a graph that was compiled for a normal tensor would not take another
        return torch.tensor(number)


def stored(
    ticket: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    layer: int,
    held: int,
    scale: float,
    route: str,
) -> Tensor:
    """As `PackedLayer.extend`, of one layer of a cache. Raises CacheError unless it holds `held` tokens."""
    if (now := _caches[int(ticket)].layers[layer].get_seq_length()) != held:
        raise CacheError(
            f"The cache holds {now} tokens, but held {held} when a compiled function was entered: it runs the model "
            "twice. Compile the model alone: torch.compile(model)."
        )
    # A compiled graph uses the memory of its intermediate tensors again, and a cache may keep what it is given.
    return _caches[int(ticket)].layers[layer].extend(q, k.clone(), v.clone(), mask, scale, route)


# Not by torch.library.custom_op, which costs a third of a layer's step more.
_library = torch.library.Library("tersekv", "FRAGMENT")
_library.define(
    "extend(Tensor(a!) ticket, Tensor q, Tensor k, Tensor v, Tensor? mask, int layer, SymInt held, float scale, "
    "str route) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe, torch.Tag.needs_exact_strides),
)
_library.impl("extend", stored, "CompositeExplicitAutograd")
extend = torch.ops.tersekv.extend.default


@torch.library.register_fake("tersekv::extend")
def _(
    ticket: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    layer: int,
    held: int,
    scale: float,
    route: str,
) -> Float[Tensor, "b n hq d"]:
    b, hq, n, d = q.shape
    return q.new_empty(b, n, hq, d)
