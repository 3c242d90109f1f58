// AVX-512 and the unit for products of byte matrices (AMX): Sapphire Rapids and newer.
#pragma once
#include "zmm.h"

namespace tersekv::TERSEKV_ISA {

// Products of up to 16 rows of signed bytes with matrices of unsigned ones. The tiles are this thread's while one
// lives: 0 holds sums, 1 and 2 the left and right side, 3 and 4 what is left of them. (The intrinsics want the numbers
// themselves.)
class Tiles {
 public:
  // `depth` of the products, a multiple of 16; products as deep as a block has tokens are possible, too.
  Tiles(int rows, int depth) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    const auto shape = [&](int tile, int tall, int wide) {
      shapes.rows[tile] = uint8_t(tall), shapes.bytes[tile] = uint16_t(wide);
    };
    shape(0, rows, 64), shape(1, rows, 64), shape(2, 16, 64);
    if (const int rest = depth % 64) shape(3, rows, rest), shape(4, rest / 4, 64);
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;

  // c[r][j] = sum over i < depth of a[r][i] * b[i / 4][4 * j + i % 4], j < 16. Strides are in bytes.
  INLINE void product(int depth, const int8_t* a, int a_stride, const uint8_t* b, int b_stride, int32_t* c,
                      int c_stride) const {
    _tile_zero(0);
    int i = 0;
    for (; i + 64 <= depth; i += 64, b += 16 * b_stride) {
      _tile_loadd(1, a + i, a_stride);
      _tile_loadd(2, b, b_stride);
      _tile_dpbsud(0, 1, 2);
    }
    if (i < depth) {
      _tile_loadd(3, a + i, a_stride);
      _tile_loadd(4, b, b_stride);
      _tile_dpbsud(0, 3, 4);
    }
    _tile_stored(0, c, c_stride);
  }
};

struct Isa : Zmm {
  static constexpr bool MATRIX = true;
  using Matrix = Tiles;
};

}  // namespace tersekv::TERSEKV_ISA
