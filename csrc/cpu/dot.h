// Dot products along the contiguous dimension, for few rows: W accumulators of W lanes, reduced together to one vector.
// Matrices are read as they lie: packing them would cost more than the product.
#pragma once

#include "pack.h"

namespace fastseq {
namespace FS_ISA {

// W vectors to one: lane i is the sum of the lanes of sums[i].
FS_INLINE vf reduce(vf (&sums)[W]) {
  const auto halve = [&](auto count, auto&& halves) FS_LAMBDA {
    unroll<decltype(count)::value>([&](int i) FS_LAMBDA {
      vu lower, upper;
      halves(bits_of<vu>(sums[2 * i]), bits_of<vu>(sums[2 * i + 1]), lower, upper);
      sums[i] = bits_of<vf>(lower) + bits_of<vf>(upper);
    });
  };
  halve(Rows<W / 2>{}, interleave<uint32_t>);
  halve(Rows<W / 4>{}, interleave<uint64_t>);
  halve(Rows<W / 8>{}, deal);
  halve(Rows<W / 16>{}, deal);
  return sums[0];
}

// sums[at(r, m)] += lanes of the products of source[m] and rows[r]; `at` folds to a constant.
template <class T, int MR, int R, class At>
FS_INLINE void add_dots(const T* const (&source)[MR], const T* const (&rows)[R], int64_t depth, vf (&sums)[W], At&& at) {
  constexpr int64_t kStep = W * Dot<T>::kPerUnit;
  auto visit = [&](int64_t k, auto&& load_at) FS_LAMBDA {
    vu a[MR];
    unroll<MR>([&](int m) FS_LAMBDA { a[m] = load_at(source[m] + k); });
    unroll<R>([&](int r) FS_LAMBDA {
      const vu row = load_at(rows[r] + k);
      unroll<MR>([&](int m) FS_LAMBDA { sums[at(r, m)] = Dot<T>::fma(a[m], row, sums[at(r, m)]); });
    });
  };
  int64_t k = 0;
  for (; k + kStep <= depth; k += kStep) visit(k, [](const T* p) FS_LAMBDA { return load_vector<vu>(p); });
  if (k < depth) visit(k, [&](const T* p) FS_LAMBDA { return load_units(p, depth - k); });
}

}  // namespace FS_ISA
}  // namespace fastseq
