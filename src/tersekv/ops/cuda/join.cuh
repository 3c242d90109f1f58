// From the sums of warps to those of a block, and from blocks to the output.
#pragma once
#include "softmax.cuh"

struct Arguments {  // as in attending.py
  const float* q;    // (b h, rows, D)
  const u8* pool;
  const int* table;  // (b h, blocks)
  const i64* lengths;
  float *out, *lse;  // (b h, rows, D), (b h, rows)
  float *part_out, *part_sums;  // of splits: (tiles, splits, ITEMS, 2), (tiles, splits, HEADS) log-sum-exps
  int* arrived;                 // of tiles; 0 before and after
  const u8* windows;            // of a trellis: levels of successive channels by the bits of their window
  u32 page_bytes;
  int rows, blocks, splits, tiles;  // tiles: of query rows, for each of b h
  float scale;                      // of scores, times log2(e)
};

// What the block works on. The compiler does not see that two of a block are the same.
struct Place {
  int split, tile, sequence, rows;
  i64 first_row;
  INLINE explicit Place(const Arguments& a) {
    asm volatile("mov.u32 %0, %%ctaid.x;\nmov.u32 %1, %%ctaid.y;" : "=r"(tile), "=r"(split));
    sequence = a.tiles == 1 ? tile : tile / a.tiles;  // the branch is the same for all, and a division takes 100 cycles
    const int head0 = (tile - sequence * a.tiles) * HEADS;
    rows = a.rows - head0 < HEADS ? a.rows - head0 : HEADS;
    first_row = i64(sequence) * a.rows + head0;
  }
};

constexpr int ITEMS = D * HEADS / 2;  // pairs of neighbouring channels of the heads, see `Item`
constexpr int AT_ONCE = 8;            // splits of which a thread waits for at the same time
struct Sums {  // of all warps, at the end; lies where the rings were. Lanes side by side, as they hold them
  float2 out[WARPS][SUMS][USED][32];
  float ref[HEADS][WARPS], mass[HEADS][WARPS], share[HEADS][WARPS];
};

// A warp's sums to shared memory.
INLINE void put(const Softmax& softmax, Sums& sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float common[MINE];  // to all channels
#pragma unroll
  for (int j = 0; j < MINE; j++) {
    const float mass = row_sum(softmax.mass[j]);
    common[j] = V_CHANNELS || V::TRELLIS ? 0 : row_sum(softmax.zero[j]) + softmax.middle[j];
    if (lane < 4) {
      sums.ref[lane + 4 * j][warp] = mass > 0 ? softmax.ref[j] : -INFINITE;
      sums.mass[lane + 4 * j][warp] = mass;
    }
  }
#pragma unroll
  for (int m = 0; m < SUMS; m++) {
    float2 factor = make_float2(V_CHANNELS ? 1.f : V::STEP, V_CHANNELS ? 1.f : V::STEP);
    if constexpr (V::BITS == 1 && !V_CHANNELS && !V::TRELLIS) factor.x /= 1 << (2 * (m % 4)), factor.y = factor.x / 2;
#pragma unroll
    for (int j = 0; j < USED; j++) {
      const auto& out = softmax.out[m];
      float2& to = sums.out[warp][m][j][lane];
      if constexpr (V::TRELLIS) to = make_float2(out[j][0] * factor.x, out[j][1] * factor.y);
      else to = make_float2(fmaf(out[0][j], factor.x, common[j]), fmaf(out[1][j], factor.y, common[j]));
    }
  }
}

// Two neighbouring channels of a head: register pair `m`, `j` of a lane.
struct Item {
  int m, j, lane, head, channel;
  INLINE Item(int i) : m(i / (32 * USED)), j(i / 32 % USED), lane(i % 32) {
    const int first = ROWS * (lane / 4);
    if constexpr (V::TRELLIS) {
      head = 2 * (m % (HEADS / 2)) + lane % 4 / 2, channel = first + 8 * (m / (HEADS / 2)) + 4 * j + lane % 2 * 2;
    } else {
      head = lane % 4 + 4 * j, channel = first + 2 * m;
    }
  }
};

