// Attention of many query rows over packed pages. Groups of four warps unpack each page once to bf16 in shared memory (on
// Hopper one the keys, one the values); other groups, 64 query rows each, multiply: see docs/kernels-cuda.md. The sides K and V and the constants stand before this text.
#include "dequantise.cuh"
#include "handover.cuh"

struct Arguments {  // as in chunks.py
  const float* q;    // (b h, rows, D)
  const u8* pool;
  const int* table;  // (b h, blocks)
  const i64* lengths;
  float *out, *lse;  // (splits, b h, rows, D), (splits, b h, rows)
  i64 page_bytes;
  int rows, blocks, splits, tiles, sequences;
  float scale;  // of scores, times log2(e)
};

constexpr int THREADS = 128 * (GROUPS + UNPACKERS), THREADS_REGISTERS = 65536 / THREADS / 8 * 8,
               TOKENS = 64 / PARTS, PAGE = K::BYTES + V::BYTES;
constexpr int SLOT = 128 * D;  // bytes of one side of a page
constexpr float SLACK = 8;     // weights stay below 2^SLACK: the reference point moves, and sums are scaled, rarely

struct Shared {
  alignas(16) u8 raw[RAW][PAGE];
  Weights weights[V::DENSE ? 1 : 4];
  u64 full[SLOTS], free[SLOTS];
  float k_list[K::LISTED ? 256 : 1], v_list[V::LISTED ? 256 : 1];
};

struct Range {  // pages of a block
  int first, count, length;
  const int* ids;
};

template <bool KEYS, bool VALUES>
INLINE void unpack(const Arguments& a, const Range& range, u8* slots, Shared& shared) {
  constexpr int FROM = KEYS ? 0 : K::BYTES, TO = VALUES ? PAGE : K::BYTES;
  const int thread = threadIdx.x % 128, w = thread / 32;
  const Entries<K> keys(shared.k_list);
  const Entries<V> values(shared.v_list);
  int id = range.ids[0];
  auto ask = [&](int i) {  // page i, whose number is known by now
    const u8* from = a.pool + i64(id) * a.page_bytes;
    if (i < range.count)
      for (int at = FROM + 16 * thread; at < TO; at += 2048)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared.raw[i % RAW] + at)),
                     "l"(from + at)
                     : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (i + 1 < range.count) id = range.ids[i + 1];
  };
  for (int i = 0; i < RAW - 1; i++) ask(i);
  Turn<SLOTS / 2> turn;
