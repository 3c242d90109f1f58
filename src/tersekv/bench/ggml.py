"""llama.cpp's flash attention, called through ctypes in the libraries that llama-cpp-python brings along.

Keys and values lie head by head, which is llama.cpp's faster case: its own cache keeps tokens together, and at 32,768
tokens of 8 heads that layout takes over twice as long. There is no mask, which it would read otherwise.
"""

import ctypes as c
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersekv.errors import TersekvError

KINDS = {"f16": 1, "q8_0": 8, "q4_0": 2}  # ggml_type
FP32 = 0
ROOM = 2**20  # for the graph and the headers of its tensors
INSTALL = 'llama-cpp-python is not installed: pip install "tersekv[peers]".'


class _Init(c.Structure):
    _fields_ = (("mem_size", c.c_size_t), ("mem_buffer", c.c_void_p), ("no_alloc", c.c_bool))


class _Plan(c.Structure):
    """`ggml_cplan`; the spare bytes are for fields that a later version may add at its end."""

    _fields_ = (
        ("work_size", c.c_size_t),
        ("work_data", c.c_void_p),
        ("n_threads", c.c_int),
        ("later", c.c_byte * 128),
    )


class _Traits(c.Structure):
    _fields_ = (
        ("type_name", c.c_char_p),
        ("blck_size", c.c_int64),
        ("blck_size_interleave", c.c_int64),
        ("type_size", c.c_size_t),
        ("is_quantized", c.c_bool),
        ("to_float", c.CFUNCTYPE(None, c.c_void_p, c.c_void_p, c.c_int64)),
    )


_P, _I, _L, _F = c.c_void_p, c.c_int, c.c_int64, c.c_float
SIGNATURES: dict[str, tuple[Any, ...]] = {  # result, arguments
    "cpu_init": (None,),
    "init": (_P, _Init),
    "free": (None, _P),
    "new_tensor_4d": (_P, _P, _I, _L, _L, _L, _L),
    "flash_attn_ext": (_P, _P, _P, _P, _P, _P, _F, _F, _F),
    "new_graph": (_P, _P),
    "build_forward_expand": (None, _P, _P),
    "graph_plan": (_Plan, _P, _I, _P),
    "graph_compute": (_I, _P, c.POINTER(_Plan)),
    "get_data": (_P, _P),
    "nbytes": (c.c_size_t, _P),
    "quantize_chunk": (c.c_size_t, _I, _P, _P, _L, _L, _L, _P),
    "get_type_traits": (c.POINTER(_Traits), _I),
}


def _functions() -> dict[str, Callable[..., Any]]:
    """The functions of `SIGNATURES`. Raises TersekvError if the library or one of them is not there."""
    try:
        library = import_module("llama_cpp._ggml").libggml
    except ImportError as error:
        raise TersekvError(INSTALL) from error
    found = {}
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(library, f"ggml_{name}", None)
        if function is None:
            raise TersekvError(f"This version of llama-cpp-python has no ggml_{name}.")
        function.restype, function.argtypes = result, arguments
        found[name] = function
    return found


def absent() -> str | None:
    """Why llama.cpp cannot take part, or None."""
    try:
        _functions()
    except TersekvError as error:
        return str(error)
    return None


class FlashAttention:
    """One call of `ggml_flash_attn_ext` over keys and values of one kind: f16, q8_0 or q4_0."""

    def __init__(self, kind: str, q: Tensor, k: Tensor, v: Tensor, scale: float, threads: int) -> None:
        self.ggml, self.kind, (_, self.h, t, self.d) = _functions(), KINDS[kind], k.shape
        self.hq, self.n = q.shape[1:3]
        self.ggml["cpu_init"]()
        room = 2 * k.numel() * 2 + 3 * q.numel() * 4 + ROOM  # f16 is the largest kind
        self.context = self.ggml["init"](_Init(room, None, False))
        self.q = self._tensor(FP32, self.n, self.hq)
        self.k, self.v = (self._tensor(self.kind, t, self.h) for _ in range(2))
        c.memmove(self.ggml["get_data"](self.q), q.float().contiguous().data_ptr(), q.numel() * 4)
        for tensor, x in ((self.k, k), (self.v, v)):
            values, data = x.float().contiguous(), self.ggml["get_data"](tensor)
            self.ggml["quantize_chunk"](self.kind, values.data_ptr(), data, 0, self.h * t, self.d, None)
        self.out = self.ggml["flash_attn_ext"](self.context, self.q, self.k, self.v, None, scale, 0, 0)
        self.graph = self.ggml["new_graph"](self.context)
        self.ggml["build_forward_expand"](self.graph, self.out)
        self.plan = self.ggml["graph_plan"](self.graph, threads, None)
        self.work = np.empty(self.plan.work_size + 64, np.uint8)
        self.plan.work_data = self.work.ctypes.data

    def _tensor(self, kind: int, tokens: int, heads: int) -> Any:
        return self.ggml["new_tensor_4d"](self.context, kind, self.d, tokens, heads, 1)

    def __call__(self) -> Tensor:
        """The output, (1, hq, n, d), in memory that the next call overwrites."""
        if status := self.ggml["graph_compute"](self.graph, c.byref(self.plan)):
            raise TersekvError(f"ggml_graph_compute returned {status}.")
        values: Any = (c.c_float * (self.hq * self.n * self.d)).from_address(self.ggml["get_data"](self.out))
        return torch.frombuffer(values, dtype=torch.float32).view(1, self.n, self.hq, self.d).transpose(1, 2)

    @property
    def nbytes(self) -> int:
        return sum(self.ggml["nbytes"](tensor) for tensor in (self.k, self.v))

    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values as llama.cpp decodes them, (1, h, t, d)."""
        traits, out = self.ggml["get_type_traits"](self.kind)[0], []
        for tensor in (self.k, self.v):
            values = torch.empty(self.ggml["nbytes"](tensor) // traits.type_size * traits.blck_size)
            traits.to_float(self.ggml["get_data"](tensor), values.data_ptr(), values.numel())
            out.append(values.view(1, self.h, -1, self.d))
        return out[0], out[1]

    def __del__(self) -> None:
        if context := getattr(self, "context", None):
            self.ggml["free"](context)
