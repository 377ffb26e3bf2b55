// Large products by a team of threads, compiled once for a dtype: RNN training and linear layers differ only in where their rows
// are and in which parts of a row meet which rows of the weights. Every thread of the team calls; a barrier is within.
#pragma once

#include "pack.h"
#include "partition.h"
#include "scratch.h"

namespace fastseq {
namespace FS_ISA {

constexpr int kVectors = 4, kPanel = kVectors * W;  // columns of a tile
constexpr int kTileRows = tile_rows(kVectors);
constexpr int64_t kTokenBlock = 256;                // tokens summed between two visits of dW: panels stay in a core's cache
constexpr int64_t kBiasUnits = 16;                  // of a token block, summed at a time for db
constexpr int64_t kUnitBlock = (kTileRegisters ? 4 : 8) * kTileRows;       // rows of dW for which the gradients are packed
constexpr int64_t kDepthBlock = 512;                // units summed between two visits of a tile
constexpr int64_t kRowBlock = (kTileRegisters ? 8 : 16) * kTileRows;       // rows for which a panel stays in the cache

// Whether these columns of a row-major matrix are a panel as they stand, but for its pitch.
template <class T>
FS_INLINE bool is_panel(int64_t columns, int64_t panel) {
  return Dot<T>::kPerUnit == 1 && (panel + 1) * kPanel <= columns;
}

// Where rows are: `find` writes the addresses of rows [begin, begin + count).
template <class E>
struct RowsAt {
  const void* context;
  void (*find)(const void* context, int64_t begin, int64_t count, E** rows);
};

// `count` elements of a row, from unit `from`, which meet as many rows of w.
struct Segment {
  int64_t from, row, count;
};

// out = sum over segments of a times w (+ bias) (+ out).
template <class T>
struct RowProduct {
  int64_t tokens, columns;
  RowsAt<const T> a;
  const Segment* segments;
  int segment_count;
  bool padded;      // rows of `a` are readable to the end of a segment's last unit, of which the rest is zero
  const T* w;
  int64_t pitch;
  bool transposed;  // w is [columns, depth], else [depth, columns]
  const T* bias;    // [columns] or null
  bool add;
  RowsAt<T> out;
};

template <class T>
FS_INLINE int64_t units(const Segment* segments, int count) {
  int64_t total = 0;
  for (int s = 0; s < count; ++s) total += units<T>(segments[s].count);
  return total;
}

template <class T>
struct RowProductBuffers {
  int64_t depth;     // units of all segments
  uint32_t* packed;  // [panels][depth][kPanel]
  float* sums;       // per thread: [kRowBlock][kPanel]
  uint32_t* halves;  // per thread: [kRowBlock] last units of rows that end within one

  RowProductBuffers(Carver& carve, int64_t columns, int64_t depth_units, int threads) : depth(depth_units) {
    packed = carve.take<uint32_t>((columns + kPanel - 1) / kPanel * depth * kPanel);
    sums = carve.take<float>(threads * kRowBlock * kPanel);
    halves = carve.take<uint32_t>(Dot<T>::kPerUnit == 2 ? threads * kRowBlock : 0);
  }
};

template <class T>
void multiply_rows(const RowProduct<T>& product, const RowProductBuffers<T>& buffers, Team team);

// Elements [from, from + count) of a gradient's rows, and the first row of each factor's d_w that they are; -1: of none.
struct Group {
  int64_t from, count, to[2];
};

// What gradients are multiplied with, and what comes of it.
template <class T>
struct Factor {
  RowsAt<const T> at;
  int64_t rows, columns;  // of d_w
  T* d_w;                 // or null
  int64_t pitch;
  T* d_b;                 // [rows] or null

  FS_INLINE int64_t panels() const { return d_w ? (columns + kPanel - 1) / kPanel : 0; }
};

// For each factor: d_w = sum over tokens of dy times factor, d_b = sum of dy.
template <class T>
struct TokenSums {
  int64_t tokens;
  RowsAt<const T> dy;
  const Group* groups;
  int group_count;
  Factor<T> factors[2];
  int factor_count;

  FS_INLINE int64_t rows() const {
    int64_t total = 0;
    for (int g = 0; g < group_count; ++g) total += groups[g].count;
    return total;
  }
};

template <class T>
struct TokenSumsBuffers {
  uint32_t* panels[2];  // per factor: [panels][kTokenBlock units][kPanel]
  float* sums[2];       // per factor: [rows][columns], between token blocks, where the result is not fp32 itself
  float* bias;          // [rows of all groups]
  uint32_t* own;        // per thread: [kTokenBlock units][kUnitBlock]
  uint32_t* turned;     // with tile registers, per thread: [kUnitBlock][kTokenBlock units]

  TokenSumsBuffers(Carver& carve, const TokenSums<T>& of, int threads) {
    for (int f = 0; f < of.factor_count; ++f) {
      const Factor<T>& factor = of.factors[f];
      panels[f] = carve.take<uint32_t>(factor.panels() * units<T>(kTokenBlock) * kPanel);
      const bool between = sizeof(T) != sizeof(float) && of.tokens > kTokenBlock && factor.d_w;
      sums[f] = carve.take<float>(between ? factor.rows * factor.columns : 0);
    }
    bias = carve.take<float>(of.rows());
    own = carve.take<uint32_t>(threads * units<T>(kTokenBlock) * kUnitBlock);
    turned = carve.take<uint32_t>(kTileRegisters ? threads * units<T>(kTokenBlock) * kUnitBlock : 0);
  }
};

template <class T>
void sum_over_tokens(const TokenSums<T>& sums, const TokenSumsBuffers<T>& buffers, Team team);

}  // namespace FS_ISA
}  // namespace fastseq
