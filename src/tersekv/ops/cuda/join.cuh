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

constexpr int APART = V::TRELLIS ? 1 : GROUPS;  // column groups whose sums a warp has apart
constexpr int PARTS = WARPS * APART;            // of a head's sums in a block
constexpr int ITEMS = D * HEADS / 2;   // pairs of neighbouring channels of the heads, see `Item`
constexpr int AT_ONCE = 16;            // splits of which a thread waits for at the same time
struct Sums {  // of all warps, at the end; lies where the rings were. Lanes side by side, as they hold them
  float2 out[WARPS][SUMS][2][32];
  float ref[HEADS][PARTS], mass[HEADS][PARTS], share[HEADS][PARTS];
};

// A warp's sums to shared memory.
INLINE void put(const Softmax& softmax, Sums& sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const int column = 2 * (lane % 4) + j, group = column / HEADS, part = warp * APART + group % APART, head = column % HEADS;
    float mass = row_sum(softmax.mass[j]);
    if constexpr (V::TRELLIS)
#pragma unroll
      for (int i = HEADS / 2; i < 4; i *= 2) mass += across(mass, i);
    const float common = V_CHANNELS || V::TRELLIS ? 0 : row_sum(softmax.zero[j]) + softmax.middle[j];
#pragma unroll
    for (int m = 0; m < SUMS; m++) {
      if constexpr (V::TRELLIS) {
        sums.out[warp][m][j][lane] = make_float2(softmax.out[m][2 * j] * V::STEP, softmax.out[m][2 * j + 1] * V::STEP);
        continue;
      }
      const float factor = V_CHANNELS ? 1.f : V::STEP * (V::BITS == 1 ? 1.f / (1 << (2 * (m % 4))) : 1.f);
      const float other = V::BITS == 1 && !V_CHANNELS ? factor / 2 : factor;
      sums.out[warp][m][j][lane] =
          make_float2(softmax.out[m][j] * factor + common, softmax.out[m][2 + j] * other + common);
    }
    if (lane / 4 == 0 && group < APART) sums.ref[head][part] = mass > 0 ? softmax.ref[j] : -INFINITE, sums.mass[head][part] = mass;
  }
}

// Two neighbouring channels of a head: register pair `m`, `j` of the lanes of `group` 0, 1, ...
struct Item {
  int m, j, lane, head, channel;
  INLINE Item(int i) {
    if constexpr (V::TRELLIS) {
      lane = i % 32, j = i / 32 % 2, m = i / 64;
      head = 2 * (m % (HEADS / 2)) + lane % 4 / 2, channel = ROWS * (lane / 4) + 8 * (m / (HEADS / 2)) + 4 * j + lane % 2 * 2;
      return;
    }
    const int pair = i % (HEADS / 2), row = i / (HEADS / 2) % 8;
    j = i / (HEADS * 4) % 2, m = i / (HEADS * 8), lane = 4 * row + pair;
    head = 2 * pair + j, channel = ROWS * row + 2 * m;
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
        PARTS, [&](int i) { return sums.ref[head][i]; }, [&](int i) { return sums.mass[head][i]; }, sums.share[head]);
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
    for (int p = 0; p < PARTS; p++) {
      const float2 x = sums.out[p / APART][item.m][item.j][item.lane + p % APART * (HEADS / 2)];
      const float weight = sums.share[item.head][p];
      out.x += weight * x.x, out.y += weight * x.y;
    }
    if (a.splits == 1) *reinterpret_cast<float2*>(a.out + (first_row + item.head) * D + item.channel) = out;
    else __stcg(reinterpret_cast<float2*>(a.part_out) + (i64(tile) * a.splits + split) * ITEMS + i, out);
  }
}
