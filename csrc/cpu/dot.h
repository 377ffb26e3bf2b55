// Dot products along the contiguous dimension, for few rows: W accumulators of W lanes, reduced together to one vector.
// Matrices are read as they lie: packing them would cost more than the product.
#pragma once

#include "pack.h"

namespace fastseq {
namespace FS_ISA {

// W vectors to one: lane i is the sum of the lanes of sums[i].
FS_INLINE vf reduce(vf (&sums)[W]) {
  const auto halve = [&](int count, auto&& halves) FS_LAMBDA {
    for (int i = 0; i < count; ++i) {
      vu lower, upper;
      halves(bits_of<vu>(sums[2 * i]), bits_of<vu>(sums[2 * i + 1]), lower, upper);
      sums[i] = bits_of<vf>(lower) + bits_of<vf>(upper);
    }
  };
  halve(W / 2, interleave<uint32_t>);
  halve(W / 4, interleave<uint64_t>);
  for (int count = W / 8; count; count /= 2) halve(count, deal);
  return sums[0];
}

// sums[at(r, m)] += lanes of the products of source[m] and rows[r]; `at` folds to a constant.
template <class T, int MR, int R, class At>
FS_INLINE void add_dots(const T* const (&source)[MR], const T* const (&rows)[R], int64_t depth, vf (&sums)[W], At&& at) {
  constexpr int64_t kStep = W * Dot<T>::kPerUnit;
  auto visit = [&](int64_t k, auto&& load_at) FS_LAMBDA {
    vu a[MR];
    for (int m = 0; m < MR; ++m) a[m] = load_at(source[m] + k);
    for (int r = 0; r < R; ++r) {
      const vu row = load_at(rows[r] + k);
      for (int m = 0; m < MR; ++m) sums[at(r, m)] = Dot<T>::fma(a[m], row, sums[at(r, m)]);
    }
  };
  int64_t k = 0;
  for (; k + kStep <= depth; k += kStep) visit(k, [](const T* p) FS_LAMBDA { return load_vector<vu>(p); });
  if (k < depth) visit(k, [&](const T* p) FS_LAMBDA { return load_units(p, depth - k); });
}

}  // namespace FS_ISA
}  // namespace fastseq
