// The `vq` recipe, in fp32. Up to two strips of query rows never look an entry up:
//
// keys     a job starts with the products of its queries with all entries; a score is a sum of those that a token's
//          indices name
// values   the weight of a token is added to each entry that its indices name; a job ends with the sum of the entries
//          so weighted
//
// The four rows of a strip are neighbours in memory, so an index moves four numbers. More rows share decoded values.
#pragma once
#include "variants.h"

namespace tersekv::TERSEKV_ISA {

// Indices of `bits` bits, one after the other, as bytes; a multiple of eight.
inline void unpack_indices(const uint8_t* packed, int bits, int count, uint8_t* out) {
  if (bits == 8) return void(std::memcpy(out, packed, size_t(count)));
  for (int i = 0; i < count; i += 8, packed += bits) {
    uint64_t eight = 0;
    std::memcpy(&eight, packed, size_t(bits));
    for (int k = 0; k < 8; k++) out[i + k] = uint8_t(eight >> bits * k & ((1u << bits) - 1));
  }
}

// One side of a job. Indices of a block are (stage, token, place).
class Lookups {
 public:
  Lookups(const Side& side, const Job& job, float* of_entries, float* decoded)
      : side_(side), books_(side.books.get()), head_(job.head), d_(job.d), places_(books_ ? job.d / books_->dim : 0),
        stages_(books_ ? int(books_->stages.size()) : 0), of_entries_(of_entries), decoded_(decoded) {}

  explicit operator bool() const { return books_; }

  void read(const uint8_t* block, uint8_t* indices) const {
    for (int i = 0, count = BLOCK * places_; i < stages_; i++)
      unpack_indices(block + (i ? side_.codes2 : side_.codes), books_->index, count, indices + i * count);
  }

  // Products of the `rows` queries of strip `strip` with all entries.
  void multiply(const float* q, int rows, int strip) const {
    alignas(16) float turned[MAX_HEAD_DIM][4] = {};
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < d_; c++) turned[c][r] = q[r * d_ + c];
    std::memset(of_strip(strip), 0, sizeof(float) * size_t(size()));
    each_book(strip, [&](float* to, const float* entry, int c, auto width) {
      Quad query[width.count];
      for (int i = 0; i < width.count; i++) query[i] = Isa::load<Quad>(turned[c + i]);
      for (int e = 0; e < books_->entries(); e++, to += 4, entry += books_->dim) {
        Quad sum = Isa::load<Quad>(to);
        for (int i = 0; i < width.count; i++) sum += query[i] * entry[i];
        Isa::store(to, sum);
      }
    });
  }

  void score(const uint8_t* indices, int strip, int rows, float* dots) const {
    for (int j = 0; j < BLOCK; j += 4) {
      Quad a = {}, b = {}, c = {}, d = {};  // sums of four tokens
      each_index(indices, strip, j, [&](const float* at, int i, int k, int l, int m) {
        a += Isa::load<Quad>(at + i), b += Isa::load<Quad>(at + k);
        c += Isa::load<Quad>(at + l), d += Isa::load<Quad>(at + m);
      });
      for (int r = 0; r < rows; r++) Isa::store(dots + BLOCK * r + j, Quad{a[r], b[r], c[r], d[r]});
    }
  }

  void clear(int strip) const { std::memset(of_strip(strip), 0, sizeof(float) * size_t(size())); }

  // `fade`: what the weights so far count from now on.
  void add_weights(const uint8_t* indices, int strip, int rows, const float* weights, const float* fade) const {
    if (!all_one(fade, rows)) multiply_all(of_strip(strip), fade, rows);
    for (int j = 0; j < BLOCK; j += 4) {
      Quad row[STRIP] = {};
      for (int r = 0; r < rows; r++) row[r] = Isa::load<Quad>(weights + BLOCK * r + j);
      const auto of_token = [&](int t) { return Quad{row[0][t], row[1][t], row[2][t], row[3][t]}; };
      const Quad a = of_token(0), b = of_token(1), c = of_token(2), d = of_token(3);
      const auto add = [](float* to, Quad w) { Isa::store(to, Isa::load<Quad>(to) + w); };
      each_index(indices, strip, j, [&](float* at, int i, int k, int l, int m) {
        add(at + i, a), add(at + k, b), add(at + l, c), add(at + m, d);
      });
    }
  }