#pragma unroll 1
  for (int i = 0; i < range.count; i++, turn.next()) {
    asm volatile("cp.async.wait_group %0;" ::"n"(RAW - 2) : "memory");
    asm volatile("bar.sync %0, 128;" ::"n"(KEYS ? 1 : 2) : "memory");
    const u8* page = shared.raw[i % RAW];
    ask(i + RAW - 1);
    if constexpr (KEYS) {
      const int slot = 2 * turn.slot;
      if (turn.phase) barrier_wait(shared.free + slot, turn.phase - 1);
      put_keys(page, slots + slot * SLOT, keys, w);
      show_stores();
      barrier_arrive(shared.full + slot);
    }
    if constexpr (VALUES) {
      const int slot = 2 * turn.slot + 1, left = range.length - 64 * (range.first + i);
      if (turn.phase) barrier_wait(shared.free + slot, turn.phase - 1);
      put_values(page + K::BYTES, slots + slot * SLOT, values, w, left, shared.weights);
      show_stores();
      barrier_arrive(shared.full + slot);
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// More registers for those that multiply, fewer for those that unpack. Hopper's way to share what a block was given.
template <int COUNT>
INLINE void take_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (COUNT > THREADS_REGISTERS) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
  else if constexpr (COUNT > 0) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

// A warp's 16 query rows, in the columns' order of the keys, as operands A.
INLINE void load_queries(const float* const (&row)[2], float scale, u32 (&q)[D / 16][4]) {
  const int j = threadIdx.x % 4 * 2;
#pragma unroll
  for (int k = 0; k < D / 16; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int c = key_channel(k / 4, k % 4 * 2 + i / 2) + j;
      const float2 x = row[i % 2] ? *reinterpret_cast<const float2*>(row[i % 2] + c) : make_float2(0, 0);
      q[k][i] = bfloats(x.x * scale, x.y * scale);
    }
}

// Running softmax of two rows of a lane. Scores are in units of log2.
struct Rows {
  float ref[2] = {-INFINITE, -INFINITE}, mass[2] = {0, 0};

  // Scores to weights as operands A.
  INLINE void weigh(float (&s)[TOKENS / 8][4], float (&out)[D / 8][4], u32 (&p)[TOKENS / 16][4]) {
    float top[2] = {s[0][0], s[0][2]};
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) top[i / 2] = fmaxf(top[i / 2], s[j][i]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      top[i] = fmaxf(top[i], across(top[i], 1));
      top[i] = fmaxf(top[i], across(top[i], 2));
    }
    if (__any_sync(~0u, top[0] > ref[0] + SLACK || top[1] > ref[1] + SLACK)) move(top, out);
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
#pragma unroll
      for (int i = 0; i < 4; i++) mass[i / 2] += s[j][i] = exp2_fast(s[j][i] - ref[i / 2]);
#pragma unroll
      for (int i = 0; i < 2; i++) p[j / 2][j % 2 * 2 + i] = bfloats(s[j][2 * i], s[j][2 * i + 1]);
    }
  }
  INLINE void move(const float (&top)[2], float (&out)[D / 8][4]) {
    float fade[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float to = fmaxf(ref[i], top[i]);
      fade[i] = exp2_fast(ref[i] - to), ref[i] = to, mass[i] *= fade[i];
    }
#pragma unroll
    for (int j = 0; j < D / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) out[j][i] *= fade[i / 2];
  }
};

INLINE void hide(float (&s)[TOKENS / 8][4], int first, int left) {
#pragma unroll
  for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (token_of(first + 8 * j + threadIdx.x % 4 * 2 + i % 2) >= left) s[j][i] = -INFINITE;
}

template <int FIRST = 0>
INLINE void mix(float (&out)[D / 8][4], const u32 (&p)[4], u32 values) {
  product<64, FIRST>(out, p, values + FIRST * 1024, true);
  if constexpr (FIRST + 8 < D / 8) mix<FIRST + 8>(out, p, values);
}

// Queries for the products of one page, in registers of their own: at head dim 64 the ptxas of CUDA 13.0 gives those of
// queries that it sees outlive the loop to the weights too, so that only the first page is right. `nothing` is 0 and the
// compiler does not know it.
INLINE void copy(const u32 (&q)[D / 16][4], u32 nothing, u32 (&to)[D / 16][4]) {
#pragma unroll
  for (int k = 0; k < D / 16; k++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if constexpr (D == 64) asm volatile("xor.b32 %0, %1, %2;" : "=r"(to[k][i]) : "r"(q[k][i]), "r"(nothing));
      else to[k][i] = q[k][i];
}

INLINE void attend(const Range& range, const u32 (&queries)[D / 16][4], u32 nothing, u32 slots, Shared& shared, Rows& rows,
                   float (&out)[D / 8][4]) {
  Turn<SLOTS> turn;
  int held = -1;  // the slot of the values that are being multiplied
#pragma unroll 1
  for (int i = 0; i < range.count; i++) {
    const int keys = turn.slot;
    barrier_wait(shared.full + keys, turn.phase);
    turn.next();
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      float s[TOKENS / 8][4];
      u32 q[D / 16][4];
      copy(queries, nothing, q);
      products_begin();
#pragma unroll
      for (int k = 0; k < D / 16; k++)
        product<TOKENS, 0>(s, q[k], slots + keys * SLOT + k / 4 * 8192 + part * TOKENS * 128 + k % 4 * 32, k > 0);
      products_commit();
      products_wait<0>();
      if (part == 0 && held >= 0) barrier_arrive(shared.free + held);
      hold(s);
      hold(out);
      if (part == PARTS - 1) barrier_arrive(shared.free + keys);
      const int left = range.length - 64 * (range.first + i);
      if (left < 64) hide(s, part * TOKENS, left);
      u32 p[TOKENS / 16][4];
      rows.weigh(s, out, p);
      if (part == 0) {
        held = turn.slot;
        barrier_wait(shared.full + held, turn.phase);
      }
      hold(out);
      products_begin();
#pragma unroll
      for (int k = 0; k < TOKENS / 16; k++) mix(out, p[k], slots + held * SLOT + (part * TOKENS / 16 + k) * 32);
      products_commit();
      products_wait<0>();
      hold(out);
    }
    turn.next();
  }
  products_wait<0>();
  hold(out);
}

