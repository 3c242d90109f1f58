"""Between the bytes of a plane and its numbers, in the linear order. Bit-exact, and the same in every backend."""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tersekv.packed import Packed

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LOG8_STEPS, LOG8_ZERO = 12, 144  # steps an octave; the code of 1.0; codes 1..255 span 2^-11.9 to 2^9.25


def pack_codes(codes: UInt8[Tensor, "*lead n"], bits: int) -> UInt8[Tensor, "*lead m"]:
    """Little-endian bit stream: code i occupies bits `bits*i` and up. `n` is a multiple of 8."""
    shifts = bits * torch.arange(8, device=codes.device)
    words = (codes.unflatten(-1, (-1, 8)).long() << shifts).sum(-1)
    return (words[..., None] >> 8 * torch.arange(bits, device=codes.device)).to(torch.uint8).flatten(-2)


def unpack_codes(stream: UInt8[Tensor, "*lead m"], bits: int) -> UInt8[Tensor, "*lead n"]:
    """Inverse of `pack_codes`: eight codes from every `bits` bytes."""
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=stream.device)
        return ((stream[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
    word = torch.int32 if bits == 3 else torch.int64
    chunks = stream.unflatten(-1, (-1, bits)).to(word)
    words = sum(chunks[..., i] << 8 * i for i in range(bits))
    shifts = bits * torch.arange(8, dtype=word, device=stream.device)
    return ((words[..., None] >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(-2)  # type: ignore[index]


@lru_cache
def log8_edges() -> tuple[np.ndarray, np.ndarray]:
    """Values of codes 0..255, and the fp32 edges between codes 1..255 (half a step, geometrically)."""
    steps = np.arange(256, dtype=np.float64) - LOG8_ZERO
    values = np.where(np.arange(256) == 0, 0.0, 2 ** (steps / LOG8_STEPS))
    edges = 2 ** ((steps[1:-1] + 0.5) / LOG8_STEPS)
    return values.astype(np.float32), edges.astype(np.float32)


def log8_codes(x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Nearest code on the logarithmic scale; the last code for anything above 2^9.25, and 0 below half of the first.

    Compared with fp32 edges instead of a logarithm, because `log2` differs in its last bit between libraries.
    """
    values, edges = log8_edges()
    codes = torch.bucketize(x, torch.from_numpy(edges).to(x.device)) + 1
    return torch.where(x >= values[1].item() / 2, codes, 0).to(torch.uint8)


def log8_values(codes: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return torch.from_numpy(log8_edges()[0]).to(codes.device)[codes.int()]


def to_bytes(x: Tensor, kind: str) -> UInt8[Tensor, "*lead n"]:
    """Values of one plane as stored bytes. Floats saturate at the largest finite value of their kind."""
    if kind == "log8":
        return log8_codes(x)
    if kind == "int8":
        return x.to(torch.int8).contiguous().view(torch.uint8)
    if kind == "index":
        return x.to(torch.uint8)
    dtype = FLOATS[kind]
    limit = torch.finfo(dtype).max
    return x.float().clamp(-limit, limit).to(dtype).contiguous().view(torch.uint8)


def in_steps(x: Float[Tensor, "*lead n"]) -> tuple[Float[Tensor, "*lead 1"], Float[Tensor, "*lead n"]]:
    """Numbers as integers -127..127 of one step, which is as it is stored: the step, and the integers."""
    step = stored(x.abs().amax(-1, keepdim=True) * np.float32(1 / 127).item(), "fp16")
    return step, (x * torch.where(step > 0, 1 / step, 0)).round().clamp(-127, 127)


def planes_of(name: str, x: Float[Tensor, "*lead n"], kind: str) -> dict[str, UInt8[Tensor, "*lead m"]]:
    """The plane `name` of these numbers and, of int8, that of their step."""
    if kind != "int8":
        return {name: to_bytes(x, kind)}
    step, steps = in_steps(x)
    return {name: to_bytes(steps, kind), f"{name}_step": to_bytes(step, "fp16")}


def stored(x: Tensor, kind: str) -> Tensor:
    """What decoding will see of `x` once it is stored as `kind`, in fp32."""
    return from_bytes(to_bytes(x, kind), kind)


def from_bytes(content: Tensor, kind: str) -> Tensor:
    if kind == "log8":
        return log8_values(content)
    if kind == "int8":
        return content.contiguous().view(torch.int8).float()
    if kind == "index":
        return content.float()
    return content.contiguous().view(FLOATS[kind]).float()


def read(packed: Packed, name: str) -> Float[Tensor, "*lead rows cols"] | None:
    """The numbers of a plane, or None if the layout has no such plane. Codes are not numbers: see `read_codes`."""
    if name not in packed.layout:
        return None
    plane = packed.layout.plane(name)
    values = from_bytes(packed.plane(name), plane.kind).unflatten(-1, (plane.rows, plane.cols))
    step = read(packed, name + "_step")
    return values if step is None else values * step


def read_codes(packed: Packed, name: str = "codes") -> UInt8[Tensor, "*lead block cols"]:
    plane = packed.layout.plane(name)
    if plane.order != "linear":
        raise ValueError(f'The reference reads the linear order, not "{plane.order}": call repack(packed, "linear").')
    return unpack_codes(packed.plane(name), plane.bits).unflatten(-1, (plane.rows, plane.cols))
