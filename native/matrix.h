// Scores and sums of values where a processor multiplies whole matrices of bytes (`Isa::Matrix`): up to 16 query rows
// share a pass over a block's levels, at the price of one. Integers, and so results, are those of `score_int8` and
// `mix_int8`.
//
// Levels lie as codes of 8 bits do, and that is what such units take. Keys: 64 bytes hold four channels of 16 tokens,
// those of the next four channels lie 256 bytes on. Values: 64 bytes hold four tokens of 16 channels, the next four
// tokens follow.
#pragma once
#include "tile.h"

namespace tersekv::TERSEKV_ISA {

// Scores of rows q (rows, d) over block i of a tile, to the strips that they belong to.
template <class Matrix>
void score_matrix(const Matrix& matrix, const uint8_t* levels, int d, const int8_t* q, int rows, int i, Products& p,
                  Strip* strips) {
  for (int tile = 0; tile < 4; tile++)
    matrix.product(d, q, d, levels + VECTOR * tile, 4 * VECTOR, p.sums + 16 * tile, 4 * BLOCK);
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < BLOCK; j += Isa::LANES)
      Isa::store(strips[r / STRIP].scores[i] + BLOCK * (r % STRIP) + j,
                 Isa::to_floats(Isa::load<Ints>(p.sums + BLOCK * r + j)));
}

// p.sums (rows, d) = the strips' weights of block i times its values' levels.
template <class Matrix>
void mix_matrix(const Matrix& matrix, const uint8_t* levels, int d, int rows, int i, const Strip* strips, Products& p) {
  for (int r = 0; r < rows; r += STRIP) std::memcpy(p.weights + BLOCK * r, strips[r / STRIP].int8[i], STRIP * BLOCK);
  for (int tile = 0; tile < d / 16; tile++)
    matrix.product(BLOCK, p.weights, BLOCK, levels + 16 * VECTOR * tile, VECTOR, p.sums + 16 * tile, 4 * d);
}

// out[r][c] += gain[r] * sums[r][c]
inline void add_products(const int32_t* sums, int d, int rows, const float* gain, float* out) {
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < d; c += Isa::LANES)
      Isa::add_to(out + r * d + c, gain[r], Isa::to_floats(Isa::load<Ints>(sums + r * d + c)));
}

}  // namespace tersekv::TERSEKV_ISA
