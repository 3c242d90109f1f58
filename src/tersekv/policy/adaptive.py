"""`adaptive`: each token has 2, 4, 8 or 16 bits, by what it is worth, and the average is what the codec says.

"Don't Waste Bits!", arXiv 2604.04722: with `rotated:bits=3`, tokens are packed in 2, 4 or 8 bits or stay dense, 3 bits
on average. What a token is worth says `router`: `attention`, that which the tokens after it paid to it; or a file of
`tersekv calibrate adaptive`, the paper's small network. `shuffle=SEED`, not 0, gives the same bits to tokens drawn at
random, the control. Always 64 neighbours share a budget.

Differs from the paper: a budget instead of whatever average comes; a token has its bits once it leaves the recent
window, when `router=attention` has seen who attends to it. See docs/methods/adaptive.md.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tersekv.codec import Codec
from tersekv.dense_tier import DenseTier
from tersekv.errors import InputError, SpecError
from tersekv.layout import BLOCK
from tersekv.packed_tier import PackedTier
from tersekv.policy.allocate import allocate
from tersekv.policy.base import Asked
from tersekv.policy.controller import Controller
from tersekv.policy.routed import NotedTier, RoutedTiers, RoutedWindow, noted, routed
from tersekv.ragged import join, take
from tersekv.tiers import Evicted, Tiers

BITS = (2, 4, 8, 16)
PACKED = {f"bits{bits}": bits for bits in BITS[:-1]}
DENSE = "bits16"
# Mean squared error of a value with so many bits, of its variance: Lloyd-Max tables of a normal distribution.
ERROR = np.array([0.1175, 0.0095, 4.1e-5, 0.0])


@dataclass(frozen=True)
class Adaptive(RoutedWindow):
    """The average is that of the bits of both codecs. Tokens wait dense until 64 of the same bits have come."""

    router: str = "attention"

    @property
    def learned(self) -> bool:
        """Whether the host must rate every token after the forward pass that it came with: see `rated`."""
        return self.router != "attention"

    @property
    def calibration_seconds(self) -> float | None:
        return Controller.load(self.router).about.get("seconds") if self.learned else None

    @property
    def first(self) -> int:
        """How many tokens come before the first block is due."""
        return self.sink + self.recent + BLOCK

    def tiers(self, k: Codec, v: Codec, empty: DenseTier) -> RoutedTiers:
        packed = {name: PackedTier.empty(k.with_bits(bits), v.with_bits(bits), empty) for name, bits in PACKED.items()}
        average = sum(getattr(codec, "bits") for codec in (k, v)) / 2  # noqa: B009 (known to be there)
        if not BITS[0] <= average <= BITS[-1]:
            raise SpecError(f"{average:g} bits on average: policy=adaptive has {BITS[0]} to {BITS[-1]} bits a token.")
        recent = NotedTier.of(empty, empty.k[..., :0].float())
        dense = {"sink": empty, "recent": recent, **{f"wait{bits}": empty for bits in PACKED.values()}, DENSE: empty}
        none, routes = Evicted.none(empty.lengths), torch.zeros(*empty.lengths.shape, 0, dtype=torch.uint8)
        return RoutedTiers(dense, packed, none, (*PACKED, DENSE), average, routes)

    def place(self, tiers: Tiers, fresh: DenseTier, asked: Asked | None = None) -> Tiers:
        """New tokens fill the sink, then the recent tier. Attention decides at once; the host rates after the pass."""
        if asked is None:
            raise InputError(
                "policy=adaptive needs the queries that come with tokens. Run inside `with tersekv.attached(model):`."
            )
        if self.learned and (waiting := self._unrated(tiers)).any():
            raise InputError(
                f"{waiting.max()} tokens of the recent window have not been rated yet: the router looks at what the "
                f"model says at the end of a forward pass. With prefill=packed give at most {self.room(tiers)} tokens "
                "a pass, see `PackedCache.pass_limit`; and run the whole model, inside `with tersekv.attached(model):`."
            )
        filled = routed(self._filled(tiers, NotedTier.of(fresh, self._note(fresh, *asked))))
        return filled if self.learned else self._packed(filled)

    def _note(self, fresh: DenseTier, q: Tensor, scale: float) -> Float[Tensor, "b h n w"]:
        """Of each token its scaled queries, or room for what it will be rated."""
        b, h, n, _ = fresh.k.shape
        if self.learned:
            return torch.full((b, h, n, len(BITS)), torch.nan, device=q.device)
        own = (q * scale).unflatten(1, (h, -1)).transpose(2, 3).flatten(3)
        return take(own, own.shape[2] - fresh.lengths, fresh.lengths)

    def _unrated(self, tiers: Tiers) -> Int[np.ndarray, "b h"]:
        recent = tiers.dense["recent"]
        if not recent.k.shape[2]:
            return np.zeros_like(recent.lengths)
        counted = np.arange(recent.k.shape[2]) < recent.lengths[..., None]
        return (counted & recent.tensors()["note"][..., 0].isnan().cpu().numpy()).sum(-1)

    def rated(self, tiers: Tiers, utility: Float[Tensor, "b n levels"]) -> Tiers:
        """What the host says after a forward pass: how much each level is worth to each of the last n tokens.

        A row's tokens are rated by its last ones, whatever its padding. Blocks that are due are packed.
        """
        if not (count := self._unrated(tiers)).any():
            return tiers
        recent = noted(tiers.dense["recent"])
        each = utility[:, None].expand(-1, recent.k.shape[1], -1, -1).to(recent.note)
        fresh = take(each, each.shape[2] - count, count)
        note = join(recent.note, recent.lengths - count, fresh, count)
        return self._packed(replace(routed(tiers), dense=tiers.dense | {"recent": replace(recent, note=note)}))

    def _packed(self, tiers: RoutedTiers) -> RoutedTiers:
        """Every 64 tokens that are older than the recent window get their bits and go where those are packed."""
        recent = tiers.dense["recent"]
        due = np.maximum(recent.lengths - self.recent, 0) // BLOCK * BLOCK
        if not due.any():
            return tiers
        levels = self._levels(noted(recent), due, tiers.budget)
        oldest = noted(recent.take(np.zeros_like(due), due)).plain()
        tiers = tiers.more(levels, due)
        left = recent.take(due, recent.lengths - due).owned()
        tiers = replace(tiers, dense=tiers.dense | {"recent": left})
        levels = np.where(np.arange(levels.shape[2]) < due[..., None], levels, len(BITS))
        for level, bits in enumerate(BITS):
            mine = oldest.where(torch.from_numpy(levels == level).to(recent.k.device))
            if bits == BITS[-1]:
                tiers = replace(tiers, dense=tiers.dense | {DENSE: tiers.dense[DENSE].append(mine)})
            else:
                tiers = tiers.with_more(f"bits{bits}", f"wait{bits}", mine)
        return tiers

    def _levels(self, recent: NotedTier, due: Int[np.ndarray, "b h"], average: float) -> Int[np.ndarray, "b h t"]:
        levels = np.zeros((*due.shape, due.max()), dtype=np.int64)
        for first in range(0, due.max(), BLOCK):
            rows = due > first
            window = noted(recent.take(np.full_like(due, first), np.where(rows, BLOCK + self.recent, 0)))
            index = torch.from_numpy(rows).to(recent.k.device)
            k, note = window.k[index], window.note[index]
            utility = note[:, :BLOCK].double().cpu().numpy() if self.learned else _attention_utility(k, note)
            chosen = allocate(utility, np.array(BITS), round(average * BLOCK))
            if self.shuffle:
                starts = window.positions[index][:, 0].tolist()
                rows_starts = zip(chosen, starts, strict=True)
                chosen = np.stack([_shuffled(row, self.shuffle, start) for row, start in rows_starts])
            levels[rows, first : first + BLOCK] = chosen
        return levels

    def blocks(self, held: int, block: int) -> int:
        """Of the fewest: as many tokens as can be may be waiting."""
        return max(held - self.sink - self.recent - len(PACKED) * (block - 1), 0) // block


def _attention_utility(k: Float[Tensor, "r t d"], note: Float[Tensor, "r t w"]) -> Float[np.ndarray, "r block levels"]:
    """Minus the error that a level leaves in the outputs of the recent tokens: their attention squared, times ERROR."""
    q = note[:, BLOCK:].unflatten(-1, (-1, k.shape[-1])).float()
    scores = torch.einsum("rngd,rtd->rgnt", q, k.float())
    ahead = torch.arange(k.shape[1], device=k.device) > torch.arange(BLOCK, k.shape[1], device=k.device)[:, None]
    paid = scores.masked_fill(ahead, -torch.inf).softmax(-1)[..., :BLOCK].square().sum((1, 2))
    return -paid.double().cpu().numpy()[..., None] * ERROR


def _shuffled(levels: Int[np.ndarray, "n"], seed: int, start: int) -> Int[np.ndarray, "n"]:
    """The same for every layer and head, as a router that decides for a token as a whole would do it."""
    return np.random.default_rng((seed, start)).permutation(levels)
