// 64-bit ARM with the dot-product extension (ARMv8.2 and newer).
#pragma once
#include <arm_neon.h>

#define TERSEKV_WIDTH 16
#include "../vector.h"

namespace tersekv::TERSEKV_ISA {

struct Isa : Vector {
  static constexpr int STRIP = 4, TILES = 2, REGISTERS = 32, INDEX_BITS = 4;

  static INLINE Bytes look_up(Bytes table, Bytes index, Bytes mask) {
    return (Bytes)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)(index & mask));
  }
  static INLINE Ints dot(Ints sum, Bytes a, int32_t four) {
    return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)a, vreinterpretq_s8_s32(vdupq_n_s32(four)));
  }
  static INLINE Bytes transposed(Bytes x) {
    const Bytes how = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    return (Bytes)vqtbl1q_u8((uint8x16_t)x, (uint8x16_t)how);
  }
  struct Bytes128 {
    uint8x16x4_t part[2];
    explicit Bytes128(const uint8_t* table) {
      for (int i = 0; i < 8; i++) part[i / 4].val[i % 4] = vld1q_u8(table + 16 * i);
    }
    INLINE Bytes operator()(Bytes index) const {  // an index beyond 63 leaves what there was
      const uint8x16_t i = vandq_u8((uint8x16_t)index, vdupq_n_u8(127)), low = vqtbl4q_u8(part[0], i);
      return (Bytes)vqtbx4q_u8(low, part[1], vsubq_u8(i, vdupq_n_u8(64)));
    }
  };
  template <int BITS>
  struct Table {
    const float* entries;
    uint8x16x4_t bytes;
    explicit Table(const float* table) : entries(table) {
      float all[16];
      for (int i = 0; i < 16; i++) all[i] = table[i & ((1 << BITS) - 1)];
      for (int i = 0; i < 4; i++) bytes.val[i] = vreinterpretq_u8_f32(vld1q_f32(all + 4 * i));
    }
    INLINE Floats operator()(Ints index) const {
      if constexpr (BITS == 8) {
        Floats out;
        for (int i = 0; i < LANES; i++) out[i] = entries[index[i] & 255];
        return out;
      }
      // The four bytes of entry i lie at 4 i: one look-up of bytes gathers four floats.
      uint32x4_t code = vandq_u32((uint32x4_t)index, vdupq_n_u32(15));
      uint32x4_t where = vmlaq_u32(vdupq_n_u32(0x03020100), code, vdupq_n_u32(0x04040404));
      return (Floats)vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_u32(where)));
    }
  };
  static INLINE float sum(Floats x) { return vaddvq_f32((float32x4_t)x); }
  static INLINE Floats max(Floats a, Floats b) { return (Floats)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
  static INLINE Quad highest(const Floats x[4]) {
    float32x4_t ab = vpmaxq_f32((float32x4_t)x[0], (float32x4_t)x[1]);
    return (Quad)vpmaxq_f32(ab, vpmaxq_f32((float32x4_t)x[2], (float32x4_t)x[3]));
  }
  static INLINE Quad sums(const Floats x[4]) {
    float32x4_t ab = vpaddq_f32((float32x4_t)x[0], (float32x4_t)x[1]);
    return (Quad)vpaddq_f32(ab, vpaddq_f32((float32x4_t)x[2], (float32x4_t)x[3]));
  }
  static INLINE void store_int8(int8_t* p, Floats x) {
    const int16x4_t pairs = vmovn_s32((int32x4_t)x);
    const int8x8_t bytes = vmovn_s16(vcombine_s16(pairs, pairs));
    vst1_lane_s32(reinterpret_cast<int32_t*>(p), vreinterpret_s32_s8(bytes), 0);
  }
  static INLINE Floats from_half(const void* p) {
    return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const uint16_t*>(p))));
  }
  static INLINE Floats from_bfloat(const void* p) {
    return (Floats)vshll_n_u16(vld1_u16(static_cast<const uint16_t*>(p)), 16);
  }
  static INLINE Floats from_log8(const uint8_t* p, const float* table) { return log8_by_table(p, table); }

  static INLINE Floats hadamard(Floats x) {
    const Floats first = {1, -1, 1, -1}, second = {1, 1, -1, -1};
    x = (Floats)vrev64q_f32((float32x4_t)x) + x * first;  // the products are exact
    return (Floats)vextq_f32((float32x4_t)x, (float32x4_t)x, 2) + x * second;
  }
  static INLINE Ints least(Ints a, Ints b) { return (Ints)vminq_s32((int32x4_t)a, (int32x4_t)b); }
  static INLINE void store_words(uint8_t* p, const Ints code[4]) {
    const uint16x8_t ab = vcombine_u16(vmovn_u32((uint32x4_t)code[0]), vmovn_u32((uint32x4_t)code[1]));
    const uint16x8_t cd = vcombine_u16(vmovn_u32((uint32x4_t)code[2]), vmovn_u32((uint32x4_t)code[3]));
    vst1q_u8(p, vcombine_u8(vmovn_u16(ab), vmovn_u16(cd)));
  }
};

}  // namespace tersekv::TERSEKV_ISA
