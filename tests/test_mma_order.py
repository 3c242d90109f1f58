"""The order of codes that CUDA kernels read, in NumPy: unpacked operands against the linear order. Needs no GPU."""

import numpy as np
import pytest
import torch
from mma_emulation import operand_rows_and_columns, prmt, unpack

from tersekv.codebook import table
from tersekv.layout import BLOCK, Layout, Plane
from tersekv.ops.cuda.levels import levels, packed
from tersekv.ops.planes import pack_codes
from tersekv.packed import Packed, repack

BITS = (1, 2, 3, 4, 8)


def uniform(bits: int) -> tuple[float, ...]:
    return tuple(float(i) for i in range(2**bits))


def grids(bits: int) -> list[tuple[float, ...]]:
    """Equal steps, and Lloyd-Max's; at 8 bits the kernels know equal steps only."""
    return [uniform(bits)] if bits == 8 else [uniform(bits), tuple(table(bits, 128).tolist())]


@pytest.mark.parametrize("order", ["mma_k", "mma_v"])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("bits", BITS)
def test_unpacked_operands_are_the_levels(bits: int, d: int, order: str) -> None:
    codes = torch.randint(0, 2**bits, (BLOCK, d), dtype=torch.uint8)
    layout = Layout(d, (Plane("codes", BLOCK, d, bits),))
    moved = repack(Packed(layout, pack_codes(codes.flatten(), bits)), order).data.numpy()
    words = moved.view("<u4").reshape(d // 64, bits, 32, 4).transpose(0, 2, 1, 3)  # unit, lane, vector, word
    for grid in grids(bits):
        found = levels(grid)
        registers = unpack(words, bits, packed(found.level))
        got = registers.astype("<u4").view(np.int8 if bits > 1 else np.uint8).reshape(-1, d // 64, 32, 4, 2, 4, 4)
        got = got.sum(0, dtype=np.int64)  # as the matrix instructions add up the two parts of 16 entries
        rows, columns = operand_rows_and_columns()
        token, channel = places(order, rows, columns, d)
        want = np.array(found.level)[codes.numpy()[token, channel]]
        if bits == 1:  # a field that stays in its place counts 2^place times: rows of a tile are 2x and 2x + 1
            want = want << (2 * (rows // 16) + rows % 16 // 8)
        assert np.array_equal(got, want)


def places(order: str, row: np.ndarray, column: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Token and channel of a unit's row and column: (units, ...). A lane's rows, and its columns, are neighbours."""
    unit = np.arange(d // 64).reshape(-1, *[1] * row.ndim)
    row_group, in_group = row % 8, row // 16 * 2 + row % 16 // 8
    lane, step, half, byte = column % 16 // 4, column // 32, column % 32 // 16, column % 4
    if order == "mma_k":
        return 8 * row_group + in_group + 0 * unit, d // 4 * lane + 16 * unit + 8 * step + 4 * half + byte
    token = 16 * lane + 8 * (byte // 2) + 4 * step + 2 * half + byte % 2
    return token + 0 * unit, d // 8 * row_group + 8 * unit + in_group


def test_weights_come_out_of_the_transpose_in_the_order_of_the_values() -> None:
    """Cells of rows g and g + 8 of a tile, transposed as `movmatrix` does, are a column's bytes of operand B."""
    weights = np.arange(16 * 8).reshape(16, 8)  # of a tile: rows by columns
    for lane in range(32):
        column, pair = lane // 4, lane % 4
        cells = [(weights[2 * pair + i, column], weights[2 * pair + i + 8, column]) for i in range(2)]
        got = np.array(cells).ravel()  # bytes 4 * pair.. of operand B for this column
        _, columns = operand_rows_and_columns()
        for x in range(4):  # tile x is columns 16 * x.. of a unit of values
            step, half = x // 2, x % 2
            token, _ = places("mma_v", np.zeros(4, int), columns[pair, 0, step, 2 * half], 64)
            row_group, in_group = token[0] // 8, token[0] % 8 - 2 * x
            assert np.array_equal(weights[row_group + 8 * in_group, column], got)


@pytest.mark.parametrize("d", [64, 128, 256, None])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_are_near_the_table(bits: int, d: int | None) -> None:
    grid = tuple(table(bits, d).tolist())
    found = levels(grid)
    assert max(map(abs, found.level)) <= 127 and (bits == 1 or found.middle == 0)
    assert found.error(grid) <= {1: 1e-7, 2: 0.001, 3: 0.005, 4: 0.012}[bits]
    assert levels(uniform(bits)).error(uniform(bits)) < 1e-12


def test_eight_bits_are_equal_steps() -> None:
    assert levels(uniform(8)).error(uniform(8)) < 1e-12
    assert levels(tuple(table(8).tolist())).error(tuple(table(8).tolist())) > 0.1  # so the kernels refuse it


def test_a_selector_with_its_highest_bit_spreads_a_sign() -> None:
    one = np.array([0x80FF7F01], dtype=np.uint32)
    assert prmt(one, one, np.array([0xBA98], dtype=np.uint32))[0] == 0xFFFF0000
    assert prmt(one, one, np.array([0x0123], dtype=np.uint32))[0] == 0x017FFF80