// What the warps count of each head, weights that sum up to 1, and the head's log-sum-exp in units of log2. A thread for
// each head and warp: it finds the head's sum by itself, which takes less time than to exchange it.
template <class Write>
INLINE void weigh(Sums& sums, Write write) {
  static_assert(HEADS * WARPS <= THREADS);
  const int head = threadIdx.x / WARPS, warp = threadIdx.x % WARPS;
  if (head >= HEADS) return;
  float top = -INFINITE, total = 0;
#pragma unroll
  for (int i = 0; i < WARPS; i++) top = fmaxf(top, sums.ref[head][i]);
  const float ref = top == -INFINITE ? 0 : top;
#pragma unroll
  for (int i = 0; i < WARPS; i++) total += exp2_fast(sums.ref[head][i] - ref) * sums.mass[head][i];
  sums.share[head][warp] = total > 0 ? exp2_fast(sums.ref[head][warp] - ref) * reciprocal(total) : 0;
  if (warp == 0) write(head, total > 0 ? ref + log2_fast(total) : -INFINITE);
}

// Joins the parts of the block's warps, to the output or to the split's place.
INLINE void join_warps(const Arguments& a, Sums& sums, const Place& place) {
  const i64 part = i64(place.tile) * a.splits + place.split;
  weigh(sums, [&](int head, float lse) {
    if (head >= place.rows) return;
    if (a.splits == 1) a.lse[place.first_row + head] = lse * 0.69314718f;
    else __stcg(a.part_sums + part * HEADS + head, lse);
  });
  __syncthreads();
  for (int i = threadIdx.x; i < ITEMS; i += THREADS) {
    const Item item(i);
    if (item.head >= place.rows) continue;
    float2 out = make_float2(0, 0);
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
      const float2 x = sums.out[warp][item.m][item.j][item.lane];
      const float weight = sums.share[item.head][warp];
      out.x += weight * x.x, out.y += weight * x.y;
    }
    if (a.splits == 1) *reinterpret_cast<float2*>(a.out + (place.first_row + item.head) * D + item.channel) = out;
    else __stcg(reinterpret_cast<float2*>(a.part_out) + part * ITEMS + i, out);
  }
}

// Whether all other blocks of the tile were here before: what they have written can be read then.
INLINE bool last_to_arrive(int* arrived, int splits) {
  __shared__ int before;
  __syncthreads();
  if (threadIdx.x == 0)  // for all threads of the block, and not by each of them: a fence waits for every store
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
  __syncthreads();
  return before == splits - 1;
}

// The parts of one item, in a running softmax.
struct Joined {
  float top = -INFINITE, mass = 0;
  float2 out = make_float2(0, 0);
  INLINE void add(const float (&lse)[AT_ONCE], const float2 (&x)[AT_ONCE]) {
    float now = top;
#pragma unroll
    for (int s = 0; s < AT_ONCE; s++) now = fmaxf(now, lse[s]);
    const float ref = now == -INFINITE ? 0 : now, fade = exp2_fast(top - ref);
    top = now, mass *= fade, out.x *= fade, out.y *= fade;
#pragma unroll
    for (int s = 0; s < AT_ONCE; s++) {
      const float weight = exp2_fast(lse[s] - ref);
      mass += weight, out.x += weight * x[s].x, out.y += weight * x[s].y;
    }
  }
};

// The block that comes last joins the splits of its tile. Nothing else runs by then, so what counts is how often it
// waits: once for memory, and never for another thread. Each item is weighed anew for that.
INLINE void join_splits(const Arguments& a, const Place& place) {
  if (!last_to_arrive(a.arrived + place.tile, a.splits)) return;
  if (threadIdx.x == 0) a.arrived[place.tile] = 0;
  const float2* parts = reinterpret_cast<const float2*>(a.part_out) + i64(place.tile) * a.splits * ITEMS;
  const float* sums = a.part_sums + i64(place.tile) * a.splits * HEADS;
  for (int i = threadIdx.x; i < ITEMS; i += THREADS) {
    const Item item(i);
    if (item.head >= place.rows) continue;
    Joined all;
#pragma unroll 1
    for (int first = 0; first < a.splits; first += AT_ONCE) {
      float lse[AT_ONCE];
      float2 x[AT_ONCE];
#pragma unroll
      for (int s = 0; s < AT_ONCE; s++) {
        const bool there = first + s < a.splits;
        x[s] = there ? __ldcg(parts + i64(first + s) * ITEMS + i) : make_float2(0, 0);
        lse[s] = there ? __ldcg(sums + (first + s) * HEADS + item.head) : -INFINITE;
      }
      all.add(lse, x);
    }
    const float inverse = all.mass > 0 ? reciprocal(all.mass) : 0;
    const i64 row = place.first_row + item.head;
    *reinterpret_cast<float2*>(a.out + row * D + item.channel) = make_float2(all.out.x * inverse, all.out.y * inverse);
    if (item.channel == 0) a.lse[row] = all.mass > 0 ? (all.top + log2_fast(all.mass)) * 0.69314718f : -INFINITE;
  }
}
