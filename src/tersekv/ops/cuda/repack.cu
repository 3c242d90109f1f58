// Bits to other places: bit i of a block's codes becomes bit `moves[i]` of the source's. A thread for each byte.
#include "ptx.cuh"

struct Arguments {
  const u8* from;
  const int* moves;
  u8* to;
  i64 blocks, from_stride, to_stride;
  int bytes, codes, codes_bytes;  // of a block; where its codes are
};

extern "C" __global__ void __launch_bounds__(256) repack(const Arguments a) {
  for (i64 i = i64(blockIdx.x) * 256 + threadIdx.x; i < a.blocks * a.bytes; i += i64(gridDim.x) * 256) {
    const int at = int(i % a.bytes), byte = at - a.codes;
    const u8* from = a.from + i / a.bytes * a.from_stride;
    u32 bits = 0;
    if (byte < 0 || byte >= a.codes_bytes) bits = from[at];
    else
      for (int j = 0; j < 8; j++) {
        const int source = a.moves[8 * byte + j];
        bits |= (from[a.codes + source / 8] >> source % 8 & 1u) << j;
      }
    a.to[i / a.bytes * a.to_stride + at] = u8(bits);
  }
}
