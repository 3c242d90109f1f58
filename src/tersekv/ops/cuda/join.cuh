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

constexpr int ITEMS = D * HEADS / 2;  // pairs of neighbouring channels of the heads, see `Item`
constexpr int AT_ONCE = 16;           // splits of which a thread waits for at the same time
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

// What parts count of a head, by one warp: weights in `share` that sum up to 1; returns the log-sum-exp in units of log2.
template <class Ref, class Mass>
INLINE float divide(int count, Ref ref_of, Mass mass_of, float* share) {
  const int lane = threadIdx.x % 32;
  float ref = -INFINITE, total = 0;
  for (int i = lane; i < count; i += 32) ref = fmaxf(ref, share[i] = ref_of(i));
#pragma unroll
  for (int i = 1; i < 32; i *= 2) ref = fmaxf(ref, across(ref, i));
  for (int i = lane; i < count; i += 32) {
    const float factor = ref == -INFINITE ? 0 : exp2_fast(share[i] - ref);
    share[i] = factor, total += factor * mass_of(i);
  }
#pragma unroll
  for (int i = 1; i < 32; i *= 2) total += across(total, i);
  for (int i = lane; i < count; i += 32) share[i] *= total > 0 ? 1 / total : 0;
  return total > 0 ? ref + log2f(total) : -INFINITE;
}

// The block that comes last joins the splits of its tile. Nothing else runs by then, so what counts is how often it waits.
INLINE void join_splits(const Arguments& a, int tile, i64 first_row, int rows, float* share) {
  __shared__ int last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(a.arrived + tile, 1) == a.splits - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  if (threadIdx.x == 0) a.arrived[tile] = 0;
  const float2* parts = reinterpret_cast<const float2*>(a.part_out) + i64(tile) * a.splits * ITEMS;
  auto part = [&](int s, int i) { return s < a.splits ? __ldcg(parts + i64(s) * ITEMS + i) : make_float2(0, 0); };
  float2 early[AT_ONCE];  // of the thread's first item: asked for before it is known what they count
#pragma unroll
  for (int s = 0; s < AT_ONCE; s++) early[s] = threadIdx.x < ITEMS ? part(s, threadIdx.x) : make_float2(0, 0);
  const float* sums = a.part_sums + i64(tile) * a.splits * HEADS;
  for (int head = threadIdx.x / 32; head < rows; head += WARPS) {
    const float lse = divide(
        a.splits, [&](int i) { return __ldcg(sums + i * HEADS + head); }, [](int) { return 1.f; },
        share + head * a.splits);
    if (threadIdx.x % 32 == 0) a.lse[first_row + head] = lse * 0.69314718f;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < ITEMS; i += THREADS) {
    const Item item(i);
    if (item.head >= rows) continue;
    float2 out = make_float2(0, 0);
    for (int first = 0; first < a.splits; first += AT_ONCE) {
      if (first || i != threadIdx.x)
#pragma unroll
        for (int s = 0; s < AT_ONCE; s++) early[s] = part(first + s, i);
#pragma unroll
      for (int s = 0; s < AT_ONCE; s++) {
        const float weight = first + s < a.splits ? share[item.head * a.splits + first + s] : 0;
        out.x += weight * early[s].x, out.y += weight * early[s].y;
      }
    }
    *reinterpret_cast<float2*>(a.out + (first_row + item.head) * D + item.channel) = out;
  }
}

// Joins the parts of the block's warps, to the output or to the split's place.
INLINE void join_warps(const Arguments& a, Sums& sums, int tile, int split, i64 first_row, int rows) {
  for (int head = threadIdx.x / 32; head < rows; head += WARPS) {
    const float lse = divide(
        WARPS, [&](int i) { return sums.ref[head][i]; }, [&](int i) { return sums.mass[head][i]; }, sums.share[head]);
    if (threadIdx.x % 32 == 0) {
      if (a.splits == 1) a.lse[first_row + head] = lse * 0.69314718f;
      else __stcg(a.part_sums + (i64(tile) * a.splits + split) * HEADS + head, lse);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < ITEMS; i += THREADS) {
    const Item item(i);
    if (item.head >= rows) continue;
    float2 out = make_float2(0, 0);
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
      const float2 x = sums.out[warp][item.m][item.j][item.lane];
      const float weight = sums.share[item.head][warp];
      out.x += weight * x.x, out.y += weight * x.y;
    }
    if (a.splits == 1) *reinterpret_cast<float2*>(a.out + (first_row + item.head) * D + item.channel) = out;
    else __stcg(reinterpret_cast<float2*>(a.part_out) + (i64(tile) * a.splits + split) * ITEMS + i, out);
  }
}
