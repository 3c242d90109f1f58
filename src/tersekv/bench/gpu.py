"""Speed on a CUDA device: a parity gate, then cold launches of all contestants in turn, timed with events.

Between two launches other memory is *read*: it empties the caches and leaves no dirty lines, whose write-back the next
kernel would pay for.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tersekv.bench.data import error
from tersekv.bench.timing import paired, spread
from tersekv.errors import TersekvError
from tersekv.layout import BLOCK, Layout
from tersekv.ops import attend_pages, encode, page_layouts, repack
from tersekv.ops.pages import Pages
from tersekv.packed import Packed
from tersekv.spec import Spec

PEERS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention 2": SDPBackend.FLASH_ATTENTION}
FLUSH = 2**30  # bytes read between two launches: twenty times the second-level cache
COPY = 2**31
MOST = 2.0  # times the error of 16-bit attention on the same dequantised tensors
Within = Callable[[], AbstractContextManager[Any]]
FLOOR = 1e-3  # errors below it are not compared: 16-bit attention may be right by luck


@dataclass(frozen=True)
class Case:
    """`b` sequences of `t` cached tokens, `hq` query and `h` KV heads, `n` new tokens."""

    b: int
    d: int
    hq: int
    h: int
    t: int
    n: int = 1

    @property
    def scale(self) -> float:
        return self.d**-0.5


@dataclass(frozen=True)
class Contestant:
    name: str
    kind: str  # ours or bf16
    nbytes: int
    run: Callable[[], Any]
    error: float | None
    within: Within = nullcontext


class Cold:
    """Empties the caches, and knows how fast this device copies."""

    def __init__(self, device: str) -> None:
        self.other = torch.ones(FLUSH // 4, device=device)
        source = torch.empty(COPY, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        seconds = self.turns({"copy": partial(target.copy_, source)}, 11)["copy"]
        self.gb_per_second = 2 * COPY / spread(seconds)["median"] / 1e9

    def __call__(self) -> None:
        self.other.max()

    def turns(
        self, runs: dict[str, Callable[[], Any]], rounds: int, within: dict[str, Within] | None = None
    ) -> dict[str, list[float]]:
        """Seconds of each, one a round, after two that are not counted. The order is drawn anew for each round."""
        marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
        drawn = Random(0)
        for _ in range(rounds + 2):
            for name in drawn.sample(list(runs), len(runs)):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                with (within or {}).get(name, nullcontext)():
                    self()  # takes longer than Python to launch what follows, so that the device never waits for it
                    begin.record()
                    runs[name]()
                    end.record()
                marks[name].append((begin, end))
        torch.cuda.synchronize()
        return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs[2:]] for name, pairs in marks.items()}


def draw(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys with channel means, and values, in bf16."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    shape = case.b, case.h, case.t, case.d
    k = normal(*shape).add_(2 * normal(1, case.h, 1, case.d))
    return normal(case.b, case.hq, case.n, case.d), k, normal(*shape)


def packed(spec: Spec, k: Tensor, v: Tensor) -> Pages:
    """Encoded on the device, pages anywhere in their pool, as an engine leaves them."""
    b, h, t, d = k.shape
    recipes = spec.k.recipe(d), spec.v.recipe(d)
    k_layout, v_layout = page_layouts(
        {"k": (spec.k.layout(d), recipes[0]), "v": (spec.v.layout(d), recipes[1])}, k.device
    )
    split, count = k_layout.nbytes, b * h * t // BLOCK
    pool = torch.empty(count, split + v_layout.nbytes, dtype=torch.uint8, device=k.device)
    encode(spec.k, k.reshape(count, BLOCK, d), k_layout, pool[:, :split])
    encode(spec.v, v.reshape(count, BLOCK, d), v_layout, pool[:, split:])
    place = torch.randperm(count, device=k.device)
    pool = pool[place.argsort()]
    lengths = torch.full((b, h), t, device=k.device)
    return Pages(pool, place.to(torch.int32).view(b, h, -1), lengths, k_layout, v_layout, *recipes, full=True)


def said(pages: Pages) -> tuple[Tensor, Tensor]:
    """What the pages of the first sequence say, folded, as dense tokens in fp32."""
    data, split = pages.pool[pages.table[:1].long()], pages.k_layout.nbytes

    def values(layout: Layout, content: Tensor) -> Packed:
        return repack(Packed(layout, content), "linear")

    k = pages.k_recipe.values(values(pages.k_layout, data[..., :split]))
    v = pages.v_recipe.values(values(pages.v_layout, data[..., split:]))
    return k.flatten(2, 3), v.flatten(2, 3)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Of one sequence in fp64, one KV head at a time."""
    heads = []
    for queries, keys, values in zip(q[0].chunk(k.shape[1]), k[0], v[0], strict=True):
        weights = torch.softmax(queries.double().flatten(0, 1) @ keys.double().mT * scale, -1)
        heads.append((weights @ values.double()).view(queries.shape))
    return torch.cat(heads)[None]


