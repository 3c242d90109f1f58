// What is asked for of pages that are read later while a block is worked on, and how many lines in each phase.
#pragma once
#include "kernels.h"
#include "tile.h"

namespace tersekv::TERSEKV_ISA {

// Phases of the work on a block, and the fifths of its time that they take. Scores and the softmax's first half ask for
// one side of a page, the softmax's second half and sums of values for the other one.
enum Phase { SCORES, SOFTENING, SOFTENING_TOO, SUMS };

class Asking {
 public:
  // `group`: query rows that share a pass over a block. `tile`: blocks that share a step of the softmax.
  Asking(const Job& job, int group, int tile)
      : job_(job), soon_(job.hints.soon && job.k->bits && job.v->bits), planes_(soon_ && tile > 1),
        keys_(!soon_ ? BLOCKS_AHEAD : tile > 1 ? tile : 2), values_(!soon_ ? BLOCKS_AHEAD : tile > 1 ? 0 : 1) {
    if (!job.tokens.table) return;
    share_out(SCORES, first(), 0, 4, group);
    share_out(SOFTENING, first(), 4, 1, Isa::STRIP);
    share_out(SOFTENING_TOO, second(), 0, 1, Isa::STRIP);
    share_out(SUMS, second(), 1, 4, group);
  }

  // Sets what is asked for during the work on this block.
  void find(Block& block, int64_t index) const {
    const uint8_t *keys = page(index + keys_, index) + job_.k->start, *values = page(index + values_, index);
    block.ahead[soon_] = keys;
    block.ahead[!soon_] = values + job_.v->start;
    if (!planes_) return;  // a tile begins with the planes of its blocks, those of values too
    const Side& v = *job_.v;
    const int codes = v.codes + BLOCK * v.d * v.bits / 8;
    const uint8_t* first = keys - job_.k->start + v.start + codes;
    Ahead{first, 256 * ((v.bytes - codes + 127) / 64), job_.hints.first_level}(0);
  }

  Ahead during(Phase phase, const Block& block, int r) const {
    if (!block.ahead[0]) return {nullptr, 0, false};
    const Share& share = shares_[phase][r / Isa::STRIP];
    return {block.ahead[phase / 2] + share.from, share.each, job_.hints.first_level};
  }

 private:
  struct Share {
    int from, each;  // a byte of a side, and 256ths of a line for each step
  };
  const Job& job_;
  const bool soon_, planes_;
  const int keys_, values_;  // blocks until the side of a page that is asked for now is read
  Share shares_[4][ROWS / Isa::STRIP];  // of each phase and strip of rows. Dividing for each block costs 5 % of it.

  const Side& first() const { return soon_ ? *job_.v : *job_.k; }
  const Side& second() const { return soon_ ? *job_.k : *job_.v; }

  // `width` fifths of a side from fifth `from` on, each line once, in passes of `each` rows.
  void share_out(Phase phase, const Side& side, int from, int width, int each) {
    const int lines = (side.bytes + 127) / 64;  // a side may begin in the middle of one
    const int passes = (job_.rows + each - 1) / each;
    for (int pass = 0; pass < passes; pass++) {
      const int start = lines * (from * passes + width * pass) / (5 * passes);
      const int stop = lines * (from * passes + width * (pass + 1)) / (5 * passes);
      const bool whole = job_.rows - pass * each >= each;
      const int rows = whole ? each : job_.rows - pass * each;
      const int steps = phase == SCORES || phase == SUMS ? job_.d / 8 : rows;
      shares_[phase][pass * each / Isa::STRIP] = {64 * start, (256 * (stop - start) + steps - 1) / steps};
    }
  }

  // Of a block of this job or the one after it; otherwise that of block `now`.
  const uint8_t* page(int64_t index, int64_t now) const {
    const Tokens& t = job_.tokens;
    const int64_t beyond = index - (t.last + BLOCK - 1) / BLOCK;
    if (beyond >= 0 && beyond < t.next_count) return t.pool + t.next[beyond] * t.page_bytes;
    return t.pool + t.table[beyond < 0 ? index : now] * t.page_bytes;
  }
};

}  // namespace tersekv::TERSEKV_ISA
