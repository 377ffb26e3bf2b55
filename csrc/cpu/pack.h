// Copies operands into panels: for each unit of the summed dimension, the vectors of one register tile side by side.
#pragma once

#include "tile.h"

namespace fastseq {
namespace FS_ISA {

// W units, those past `elements` >= 0 zero.
template <class T>
FS_INLINE vu load_units(const T* p, int64_t elements) {
  if (elements >= W * Dot<T>::kPerUnit) return load_vector<vu>(p);
  const int n = static_cast<int>(elements);
  if constexpr (Dot<T>::kPerUnit == 1) {
    return bits_of<vu>(load_lanes(p, n));
  } else {
    return load_halves<vu>(p, n);
  }
}

// to[k * to_pitch + r] = unit k of row r: a W x W transpose, four rows of each 128 bits at a time.
template <class T>
FS_INLINE void transpose(const T* source, int64_t pitch, uint32_t* to, int64_t to_pitch) {
  for (int k = 0; k < W; k += 4) {
    vu rows[4], low[2], high[2], unit[4];
    for (int r = 0; r < 4; ++r) rows[r] = load_quads(source + r * pitch + k * Dot<T>::kPerUnit, 4 * pitch);
    for (int i = 0; i < 2; ++i) interleave<uint32_t>(rows[2 * i], rows[2 * i + 1], low[i], high[i]);
    interleave<uint64_t>(low[0], low[1], unit[0], unit[1]);
    interleave<uint64_t>(high[0], high[1], unit[2], unit[3]);
    for (int i = 0; i < 4; ++i) __builtin_memcpy(to + (k + i) * to_pitch, &unit[i], sizeof(vu));
  }
}

// source: rows of `depth` contiguous elements, `pitch` elements apart; the first `rows` <= W exist.
// panel[k * panel_pitch + r] = unit k of row r: the transpose of W rows.
template <class T>
void pack_transposed(const T* source, int64_t pitch, int rows, int64_t depth, uint32_t* panel, int64_t panel_pitch) {
  constexpr int64_t kStep = W * Dot<T>::kPerUnit;
  int64_t k = 0;
  if (rows == W)
    for (; k + kStep <= depth; k += kStep) transpose(source + k, pitch, panel + k / Dot<T>::kPerUnit * panel_pitch, panel_pitch);
  for (; k < depth; k += kStep) {
    uint32_t block[W * W] = {}, packed[W * W];
    for (int r = 0; r < rows; ++r) {
      const vu row = load_units(source + r * pitch + k, depth - k);
      __builtin_memcpy(block + r * W, &row, sizeof(vu));
    }
    transpose(reinterpret_cast<const T*>(block), kStep, packed, W);
    const int64_t first = k / Dot<T>::kPerUnit, last = units<T>(depth);
    for (int i = 0; i < W && first + i < last; ++i) __builtin_memcpy(panel + (first + i) * panel_pitch, packed + i * W, sizeof(vu));
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
