"""`unpack.cuh` in NumPy: from the words of lanes to operands of matrix instructions, and where their bytes belong."""

import numpy as np

U32 = np.uint32
FLIP = U32(0x88888888)  # the highest bit of every nibble


def prmt(low: np.ndarray, high: np.ndarray, index: np.ndarray) -> np.ndarray:
    """As the instruction: each nibble of `index` chooses one of eight bytes, or spreads its sign."""
    source = np.stack([low, high], -1).astype("<u4").view(np.uint8).reshape(*low.shape, 8)
    out = np.zeros(low.shape, dtype=U32)
    for i in range(4):
        nibble = (index >> U32(4 * i)) & U32(15)
        byte = np.take_along_axis(source, (nibble & U32(7))[..., None].astype(np.int64), -1)[..., 0]
        spread = np.where(byte & 0x80, 0xFF, 0).astype(np.uint8)
        out |= np.where(nibble & U32(8), spread, byte).astype(U32) << U32(8 * i)
    return out


def unpack(words: np.ndarray, bits: int, table: tuple[int, ...]) -> np.ndarray:
    """Registers (..., x=4, y=2, r=4) of one unit from a lane's words (..., vectors, 4); of 4 bits, two parts of it."""
    t = [np.full(words.shape[:-2], word, dtype=U32) for word in table]
    if bits == 4:
        return np.stack(
            [_half(words, t[:2], U32(0)), _half(words, [t[2] + U32(0x01010101), t[3] + U32(0x01010101)], FLIP)]
        )
    registers = np.empty((*words.shape[:-2], 4, 2, 4), dtype=U32)
    for x in range(4):
        for y in range(2):
            for r in range(4):
                registers[..., x, y, r] = _register(words, bits, t, x, y, r)
    return registers


def _half(words: np.ndarray, t: list[np.ndarray], flip: np.uint32) -> np.ndarray:
    """What eight of 16 entries contribute."""
    registers = np.empty((*words.shape[:-2], 4, 2, 4), dtype=U32)
    for x, y, r in np.ndindex(4, 2, 4):
        registers[..., x, y, r] = prmt(t[0], t[1], (words[..., x, 2 * y + r // 2] ^ flip) >> U32(16 * (r % 2)))
    return registers


def _register(words: np.ndarray, bits: int, t: list[np.ndarray], x: int, y: int, r: int) -> np.ndarray:
    shift = U32(16 * (r % 2))
    if bits == 1:
        return words[..., 0, 2 * y + r // 2] & U32(0x01010101 << (2 * x + r % 2))
    if bits == 2:
        word = words[..., x // 2, 2 * (x % 2) + y]
        return prmt(t[0], t[0], ((word >> U32(2 * (r // 2))) & U32(0x33333333)) >> shift)
    if bits == 3:
        w, i = [words[..., v, x] for v in range(3)], 2 * y + r // 2
        spare = (
            (w[0] >> U32(3) & U32(0x11111111)) | (w[1] >> U32(2) & U32(0x22222222)) | (w[2] >> U32(1) & U32(0x44444444))
        )
        return prmt(t[0], t[1], (w[i] & U32(0x77777777) if i < 3 else spare) >> shift)
    return words[..., 2 * x + y, r] ^ U32(0x80808080)


def operand_rows_and_columns() -> tuple[np.ndarray, np.ndarray]:
    """Row and column in a unit of each byte (lane, x, y, r, byte), by the PTX manual's operand A of m16n8k32."""
    lane, x, y, r, byte = np.indices((32, 4, 2, 4, 4))
    return 16 * x + lane // 4 + 8 * (r % 2), 32 * y + 4 * (lane % 4) + byte + 16 * (r // 2)
