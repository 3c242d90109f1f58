// The kernels with their template arguments, by numbers that are known when they run.
#pragma once
#include "dense.h"
#include "matrix.h"
#include "softmax.h"
#include "trellis.h"

namespace tersekv::TERSEKV_ISA {

using ScoreInt8 = void (*)(const uint8_t*, const uint8_t*, Ahead, int, const int8_t*, float*);
using ScoreExact = void (*)(const float*, const uint8_t*, Ahead, int, const float*, float*);
using ScoreDense = void (*)(const uint8_t*, int64_t, int, int, const float*, float*);
using MixInt8 = void (*)(const uint8_t*, const uint8_t*, Ahead, int, const int8_t*, const float*, float*);
using MixExact = void (*)(const float*, const uint8_t*, Ahead, int, const float*, const float*, float*);
using MixDense = void (*)(const uint8_t*, int64_t, int, int, const float*, const float*, float*);

// A strip of R rows at bits B: [bits][rows - 1].
#define EACH_STRIP(F, B) {F<B, 1>, F<B, 2>, F<B, 3>, F<B, 4>}
#define GRID(F) {EACH_STRIP(F, 1), EACH_STRIP(F, 2), EACH_STRIP(F, 3), EACH_STRIP(F, 4), EACH_STRIP(F, 8)}
#define STRIP_IN_GROUPS(F, B) {F<B, 1, true>, F<B, 2, true>, F<B, 3, true>, F<B, 4, true>}
#define GRID_IN_GROUPS(F) \
  {STRIP_IN_GROUPS(F, 1), STRIP_IN_GROUPS(F, 2), STRIP_IN_GROUPS(F, 3), STRIP_IN_GROUPS(F, 4), STRIP_IN_GROUPS(F, 8)}
#define EACH_BITS(F) {F<1>, F<2>, F<3>, F<4>}
#define DENSE(F) {EACH_STRIP(F, Kind::fp32), EACH_STRIP(F, Kind::fp16), EACH_STRIP(F, Kind::bf16)}
constexpr ScoreInt8 SCORE_INT8[5][STRIP] = GRID(score_int8);
constexpr MixInt8 MIX_INT8[5][STRIP] = GRID(mix_int8);
constexpr ScoreExact SCORE_EXACT[5][STRIP] = GRID(score_exact);
constexpr MixExact MIX_EXACT[5][STRIP] = GRID(mix_exact);
constexpr ScoreInt8 SCORE_INT8_IN_GROUPS[5][STRIP] = GRID_IN_GROUPS(score_int8);
constexpr ScoreExact SCORE_EXACT_IN_GROUPS[5][STRIP] = GRID_IN_GROUPS(score_exact);
constexpr ScoreDense SCORE_DENSE[3][STRIP] = DENSE(score_dense);
constexpr MixDense MIX_DENSE[3][STRIP] = DENSE(mix_dense);
// A block as bytes: levels of a grid, levels of a trellis, or its windows, which are codes of 8 bits.
using LookUp = void (*)(const uint8_t*, bool, const uint8_t*, Ahead, int, uint8_t*);
constexpr LookUp LOOK_UP[3][4] = {EACH_BITS(look_up_block), EACH_BITS(trellis_levels), EACH_BITS(trellis_windows)};

template <int R, bool ZERO>
void softmax(const Job& job, const Queries& q, const Block* blocks, int count, Sums& sums, Strip& strip, int row,
             const Ahead* ahead, bool all_seen, float* max, int64_t at, bool int8) {
  Softmax<R, ZERO>(job, q, blocks, count, sums, strip, row, ahead, all_seen)(max, at, int8);
}
constexpr decltype(&softmax<1, false>) SOFTMAX[2][STRIP] = {
    {softmax<1, false>, softmax<2, false>, softmax<3, false>, softmax<4, false>},
    {softmax<1, true>, softmax<2, true>, softmax<3, true>, softmax<4, true>}};
#undef EACH_STRIP
#undef GRID
#undef STRIP_IN_GROUPS
#undef GRID_IN_GROUPS
#undef DENSE
#undef EACH_BITS

inline int of_bits(int bits) { return bits == 8 ? 4 : bits - 1; }
inline int of_kind(Kind kind) { return int(kind) - int(Kind::fp32); }

}  // namespace tersekv::TERSEKV_ISA
