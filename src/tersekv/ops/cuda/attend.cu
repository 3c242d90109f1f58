// Attention of a few query rows over packed pages. Keys and values are operand A of 8-bit matrix instructions, queries
// and weights are operand B: see docs/kernels-cuda.md. The sides K and V and the constants stand before this text.
#include "join.cuh"
#include "mix.cuh"
#include "ring.cuh"
#include "score.cuh"
#include "waiting.cuh"

typedef Ring<SLOTS, SLOT_BYTES> Pages;

struct Shared : WalksOf<V::TRELLIS> {
  u64 copied[WARPS][SLOTS];
  Queries queries[QUERIES];
  __align__(16) float q[BY_PAGE ? HEADS : 1][BY_PAGE ? D : 4];
  float sizes[LOG8_SCALES ? 256 : 1];  // of the codes of LOG8
};
// The same number, in a register of its own: the compiler would write a constant, or one that all lanes share, anew for
// each look-up. It does not know that a block has fewer threads.
INLINE u32 hidden(u32 x) { return threadIdx.x > 1u << 30 ? 0 : x; }

// The tables of both sides, as `Unit` looks entries up.
template <class Side>
INLINE u32 upper(u32 entries) { return Side::BITS == 4 ? entries + 0x01010101u : entries; }
struct Tables {
  u32 k[4], v[4];
  static constexpr bool SAME = K::BITS == V::BITS && K::T0 == V::T0 && K::T1 == V::T1 && K::T2 == V::T2 && K::T3 == V::T3;
  INLINE Tables() : k{K::T0, K::T1, upper<K>(K::T2), upper<K>(K::T3)}, v{V::T0, V::T1, upper<V>(V::T2), upper<V>(V::T3)} {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      k[i] = hidden(k[i]);
      v[i] = SAME ? k[i] : hidden(v[i]);
    }
  }
};

// Of a split: they differ by one page at most.
INLINE int first_page(int pages, int split, int splits) {
  const int each = pages / splits, more = pages % splits;
  return split * each + (split < more ? split : more);
}

static_assert(sizeof(Sums) <= WARPS * Pages::BYTES, "sums lie where the rings were");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) attend(const Arguments a) {
  extern __shared__ __align__(128) u8 memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory + WARPS * Pages::BYTES);
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // which the compiler sees to be one
  const Place place(a);
  const int sequence = place.sequence, split = place.split, rows = place.rows;
  // The numbers of the first pages are asked for beside the length: they are these if the table is full.
  const int guess = first_page(a.blocks, split, a.splits) + warp, first = guess + lane * WARPS;
  int ids = first < a.blocks ? a.table[i64(sequence) * a.blocks + first] : 0;  // the lanes hold the numbers of 32 pages
  int begin = guess, end = first_page(a.blocks, split + 1, a.splits);
  const int length = int(a.lengths[sequence]), pages = (length + BLOCK - 1) / BLOCK;
  if (pages != a.blocks) begin = first_page(pages, split, a.splits) + warp, end = first_page(pages, split + 1, a.splits);
  const int count = end > begin ? (end - begin + WARPS - 1) / WARPS : 0;
  const Pages ring(memory + warp * Pages::BYTES, shared.copied[warp]);

  const int* const table = a.table + i64(sequence) * a.blocks + begin + lane * WARPS;
  auto numbers = [&](int i) { return i + lane < count ? table[i * WARPS] : 0; };
  if (begin != guess) ids = numbers(0);
  const u8* from = a.pool;
  auto ask = [&](int piece, int slot) {  // for a page, or for its keys (even) or values, in the order in which they are used
    const int i = piece / PIECES;
    if (piece % PIECES == 0) {
      if (i % 32 == 0 && i) ids = numbers(i);
      from = a.pool + u64(u32(__shfl_sync(~0u, ids, i % 32))) * a.page_bytes;
    }
    if constexpr (PIECES == 1) ring.copy<K::BYTES + V::USED>(slot, from, i < count);
    else if (piece % 2 == 0) ring.copy<K::USED>(slot, from, i < count);
    else ring.copy<V::USED>(slot, from + K::BYTES, i < count);
  };
  ask(0, 0);
  wait_for_last_launch();  // until here nothing was read that it may write: queries are what it writes
  // They are asked for before all pages but one, behind which they would wait.
  QueryRows<1> own[(HEADS + WARPS - 1) / WARPS];
#pragma unroll
  for (int row = 0; row < HEADS; row += WARPS)
    own[row / WARPS].load(a.q + (place.first_row + (row + warp < rows ? row + warp : 0)) * D);
#pragma unroll 1
  for (int piece = 1; piece < SLOTS - 1; piece++) ask(piece, piece);
  shared.copy(reinterpret_cast<const uint4*>(a.windows));
  let_next_launch();

  for (int i = threadIdx.x; i < (LOG8_SCALES ? 256 : 0); i += THREADS) shared.sizes[i] = log8_to_float(i);
#pragma unroll
  for (int row = 0; row < HEADS; row += WARPS) {
    if (row + warp >= HEADS) break;
    const QueryRows<1>& q = own[row / WARPS];
    if constexpr (BY_PAGE) q.store(shared.q[row + warp]);
    else quantise<1>(q, nullptr, rows, a.scale, row + warp, shared.queries[0]);
  }
  __syncthreads();

  const Tables tables;
  const WalkTables walks(shared, warp);
  Softmax softmax;
  int slot = 0, left = length - begin * BLOCK;
  u32 turn = 0;
  auto next = [&](int piece) {  // its slot, once it is there; the one before it is free, and filled with what comes last
    const u8* at = memory + warp * Pages::BYTES + slot * SLOT_BYTES;
    ring.wait(slot, turn);
    ask(piece + SLOTS - 1, slot ? slot - 1 : SLOTS - 1);
    if (++slot == SLOTS) slot = 0, turn++;
    return at;
  };
#pragma unroll 1
  for (int i = 0; i < count; i++, left -= WARPS * BLOCK) {
    const u8* page = next(PIECES * i);
    softmax.first = i == 0;
    Queries& queries = shared.queries[BY_PAGE ? warp : 0];
    if constexpr (BY_PAGE) {
#pragma unroll
      for (int row = 0; row < HEADS; row += 4) {
        QueryRows<4> four;
        four.load(shared.q[row], D);
        quantise<4>(four, page, rows, a.scale, row, queries);
      }
      __syncwarp();
    }
    float s[TOKENS][MINE];
    score(page, tables.k, shared.sizes, queries, softmax.ref, left, s);
    page = PIECES == 1 ? page + K::BYTES : next(2 * i + 1);
    mix(page, tables.v, walks, shared.sizes, left, s, softmax);
  }
#if __CUDA_ARCH__ < 900
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
  __syncthreads();
  Sums& sums = *reinterpret_cast<Sums*>(memory);
  put(softmax, sums);
  __syncthreads();
  const Place again(a);  // and not held in registers until now
  join_warps(a, sums, again);
  if (a.splits > 1) join_splits(a, again);
}
