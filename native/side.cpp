#include "side.h"

#include <cmath>

#include "require.h"

namespace tersekv {

namespace {

Kind kind_of(const std::string& name) {
  for (auto [text, kind] : {std::pair{"fp32", Kind::fp32}, {"fp16", Kind::fp16}, {"bf16", Kind::bf16},
                            {"log8", Kind::log8}, {"int8", Kind::int8}})
    if (name == text) return kind;
  require(false, "Unknown kind of plane \"", name, "\". Allowed: fp32, fp16, bf16, log8, int8.");
  return Kind::none;
}

int width(Kind kind) { return kind == Kind::fp32 ? 4 : kind == Kind::fp16 || kind == Kind::bf16 ? 2 : 1; }

void set_groups(Side& side, bool of_tokens, int groups) {
  const int whole = of_tokens ? BLOCK : side.d, each = whole / groups;
  require(whole % groups == 0 && each % 16 == 0, groups, " groups of ", whole, of_tokens ? " tokens" : " channels",
          ". Allowed: groups of 16 or a multiple.");
  (of_tokens ? side.tokens_each : side.channels_each) = each;
}

// What the kernels have no form for; both planes of a kind must be in the same groups.
void check_groups(const Side& s, const std::vector<PlaneArgs>& planes) {
  const bool of_token = s.scale || s.zero, of_channel = s.channel_scale || s.channel_zero;
  require(!s.in_groups() || !(of_token && of_channel),
          "Numbers in groups beside others: tokens may have them, or channels, not both.");
  require(!s.in_groups() || (s.bits && !s.trellis), "Numbers in groups are for codes of a grid.");
  require(!s.channels_first || !(s.zero || s.in_groups()), "Channels first: no zeros of tokens and no groups.");
  for (const auto& [name, kind, offset, step, groups] : planes) {
    const bool of_channels = name.substr(0, 7) == "channel";
    const int right = of_channels ? BLOCK / s.tokens_each : name == "values" ? 1 : s.d / s.channels_each;
    require(groups == right, "Plane ", name, " in ", groups, " groups. Allowed: ", right, ", as the other plane.");
  }
}

void set_plane(Side& side, const PlaneArgs& args) {
  const auto& [name, kind, offset, step, groups] = args;
  const Plane plane{kind_of(kind), offset, step};
  int count = BLOCK;
  if (name == "values") side.values = plane, count = BLOCK * side.d;
  else if (name == "scale") side.scale = plane;
  else if (name == "zero") side.zero = plane;
  else if (name == "channel_scale") side.channel_scale = plane, count = side.d;
  else if (name == "channel_zero") side.channel_zero = plane, count = side.d;
  else require(false, "Unknown plane \"", name, "\". Allowed: values, scale, zero, channel_scale, channel_zero.");
  require(groups == 1 || (groups > 1 && name != "values"), "Plane ", name, " in ", groups,
          " groups. Allowed: 1 and more, values 1.");
  if (groups > 1) set_groups(side, name.substr(0, 7) == "channel", groups);
  count *= groups;
  const bool inside = offset >= 0 && offset + count * width(plane.kind) <= side.bytes && step + 2 <= side.bytes;
  require(inside, "Plane ", name, " at byte ", offset, " ends beyond the ", side.bytes, " bytes of its block.");
  require(name != "values" || plane.kind <= Kind::bf16, "Plane values: fp32, fp16 or bf16, not ", kind, ".");
}

// Levels 0..127 that come nearest to the table: what the int8 path looks up.
void set_levels(Side& side, const std::vector<float>& table) {
  float low = INFINITY, high = -INFINITY;
  for (size_t i = 0; i < table.size(); i++) {
    side.table[i] = table[i];
    low = std::fmin(low, table[i]), high = std::fmax(high, table[i]);
  }
  side.low = low, side.step = high > low ? (high - low) / 127 : 1;
  if (side.bits == 8) return;  // read exactly: an index has 6 bits
  for (int which = 0; which < 4; which++)
    for (int i = 0; i < 64; i++) {
      const float x = table[code_at(side.bits, which, i)];
      side.levels[which][i] = uint8_t(std::lround((x - low) / side.step));
    }
}

// A trellis' entries are levels already: odd multiples -127..127 of half a step, the second half the first one negated.
void set_trellis(Side& side, const std::vector<float>& table, float half) {
  side.step = 2 * half, side.low = -127 * half;
  for (int i = 0; i < 256; i++) {
    const float odd = table[i] / half;
    const bool fits = std::fabs(odd) <= 127 && std::fabs(std::remainder(odd, 2.f)) == 1 && table[i] == -table[i ^ 128];
    require(fits, "Entry ", i, " of a trellis is ", table[i], ". Allowed: odd multiples of ", half,
            " up to 127 in magnitude, in the second half those of the first one negated.");
    side.table[i] = table[i];
    if (i < 128) side.levels[i / 64][i % 64] = uint8_t((127 + int(odd)) / 2);
  }
}

}  // namespace

Side make_side(int bits, int d, int start, int bytes, int codes, const std::vector<PlaneArgs>& planes,
               const std::vector<float>& table, float half, bool channels_first) {
  const bool known = bits == 0 || bits == 1 || bits == 2 || bits == 3 || bits == 4 || bits == 8;
  require(known, "bits=", bits, ". Allowed: 1, 2, 3, 4, 8, or 0 for dense values.");
  require(d >= 8 && d <= MAX_HEAD_DIM && d % (bits ? 16 : 8) == 0, "head_dim ", d, ". Allowed: a multiple of ",
          bits ? 16 : 8, " up to ", MAX_HEAD_DIM, ".");
  const bool trellis = half > 0;
  const int entries = trellis ? 256 : 1 << bits;
  require(bits == 0 || int(table.size()) == entries, "A table of ", table.size(), " entries for codes of ", bits,
          " bits. It needs ", entries, ": one for each code, or for each state of a trellis.");
  require(!trellis || (bits && bits < 8 && d % 32 == 0), "A trellis of ", bits, " bits at head_dim ", d,
          ". Allowed: 1 to 4 bits, multiples of 32.");
  require(bits == 0 || (codes >= 0 && codes + BLOCK * d * bits / 8 <= bytes), "Plane codes at byte ", codes,
          " ends beyond the ", bytes, " bytes of its block.");
  Side side;
  side.bits = bits, side.d = side.channels_each = d, side.start = start, side.bytes = bytes, side.codes = codes;
  side.channels_first = channels_first, side.trellis = trellis;
  for (const PlaneArgs& plane : planes) set_plane(side, plane);
  check_groups(side, planes);
  require(bits || side.values, "A side without codes needs the plane values.");
  if (trellis) set_trellis(side, table, half);
  else if (bits) set_levels(side, table);
  return side;
}

std::shared_ptr<const Books> make_books(int index, int heads, int places, int dim,
                                        std::vector<std::vector<float>> stages) {
  require(index >= 2 && index <= 8 && dim >= 4 && dim % 4 == 0, "Indices of ", index, " bits to sub-vectors of ", dim,
          ". Allowed: 2 to 8 bits, multiples of 4.");
  require(!stages.empty() && stages.size() <= MAX_STAGES, stages.size(), " stages. Allowed: 1 or 2.");
  const int64_t numbers = int64_t(heads) * places * dim << index;
  for (const auto& stage : stages)
    require(heads > 0 && places > 0 && int64_t(stage.size()) == numbers, "Books of ", stage.size(), " numbers for ",
            heads, " heads and ", places, " places. They must have ", 1 << index, " entries of ", dim, " each.");
  auto books = std::make_shared<Books>();
  books->index = index, books->heads = heads, books->places = places, books->dim = dim;
  books->stages = std::move(stages);
  return books;
}

Side make_books_side(int d, int start, int bytes, int codes, int codes2, const std::vector<PlaneArgs>& planes,
                     std::shared_ptr<const Books> books) {
  require(d >= 16 && d <= MAX_HEAD_DIM && d % 16 == 0 && d % books->dim == 0, "head_dim ", d, " with sub-vectors of ",
          books->dim, ". Allowed: a multiple of 16 and of them, up to ", MAX_HEAD_DIM, ".");
  const int places = d / books->dim, packed = BLOCK * places * books->index / 8;
  require(books->places == 1 || books->places == places, "Books for ", books->places, " places. Allowed: 1 or ", places,
          ".");
  for (const int at : {codes, books->stages.size() > 1 ? codes2 : codes})
    require(at >= 0 && at + packed <= bytes, "A plane of codes at byte ", at, " ends beyond the ", bytes,
            " bytes of its block.");
  Side side;
  side.d = side.channels_each = d, side.start = start, side.bytes = bytes, side.codes = codes, side.codes2 = codes2;
  side.books = std::move(books);
  for (const PlaneArgs& plane : planes) set_plane(side, plane);
  check_groups(side, planes);
  require(!side.values && !side.zero && !side.channel_scale,
          "Books have no planes values, zero and channel_scale. Allowed: scale, channel_zero.");
  return side;
}

}  // namespace tersekv