INLINE void write(float* row, float* lse, int i, const Rows& rows, const float (&out)[D / 8][4]) {
  const int p = threadIdx.x % 4;
  float mass = rows.mass[i];
  mass += across(mass, 1);
  mass += across(mass, 2);
  if (!row) return;
  const float share = mass > 0 ? 1 / mass : 0;
#pragma unroll
  for (int e = 0; e < 2; e++)
#pragma unroll
    for (int j = 0; j < D / 8; j += 4)
      *reinterpret_cast<float4*>(row + D / 8 * (2 * p + e) + j) =
          make_float4(out[j][2 * i + e] * share, out[j + 1][2 * i + e] * share, out[j + 2][2 * i + e] * share,
                      out[j + 3][2 * i + e] * share);
  if (p == 0) *lse = mass > 0 ? (rows.ref[i] + log2f(mass)) * 0.69314718f : -INFINITE;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attend_chunk(const Arguments a) {
  extern __shared__ u8 memory[];
  u8* slots = memory + (1024 - shared_address(memory) % 1024) % 1024;
  Shared& shared = *reinterpret_cast<Shared*>(slots + SLOTS * SLOT);
  const int tile = blockIdx.x % a.tiles, split = blockIdx.x / a.tiles % a.splits, sequence = blockIdx.x / a.tiles / a.splits;
  const int length = int(a.lengths[sequence]), pages = (length + 63) / 64;
  const int begin = int(i64(pages) * split / a.splits), end = int(i64(pages) * (split + 1) / a.splits);
  const Range range{begin, end - begin, length, a.table + i64(sequence) * a.blocks + begin};
  if (threadIdx.x == 0)
    for (int i = 0; i < SLOTS; i++) barrier_init(shared.full + i, 4), barrier_init(shared.free + i, 4 * GROUPS);
  COPY_LIST(K, shared.k_list, THREADS)
  COPY_LIST(V, shared.v_list, THREADS)
  __syncthreads();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (warp >= 4 * GROUPS) {
    take_registers<UNPACKER_REGISTERS>();
    if (range.count > 0) {
      if constexpr (UNPACKERS == 1) unpack<true, true>(a, range, slots, shared);
      else if (warp < 4 * GROUPS + 4) unpack<true, false>(a, range, slots, shared);
      else unpack<false, true>(a, range, slots, shared);
    }
  } else {
    take_registers<REGISTERS>();
    const float* from[2];
    float *to[2], *lse[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = 64 * GROUPS * tile + 16 * warp + threadIdx.x % 32 / 4 + 8 * i;
      const i64 at = i64(sequence) * a.rows + r, part = i64(split) * a.sequences * a.rows + at;
      from[i] = r < a.rows ? a.q + at * D : nullptr;
      to[i] = r < a.rows ? a.out + part * D : nullptr, lse[i] = a.lse + part;
    }
    u32 q[D / 16][4];
    load_queries(from, a.scale, q);
    float out[D / 8][4];
#pragma unroll
    for (int j = 0; j < D / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) out[j][i] = 0;
    Rows rows;
    attend(range, q, u32(a.rows) >> 31, shared_address(slots), shared, rows, out);
#pragma unroll
    for (int i = 0; i < 2; i++) write(to[i], lse[i], i, rows, out);
  }
}