  // Entries times what they weigh, added to `out` (rows, d).
  void add_entries(int strip, int rows, float* out) const {
    alignas(16) float sum[MAX_HEAD_DIM][4] = {};
    each_book(strip, [&](const float* weight, const float* entry, int c, auto width) {
      Quad all[width.count] = {};
      for (int e = 0; e < books_->entries(); e++, weight += 4, entry += books_->dim) {
        const Quad w = Isa::load<Quad>(weight);
        for (int i = 0; i < width.count; i++) all[i] += w * entry[i];
      }
      for (int i = 0; i < width.count; i++) Isa::store(sum[c + i], Isa::load<Quad>(sum[c + i]) + all[i]);
    });
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < d_; c++) out[r * d_ + c] += sum[c][r];
  }

  // Fills `decoded`: the values of a block without scales, (64, d).
  void decode(const uint8_t* indices) const {
    for (int j = 0; j < BLOCK; j++)
      for (int place = 0; place < places_; place++) {
        float* to = decoded_ + j * d_ + place * books_->dim;
        std::memset(to, 0, sizeof(float) * size_t(books_->dim));
        for (int i = 0; i < stages_; i++) {
          const int index = indices[(i * BLOCK + j) * places_ + place];
          const float* entry = books_->entry(i, head_, place) + books_->dim * index;
          for (int k = 0; k < books_->dim; k++) to[k] += entry[k];
        }
      }
  }
  const uint8_t* decoded() const { return reinterpret_cast<const uint8_t*>(decoded_); }

 private:
  const Side& side_;
  const Books* books_;
  const int head_, d_, places_, stages_;
  float *of_entries_, *decoded_;  // (strip, stage, place, entry, row)

  int size() const { return stages_ * places_ * books_->entries() * 4; }
  float* of_strip(int strip) const { return of_entries_ + strip * size(); }

  template <int COUNT>
  struct Width {
    static constexpr int count = COUNT;
  };

  // Calls visit(four numbers of the first entry, the entry itself, channel, width) for so many channels of all entries
  // at a time.
  template <class Visit>
  INLINE void each_book(int strip, Visit visit) const {
    const int dim = books_->dim;
    float* at = of_strip(strip);
    for (int i = 0; i < stages_; i++)
      for (int place = 0; place < places_; place++, at += 4 * books_->entries()) {
        const float* entry = books_->entry(i, head_, place);
        int c = 0;
        for (; c + 8 <= dim; c += 8) visit(at, entry + c, place * dim + c, Width<8>{});
        if (c < dim) visit(at, entry + c, place * dim + c, Width<4>{});
      }
  }

  // Calls visit(the numbers of all entries, where in them those are that four tokens name) for each of their indices.
  template <class Visit>
  INLINE void each_index(const uint8_t* indices, int strip, int token, Visit visit) const {
    float* at = of_strip(strip);
    for (int i = 0; i < stages_; i++) {
      const uint8_t* row = indices + (i * BLOCK + token) * places_;
      for (int place = 0; place < places_; place++, at += 4 * books_->entries())
        visit(at, 4 * row[place], 4 * row[places_ + place], 4 * row[2 * places_ + place], 4 * row[3 * places_ + place]);
    }
  }

  static bool all_one(const float* fade, int rows) {
    bool one = true;
    for (int r = 0; r < rows; r++) one = one && fade[r] == 1;
    return one;
  }

  void multiply_all(float* at, const float* fade, int rows) const {
    alignas(64) float repeated[Isa::LANES] = {};
    for (int i = 0; i < Isa::LANES; i++) repeated[i] = i % 4 < rows ? fade[i % 4] : 0;
    const Floats by = Isa::load<Floats>(repeated);
    for (int i = 0; i < size(); i += Isa::LANES) Isa::store(at + i, Isa::load<Floats>(at + i) * by);
  }
};

}  // namespace tersekv::TERSEKV_ISA
