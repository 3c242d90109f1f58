// The encoder of a trellis: see `TrellisEncoder`, and `viterbi` of ops/trellis.py. Rotation and sums by a thread for each token;
// the walk by 16 threads, of which each holds 16 states of four tokens.
//
// A state's oldest BITS are its fork, the rest its head. Register index R of a thread holds, from its highest bit on, codes that
// are new since the last exchange, the fork, and what is left of the bits that R was then; the thread's number T stands in
// the middle of the state. So STEPS values need no other thread, and then T and R change places. Costs are as in the
// reference, times 2^BITS more: then u (u - w) is one addition and one multiplication with the same constant.
constexpr int THREADS = 4 * AT_ONCE;
#include "tokens.cuh"

constexpr int BITS = S::BITS, FORKS = 1 << BITS, STEPS = BITS <= 2 ? 4 / BITS : 1;
constexpr int HEADS = 16 / FORKS;       // of a thread
constexpr int EACH = 4;                 // tokens of a thread
constexpr int ROW = 20, PLACE = 336;    // words: 16 costs, and 256 of them, in which eight threads meet no bank twice
constexpr int UNREACHED = 1 << 30;
static_assert(!MEAN, "values have none");

struct Tables {  // as in encoding.py
  float edges[256], entry[256];  // of the logarithmic scale; of the states
  int unit[STEPS][16][16];       // FORKS times the odd number of a state: [step][register][thread]
};
struct Shared : Tokens {
  alignas(16) u32 fallen[AT_ONCE][4 * D];  // [channel / 4][thread], a byte for each channel: the forks of its heads
  int costs[THREADS / 32][2][PLACE];
  int unit[STEPS][16][16];
  float per_value[BLOCK], entry[256];
  u32 last[AT_ONCE];
};

// Register of a fork, or of a new code, before and after value `step` since the last exchange.
INLINE constexpr int left(int step) { return 4 - BITS - BITS * step; }  // bits that were there at the exchange
INLINE constexpr int place(int step, int head, int fork) {
  return head >> left(step) << (4 - BITS * step) | fork << left(step) | (head & ((1 << left(step)) - 1));
}
// The fork of the states that follow a head.
INLINE int next_fork(int step, int head, int thread) {
  const int bits = left(step), rest = head & ((1 << bits) - 1);
  return bits >= BITS ? rest >> (bits - BITS) : rest << (BITS - bits) | thread >> (4 - BITS + bits);
}

template <int STEP>
INLINE void one_value(const Shared& s, const int (&w)[EACH], int (&x)[EACH][16], u32 (&fallen)[EACH]) {
  const int thread = threadIdx.x % 16;
#pragma unroll
  for (int head = 0; head < HEADS; head++) {
    int unit[FORKS];
#pragma unroll
    for (int code = 0; code < FORKS; code++) unit[code] = s.unit[STEP][place(STEP, head, code)][thread];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      int best = x[i][place(STEP, head, 0)];
#pragma unroll
      for (int fork = 1; fork < FORKS; fork++) best = min(best, x[i][place(STEP, head, fork)]);
      fallen[i] = __funnelshift_r(fallen[i], best, BITS);
      best = (best & -FORKS) | next_fork(STEP, head, thread);
#pragma unroll
      for (int code = 0; code < FORKS; code++) x[i][place(STEP, head, code)] = unit[code] * (unit[code] - w[i]) + best;
    }
  }
  if constexpr (HEADS * BITS < 8)
#pragma unroll
    for (int i = 0; i < EACH; i++) fallen[i] >>= 8 - HEADS * BITS;
}

// Costs from where values leave them to [register = oldest four bits][thread = the others].
INLINE void exchange(int* costs, int (&x)[16]) {
  const int thread = threadIdx.x % 16;
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    int4* to = reinterpret_cast<int4*>(costs + ROW * thread + i);
    if constexpr (BITS == 3) {  // a bit of before is the lowest of the register and the highest of the state
      to = reinterpret_cast<int4*>(costs + ROW * (i / 8 * 8 + thread / 2) + 8 * (thread % 2) + i % 8);
      const int n = i % 8, high = i / 8;
      *to = make_int4(x[2 * n + high], x[2 * n + 2 + high], x[2 * n + 4 + high], x[2 * n + 6 + high]);
    } else {
      *to = make_int4(x[i], x[i + 1], x[i + 2], x[i + 3]);
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16; i++) x[i] = costs[ROW * i + thread];
  __syncwarp();
}

template <int STEP = 0>
INLINE void values(const Shared& s, int* costs, const int (&w)[4][EACH], int (&x)[EACH][16], u32 (&fallen)[EACH]) {
  if constexpr (STEP < 4) {
    one_value<STEP % STEPS>(s, w[STEP], x, fallen);
    if constexpr (STEP % STEPS == STEPS - 1)
#pragma unroll
      for (int i = 0; i < EACH; i++) exchange(costs, x[i]);
    values<STEP + 1>(s, costs, w, x, fallen);
  }
}

