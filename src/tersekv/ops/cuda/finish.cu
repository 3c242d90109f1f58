// The last launch of a decoding step: attention to the dense tokens (sinks, and the ring), joined with that to the pages.
// A block for each KV head and ROWS query rows. Lanes that share a token, LANES of them, are a group with a softmax of its
// own. Constants: D, KIND, ROWS, ROTATED, SIZE_ROOT.
#include "rows.cuh"
#include "waiting.cuh"

struct Arguments {
  const u8* q;                // (b, hq, n, D)
  const u8 *sink_k, *sink_v;  // (b h, sink_slots, D)
  const i64* sinks;           // (b h): tokens of them
  const u8 *ring_k, *ring_v;  // (b h, slots, D)
  const i64* packed;          // (b h): tokens in pages; the ring holds those from there on
  const int* next;            // (b h): up to here
  const float *part, *part_lse;  // attention to pages (b, hq, n, D), in the values' domain
  const float* after;            // of that domain's rotation
  u8* out;                       // (b, n, hq, D)
  i64 q_strides[3];              // bytes between sequences, heads, tokens
  int heads, group, n, sink_slots, slots;
  float scale;  // of scores, times log2(e)
};

constexpr int THREADS = 256, SIZE = KIND == FP32 ? 4 : 2;
constexpr int CHANNELS = D / 32 > 16 / SIZE ? D / 32 : 16 / SIZE;  // of a lane
constexpr int LANES = D / CHANNELS, GROUPS = THREADS / LANES;
constexpr int WORDS = CHANNELS * SIZE / 16;
constexpr int AHEAD = 4;  // tokens that a group reads at a time

struct Shared {
  float out[GROUPS][ROWS][D], top[GROUPS][ROWS], mass[GROUPS][ROWS];
};

struct Raw {
  uint4 word[WORDS];
  INLINE void load(const u8* from) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) word[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  INLINE void clear() {
#pragma unroll
    for (int i = 0; i < WORDS; i++) word[i] = make_uint4(0, 0, 0, 0);
  }
  INLINE float operator[](int i) const {  // `i` is known to the compiler
    const uint4& w = word[i * SIZE / 16];
    const int j = i * SIZE % 16 / 4;
    const u32 bits = (j == 0 ? w.x : j == 1 ? w.y : j == 2 ? w.z : w.w) >> (8 * (i * SIZE % 4));
    return KIND == FP32 ? __uint_as_float(bits) : KIND == FP16 ? half_to_float(u16(bits)) : bfloat_to_float(u16(bits));
  }
};

// The running softmax of a group over its tokens; scores in units of log2.
struct Running {
  float out[ROWS][CHANNELS], top[ROWS], mass[ROWS];
  INLINE Running() {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      top[r] = -INFINITE, mass[r] = 0;
#pragma unroll
      for (int i = 0; i < CHANNELS; i++) out[r][i] = 0;
    }
  }
  INLINE void add(const float (&s)[AHEAD][ROWS], const Raw (&v)[AHEAD]) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float now = top[r];
#pragma unroll
      for (int u = 0; u < AHEAD; u++) now = fmaxf(now, s[u][r]);
      const float reference = now == -INFINITE ? 0.f : now, fade = exp2_fast(top[r] - reference);
      top[r] = now, mass[r] *= fade;
#pragma unroll
      for (int i = 0; i < CHANNELS; i++) out[r][i] *= fade;
#pragma unroll
      for (int u = 0; u < AHEAD; u++) {
        const float p = exp2_fast(s[u][r] - reference);
        mass[r] += p;
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) out[r][i] = fmaf(p, v[u][i], out[r][i]);
      }
    }
  }
};

