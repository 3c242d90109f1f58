"""The cache of one attention layer: its tiers, the policy that fills them, and attention over all of them."""

from collections.abc import Callable, Iterator
from copy import copy

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tersekv.dense_tier import DenseTier
from tersekv.device_steps import refusal, tail_behind
from tersekv.device_tail import DeviceTail
from tersekv.ops import attend_alone, attend_causal, merge
from tersekv.ops.attention import weight_variance
from tersekv.policy.base import Asked
from tersekv.ragged import take
from tersekv.spec import Spec
from tersekv.tail import Tail
from tersekv.tiers import Tiers

Padding = Int[np.ndarray, "b"] | None  # tokens at the left of a chunk that belong to no sequence; None: there are none
State = tuple[Tiers, Tail | DeviceTail | None, int]  # tiers, and how many tokens of a tail behind them


class Store:
    """Keys and values of one layer under one spec. A failed call leaves it unchanged."""

    def __init__(
        self,
        spec: Spec,
        b: int,
        h: int,
        d: int,
        dtype: torch.dtype,
        device: torch.device,
        room: int | None = None,
    ) -> None:
        """`room`: tokens of a sequence that a GPU keeps memory for; None: a little more than there are.

        Raises SpecError if a codec does not fit head dim `d`.
        """
        self.spec, self.room = spec, room
        self.steady = True  # no sequence was selected or cropped since the last step
        empty = DenseTier.empty(b, h, d, dtype, device)
        self.like = empty.k  # what keys and values must be like
        # A layer's state. Nothing that it refers to is ever changed, so it can be kept, and returned to.
        self.state: State = (spec.policy.tiers(spec.k, spec.v, empty), None, 0)

    def at(self, state: State) -> "Store":
        """Another store like this one, in a state that it was in."""
        other = copy(self)
        other.state, other.like = state, self._like(len(state[0].seen))
        return other

    def _like(self, b: int) -> Float[Tensor, "b h 0 d"]:
        return self.like.new_empty((b, *self.like.shape[1:]))

    @property
    def tiers(self) -> Tiers:
        """All tokens, by tier. Those that a decoding step left waiting are given to the policy first."""
        self._settle()
        return self.state[0]

    @tiers.setter
    def tiers(self, tiers: Tiers) -> None:
        self.state = (tiers, None, 0)

    def _settle(self) -> None:
        _, tail, count = self.state
        if tail is not None:
            self.state = (tail.settled(self.spec.policy, count), None, 0)

    @property
    def lengths(self) -> Int[np.ndarray, "b"]:
        """Real tokens of each sequence, padding not counted."""
        tiers, _, waiting = self.state
        return tiers.seen[:, 0] + waiting

    def append(
        self, k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"], padding: Padding, asked: Asked | None = None
    ) -> None:
        """Store new tokens; those that make a block due are encoded. `asked`: the queries that came with them."""
        tiers, (b, h, n, _) = self.tiers, k.shape
        start = np.zeros((b, h), dtype=np.int64) if padding is None else np.broadcast_to(padding[:, None], (b, h))
        count = n - start
        slots = np.arange(int(count.max(initial=0)))
        positions = torch.from_numpy((tiers.seen[..., None] + slots).astype(np.int32)).to(k.device)
        fresh = DenseTier(take(k, start, count), take(v, start, count), positions, count)
        self.tiers = self.spec.policy.place(tiers, fresh, asked)

    def step(
        self,
        q: Float[Tensor, "b hq n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n d"],
        scale: float,
        route: str = "fused",
        moved: Callable[[], None] = lambda: None,
    ) -> Float[Tensor, "b hq n d"] | None:
        """`extend` for a few tokens without padding, in one native call, or in three launches on a GPU.

        None, and nothing is stored, where native code cannot do all of it, tokens are not finite or not like those
        held, nothing is stored yet (the host's own kernel begins), or a block becomes due among the new tokens.
        On a GPU the device is not waited for: see `DeviceTail.claim` for tokens that are not finite. `moved` is called
        there, before anything is stored, when the tokens held were copied to memory with room.
        """
        if route == "decoded":
            return None
        if q.device.type == "cuda":
            return self._step_on_device(q, k, v, scale, moved) if route == "fused" else None
        (tiers, tail, count), n = self.state, q.shape[2]
        if not isinstance(tail, Tail) or not tail.claim(count, n):
            tiers, count = self.tiers, 0
            tail = Tail.behind(tiers, self.spec.policy, q) if tiers.seen.any() else None
            if tail is None or not tail.claim(0, n):
                return None
        out = tail.step(q, k, v, count, scale, route == "exact")
        if out is not None:
            self.state = (tiers, tail, count + n)
            if tail.full(count + n):
                self._settle()  # a block may be due
        return out

    def _step_on_device(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, moved: Callable[[], None]
    ) -> Tensor | None:
        (tiers, tail, count), n = self.state, q.shape[2]
        if not isinstance(tail, DeviceTail) or not tail.claim(count, n):
            tail, count = self._with_room(q), 0
            if tail is None:
                return None
            tiers = tail.tiers
            self.state = (tiers, tail, 0)
            moved()
            if not tail.claim(0, n):
                return None
        self.state = (tiers, tail, count + n)
        return tail.step(q, k, v, scale)

    def _with_room(self, q: Tensor) -> DeviceTail | None:
        """The tokens where a step on a GPU can write, if it can.

        Not for who exchanges or crops sequences at every step: there they would be moved each time.
        """
        steady, self.steady = self.steady, True
        if not steady or not self.lengths.any():
            return None
        return tail_behind(self.tiers, self.spec.policy, self.room, q)

    def ready(self, n: int) -> DeviceTail | None:
        """Where the next `n` tokens are a matter of launches alone, which a graph can hold. Packs what is due."""
        _, tail, count = self.state
        return tail if isinstance(tail, DeviceTail) and tail.takes(count, n) else None

    def refusal(self) -> str:
        """Why `ready` never finds a place on a GPU; empty if it does."""
        return refusal(self.state[0], self.spec.policy)

    def replayed(self, n: int) -> None:
        """A graph was replayed in which `step` stored `n` tokens; see `hf.graph`."""
        tiers, tail, count = self.state
        assert isinstance(tail, DeviceTail)
        tail.wrote(n)
        self.state = (tiers, tail, count + n)

    def kept(self) -> State:
        """A state that can be returned to however long this store goes on."""
        if isinstance(self.state[1], DeviceTail):
            self._settle()
        return self.state

    def extend(
        self,
        q: Float[Tensor, "b hq n d"],
        k: Float[Tensor, "b h n d"],
        v: Float[Tensor, "b h n d"],
        padding: Padding,
        scale: float,
        route: str = "fused",
    ) -> Float[Tensor, "b hq n d"]:
        """Attend from new tokens to all stored ones and causally to each other, then store them.

        With `prefill=packed` the chunk is taken in pieces that end where a block becomes due, so each token sees
        exactly what decoding token by token would show it; with `prefill=exact` a chunk sees itself undamaged.
        Routes: "fused" attends to packed tiers where they lie; "exact" does so in fp32 where kernels would compute in
        8-bit integers; "decoded" unpacks the whole history into one dense tier, slow, and the check on the others.
        """
        if padding is None and (out := self.step(q, k, v, scale, route)) is not None:
            return out
        outputs = []
        for start, stop in self.pieces(k.shape[2]):
            now_q, now_k, now_v = (x[:, :, start:stop] for x in (q, k, v))
            pads = None if padding is None else np.clip(padding - start, 0, stop - start)
            outputs.append(self._attend(now_q, now_k, now_v, pads, scale, route))
            self.append(now_k, now_v, pads, (now_q, scale))
        return torch.cat([out.to(q.dtype) for out in outputs], 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, pads: Padding, scale: float, route: str) -> Tensor:
        tiers = [self.decoded()] if route == "decoded" else self.tiers.all().values()
        stored = [tier.attend(q, scale, route == "exact") for tier in tiers if tier.lengths.any()]
        if not stored and pads is None:
            return attend_alone(q, k, v, scale)
        padding = torch.zeros(len(q), dtype=torch.int64) if pads is None else torch.from_numpy(pads)
        return merge([*stored, attend_causal(q, k, v, padding, scale)])[0]

    def spread(
        self, q: Float[Tensor, "b hq n d"], k: Float[Tensor, "b h n d"], padding: Padding, scale: float
    ) -> Float[Tensor, "b n"]:
        """Variance of the attention weights of new tokens that are not stored yet, mean over heads. Two passes."""
        pads = torch.zeros(len(q), dtype=torch.int64) if padding is None else torch.from_numpy(padding)
        stored = [tier for tier in self.tiers.all().values() if tier.lengths.any()]

        def lse(factor: float) -> Tensor:
            parts = [tier.attend(q, factor)[1] for tier in stored] + [attend_causal(q, k, k, pads, factor)[1]]
            return torch.stack([part.float() for part in parts]).logsumexp(0)

        own = torch.arange(1, q.shape[2] + 1) - pads[:, None] + torch.from_numpy(self.lengths)[:, None]
        return weight_variance(lse(scale), lse(2 * scale), own.clamp(min=1).to(q.device))

    def pieces(self, n: int) -> Iterator[tuple[int, int]]:
        """Start and stop of the parts in which `n` new tokens are taken; store each part before asking for the next."""
        start = 0
        while start < n:
            room = n if self.spec.prefill == "exact" else self.spec.policy.room(self.tiers)
            stop = min(start + room, n)
            yield start, stop
            start = stop

    def decoded(self) -> DenseTier:
        """Every stored token in the order of its position, unpacked."""
        whole, *parts = self.tiers.decoded()
        for part in parts:
            whole = whole.append(part)
        return whole.sorted()

    def crop(self, lengths: Int[np.ndarray, "b"]) -> None:
        """Keep the first `lengths` real tokens of each sequence; see the policy for a block that is cut through."""
        self.tiers, self.steady = self.spec.policy.crop(self.tiers, lengths), False

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        """Sequences `rows`, in that order; a sequence may repeat."""
        self.tiers, self.steady = self.tiers.select(rows), False
        self.like = self._like(len(rows))
