#include "bandwidth.h"

#include <algorithm>
#include <vector>

#include "pool.h"

namespace tersekv {

namespace {

constexpr int64_t CHUNK = 256;  // bytes of a stream at a time: few enough to unroll, without which a fifth is lost

uint64_t read_part(const uint8_t* data, int64_t size, int streams) {
  typedef uint64_t Words __attribute__((vector_size(16), aligned(1)));
  // An odd number of chunks: streams that lie a power of two apart would meet in the same sets of a cache.
  const int64_t chunks = std::max<int64_t>(size / streams / CHUNK, 1), stream = ((chunks - 1) | 1) * CHUNK;
  const int64_t whole = stream * streams <= size ? stream : 0;
  Words sums[4] = {};
  for (int64_t i = 0; i < whole; i += CHUNK)
    for (int s = 0; s < streams; s++) {
      const Words* words = reinterpret_cast<const Words*>(data + s * stream + i);
#pragma GCC unroll 16
      for (int j = 0; j < int(CHUNK / 16); j++) sums[j % 4] ^= words[j];
    }
  uint64_t parity = 0;
  for (const Words& sum : sums) parity ^= sum[0] ^ sum[1];
  for (int64_t i = streams * whole; i < size; i++) parity ^= uint64_t(data[i]) << 8 * (i % 8);
  return parity;
}

}  // namespace

uint64_t read_all(const uint8_t* data, int64_t size, int streams, int threads) {
  const int64_t part = size / threads / 64 * 64;
  std::vector<uint64_t> parities(threads);
  Pool::shared().run(threads, threads, [&](int i) {
    const int64_t start = i * part, stop = i + 1 < threads ? start + part : size;
    parities[i] = read_part(data + start, stop - start, streams);
  });
  uint64_t parity = 0;
  for (uint64_t one : parities) parity ^= one;
  return parity;
}

}  // namespace tersekv
