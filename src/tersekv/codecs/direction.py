"""`direction`: a norm for each token, its direction rounded per channel and brought back to length one.

The method of nd-kv-quant (software; there is no paper), there called N8+D4 with an 8-bit norm and 4-bit directions. A
channel's grid follows its own range, so keys with strong channels keep their direction; the length cannot drift.

Differs from the original: ranges are those of a block of 64 tokens and not of the whole sequence, which would be known
only at its end; norm and renormalisation are one stored number, r = |x| / |u_hat|; it has 16 bits, because 8 leave
steps that are wider than the norms of some heads vary, see docs/methods/direction.md; `codebook=shared` is a fixed
Lloyd-Max table and not one fitted to the sequence. The original, with ranges and 8-bit norms of the whole sequence, is
`direction:norm=linear8 policy=wholesequence`, for evaluation only.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tersekv.codebook import lloyd_max, table
from tersekv.codec import Codec, check_bits, check_choice
from tersekv.codecs.intn import IntN
from tersekv.layout import Layout, codes_and_scale
from tersekv.ops.lookup import nearest
from tersekv.ops.planes import pack_codes, stored, to_bytes
from tersekv.ops.recipe import Grid
from tersekv.ops.sums import channel_sum, root, unit_scale
from tersekv.packed import Packed


@dataclass(frozen=True)
class Direction(Codec):
    """`norm`: fp16, log8, or linear8, which is of a whole sequence: see `policy.wholesequence`.

    `codebook`: channel (a uniform grid for each channel) or shared (one table for all).
    """

    bits: int = 4
    norm: str = "fp16"
    codebook: str = "channel"

    def __post_init__(self) -> None:
        check_bits(self.bits, 2, 8)
        check_choice("norm", self.norm, ("fp16", "log8", "linear8"))
        check_choice("codebook", self.codebook, ("channel", "shared"))

    @property
    def channels(self) -> IntN:
        """What rounds the directions of `codebook=channel`."""
        return IntN(self.bits, axis="channel")

    def layout(self, d: int) -> Layout:
        codes, scale = codes_and_scale(d, self.bits, "log8" if self.norm == "linear8" else self.norm)
        return Layout(d, (codes, scale) if self.codebook == "shared" else (*self.channels.layout(d).planes, scale))

    def recipe(self, d: int) -> Grid:
        if self.codebook == "shared":
            return Grid(tuple(table(self.bits, d).tolist()))
        return Grid(self.channels.recipe(d).table, first="channel")

    @property
    def whole(self) -> bool:
        return self.norm == "linear8"

    def encode(self, x: Float[Tensor, "*lead block d"]) -> Packed:
        self.check_blocks()
        x, d = x.float(), x.shape[-1]
        norm = root(channel_sum(x * x))
        u = x * unit_scale(norm, d)[..., None]  # of length sqrt(d), which spares fp16 scales their small numbers
        decoded, planes = (self._shared if self.codebook == "shared" else self._by_channel)(u)
        length = root(channel_sum(decoded * decoded))
        planes["scale"] = to_bytes(torch.where(length > 0, norm / length, 0), self.norm)
        return Packed.assemble(self.layout(d), planes)

    def rounded(self, x: Float[Tensor, "b h t d"], counted: Bool[Tensor, "b h t"]) -> Float[Tensor, "b h t d"]:
        if self.codebook == "shared":
            return super().rounded(x, counted)
        x = x.float()
        norm = x.norm(dim=-1, keepdim=True)
        u = _uniform(torch.where(norm > 0, x / norm, 0), counted, self.bits)
        length = u.norm(dim=-1, keepdim=True)
        norm = _uniform(norm, counted, 8) if self.norm == "linear8" else stored(norm, self.norm)
        return torch.where(length > 0, u / length, 0) * norm

    def _shared(self, u: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        d = u.shape[-1]
        codes = nearest(u, lloyd_max(self.bits, d)[1])
        decoded = torch.from_numpy(table(self.bits, d)).to(u.device)[codes.int()]
        return decoded, {"codes": pack_codes(codes.flatten(-2), self.bits)}

    def _by_channel(self, u: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        packed = self.channels.encode(u)
        return self.channels.decode(packed), {plane.name: packed.plane(plane.name) for plane in packed.layout.planes}


def _uniform(x: Float[Tensor, "b h t n"], counted: Bool[Tensor, "b h t"], bits: int) -> Float[Tensor, "b h t n"]:
    """Each column on a uniform grid between its extremes over the counted tokens."""
    if not x.shape[2]:
        return x
    counts, infinite = counted[..., None], torch.inf
    low = torch.where(counts, x, infinite).amin(2, keepdim=True)
    step = (torch.where(counts, x, -infinite).amax(2, keepdim=True) - low) / (2**bits - 1)
    return torch.where(counts & (step > 0), ((x - low) / step).round() * step, 0) + torch.where(counts, low, 0)
