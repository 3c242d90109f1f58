"""CUDA kernels, compiled at first use: `compiler` makes and loads them, the other modules decide and launch.

The same names as in `ops.native` and `ops.native_encoding`, so that `ops` can choose by device.
"""

from tersekv.ops.cuda.chunks import attend_pages
from tersekv.ops.cuda.compiler import missing
from tersekv.ops.cuda.encoding import encode, rotate, rotates, writes
from tersekv.ops.cuda.joining import attend_causal, attend_dense, flashes, joins, merge
from tersekv.ops.cuda.joining import reads as reads_dense
from tersekv.ops.cuda.reading import ORDERS, order, reads, refusal
from tersekv.ops.cuda.repacking import repack, repacks
from tersekv.ops.cuda.stepping import StepTokens, pages_step, queries_step, step

__all__ = [
    "ORDERS",
    "StepTokens",
    "attend_causal",
    "attend_dense",
    "attend_pages",
    "encode",
    "flashes",
    "joins",
    "merge",
    "missing",
    "order",
    "pages_step",
    "queries_step",
    "reads",
    "reads_dense",
    "refusal",
    "repack",
    "repacks",
    "rotate",
    "rotates",
    "step",
    "writes",
]
