// Dot products along the contiguous dimension, for few rows: W accumulators of W lanes, reduced together to one vector.
// Matrices are read as they lie: packing them would cost more than the product.
#pragma once

#include "pack.h"

namespace fastseq {
namespace FS_ISA {

// W vectors to one: lane i is the sum of the lanes of sums[i].
FS_INLINE vf reduce(vf (&sums)[W]) {
  const auto fold = [&](auto count, auto&& halves) FS_LAMBDA {
    unroll<decltype(count)::value>([&](int i) FS_LAMBDA {
      vu lower, upper;
      halves(bits_of<vu>(sums[2 * i]), bits_of<vu>(sums[2 * i + 1]), lower, upper);
      sums[i] = bits_of<vf>(lower) + bits_of<vf>(upper);
    });
  };
  fold(Rows<W / 2>{}, interleave<uint32_t>);
  fold(Rows<W / 4>{}, interleave<uint64_t>);
  fold(Rows<W / 8>{}, deal);
  fold(Rows<W / 16>{}, deal);
  return sums[0];
}

// sums[at(r, m, p)] += lanes of the products of source[m] and rows[r], for P parts that add up to the whole; `at` folds to a constant.
template <class T, int P = 1, int MR, int R, class At>
FS_INLINE void add_dots(const T* const (&source)[MR], const T* const (&rows)[R], int64_t depth, vf (&sums)[W], At&& at) {
  constexpr int64_t kStep = W * Dot<T>::kPerUnit;
  auto visit = [&](int64_t k, int p, auto&& load_at) FS_LAMBDA {
    vu a[MR];
    unroll<MR>([&](int m) FS_LAMBDA { a[m] = load_at(source[m] + k); });
    unroll<R>([&](int r) FS_LAMBDA {
      const vu row = load_at(rows[r] + k);
      unroll<MR>([&](int m) FS_LAMBDA { sums[at(r, m, p)] = Dot<T>::fma(a[m], row, sums[at(r, m, p)]); });
    });
  };
  const auto whole = [](const T* p) FS_LAMBDA { return load_vector<vu>(p); };
  int64_t k = 0;
  for (; k + P * kStep <= depth; k += P * kStep) unroll<P>([&](int p) FS_LAMBDA { visit(k + p * kStep, p, whole); });
  if constexpr (P > 1)
    for (; k + kStep <= depth; k += kStep) visit(k, 0, whole);
  if (k < depth) visit(k, 0, [&](const T* p) FS_LAMBDA { return load_units(p, depth - k); });
}

constexpr int64_t kDotDepth = 192;         // elements from which dot products pay for their last sums
constexpr int64_t kDotSteps = 64;          // steps of one row up to which weights are read in place: packing them pays later
constexpr int kDotRows = W >= 16 ? 4 : 2;  // sources, where there are many

// Operands of a block of W sums: MR sources and a few rows, `depth` elements each. One source meets fewer rows, each in two parts:
// memory is the limit then, and sixteen rows side by side come from it at 60 to 80 GB/s, eight at 85 to 105 (Zen 4).
template <class T, int MR>
struct DotBlock {
  static constexpr int kParts = MR == 1 ? 2 : 1, kRows = W / (MR * kParts);

  const T *source[MR], *rows[kRows];
  int64_t depth;
};

// Lane (m * kParts + p) * kRows + r: the products of source m and row r, of all blocks. A function of its own, since what surrounds
// it would leave too few registers for the addresses.
template <class T, int MR>
__attribute__((noinline)) vf sum_dots(const DotBlock<T, MR>* blocks, int count) {
  using Block = DotBlock<T, MR>;
  vf sums[W];
  set_zero(sums);
  for (int i = 0; i < count; ++i)
    add_dots<T, Block::kParts>(blocks[i].source, blocks[i].rows, blocks[i].depth, sums,
                               [](int r, int m, int p) FS_LAMBDA { return (m * Block::kParts + p) * Block::kRows + r; });
  return reduce(sums);
}

// to[m]'s lane i = the products of source m and row i < n, zero from n on; block(first) gives the sums of kRows rows from `first` on.
template <class T, int MR, class Block>
FS_INLINE void dot_rows(int n, vf (&to)[MR], Block&& block) {
  static_assert(MR <= 2 || (MR == 4 && W == 16), "the halves and quarters below");
  constexpr int kRows = DotBlock<T, MR>::kRows;
  vf found[W / kRows];
  for (int first = 0; first < W; first += kRows) found[first / kRows] = first < n ? block(first) : vf{};
  vu low[MR == 4 ? 2 : 1], high[MR == 4 ? 2 : 1];
  unroll<MR == 4 ? 2 : 1>([&](int i) FS_LAMBDA { halve(bits_of<vu>(found[2 * i]), bits_of<vu>(found[2 * i + 1]), low[i], high[i]); });
  if constexpr (MR == 1) {
    to[0] = bits_of<vf>(low[0]) + bits_of<vf>(high[0]);
  } else if constexpr (MR == 2) {
    to[0] = bits_of<vf>(low[0]), to[1] = bits_of<vf>(high[0]);
  } else {
    vu even, odd;
    deal(low[0], low[1], even, odd);
    to[0] = bits_of<vf>(even), to[1] = bits_of<vf>(odd);
    deal(high[0], high[1], even, odd);
    to[2] = bits_of<vf>(even), to[3] = bits_of<vf>(odd);
  }
  if (n == W) return;
  float lanes[W];
  for (vf& sums : to) store(lanes, sums, W), sums = load(lanes, n);
}

// The same for rows that are found by row(i).
template <class T, int MR, class Row>
FS_INLINE void dot_rows(const T* const (&source)[MR], Row&& row, int n, int64_t depth, vf (&to)[MR]) {
  DotBlock<T, MR> block;
  for (int m = 0; m < MR; ++m) block.source[m] = source[m];
  block.depth = depth;
  dot_rows<T>(n, to, [&](int first) FS_LAMBDA {
    for (int i = 0; i < block.kRows; ++i) block.rows[i] = row(first + i < n ? first + i : n - 1);  // past the last one: that again
    return sum_dots(&block, 1);
  });
}

}  // namespace FS_ISA
}  // namespace fastseq
