// The Python module.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "attend_bindings.h"
#include "bandwidth.h"
#include "encode_bindings.h"
#include "isas.h"
#include "decoder_bindings.h"
#include "linear_bindings.h"
#include "memory.h"
#include "require.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tersekv {

namespace {

using Pool8 = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

uint64_t read_memory(Bytes data, int streams, int threads) {
  require(streams >= 1 && threads >= 1, "streams, threads: 1 or more.");
  nb::gil_scoped_release release;
  return read_all(data.data(), int64_t(data.size()), streams, threads);
}

void large_pages(Pool8 pool) { prefer_large_pages(pool.data(), int64_t(pool.size())); }

std::vector<std::tuple<std::string, bool, std::string>> isas() {
  std::vector<std::tuple<std::string, bool, std::string>> all;
  for (const Choice& choice : choices()) all.emplace_back(choice.kernels->name, choice.runs, choice.why);
  return all;
}

}  // namespace

}  // namespace tersekv

NB_MODULE(_native, m) {
  using namespace tersekv;
  m.doc() = "Kernels of tersekv for processors. Call them through tersekv.ops.";
  nb::set_leak_warnings(false);  // a cache that lives until the process ends is no leak
  bind_attention(m);
  bind_encoding(m);
  bind_linear(m);
  bind_decoder(m);
  m.def("read_memory", &read_memory, "data"_a.noconvert(), "streams"_a, "threads"_a, "Parity of all bytes.");
  m.def("prefer_large_pages", &large_pages, "pool"_a.noconvert());
  m.def("isas", &isas, "Names, whether each runs here, and what it needs; best first.");
}
