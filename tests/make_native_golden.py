"""Cases for the kernel test program, in a file of arrays: `python tests/make_native_golden.py FILE`.

Made anew wherever they are needed: the same pages, truth and bounds as in the tests of the Python module.
"""

import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from native_cases import Case, make_case
from native_truth import truth

from tersekv.layout import Layout
from tersekv.ops import native
from tersekv.ops.recipe import Dense, Grid
from tersekv.ops.trellis import Trellis
from tersekv.ops.vq import VectorLookup

ALL = "scale:fp16 zero:fp16 channel_scale:fp16 channel_zero:fp16"
KIVI_K = "{0} positive channel_scale/{1}:fp16 channel_zero/{1}:fp16"
KIVI_V = "{0} positive scale/{1}:fp16 zero/{1}:fp16"
FIRST = "channel_scale:fp16 channel_zero:fp16 scale:log8"
CASES = [
    ("1 normal scale:log8", "2 normal scale:fp16", 64, 2, 1, [[0, 1], [63, 65]]),
    ("2 normal scale:log8 channel_zero:int8", "3 normal scale:log8", 80, 3, 2, [[64, 130]]),
    (f"3 normal {ALL}", f"4 uniform {ALL}", 96, 4, 5, [[65, 1]]),
    (f"4 uniform {ALL}", f"1 normal {ALL}", 128, 1, 1, [[127, 64]]),
    ("8 uniform scale:fp16 zero:bf16", "8 normal scale:fp32 channel_zero:int8", 64, 5, 1, [[66]]),
    ("2 normal scale:log8", "4 normal channel_scale:fp32 channel_zero:bf16", 80, 4, 16, [[129]]),
    ("3 normal scale:log8 channel_zero:int8", "3 normal scale:log8", 256, 7, 9, [[70]]),
    ("4 normal scale:log8", "4 normal scale:log8", 64, 2, 1, [[1100]]),
    ("1 trellis scale:log8", "2 trellis scale:fp16 channel_zero:int8", 96, 3, 1, [[130, 1]]),
    ("2 trellis scale:log8 channel_zero:int8", "1 trellis scale:log8", 64, 4, 16, [[129]]),
    ("3 trellis scale:fp16", "4 trellis scale:log8", 128, 5, 1, [[65, 127]]),
    ("4 trellis scale:log8", "3 trellis scale:log8", 32, 1, 1, [[64, 3]]),
    (KIVI_K.format(2, 32), KIVI_V.format(2, 32), 64, 4, 1, [[130, 1]]),
    (KIVI_K.format(4, 16), KIVI_V.format(3, 16), 80, 3, 6, [[65]]),
    (KIVI_V.format(3, 32), KIVI_K.format(4, 32), 128, 2, 1, [[70, 64]]),
    (f"3 uniform first=channel {FIRST}", f"8 uniform first=channel {FIRST}", 96, 5, 1, [[127]]),
    ("vq 8x8 scale:log8 channel_zero:int8", "vq 16x6x2 scale:log8", 64, 3, 1, [[130, 1]]),
    ("vq 16x6 own", "vq 8x5 own channel_zero:fp16", 80, 5, 4, [[70, 64]]),
    ("dense fp32", "dense bf16", 72, 3, 1, [[65, 2]]),
    ("dense fp16", "2 normal scale:log8", 80, 2, 3, [[65]]),
    ("2 normal scale:log8", "dense fp16", 80, 2, 3, [[65]]),
]


def put(file: BinaryIO, x: Any, dtype: type | str) -> None:
    array = np.frombuffer(x.encode(), np.uint8) if isinstance(x, str) else np.ascontiguousarray(x, dtype).ravel()
    file.write(np.int32(array.size).tobytes() + array.tobytes())


def put_side(file: BinaryIO, layout: Layout, recipe: Dense | Grid | Trellis | VectorLookup, start: int) -> None:
    planes = [p for p in layout.planes if p.kind != "code" and not p.name.endswith("_step")]
    books = recipe.tables.stages if isinstance(recipe, VectorLookup) else ()
    bits = 0 if books or isinstance(recipe, Dense) else layout.code_bits
    codes = layout.offsets.get("codes", 0)
    first = isinstance(recipe, Grid) and recipe.first == "channel"
    put(file, [bits, layout.d, start, layout.nbytes, codes, len(planes), first], np.int32)
    for plane in planes:
        put(file, plane.name, "")
        put(file, plane.kind, "")
        step, groups = layout.offsets.get(plane.name + "_step", -1), native.groups(layout, plane)
        put(file, [layout.offsets[plane.name], step, groups], np.int32)
    put(file, recipe.table if isinstance(recipe, Grid | Trellis) else [], np.float32)
    if books:
        heads, places, _, dim = books[0].shape
        put(file, [layout.code_bits, heads, places, dim, layout.offsets.get("codes2", 0), len(books)], np.int32)
        for stage in books:
            put(file, stage, np.float32)
        return
    put(file, [], np.int32)
    put(file, [recipe.half if isinstance(recipe, Trellis) else 0], np.float32)


def put_case(file: BinaryIO, name: str, case: Case) -> None:
    pages = case.native
    b, hq, n, d = case.q.shape
    h, blocks = pages.table.shape[1:]
    put(file, name, "")
    put(file, [b, h, hq // h, n, d, blocks, pages.pool.shape[1]], np.int32)
    put_side(file, pages.k_layout, pages.k_recipe, 0)
    put_side(file, pages.v_layout, pages.v_recipe, pages.k_layout.nbytes)
    put(file, pages.pool, np.uint8)
    put(file, [], np.uint8)
    put(file, pages.table, np.int32)
    put(file, pages.lengths, np.int64)
    put(file, case.q, np.float32)
    put(file, [case.scale], np.float32)
    for exact in (True, False):
        right = truth(case, exact)
        for x in (right.out, right.lse, right.out_bound, right.lse_bound):
            put(file, x, np.float32)


def write(path: Path) -> None:
    with path.open("wb") as file:
        put(file, [len(CASES)], np.int32)
        for i, arguments in enumerate(CASES):
            torch.manual_seed(i)
            k, v, d, g, n, lengths = arguments
            put_case(file, f"k={k} v={v} d={d} g={g} n={n} lengths={lengths}", make_case(*arguments))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