// Attention of query rows row0.. of KV head `row` to its dense tokens, each group to some of them.
INLINE void dense(const Arguments& a, int row, int row0, int rows, Running& sum) {
  const int lane = threadIdx.x % LANES, sinks = int(a.sinks[row]), first = int(a.packed[row]), next = a.next[row];
  const int total = sinks + next - first, at = lane * CHANNELS * SIZE;
  float q[ROWS][CHANNELS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const int i = row0 + r < rows ? row0 + r : row0, query = row % a.heads * a.group + i / a.n;
    Raw raw;
    raw.load(a.q + row / a.heads * a.q_strides[0] + query * a.q_strides[1] + i % a.n * a.q_strides[2] + at);
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) q[r][c] = raw[c] * a.scale;
  }
  for (int turn = 0; turn < total; turn += GROUPS * AHEAD) {  // as often for all lanes of a warp: they exchange sums
    const int start = turn + threadIdx.x / LANES;
    Raw k[AHEAD], v[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      const int i = start + u * GROUPS;
      k[u].clear(), v[u].clear();
      if (i >= total) continue;
      const bool sink = i < sinks;
      const i64 slot = sink ? i64(row) * a.sink_slots + i : i64(row) * a.slots + (first + i - sinks) % a.slots;
      k[u].load((sink ? a.sink_k : a.ring_k) + slot * D * SIZE + at);
      v[u].load((sink ? a.sink_v : a.ring_v) + slot * D * SIZE + at);
    }
    float s[AHEAD][ROWS];
#pragma unroll
    for (int u = 0; u < AHEAD; u++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        float dot = 0;
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) dot = fmaf(q[r][c], k[u][c], dot);
#pragma unroll
        for (int i = 1; i < LANES; i *= 2) dot += across(dot, i);
        const int seen = total - a.n + (row0 + r) % a.n + 1;  // row r of a head is query r % n
        s[u][r] = start + u * GROUPS < seen ? dot : -INFINITE;
      }
    sum.add(s, v);
  }
}

template <int COUNT>
INLINE void write(u8* to, int first, const float (&x)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    u16 half;
    if constexpr (KIND == FP32) reinterpret_cast<float*>(to)[first + i] = x[i];
    else if constexpr (KIND == FP16) asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x[i]));
    else asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(x[i]));
    if constexpr (KIND != FP32) reinterpret_cast<u16*>(to)[first + i] = half;
  }
}

// A query row by a warp: the groups' sums and the pages' part, whose rotation is undone.
INLINE void join(const Arguments& a, const Shared& s, int row, int index, int r) {
  constexpr int COUNT = D / 32;
  const int lane = threadIdx.x % 32, first = lane * COUNT;
  const i64 at = i64(row) * a.group * a.n + index;
  float x[COUNT], total[COUNT] = {}, mass = 0;
  load_row<FP32>(reinterpret_cast<const u8*>(a.part + at * D), first, x);
  if constexpr (ROTATED) {
    hadamard(x);
#pragma unroll
    for (int i = 0; i < COUNT; i++) x[i] *= SIZE_ROOT * a.after[first + i];
  }
  const float lse = a.part_lse[at] * 1.4426950408889634f;
  float top = lse;
  for (int g = 0; g < GROUPS; g++) top = fmaxf(top, s.top[g][r]);
  const float share = lse == -INFINITE ? 0.f : exp2_fast(lse - top);
  mass = share;
#pragma unroll
  for (int i = 0; i < COUNT; i++) total[i] = share > 0 ? share * x[i] : 0.f;
  for (int g = 0; g < GROUPS; g++) {
    const float weight = exp2_fast(s.top[g][r] - top);
    mass += weight * s.mass[g][r];
#pragma unroll
    for (int i = 0; i < COUNT; i++) total[i] += weight * s.out[g][r][first + i];
  }
#pragma unroll
  for (int i = 0; i < COUNT; i++) total[i] /= mass;
  const int query = row % a.heads * a.group + index / a.n;
  write(a.out + ((i64(row / a.heads) * a.n + index % a.n) * a.heads * a.group + query) * D * SIZE, first, total);
}

extern "C" __global__ void __launch_bounds__(THREADS) finish(const Arguments a) {
  __shared__ Shared s;
  const int row = blockIdx.y, row0 = blockIdx.x * ROWS, rows = a.group * a.n;
  const int group = threadIdx.x / LANES, first = threadIdx.x % LANES * CHANNELS;
  Running sum;
  dense(a, row, row0, rows, sum);
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) s.out[group][r][first + i] = sum.out[r][i];
    if (first == 0) s.top[group][r] = sum.top[r], s.mass[group][r] = sum.mass[r];
  }
  __syncthreads();
  wait_for_last_launch();  // here pages begin to count; until then only what the launch before that one wrote was read
  for (int r = threadIdx.x / 32; r < ROWS && row0 + r < rows; r += THREADS / 32) join(a, s, row, row0 + r, r);
}
