// Arithmetic that GCC and Clang vectorise by themselves, over registers of TERSEKV_WIDTH bytes, which the ISA's header
// defines before it includes this one. The ISA adds what compilers cannot do. (The width is a macro, because GCC
// ignores a vector size that depends on a template parameter.)
#pragma once
#include <cstdint>
#include <cstring>

namespace tersekv::TERSEKV_ISA {

#define INLINE inline __attribute__((always_inline))

struct Vector {
  static constexpr int WIDTH = TERSEKV_WIDTH, LANES = WIDTH / 4;
  typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));
  typedef uint16_t Pairs __attribute__((vector_size(WIDTH)));
  typedef uint32_t Words __attribute__((vector_size(WIDTH)));
  typedef int32_t Ints __attribute__((vector_size(WIDTH)));
  typedef float Floats __attribute__((vector_size(WIDTH)));
  static constexpr bool MATRIX = false;  // whether `Matrix` can multiply matrices of bytes
  struct Matrix {
    Matrix(int, int) {}
  };
  typedef float Quad __attribute__((vector_size(16)));  // one number for each row of a strip
  typedef int32_t QuadInts __attribute__((vector_size(16)));

  template <class T>
  static INLINE T load(const void* p) {
    T x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  template <class T>
  static INLINE void store(void* p, T x) {
    std::memcpy(p, &x, sizeof x);
  }
  static INLINE Floats all(float x) { return x - Floats{}; }
  static INLINE Ints all(int32_t x) { return x - Ints{}; }
  static INLINE Bytes all_bytes(uint8_t x) { return x - Bytes{}; }
  static INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }
  static INLINE Quad max_quad(Quad a, Quad b) { return a > b ? a : b; }
  static INLINE bool any(QuadInts x) { return x[0] | x[1] | x[2] | x[3]; }
  static INLINE Floats abs(Floats x) { return (Floats)((Ints)x & all(0x7fffffff)); }
  // Of a positive number and a magnitude.
  static INLINE Floats larger(Floats a, Floats x) { return max(a, abs(x)); }
  static INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

  // out = out + x * gain
  static INLINE void add_to(float* out, float gain, Floats x) {
    store(out, load<Floats>(out) + x * gain);
  }

  static INLINE float sum(Floats x) {
    float out = 0;
    for (int i = 0; i < LANES; i++) out += x[i];
    return out;
  }
  static INLINE Quad highest(const Floats x[4]) {
    Quad out;
    for (int r = 0; r < 4; r++) {
      out[r] = x[r][0];
      for (int i = 1; i < LANES; i++) out[r] = x[r][i] > out[r] ? x[r][i] : out[r];
    }
    return out;
  }
  static INLINE Quad sums(const Floats x[4]) {
    Quad out = {};
    for (int r = 0; r < 4; r++)
      for (int i = 0; i < LANES; i++) out[r] += x[r][i];
    return out;
  }

  // Nearest integer, half to even, of |x| < 2^22, left as the bits of a float: the low 23 bits are the integer.
  static INLINE Floats rounded(Floats x) { return (x + all(12582912.f)); }

  // 2^x, relative error below 2^-22; 0 below -126, where fp32 leaves its normal range, and 2^127 above 127.
  template <class F, class I>
  static INLINE F power_of_two(F x) {
    F held = x > F{} - 126.f ? x : F{} - 126.f;
    held = x > F{} + 127.f ? F{} + 127.f : held;
    const F shifted = held + 12582912.f;  // 1.5 * 2^23: the integer part is in the low bits
    const F r = held - (shifted - 12582912.f);
    F p = F{} + 1.326472707e-03f;
    p = p * r + 9.671512649e-03f;
    p = p * r + 5.550733744e-02f;
    p = p * r + 2.402224209e-01f;
    p = p * r + 6.931469776e-01f;
    p = p * r + 1.f;
    const F power = (F)(((I)shifted + 127) << 23);
    return x < F{} - 126.f ? F{} : p * power;
  }
  template <int N>
  static INLINE void exp2(Floats (&x)[N]) {
    for (int i = 0; i < N; i++) x[i] = power_of_two<Floats, Ints>(x[i]);
  }

  static INLINE float half(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    float magnitude;
    if (rest >= 0x7c00) {
      uint32_t bits = 0x7f800000u | (rest & 0x3ff) << 13;
      std::memcpy(&magnitude, &bits, 4);
    } else {
      uint32_t bits = rest << 13;
      std::memcpy(&magnitude, &bits, 4);
      magnitude *= 5.192296858534828e33f;  // 2^112: exact, subnormal halves included
    }
    uint32_t bits;
    std::memcpy(&bits, &magnitude, 4);
    bits |= sign;
    std::memcpy(&magnitude, &bits, 4);
    return magnitude;
  }
  static INLINE Floats half_to_float(const void* p) {
    Floats out;
    for (int i = 0; i < LANES; i++) {
      uint16_t h;
      std::memcpy(&h, static_cast<const uint8_t*>(p) + 2 * i, 2);
      out[i] = half(h);
    }
    return out;
  }
  static INLINE Floats from_bfloat(const void* p) {
    Ints bits;
    for (int i = 0; i < LANES; i++) {
      uint16_t h;
      std::memcpy(&h, static_cast<const uint8_t*>(p) + 2 * i, 2);
      bits[i] = int32_t(uint32_t(h) << 16);
    }
    return (Floats)bits;
  }
  static INLINE Floats from_int8(const void* p) {
    Ints out;
    for (int i = 0; i < LANES; i++) out[i] = static_cast<const int8_t*>(p)[i];
    return to_floats(out);
  }
  static INLINE Floats log8_by_table(const uint8_t* p, const float* table) {
    Floats out;
    for (int i = 0; i < LANES; i++) out[i] = table[p[i]];
    return out;
  }
  // The low bytes of a `rounded` register.
  static INLINE void store_int8(int8_t* p, Floats x) {
    for (int i = 0; i < LANES; i++) p[i] = int8_t(((Ints)x)[i]);
  }

  // What a trellis needs. The 32 bits that end `after` bits before the end of `now`, which follows `before`; 0..31.
  static INLINE Ints shifted_in(Ints now, Ints before, Ints after) {
    return (Ints)((Words)now >> (Words)after | (Words)before << 1 << (31 - (Words)after));
  }
  // Byte i of a lane: the eight bits that end (3 - i) * BITS bits before the end of the word.
  template <int BITS>
  static INLINE Bytes windows(Ints x) {
    const Words last = (Words)x;
    return (Bytes)((last >> 3 * BITS & 0xff) | (last >> 2 * BITS & 0xff) << 8 | (last >> BITS & 0xff) << 16 |
                   last << 24);
  }
  // 16 bytes: four by four, rows become columns.
  static INLINE Bytes transposed(Bytes x) {
    Bytes out;
    for (int i = 0; i < WIDTH; i++) out[i] = x[i / 16 * 16 + i % 4 * 4 + i / 4 % 4];
    return out;
  }
  // 128-bit lanes: those below `split` from `first`, the others from `second`.
  static INLINE Ints lanes(const uint8_t* first, const uint8_t* second, int split) {
    Ints out;
    for (int i = 0; i < WIDTH / 16; i++)
      std::memcpy(reinterpret_cast<uint8_t*>(&out) + 16 * i, i < split ? first : second, 16);
    return out;
  }
  // A table of 128 bytes, by the low seven bits of an index.
  struct Bytes128 {
    const uint8_t* entries;
    explicit Bytes128(const uint8_t* table) : entries(table) {}
    INLINE Bytes operator()(Bytes index) const {
      Bytes out;
      for (int i = 0; i < WIDTH; i++) out[i] = entries[index[i] & 127];
      return out;
    }
  };
  // 127 - level where the highest bit of `sign` is set.
  static INLINE Bytes turned_round(Bytes level, Bytes sign) { return level ^ ((Bytes)(sign > 127) & 127); }

  // What encoders need. Lane i becomes x[i] + x[i ^ S], or x[i ^ S] - x[i] where bit S of i is set; S = 1, 2, 4, ...
  static INLINE Floats hadamard(Floats x) {
    for (int s = 1; s < LANES; s *= 2) {
      Floats y;
      for (int i = 0; i < LANES; i++) y[i] = i & s ? x[i ^ s] - x[i] : x[i] + x[i ^ s];
      x = y;
    }
    return x;
  }
  // Sums of four registers: first half of the lanes plus second half, and again.
  static INLINE Quad halved(const Floats x[4]) {
    Quad out;
    for (int r = 0; r < 4; r++) {
      Floats y = x[r];
      for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) y[i] += y[i + half];
      out[r] = y[0];
    }
    return out;
  }
  static INLINE Ints least(Ints a, Ints b) { return a < b ? a : b; }
  // Drops the low byte of each lane of `all`, and appends that of `last` at its end.
  static INLINE Ints bytes_in(Ints all, Ints last) { return (Ints)((Words)all >> 8 | (Words)last << 24); }
  // sum + a * c + b * d: `pair` is a in the low 16 bits and b in the high ones, `other` c, which is positive, and d.
  static INLINE Ints plus_pairs(Ints sum, int32_t pair, Ints other) {
    return sum + (other & 0xffff) * int32_t(int16_t(pair)) + (other >> 16) * (pair >> 16);
  }
  // Lane i of each of the registers that `index` names.
  static INLINE Ints gathered(const uint8_t* registers, Ints index) {
    Ints out;
    for (int i = 0; i < LANES; i++)
      std::memcpy(reinterpret_cast<uint8_t*>(&out) + 4 * i, registers + WIDTH * index[i] + 4 * i, 4);
    return out;
  }
  static INLINE Ints from_bytes(const uint8_t* p) {
    Ints out;
    for (int i = 0; i < LANES; i++) out[i] = p[i];
    return out;
  }
  static INLINE Ints to_ints(Floats x) { return __builtin_convertvector(x, Ints); }
  static INLINE Ints count(Ints level, Floats x, Floats threshold) { return level - (Ints)(x > threshold); }
  static INLINE Ints flip(Ints level, Floats sign, Ints mask) { return level ^ ((Ints)(sign < Floats{}) & mask); }
  // The low bytes of four tokens' codes: four channels of a token side by side, and 256 bytes on the next four
  // channels.
  static INLINE void store_words(uint8_t* p, const Ints code[4]) {
    for (int i = 0; i < LANES; i++)
      for (int j = 0; j < 4; j++) p[256 * (i / 4) + 4 * j + i % 4] = uint8_t(code[j][i]);
  }
};

}  // namespace tersekv::TERSEKV_ISA
