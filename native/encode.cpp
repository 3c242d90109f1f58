#include "encode.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "isas.h"
#include "pool.h"

namespace tersekv {

#define HAVE(ISA) namespace ISA { extern const EncodeKernels encode_kernels; }
HAVE(portable)
#if defined(TERSEKV_PORTABLE)
#elif defined(__x86_64__)
HAVE(avx512) HAVE(avxvnni) HAVE(avx2)
#elif defined(__aarch64__)
HAVE(neon)
#endif
#undef HAVE

const EncodeKernels& encode_kernels(const std::string& isa) {
  const std::string name = choose(isa).name;
#if defined(TERSEKV_PORTABLE)
#elif defined(__x86_64__)
  if (name == "amx" || name == "avx512") return avx512::encode_kernels;
  if (name == "avxvnni") return avxvnni::encode_kernels;
  if (name == "avx2") return avx2::encode_kernels;
#elif defined(__aarch64__)
  if (name == "neon") return neon::encode_kernels;
#endif
  return portable::encode_kernels;
}

namespace {

constexpr int BLOCKS = 8;      // of one task
constexpr int64_t ROWS_EACH = 256;  // rows that a thread rotates at once

EncodeScratch& scratch() {
  thread_local std::unique_ptr<EncodeScratch> mine(new EncodeScratch);
#ifdef TERSEKV_POISON
  std::memset(static_cast<void*>(mine.get()), 0xff, sizeof(EncodeScratch));
#endif
  return *mine;
}

template <class Task>
void run(int64_t count, int64_t each, int threads, Task task) {
  const int tasks = int((count + each - 1) / each);
  Pool::shared().run(tasks, threads, [&](int i) {
    for (int64_t j = i * each; j < std::min(count, (i + 1) * each); j++) task(j);
  });
}

}  // namespace

void encode(const Encoder& e, const std::vector<Input>& blocks, const std::vector<uint8_t*>& out,
            const EncodeKernels& kernels, int threads) {
  run(int64_t(blocks.size()), BLOCKS, threads, [&](int64_t i) { kernels.encode(e, blocks[i], scratch(), out[i]); });
}

void repack(const Repacking& how, const std::vector<const uint8_t*>& blocks, const std::vector<uint8_t*>& out,
            const EncodeKernels& kernels, int threads) {
  run(int64_t(blocks.size()), BLOCKS, threads, [&](int64_t i) {
    std::memcpy(out[i], blocks[i], size_t(how.nbytes));
    kernels.repack(how.bits, how.d, how.from, how.to, blocks[i] + how.codes, scratch(), out[i] + how.codes);
  });
}

void steer(const Encoder& e, const std::vector<Input>& blocks, const std::vector<const float*>& passed,
           const std::vector<uint8_t*>& out, const EncodeKernels& kernels, int threads) {
  run(int64_t(blocks.size()), 1, threads,  // a decoding step has one block for each head
      [&](int64_t i) { kernels.steer(e, blocks[i], passed[i], scratch(), out[i]); });
}

void rotate(const float* x, int64_t rows, int d, const float* before, const float* after, float* y,
            const EncodeKernels& kernels, int threads) {
  run(rows, ROWS_EACH, threads, [&](int64_t i) { kernels.rotate(x + i * d, d, before, after, y + i * d); });
}

void set_bins(Encoder& e) {
  const int count = int(std::find(e.thresholds, e.thresholds + 256, INFINITY) - e.thresholds);
  const int bins = e.bits == 4 ? 16 : 256;
  std::fill(e.below, e.below + 256, count);
  e.bins_per_unit = count ? float(bins - 1) / e.thresholds[count - 1] : 1;
  int in[256] = {};
  for (int i = count - 1; i >= 0; i--) {  // the same product and truncation as the kernels'
    const int bin = int(e.thresholds[i] * e.bins_per_unit);
    std::fill(e.below, e.below + bin + 1, i);
    in[bin]++;
  }
  e.in_bin = *std::max_element(in, in + 256);
}

void set_log8(Log8& log8, const std::vector<float>& edges, float floor) {
  std::fill(log8.edges, log8.edges + 256, INFINITY);
  std::copy(edges.begin(), edges.end(), log8.edges);
  log8.floor = floor;
  for (int bin = 0; bin < Log8::BINS; bin++) {
    const int32_t bits = (Log8::FIRST + bin) << 18;
    float start;
    std::memcpy(&start, &bits, 4);
    log8.below[bin] = uint8_t(std::lower_bound(edges.begin(), edges.end(), start) - edges.begin());
  }
}

}  // namespace tersekv