// Four values of a token in units of the trellis, times FORKS.
INLINE void whole(const float* y, float per_value, int (&w)[4][EACH], int i) {
  float z[4];
  numbers<FP32>(reinterpret_cast<const u8*>(y), 0, z);
#pragma unroll
  for (int k = 0; k < 4; k++) w[k][i] = (__float_as_int(z[k] * per_value * PER_UNIT + MAGIC) - MAGIC_BITS) * FORKS;
}

// The states of the best walks' last values to `last`, and all forks.
INLINE void walk(Shared& s, int first) {
  const int thread = threadIdx.x % 16, mine = threadIdx.x / 16 * EACH;
  int* costs = s.costs[threadIdx.x / 32][threadIdx.x % 32 / 16];
  int x[EACH][16];
#pragma unroll
  for (int i = 0; i < EACH; i++)
#pragma unroll
    for (int r = 0; r < 16; r++) x[i][r] = r == 0 && thread == 0 ? 0 : UNREACHED | r >> (4 - BITS);
  float per_value[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) per_value[i] = s.per_value[first + mine + i];
#pragma unroll 1
  for (int c = 0; c < D; c += 4) {
    int w[4][EACH];
    u32 fallen[EACH] = {};
#pragma unroll
    for (int i = 0; i < EACH; i++) whole(s.y[first + mine + i] + c, per_value[i], w, i);
    values(s, costs, w, x, fallen);
#pragma unroll
    for (int i = 0; i < EACH; i++) s.fallen[mine + i][4 * c + thread] = fallen[i];
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int least = x[i][0], state = thread;
#pragma unroll
    for (int r = 1; r < 16; r++)
      if (x[i][r] < least) least = x[i][r], state = 16 * r + thread;
#pragma unroll
    for (int j = 1; j < 16; j *= 2) {
      const int other = across(least, j), its = across(state, j);
      if (other < least || (other == least && its < state)) least = other, state = its;
    }
    if (thread == 0) s.last[mine + i] = state;
  }
}

// From the last state to all of them: that of channel c takes the place of a fork that is no longer needed.
INLINE void trace(u8* fallen, u32 state) {
#pragma unroll 1
  for (int c = D - 4; c >= 0; c -= 4)
#pragma unroll
    for (int k = 3; k >= 0; k--) {
      const int made = BITS * (k % STEPS);
      const u32 head = state >> BITS, thread = head >> made & 15, rest = head >> (4 + made);
      const u32 number = (head & ((1u << made) - 1)) << left(k % STEPS) | rest;
      const u32 fork = u32(fallen[16 * c + 4 * thread + k]) >> (number * BITS) & (FORKS - 1);
      fallen[16 * c + k] = u8(state);
      state = head | fork << (8 - BITS);
    }
}

// <y, entries> of a token, and its codes in the order `mma_trellis_v`.
INLINE float code(const Shared& s, const float* y, const u8* states, u8* out) {
  const int token = threadIdx.x;
  float along[LANES] = {};
#pragma unroll 1
  for (int k = 0; k < PARTS; k++) {
    float z[LANES];
    numbers<FP32>(reinterpret_cast<const u8*>(y), LANES * k, z);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 bits = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int c = 16 * k + 8 * half + i;
        const u32 state = states[16 * (c & ~3) + c % 4];
        along[8 * half + i] += z[8 * half + i] * s.entry[state];
        bits = bits << BITS | (state & (FORKS - 1));
      }
      const int eighth = 2 * k + half, lane = 4 * (eighth / (D / 64)) + token / 16;
      u8* to = out + S::CODES + 512 * BITS * (eighth % (D / 64)) + 16 * lane + token % 16;
#pragma unroll
      for (int i = 0; i < BITS; i++) to[512 * i] = u8(bits >> (8 * (BITS - 1 - i)));
    }
  }
  return halved(along);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) encode(const Arguments a) {
  extern __shared__ __align__(16) u8 memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const Tables& tables = *reinterpret_cast<const Tables*>(a.tables);
  u8* out = a.out + i64(blockIdx.x) * a.stride;
  load(a, s);
  pad(out);
  for (int i = threadIdx.x; i < 256; i += THREADS) s.entry[i] = tables.entry[i];
  for (int i = threadIdx.x; i < 256 * STEPS; i += THREADS) s.unit[0][0][i] = tables.unit[0][0][i];
  __syncthreads();
  float energy = 0, norm = 0, scale = 0;
  if (threadIdx.x < BLOCK) {
    float y[CHUNK];
    rotate(s.y[threadIdx.x], y);
    energy = energy_of(s, s.y[threadIdx.x], y), norm = sqrtf(energy);
    s.per_value[threadIdx.x] = norm > 0 ? ROOT_D / norm : 0.f;
  }
#pragma unroll 1
  for (int first = 0; first < BLOCK; first += AT_ONCE) {
    __syncthreads();
    walk(s, first);
    __syncthreads();
    const int mine = threadIdx.x - first;
    if (mine < 0 || mine >= AT_ONCE) continue;
    u8* fallen = reinterpret_cast<u8*>(s.fallen[mine]);
    trace(fallen, s.last[mine]);
    const float along = code(s, s.y[threadIdx.x], fallen, out);
    scale = !UNBIASED ? norm * FACTOR : along > 0 ? energy / along : 0.f;
  }
  put_scale(s, scale, tables.edges, out);
}
