// Any processor: GCC and Clang vector extensions, plain loops where a look-up or an integer dot product is needed.
#pragma once
#define TERSEKV_WIDTH 16
#include "../vector.h"

namespace tersekv::TERSEKV_ISA {

struct Isa : Vector {
  static constexpr int STRIP = 2, TILES = 1, REGISTERS = 32, INDEX_BITS = 4;

  static Bytes look_up(Bytes table, Bytes index, Bytes mask) {
    index &= mask;
    Bytes out;
    for (int i = 0; i < WIDTH; i++) out[i] = table[index[i]];
    return out;
  }
  static Ints dot(Ints sum, Bytes a, int32_t four) {
    for (int i = 0; i < LANES; i++)
      for (int j = 0; j < 4; j++) sum[i] += int(a[4 * i + j]) * int8_t(uint32_t(four) >> (8 * j));
    return sum;
  }
  template <int BITS>
  struct Table {
    const float* entries;
    explicit Table(const float* table) : entries(table) {}
    Floats operator()(Ints index) const {
      Floats out;
      for (int i = 0; i < LANES; i++) out[i] = entries[index[i] & ((1 << BITS) - 1)];
      return out;
    }
  };
  static Floats from_half(const void* p) { return half_to_float(p); }
  static Floats from_log8(const uint8_t* p, const float* table) { return log8_by_table(p, table); }
};

}  // namespace tersekv::TERSEKV_ISA
