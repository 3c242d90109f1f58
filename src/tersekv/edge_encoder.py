"""The steps that encode one chunk of vectors for `tersekv.edge`: NumPy calls on preallocated arrays.

A 3-bit code costs one sign and three comparisons of |z|, because the table is odd. Codes stay bytes until
eight of them merge inside a 64-bit word, of which only the low bytes are kept. Constants are 0-d arrays of
the right type: a scalar costs every call another 0.3 us, a twentieth of the cheaper steps.
"""

from math import inf, isfinite, sqrt

import numpy as np
from jaxtyping import Float, UInt8

from tersekv.codebook import lloyd_max
from tersekv.layout import BLOCK, Layout

NORMS = {"fp16": np.float16, "fp32": np.float32}


class ChunkEncoder:
    """Encodes chunks of up to `blocks` blocks. Every call overwrites the same scratch: 7 bytes a value."""

    def __init__(self, packed: Layout, blocks: int) -> None:
        self.packed, self.bits, self.blocks = packed, packed.code_bits, blocks
        self.z = np.empty((blocks * BLOCK, packed.d), np.float32)
        self.norm, self.inverse = np.empty((2, len(self.z)), np.float32)
        self.codes, self.spare, self.sign = np.empty((3, self.z.size), np.uint8)
        self.zero, self.root = np.array(0, np.float32), np.array(sqrt(packed.d), np.float32)
        self.half = np.array(2 ** (self.bits - 1), np.uint8)
        self.thresholds = [np.array(t, np.float32) for t in lloyd_max(self.bits)[1]] or [np.array(inf, "f4")]
        self.kind = NORMS[packed.plane("scale").kind]
        self.largest = np.array(np.finfo(self.kind).max, np.float32)

    def __call__(self, x: Float[np.ndarray, "n d"], out: UInt8[np.ndarray, "blocks nbytes"]) -> bool:
        """Write `x` to `out`, filling the last block up with zero vectors. False if `x` is not finite."""
        if len(x) < len(self.z) or x.dtype != np.float32:
            self.z[: len(x)], self.z[len(x) :] = x, 0
            x = self.z
        if not self._normalise(x):
            return False
        self._quantise()
        self._merge()
        self._store(out)
        return True

    def _normalise(self, x: Float[np.ndarray, "n d"]) -> bool:
        np.vecdot(x, x, out=self.norm)
        np.sqrt(self.norm, out=self.norm)
        np.divide(self.root, self.norm, out=self.inverse)
        # NaN as soon as one norm is 0, infinite or NaN: only such chunks pay for a look at every value.
        if not isfinite(np.dot(self.norm, self.inverse)):
            if not np.isfinite(x).all():
                return False
            self.inverse[self.norm == 0] = 0
        np.multiply(x, self.inverse[:, None], out=self.z)
        return True

    def _quantise(self) -> None:
        """As `ops.lookup.nearest`: half + level, below zero half - 1 - level; both are exclusive ors."""
        z, above = self.z.reshape(-1), self.spare.view(bool)
        np.less(z, self.zero, out=self.sign.view(bool))
        np.abs(z, out=z)
        np.greater(z, self.thresholds[0], out=self.codes.view(bool))
        for threshold in self.thresholds[1:]:
            np.greater(z, threshold, out=above)
            np.add(self.codes, self.spare, out=self.codes)
        np.subtract(self.half, self.sign, out=self.sign)
        np.bitwise_xor(self.codes, self.sign, out=self.codes)

    def _merge(self) -> None:
        """Move eight codes into the low bits of every 8 bytes: pairs in 16 bits, fours in 32, eights in 64.

        A lane holds `low + high * 2^half`; wanted is `low + high * 2^field`.
        """
        for size in (2, 4, 8) if self.bits < 8 else ():
            half, field = 4 * size, self.bits * size // 2
            lane, moved = self.codes.view(f"u{size}"), self.spare.view(f"u{size}")
            shift, narrow = np.array(half, lane.dtype), np.array(half - field, lane.dtype)
            if self.bits > 4:
                np.right_shift(lane, shift, out=moved)
                np.multiply(moved, np.array(2**half - 2**field, lane.dtype), out=moved)
                np.subtract(lane, moved, out=lane)
            elif size < 8:  # one product makes it in the upper half; its other terms stay out of there
                np.multiply(lane, np.array(2**half + 2**field, lane.dtype), out=lane)
                np.right_shift(lane, shift, out=lane)
            else:  # the upper half may keep what it has: it is not stored
                np.right_shift(lane, narrow, out=moved)
                np.bitwise_or(lane, moved, out=lane)

    def _store(self, out: UInt8[np.ndarray, "blocks nbytes"]) -> None:
        unit = f"u{self.bits & -self.bits}"  # the widest integer that divides the `bits` bytes of eight codes
        words = self.codes.reshape(len(out), -1, 8).view(unit)
        codes = out[:, self.packed.span("codes")].reshape(len(out), -1, self.bits).view(unit)
        for i in range(codes.shape[-1]):
            codes[..., i] = words[..., i]
        norms = out[:, self.packed.span("scale")].view(self.kind)
        np.minimum(self.norm, self.largest, out=self.norm)
        norms[...] = self.norm.reshape(norms.shape)