def ours(case: Case, name: str, spec: Spec, drawn: tuple[Tensor, Tensor, Tensor]) -> tuple[Contestant, float]:
    """Attention over the pages, and the error of 16-bit attention. Raises TersekvError behind a closed gate."""
    pages, q = packed(spec, *drawn[1:]), spec.k.fold_query(drawn[0].float())
    k, v = said(pages)
    truth = exact(q[:1], k, v, case.scale)
    half = sdpa(q[:1].bfloat16(), k.bfloat16(), v.bfloat16(), scale=case.scale, enable_gqa=True)
    allowed = error(half, truth)
    run = partial(attend_pages, q, pages, case.scale)
    found = error(run()[0][:1], truth)
    if not found <= max(MOST * allowed, FLOOR):
        raise TersekvError(
            f"Parity gate: {name} is off by {found:.2g} of the output's norm, 16-bit attention on the same "
            f"tensors by {allowed:.2g}; allowed is twice that. No timing."
        )
    return Contestant(name, "ours", pages.pool.nbytes, run, found), allowed


def peers(case: Case, drawn: tuple[Tensor, Tensor, Tensor]) -> Iterator[Contestant]:
    """PyTorch's attention in bf16 on the dense cache, with those kernels of it that take the case."""
    q, k, v = drawn
    run = partial(sdpa, q, k, v, scale=case.scale, enable_gqa=True)
    truth = exact(q[:1], k[:1], v[:1], case.scale)
    for name, backend in PEERS.items():
        within = partial(sdpa_kernel, backend)
        try:
            with within():
                found = error(run()[:1], truth)
        except RuntimeError:
            continue
        yield Contestant(f"bf16, {name}", "bf16", 2 * k.nbytes, run, found, within)


def measure(case: Case, specs: dict[str, Spec], rounds: int, cold: Cold, device: str) -> dict[str, Any]:
    """The rows of one case; `times_faster` is against its fastest bf16 kernel, in the same rounds."""
    drawn = draw(case, device)
    found: list[tuple[Contestant, float | None]] = [(one, None) for one in peers(case, drawn)]
    found += [ours(case, name, spec, drawn) for name, spec in specs.items()]
    everyone = [one for one, _ in found]
    seconds = cold.turns({one.name: one.run for one in everyone}, rounds, {one.name: one.within for one in everyone})
    times = {name: spread(values) for name, values in seconds.items()}
    half = [one.name for one in everyone if one.kind == "bf16"]
    base = min(half, key=lambda name: times[name]["median"], default=None)
    rows = []
    for one, allowed in found:
        rate = one.nbytes / times[one.name]["median"] / 1e9
        row = {"name": one.name, "kind": one.kind, "bytes": one.nbytes, "error": one.error, "seconds": times[one.name]}
        row |= {"gb_per_second": rate, "share_of_copy": rate / cold.gb_per_second, "error_of_bf16": allowed}
        faster = paired(seconds[base], seconds[one.name])["median"] if base and one.kind == "ours" else None
        rows.append(row | ({"times_faster": faster} if faster else {}))
    return asdict(case) | {"rows": rows}
