// Cases written by tests/make_native_golden.py: pages or dense tokens, queries, and what attention over them is.
#pragma once
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "side.h"

namespace tersekv {

class Reader {
 public:
  explicit Reader(const char* path) : file_(std::fopen(path, "rb")) {
    if (!file_) throw std::runtime_error(std::string("cannot read ") + path);
  }
  ~Reader() { std::fclose(file_); }
  Reader(const Reader&) = delete;

  template <class T>
  std::vector<T> many() {
    int32_t count = 0;
    take(&count, sizeof count);
    std::vector<T> x(static_cast<size_t>(count));
    take(x.data(), x.size() * sizeof(T));
    return x;
  }
  std::string text() {
    const std::vector<char> x = many<char>();
    return {x.begin(), x.end()};
  }

 private:
  void take(void* to, size_t bytes) {
    if (bytes && std::fread(to, 1, bytes, file_) != bytes) throw std::runtime_error("the golden file ends early");
  }
  std::FILE* file_;
};

struct Expected {
  std::vector<float> out, lse, out_bound, lse_bound;
  explicit Expected(Reader& r)
      : out(r.many<float>()), lse(r.many<float>()), out_bound(r.many<float>()), lse_bound(r.many<float>()) {}
};

inline Side read_side(Reader& r) {
  const std::vector<int32_t> n = r.many<int32_t>();  // bits, d, start, bytes, codes, planes, channels first
  std::vector<PlaneArgs> planes;
  for (int i = 0; i < n[5]; i++) {
    std::string name = r.text(), kind = r.text();
    const std::vector<int32_t> at = r.many<int32_t>();
    planes.emplace_back(name, kind, at[0], at[1], at[2]);
  }
  const std::vector<float> table = r.many<float>();
  const std::vector<int32_t> books = r.many<int32_t>();  // index, heads, places, dim, codes2, stages; or none
  if (!books.empty()) {
    std::vector<std::vector<float>> stages;
    for (int i = 0; i < books[5]; i++) stages.push_back(r.many<float>());
    auto made = make_books(books[0], books[1], books[2], books[3], std::move(stages));
    return make_books_side(n[1], n[2], n[3], n[4], books[4], planes, std::move(made));
  }
  return make_side(n[0], n[1], n[2], n[3], n[4], planes, table, r.many<float>().at(0), n[6]);
}

struct Golden {
  std::string name;
  std::vector<int32_t> sizes;  // b, h, g, n, d, blocks, page bytes; no blocks: dense tokens, of which page bytes a row
  Side k, v;
  std::vector<uint8_t> k_bytes, v_bytes;  // of pages, all in the first
  std::vector<int32_t> table;
  std::vector<int64_t> lengths;
  std::vector<float> q;
  std::vector<float> scale;
  Expected exact, int8;
  explicit Golden(Reader& r)
      : name(r.text()), sizes(r.many<int32_t>()), k(read_side(r)), v(read_side(r)), k_bytes(r.many<uint8_t>()),
        v_bytes(r.many<uint8_t>()), table(r.many<int32_t>()), lengths(r.many<int64_t>()), q(r.many<float>()),
        scale(r.many<float>()), exact(r), int8(r) {}
};

}  // namespace tersekv
