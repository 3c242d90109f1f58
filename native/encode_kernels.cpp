// Compiled once for each instruction set, without fused multiply-adds: they would change stored bytes.
#include "encode.h"

#include TERSEKV_ISA_HEADER

#include "convert.h"
#include "feedback.h"
#include "table.h"
#include "uniform.h"
#include "viterbi.h"

namespace tersekv::TERSEKV_ISA {

namespace {

template <int BITS>
void encode_bits(const Encoder& e, const Input& in, EncodeScratch& s, uint8_t* out) {
  if (e.method == Method::uniform)
    return e.channel_scale ? channel_block<BITS>(e, in, s, out) : token_block<BITS>(e, in, s, out);
  if constexpr (BITS <= 4)
    if (e.method == Method::trellis) return trellis_block<BITS>(e, in, s, out);
  if (e.unbiased) return table_block<BITS, true>(e, in, s, out);
  table_block<BITS, false>(e, in, s, out);
}

void encode(const Encoder& e, const Input& in, EncodeScratch& s, uint8_t* out) {
  std::memset(out, 0, size_t(e.nbytes));  // the padding between planes is part of the page
  if (e.method == Method::dense) return dense_block(e, in, s, out);
  switch (e.bits) {
    case 1: return encode_bits<1>(e, in, s, out);
    case 2: return encode_bits<2>(e, in, s, out);
    case 3: return encode_bits<3>(e, in, s, out);
    case 4: return encode_bits<4>(e, in, s, out);
    default: return encode_bits<8>(e, in, s, out);
  }
}

void repack(int bits, int d, Order from, Order to, const uint8_t* codes, EncodeScratch& s, uint8_t* out) {
  switch (bits) {
    case 1: return repack_block<1>(d, from, to, codes, s, out);
    case 2: return repack_block<2>(d, from, to, codes, s, out);
    case 3: return repack_block<3>(d, from, to, codes, s, out);
    case 4: return repack_block<4>(d, from, to, codes, s, out);
    default: return repack_block<8>(d, from, to, codes, s, out);
  }
}

void steer(const Encoder& e, const Input& in, const float* passed, EncodeScratch& s, uint8_t* codes) {
  switch (e.bits) {
    case 1: return steer_block<1>(e, in, passed, s, codes);
    case 2: return steer_block<2>(e, in, passed, s, codes);
    case 3: return steer_block<3>(e, in, passed, s, codes);
    case 4: return steer_block<4>(e, in, passed, s, codes);
    default: return steer_block<8>(e, in, passed, s, codes);
  }
}

}  // namespace

extern const EncodeKernels encode_kernels = {encode, repack, steer, rotate_row, load_numbers, store_numbers};

}  // namespace tersekv::TERSEKV_ISA
