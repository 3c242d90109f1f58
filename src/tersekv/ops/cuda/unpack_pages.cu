// Whole pages to bf16 in memory, tokens and channels in the model's order, for so many query rows that a library's kernel
// multiplies. A block of four warps a page. The sides K and V and the constants stand before this text.
#include "dequantise.cuh"

struct Arguments {  // as in unpacked.py
  const u8* pool;
  const int* table;  // (b h, blocks)
  u8 *k, *v;         // (b h, pages, 64, D) in bf16
  i64 page_bytes;
  int blocks, first, pages;
};

constexpr int THREADS = 128, SLOT = 128 * D, PAGE = K::BYTES + V::BYTES, PARTS = D / 8;  // eight channels of a token

struct Shared {
  alignas(16) u8 keys[SLOT], values[SLOT], page[PAGE];
  Weights weights[4];
  float k_list[K::LISTED ? 256 : 1], v_list[V::LISTED ? 256 : 1];
};

// Channels c.. of a token, which lie eight rows apart.
INLINE uint4 values_of(const u8* slot, int token, int c) {
  const int column = place_of(token), row = 8 * (c % (D / 8)) + c / (D / 8);
  u32 x[8];
#pragma unroll
  for (int i = 0; i < 8; i++)
    x[i] = *reinterpret_cast<const u16*>(slot + swizzled(row + 8 * i, column / 8) + 2 * (column % 8));
  return make_uint4(x[0] | x[1] << 16, x[2] | x[3] << 16, x[4] | x[5] << 16, x[6] | x[7] << 16);
}

extern "C" __global__ void __launch_bounds__(THREADS) unpack_pages(const Arguments a) {
  extern __shared__ u8 memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int thread = threadIdx.x, w = thread / 32;
  const u8* page = a.pool + i64(a.table[i64(blockIdx.y) * a.blocks + a.first + blockIdx.x]) * a.page_bytes;
  for (int at = 16 * thread; at < PAGE; at += 16 * THREADS)
    *reinterpret_cast<uint4*>(shared.page + at) = *reinterpret_cast<const uint4*>(page + at);
  COPY_LIST(K, shared.k_list, THREADS)
  COPY_LIST(V, shared.v_list, THREADS)
  __syncthreads();
  put_keys(shared.page, shared.keys, Entries<K>(shared.k_list), w);
  put_values(shared.page + K::BYTES, shared.values, Entries<V>(shared.v_list), w, BLOCK, shared.weights);
  __syncthreads();
  const i64 to = (i64(blockIdx.y) * a.pages + blockIdx.x) * SLOT;
  for (int i = thread; i < BLOCK * PARTS; i += THREADS) {
    const int token = i / PARTS, part = i % PARTS, c = key_channel(part / 8, part % 8);
    *reinterpret_cast<uint4*>(a.k + to + 2 * (token * D + c)) =
        *reinterpret_cast<const uint4*>(shared.keys + 8192 * (part / 8) + swizzled(place_of(token), part % 8));
    *reinterpret_cast<uint4*>(a.v + to + 2 * (token * D + 8 * part)) = values_of(shared.values, token, 8 * part);
  }
}
