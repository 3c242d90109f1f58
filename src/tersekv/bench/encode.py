"""`tersekv bench encode`: vectors a second of every encoder, interleaved in one process, after a parity gate."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.table import Table

from tersekv import edge, ops
from tersekv.codec import Codec
from tersekv.codecs.lloydmax import LloydMax
from tersekv.codecs.rotated import Rotated
from tersekv.codecs.trellis import TrellisCodec
from tersekv.errors import TersekvError
from tersekv.layout import BLOCK, Layout
from tersekv.ops import native
from tersekv.record import provenance
from tersekv.terminal import Stages

ROUNDS = 11
BF16 = ", bf16 input"


@dataclass(frozen=True)
class EncodeBench:
    """Median and 20th to 80th percentile of vectors a second on one thread."""

    bits: int
    d: int
    vectors: int
    rows: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | provenance()

    def __rich__(self) -> Table:
        title = f"encode {self.vectors:,} fp32 vectors, d={self.d}, {self.bits} bits, one thread, median of {ROUNDS}"
        table = Table("encoder", "million vectors/s", "p20-p80", "GB/s read", "times searchsorted", title=title)
        for row in self.rows:
            span = f"{row['p20'] / 1e6:.2f}-{row['p80'] / 1e6:.2f}"
            rate = row["vectors_per_second"]
            table.add_row(
                row["encoder"], f"{rate / 1e6:.2f}", span, f"{row['gb_per_second']:.2f}", f"{row['ratio']:.1f}"
            )
        return table


def _searchsorted(x: np.ndarray, bits: int) -> None:
    """The form that published NumPy code uses, packing left out: the peer."""
    from tersekv.codebook import lloyd_max

    _, thresholds = lloyd_max(bits)
    every = np.concatenate([-thresholds[::-1], [np.float32(0)], thresholds])
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    np.searchsorted(every, x / (norm + 1e-8) * np.sqrt(x.shape[1]).astype(np.float32)).astype(np.uint8)


def _gate(x: np.ndarray, bits: int) -> None:
    """No speed without parity: the NumPy bytes must be the torch codec's."""
    blocks = torch.from_numpy(x).unflatten(0, (-1, BLOCK))
    same = np.mean(edge.encode(x, bits).data == LloydMax(bits).encode(blocks).data.numpy())
    if same < 0.9999:
        raise TersekvError(f"Parity gate: {100 * (1 - same):.3f} % of the NumPy bytes differ from torch's. No timing.")


def _native(x: torch.Tensor, bits: int) -> dict[str, Callable[[], Any]]:
    """The C++ encoders, where they are built, into pages that are there already. Bytes must be the reference's."""
    if native.missing():
        return {}
    codecs: dict[str, Codec] = {"lloydmax": LloydMax(bits), "rotated with block mean": Rotated(bits, mean="block")}
    if bits <= 4:
        codecs["trellis with block mean"] = TrellisCodec(bits, mean="block")
    encoders: dict[str, Callable[[], Any]] = {}
    for dtype, note in ((torch.float32, ""), (torch.bfloat16, BF16)):
        values = x.to(dtype)
        for name, codec in codecs.items():
            layout = _keys_layout(codec, x.shape[-1])
            pages = torch.empty(len(x), layout.nbytes, dtype=torch.uint8)
            if not torch.equal(
                ops.encode(codec, values[:64], layout).data, ops.repack(codec.encode(values[:64]), layout.order).data
            ):
                raise TersekvError(f"Parity gate: the native bytes of {name} differ from torch's. No timing.")
            encoders[f"native {name}{note}"] = partial(ops.encode, codec, values, layout, pages)
    return encoders | {"native rotated with block mean, for queries": _for_queries(x, bits)}


def _for_queries(x: torch.Tensor, bits: int) -> Callable[[], Any]:
    """Keys as `policy=queryaware` has them encoded, for queries that look along few directions. Tests have the gate."""
    codec, d = Rotated(bits, mean="block"), x.shape[-1]
    q = torch.randn(512, d // 8, generator=(drawn := torch.Generator().manual_seed(0)))
    q = q @ torch.randn(d // 8, d, generator=drawn) + torch.randn(512, d, generator=drawn)
    layout, asked = _keys_layout(codec, d), codec.asked((q.mT @ q).double())
    pages = torch.empty(len(x), layout.nbytes, dtype=torch.uint8)
    return partial(ops.encode, codec, x, layout, pages, asked)


def _keys_layout(codec: Codec, d: int) -> Layout:
    return codec.layout(d).ordered(native.order(codec.layout(d), codec.recipe(d), "k"))


def encode(bits: int = 3, d: int = 128, vectors: int = 131_072, stages: Stages | None = None) -> EncodeBench:
    """Time every encoder on the same vectors, in turn, `ROUNDS` times; torch runs on one thread."""
    x = np.random.default_rng(0).standard_normal((vectors // BLOCK * BLOCK, d), dtype=np.float32)
    _gate(x[: 64 * BLOCK], bits)
    blocks = torch.from_numpy(x).unflatten(0, (-1, BLOCK))
    encoders: dict[str, Callable[[], Any]] = {
        "numpy searchsorted, without packing": lambda: _searchsorted(x, bits),
        "torch lloydmax": lambda: LloydMax(bits).encode(blocks),
        "torch rotated with block mean": lambda: Rotated(bits, mean="block").encode(blocks),
        "numpy lloydmax (tersekv.edge)": lambda: edge.encode(x, bits),
        **_native(blocks, bits),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {name: [] for name in encoders}
    try:
        for number in range(ROUNDS):
            for name, run in encoders.items():
                began = perf_counter()
                run()
                rates[name].append(len(x) / (perf_counter() - began))
            if stages:
                stages("encode", (number + 1) / ROUNDS)
    finally:
        torch.set_num_threads(threads)
    return EncodeBench(bits, d, len(x), [_row(name, values, rates, d) for name, values in rates.items()])


def _row(name: str, values: list[float], rates: dict[str, list[float]], d: int) -> dict[str, Any]:
    first = next(iter(rates.values()))
    low, high = np.percentile(values, [20, 80])
    rate = median(values)
    ratio = median(a / b for a, b in zip(values, first, strict=True))
    return {
        "encoder": name,
        "vectors_per_second": rate,
        "p20": float(low),
        "p80": float(high),
        "gb_per_second": rate * d * (2 if name.endswith(BF16) else 4) / 1e9,
        "ratio": ratio,
    }
