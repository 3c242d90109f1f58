"""Trellis codes as CUDA kernels read and write them (trellis.cuh, walks.cuh, encode_trellis.cu), in NumPy: no GPU."""

import numpy as np
import pytest
import torch
from mma_emulation import operand_rows_and_columns, prmt

from tersekv.codecs.trellis import trellis
from tersekv.layout import BLOCK, Layout, Plane
from tersekv.ops.cuda import walks
from tersekv.ops.planes import pack_codes
from tersekv.ops.trellis import Trellis, viterbi, walk
from tersekv.packed import Packed, repack

U32 = np.uint32
LANE = np.arange(32)
BITS = (1, 2, 3, 4)


def vectors(codes: torch.Tensor, bits: int) -> np.ndarray:
    """(vector, lane, word) of a block in the order of the kernels."""
    d = codes.shape[1]
    plain = Packed(Layout(d, (Plane("codes", BLOCK, d, bits),)), pack_codes(codes.flatten(), bits))
    return repack(plain, "mma_trellis_v").data.numpy()[: BLOCK * d * bits // 8].view("<u4").reshape(-1, 32, 4)


def octets(words: np.ndarray, bits: int) -> list[np.ndarray]:
    """Of each unit, (byte, lane, word): the byte before its eight channels, and theirs."""
    before = np.where(LANE[:, None] < 4, U32(0), words[-1, LANE - 4])
    return [np.stack([words[u - 1] if u else before, *words[u : u + bits]]) for u in range(0, len(words), bits)]


def four(table: np.ndarray, *at: np.ndarray) -> np.ndarray:
    """(lane, 4) levels at byte offsets of one look-up, or of two."""
    return np.concatenate([table[a // table.shape[1]] for a in at], -1)


def get(octet: np.ndarray, bits: int, t: int, table: np.ndarray) -> list[np.ndarray]:
    """`Walks::get`: a[2 * token + group], four levels each."""

    def pair(i: int) -> np.ndarray:
        which = np.full(32, 0x7362 if t % 2 else 0x5140, dtype=U32)
        return prmt(octet[i + 1][:, t // 2], octet[i][:, t // 2], which)

    if bits == 1:
        x = pair(0)
        return [four(table, y & 0x1FFC) for y in (x >> 2, x << 2, x >> 18, x >> 14)]
    if bits == 3:
        halves = (prmt(pair(2), pair(0), np.full(32, which, dtype=U32)) for which in (0x5410, 0x7632))
        return [
            four(table, *(y & 0xFFE for y in two)) for x in halves for two in ((x >> 17, x >> 11), (x >> 5, x << 1))
        ]
    if bits == 2:
        return [four(table, y & 0xFFFC) for y in (pair(0) << 2, pair(1) << 2, pair(0) >> 14, pair(1) >> 14)]
    low = [four(table, pair(i) << 1 & 0x1FFE, pair(i + 1) << 1 & 0x1FFE) for i in (0, 2)]
    return low + [four(table, pair(i) >> 15 & 0x1FFE, pair(i + 1) >> 15 & 0x1FFE) for i in (0, 2)]


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("bits", BITS)
def test_windows_give_the_levels_of_the_walk(bits: int, d: int) -> None:
    codes = torch.randint(0, 2**bits, (BLOCK, d), dtype=torch.uint8)
    recipe, table = trellis(bits), walks.table(trellis(bits))
    assert table.nbytes == walks.table_bytes(bits)
    want = np.array([*recipe.odd, *(-u for u in recipe.odd)])[walk(codes, bits).numpy()]
    for u, octet in enumerate(octets(vectors(codes, bits), bits)):
        for t in range(8):
            for i, levels in enumerate(get(octet, bits, t, table)):
                token = 16 * (LANE % 4) + 2 * t + i // 2
                first = d // 8 * (LANE // 4) + 8 * u + 4 * (i % 2)
                assert np.array_equal(levels, want[token[:, None], first[:, None] + np.arange(4)])


def test_a_product_adds_up_weights_times_values() -> None:
    """Two heads by four channels are columns, eight tokens by four channels the depth; of one unit, as `mix_walks`."""
    values, weights = np.random.default_rng(0).integers(-99, 99, (BLOCK, 64)), np.arange(2 * BLOCK).reshape(2, BLOCK)
    row, depth = (x[:, 0, 0] for x in operand_rows_and_columns())  # (lane, r, byte)
    got = np.zeros((16, 8), dtype=int)
    for t in range(8):
        a, b = np.zeros((16, 32), dtype=int), np.zeros((32, 8), dtype=int)
        for r in range(4):  # register a[2 * token + group]
            token, first = 16 * (LANE % 4) + 2 * t + r // 2, 8 * (LANE // 4) + 4 * (r % 2)
            a[row[:, r], depth[:, r]] = values[token[:, None], first[:, None] + np.arange(4)]
        for half in range(2):
            for lane in range(32):
                column, token = lane // 4, 16 * (lane % 4) + 2 * t + half
                b[16 * half + 4 * (lane % 4) + column % 4, column] = weights[column // 4, token]
        got += a @ b
    channel = 8 * (np.arange(16) % 8)[:, None] + 4 * (np.arange(16) // 8)[:, None] + np.arange(8) % 4
    assert np.array_equal(got, (weights @ values)[np.arange(8) // 4, channel])


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("bits", BITS)
def test_states_of_four_tokens(bits: int, d: int) -> None:
    """`states` of `dequantise.cuh`, for many query rows."""
    codes = torch.randint(0, 2**bits, (BLOCK, d), dtype=torch.uint8)
    words, want = vectors(codes, bits), walk(codes, bits).numpy()
    before = np.where(LANE[:, None] < 4, U32(0), words[-1, LANE - 4])
    for u, x, r, y, half in np.ndindex(d // 64, 4, 2, 2, 2):
        end = (8 * u + 2 * x + r + 1) * bits
        at, which = (end - 1) // 8, np.full(32, 0x7632 if half else 0x5410, dtype=U32)
        shift, last = U32(8 * (at + 1) - end), words[at - 1] if at else before
        low, high = prmt(words[at][:, y], words[at][:, 2 + y], which), prmt(last[:, y], last[:, 2 + y], which)
        mask = U32(0x01010101 * (0xFF >> int(shift)))
        got = ((low >> shift & mask) | (high << (U32(8) - shift) & ~mask)).view(np.uint8).reshape(32, 4)
        token = 16 * (LANE % 4)[:, None] + 4 * y + 2 * half + np.array([0, 1, 8, 9])
        assert np.array_equal(got, want[token, (d // 8 * (LANE // 4) + 8 * u + 2 * x + r)[:, None]])


class Walker:
    """`encode_trellis.cu` for one token: costs by register and thread."""

    def __init__(self, recipe: Trellis) -> None:
        self.bits, self.forks, self.steps = recipe.bits, 2**recipe.bits, walks.steps(recipe.bits)
        self.unit = walks.units(recipe).reshape(self.steps, 16, 16).astype(np.int64)
        self.x = np.full((16, 16), 2**30) | (np.arange(16) >> 4 - self.bits)[:, None]
        self.x[0, 0], self.thread = 0, np.arange(16)
        self.fallen: list[np.ndarray] = []

    def left(self, step: int) -> int:
        return 4 - self.bits - self.bits * step

    def place(self, step: int, head: int, fork: int) -> int:
        left = self.left(step)
        return head >> left << 4 - self.bits * step | fork << left | head & 2**left - 1

    def one_value(self, step: int, w: int) -> None:
        bits, left, forks = self.bits, self.left(step), range(self.forks)
        byte = np.zeros(16, dtype=int)
        for head in range(16 // self.forks):
            places, rest = [self.place(step, head, fork) for fork in forks], head & 2**left - 1
            best = self.x[places].min(0)
            byte |= (best & self.forks - 1) << head * bits
            nearest = rest >> left - bits if left >= bits else rest << bits - left | self.thread >> 4 - bits + left
            best = best & -self.forks | nearest
            for at in places:
                self.x[at] = self.unit[step, at] * (self.unit[step, at] - w * self.forks) + best
        self.fallen.append(byte)
        if step == self.steps - 1:
            self.exchange()

    def exchange(self) -> None:
        register, thread = np.indices((16, 16))
        state = 16 * thread + register
        if self.bits == 3:
            state = register % 2 * 128 + thread * 8 + register // 2
        flat = np.empty(256, dtype=np.int64)
        flat[state] = self.x
        self.x = flat.reshape(16, 16)

    def states(self) -> list[int]:
        state, found = int(self.x.ravel().argmin()), []
        for c in range(len(self.fallen) - 1, -1, -1):
            found.append(state)
            step = c % self.steps
            made, head = self.bits * step, state >> self.bits
            number = (head & 2**made - 1) << self.left(step) | head >> 4 + made
            fork = int(self.fallen[c][head >> made & 15]) >> number * self.bits & self.forks - 1
            state = head | fork << 8 - self.bits
        return found[::-1]


@pytest.mark.parametrize("bits", BITS)
def test_the_walk_of_sixteen_threads_is_that_of_the_reference(bits: int) -> None:
    recipe = trellis(bits)
    for row in torch.cat([torch.randn(3, 64), torch.zeros(1, 64), torch.full((1, 64), 8.0)]):
        walker = Walker(recipe)
        for c, w in enumerate((row * np.float32(2 / recipe.half).item()).round().int().tolist()):
            walker.one_value(c % walker.steps, w)
        assert [state % 2**bits for state in walker.states()] == viterbi(row[None], recipe)[0].tolist()
