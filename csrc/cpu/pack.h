// Copies operands into panels: for each unit of the summed dimension, the vectors of one register tile side by side.
#pragma once

#include "tile.h"

namespace fastseq {
namespace FS_ISA {

template <class T>
FS_INLINE vu load_units(const T* p, int64_t elements) {  // past `elements`: zero
  if (elements >= W * Dot<T>::kPerUnit) return load_vector<vu>(p);
  uint32_t lanes[W] = {};
  if (elements > 0) std::memcpy(lanes, p, sizeof(T) * elements);
  return load_vector<vu>(lanes);
}

// source: rows of `depth` contiguous elements, `pitch` elements apart; the first `rows` <= W exist.
// panel[k * panel_pitch + r] = unit k of row r: the transpose of W rows.
template <class T>
void pack_transposed(const T* source, int64_t pitch, int rows, int64_t depth, uint32_t* panel, int64_t panel_pitch) {
  constexpr int kPer = Dot<T>::kPerUnit;
  for (int64_t k = 0; k < depth; k += W * kPer) {
    vu block[W];
    for (int r = 0; r < W; ++r) block[r] = r < rows ? load_units(source + r * pitch + k, depth - k) : vu{};
    transpose(block);
    const int64_t first = k / kPer, last = units<T>(depth);
    for (int i = 0; i < W && first + i < last; ++i) __builtin_memcpy(panel + (first + i) * panel_pitch, &block[i], sizeof(vu));
  }
}

template <class T>
FS_INLINE vu pair_rows(const T* even, const T* odd, int n);

template <>
FS_INLINE vu pair_rows<float>(const float* even, const float*, int n) {
  return bits_of<vu>(load(even, n));
}

template <>
FS_INLINE vu pair_rows<bf16>(const bf16* even, const bf16* odd, int n) {
  const vu low = bits_of<vu>(load(even, n)) >> 16;
  return odd ? low | bits_of<vu>(load(odd, n)) : low;
}

// row(k): the k-th of `depth` rows with `columns` contiguous elements. panel[unit][0 .. width) with width a multiple of W;
// columns past the end are zero.
template <class T, class Row>
FS_INLINE void pack_rows(Row&& row, int64_t depth, int64_t columns, uint32_t* panel, int64_t width) {
  constexpr int kPer = Dot<T>::kPerUnit;
  for (int64_t k = 0; k < depth; k += kPer) {
    const T* even = row(k);
    const T* odd = kPer == 2 && k + 1 < depth ? row(k + 1) : nullptr;
    for (int64_t c = 0; c < width; c += W) {
      const int64_t left = columns - c;
      const vu unit = left <= 0 ? vu{} : pair_rows<T>(even + c, odd ? odd + c : nullptr, left < W ? static_cast<int>(left) : W);
      __builtin_memcpy(panel + k / kPer * width + c, &unit, sizeof(unit));
    }
  }
}

}  // namespace FS_ISA
}  // namespace fastseq
