"""Who takes part in `tersekv bench attend`: our pages, PyTorch's attention, llama.cpp's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tersekv.bench import ggml
from tersekv.bench.data import Drawn, error, exact, packed, scattered
from tersekv.errors import TersekvError
from tersekv.ops import native, pages_part
from tersekv.spec import Spec, parse

Kernel = Callable[..., tuple[Tensor, Tensor]]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GROUPED = ("fp32", "bf16")  # with enable_gqa: what transformers calls
# Relative errors beyond which a contestant does not compute what it should. The 8-bit path rounds queries and softmax
# weights to 8 bits; llama.cpp rounds queries to 8 bits.
BOUNDS = {"exact": 2e-5, "int8": 0.05, "fp32": 2e-5, "fp16": 0.02, "bf16": 0.02, "llama.cpp": 0.05}
# llama.cpp adds up f16 values in fp16: t roundings of 2^-11, which add up like steps of a random walk; twice that.
ROUNDING_WALK = 2**-10


@dataclass(frozen=True)
class Contestant:
    """`run` is what is timed; `inputs` are the keys and values that it reads, as dense tokens."""

    name: str
    kind: str  # ours, torch or llama.cpp
    nbytes: int
    run: Callable[[], Tensor]
    bound: float
    inputs: Callable[[], tuple[Tensor, Tensor]]
    truth: Callable[[Tensor, Tensor], Tensor]

    def checked(self) -> float:
        """The error of its output against fp64 on its own inputs. Raises TersekvError if it is out of bounds."""
        found = error(self.run().float(), self.truth(*self.inputs()))
        if not found <= self.bound:
            raise TersekvError(
                f"Parity gate: {self.name} is off by {found:.2g} of the output's norm, allowed is {self.bound:.2g}. "
                "No timing."
            )
        return found


def ours(drawn: Drawn, title: str, text: str, isas: list[str], attend: Kernel) -> Iterator[Contestant]:
    """Packed pages: on every instruction set in 8-bit integers; on the first one also scattered, and in fp32.

    As the host calls it: what the pages are is checked once, queries and outputs are rotated in the call.
    """
    spec, scale = parse(text), drawn.case.scale
    in_order, said = packed(drawn, spec.k, spec.v)
    best, *others = isas
    ways = [("", in_order, False, best), (" scattered", scattered(in_order), False, best)]
    ways += [(" exact", in_order, True, best), *((f" {isa}", in_order, False, isa) for isa in others)]
    for name, pages, in_fp32, isa in ways:
        part = pages_part(pages, spec.k.rotation, spec.v.rotation)

        def run(part: Any = part, in_fp32: bool = in_fp32, isa: str = isa) -> Tensor:
            return attend(drawn.q, part, scale, in_fp32, isa)[0]

        bound, truth = BOUNDS["exact" if in_fp32 else "int8"], partial(_folded_truth, drawn, spec)
        yield Contestant(title + name, "ours", pages.pool.nbytes, run, bound, lambda: said, truth)


def _folded_truth(drawn: Drawn, spec: Spec, k: Tensor, v: Tensor) -> Tensor:
    return spec.v.unfold_output(exact(spec.k.fold_query(drawn.q), k, v, drawn.case.scale).float()).double()


def of_torch(drawn: Drawn) -> Iterator[Contestant]:
    """As transformers calls it, and with the query group folded into the query length: keys are read once a group."""
    case = drawn.case
    for name, dtype in DTYPES.items():
        q, k, v = (x.to(dtype) for x in (drawn.q, *drawn.undamaged))
        folded = q.view(1, case.h, -1, case.d)
        calls = {"folded": partial(sdpa, folded, k, v, scale=case.scale)}
        if name in GROUPED:
            calls["enable_gqa"] = partial(sdpa, q, k, v, scale=case.scale, enable_gqa=True)

        def truth(k: Tensor, v: Tensor, q: Tensor = q) -> Tensor:
            return exact(q, k, v, case.scale)

        for form, call in calls.items():

            def run(call: Callable[[], Tensor] = call) -> Tensor:
                return call().view(drawn.q.shape)

            def inputs(k: Tensor = k, v: Tensor = v) -> tuple[Tensor, Tensor]:
                return k, v

            yield Contestant(f"torch {name} {form}", "torch", 2 * k.nbytes, run, BOUNDS[name], inputs, truth)


def of_llama_cpp(drawn: Drawn, threads: int) -> Iterator[Contestant]:
    for kind in ggml.KINDS:
        call = ggml.FlashAttention(kind, drawn.q, *drawn.undamaged, drawn.case.scale, threads)

        def truth(k: Tensor, v: Tensor) -> Tensor:
            return exact(drawn.q, k, v, drawn.case.scale)

        bound = BOUNDS["llama.cpp"] + (ROUNDING_WALK * drawn.case.t**0.5 if kind == "f16" else 0)
        yield Contestant(f"llama.cpp {kind}", "llama.cpp", call.nbytes, call, bound, call.stored, truth)


def all_of(
    drawn: Drawn, specs: dict[str, str], isas: list[str], threads: int, attend: Kernel | None
) -> list[Contestant]:
    """Everyone who can take part; see `ggml.absent` for who cannot. `attend` stands in for our kernel in tests."""
    found = [one for item in specs.items() for one in ours(drawn, *item, isas, attend or native.attend_part)]
    found += of_torch(drawn)
    return found if ggml.absent() else [*found, *of_llama_cpp(drawn, threads)]
