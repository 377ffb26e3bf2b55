// The products inside a loop over steps: weights packed once before it, multiplied by a few rows at every step.
//
// Packed weights lie in panels of kStepPanel outputs, [panel][unit of depth][kStepPanel]. For very few rows they are read where
// they stand: a copy would cost as much as several steps. The summed dimension may be several operands side by side (what is
// fed back, the context, the state): a row of each, wherever it stands.
#pragma once

#include "dot.h"
#include "partition.h"
#include "scratch.h"

namespace fastseq {
namespace FS_ISA {

constexpr int kStepVectors = 4, kStepPanel = kStepVectors * W;
constexpr int kStepRows = tile_rows(kStepVectors);
constexpr int kMaxParts = 4;

constexpr int kWidePanels = W >= 16 ? 4 : 2;  // of one row's tile over rows of w

// How often a product is run, and for about how many rows by one thread.
struct Use {
  int64_t rows, steps;

  // Whether packing weights would cost more than it brings. `streams`: one row reads them as fast where they stand.
  // Measured at H = 256, where packing 1 MB takes 45 us (Zen 4).
  FS_INLINE bool reads_in_place(bool streams) const {
    return (rows <= 1 && steps <= (streams ? kDotSteps : 12)) || (rows <= 2 && steps <= 8) || (rows <= (kTileRegisters ? 6 : 16) && steps <= 2);
  }
};

FS_INLINE int64_t padded(int64_t n) { return (n + kStepPanel - 1) / kStepPanel * kStepPanel; }

// What a tile starts from: a bias, and per row T values, or the sums that are there.
template <class T>
struct Start {
  const T* const* rows = nullptr;
  bool add = false;  // over rows only
};

template <class T>
class StepProduct {
 public:
  // Sums over the columns of w (out[o] = a . w[o]), or over its rows (out[o] = sum of a[k] w[k][o]).
  enum class Over { columns, rows };

  StepProduct() = default;
  StepProduct(Over over, int64_t outputs, Use use) : over_(over), outputs_(outputs), panels_((outputs + kStepPanel - 1) / kStepPanel), use_(use) {}

  // `depth` elements of the summed dimension; with columns, w is that part's first one.
  FS_INLINE void add(const void* w, int64_t pitch, int64_t depth) {
    if (depth == 0) return;
    w_[parts_] = static_cast<const T*>(w), pitch_[parts_] = pitch, depth_[parts_] = depth, at_[parts_] = units_;
    units_ += units<T>(depth);
    ++parts_;
  }

  FS_INLINE void place(Carver& carve) {
    in_place_ = use_.reads_in_place(dense() && (over_ == Over::rows || units_ >= units<T>(kDotDepth)));
    packed_ = carve.take<uint32_t>(in_place_ && over_ == Over::columns ? 0 : panels_ * units_ * kStepPanel);
    bias_ = carve.take<float>(panels_ * kStepPanel);
  }

  int64_t panels() const { return panels_; }
  float* bias() const { return bias_; }

  // Adds b [outputs] to the bias.
  FS_INLINE void add_bias(const void* b) const {
    for (int64_t o = 0; b && o < outputs_; o += W) {
      const int n = outputs_ - o < W ? static_cast<int>(outputs_ - o) : W;
      store(bias_ + o, load(bias_ + o, n) + load(static_cast<const T*>(b) + o, n), n);
    }
  }

  void pack(Range panels) const {
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      if (stands(p)) continue;
      for (int i = 0; i < parts_; ++i) {
        uint32_t* panel = packed_ + (p * units_ + at_[i]) * kStepPanel;
        over_ == Over::columns ? pack_columns(p, i, panel) : pack_depth(p, i, panel);
      }
    }
  }

  // out[r][o] for r in [0, rows): operand(i)[r] is row r of part i, all `stride` apart in `operands`. Panels are visited
  // backwards by turns, but for those in place of one row, so that what the cache still holds of the last step is read first.
  void run(int64_t rows, const uint32_t* const* operands, int64_t stride, Start<T> start, float* out, int64_t pitch, bool backwards) const {
    if (in_place_ && over_ == Over::columns) return dots(rows, operands, stride, start.rows, out, pitch, backwards);
    int64_t wide = 0;
    if constexpr (Dot<T>::kPerUnit == 1) {
      if (rows == 1 && in_place_) wide = outputs_ / (kWidePanels * kStepPanel) * kWidePanels;
      for (int64_t p = 0; p < wide; p += kWidePanels) tile<kWidePanels>(Rows<1>{}, p, 0, operands, stride, start, out, pitch);
    }
    const Blocks blocks(rows, kStepRows, kTileRegisters);
    for (int64_t i = wide; i < panels_; ++i) {
      const int64_t p = backwards ? panels_ - 1 - i + wide : i;
      for (int64_t b = 0; b < blocks.count; ++b)
        with_tile<kStepRows>(blocks.begin(b + 1) - blocks.begin(b), [&](auto count) {
          tile<1>(count, p, blocks.begin(b), operands, stride, start, out, pitch);
        });
    }
  }

 private:
  // Whether the parts, side by side, are all that there is of w.
  FS_INLINE bool dense() const {
    for (int i = 0; i < parts_; ++i) {
      int64_t width = over_ == Over::columns ? 0 : outputs_;
      for (int j = 0; over_ == Over::columns && j < parts_; ++j) {  // of the same rows
        const auto apart = reinterpret_cast<intptr_t>(w_[j]) - reinterpret_cast<intptr_t>(w_[i]);  // perhaps of two matrices
        const auto row = static_cast<intptr_t>(sizeof(T)) * pitch_[i];
        if (-row < apart && apart < row) width += depth_[j];
      }
      if (width != pitch_[i]) return false;
    }
    return true;
  }

  // Whether panel p is read where it stands: over rows, fp32 ones are as a packed panel would be, but for their pitch.
  FS_INLINE bool stands(int64_t p) const {
    return in_place_ && (over_ == Over::columns || (Dot<T>::kPerUnit == 1 && (p + 1) * kStepPanel <= outputs_));
  }

  // starts: of Start.rows.
  void dots(int64_t rows, const uint32_t* const* operands, int64_t stride, const T* const* starts, float* out, int64_t pitch, bool backwards) const {
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) dot_panels<2>(r, operands, stride, starts, out, pitch, backwards);
    if (r < rows) dot_panels<1>(r, operands, stride, starts, out, pitch, backwards);
  }

  // Whole vectors of outputs, as tiles leave them.
  template <int MR>
  __attribute__((noinline)) void dot_panels(int64_t r, const uint32_t* const* operands, int64_t stride, const T* const* rows, float* out,
                                            int64_t pitch, bool backwards) const {
    DotBlock<T, MR> blocks[kMaxParts];
    for (int part = 0; part < parts_; ++part) {
      for (int m = 0; m < MR; ++m) blocks[part].source[m] = reinterpret_cast<const T*>(operands[part * stride + r + m]);
      blocks[part].depth = depth_[part];
    }
    const int64_t vectors = (outputs_ + W - 1) / W;
    for (int64_t i = 0; i < vectors; ++i) {
      const int64_t o = (backwards ? vectors - 1 - i : i) * W;
      const int n = outputs_ - o < W ? static_cast<int>(outputs_ - o) : W;
      vf sums[MR];
      dot_rows<T>(n, sums, [&](int first) FS_LAMBDA {
        for (int part = 0; part < parts_; ++part)
          for (int j = 0; j < blocks[part].kRows; ++j) blocks[part].rows[j] = w_[part] + (o + (first + j < n ? first + j : n - 1)) * pitch_[part];
        return sum_dots(blocks, parts_);
      });
      for (int m = 0; m < MR; ++m) {
        vf sum = sums[m] + load_vector<vf>(bias_ + o);
        if (rows) sum += load(rows[r + m] + o, n);
        store(out + (r + m) * pitch + o, sum, W);
      }
    }
  }

  void pack_columns(int64_t p, int i, uint32_t* panel) const {
    for (int v = 0; v < kStepVectors; ++v) {
      const int64_t o = p * kStepPanel + v * W, left = outputs_ - o;
      const int n = left <= 0 ? 0 : left < W ? static_cast<int>(left) : W;
      pack_transposed(w_[i] + (n ? o * pitch_[i] : 0), pitch_[i], n, depth_[i], panel + v * W, kStepPanel);
    }
  }

  void pack_depth(int64_t p, int i, uint32_t* panel) const {
    pack_rows<T>([&](int64_t k) { return w_[i] + k * pitch_[i] + p * kStepPanel; }, depth_[i], outputs_ - p * kStepPanel, panel, kStepPanel);
  }

  // `count` rows from `begin` on, kPanels panels from p on; several stand in place, side by side.
  template <int kPanels, class Count>
  __attribute__((noinline)) void tile(Count count, int64_t p, int64_t begin, const uint32_t* const* operands, int64_t stride, Start<T> start, float* out,
                                      int64_t pitch) const {
    constexpr int NV = kPanels * kStepVectors;
    vf acc[Count::value][NV];
    set_first(count, p * kStepPanel, begin, start, out, pitch, acc);
    for (int i = 0; i < parts_; ++i) {
      const bool in_place = stands(p);
      const uint32_t* panel = in_place ? reinterpret_cast<const uint32_t*>(w_[i] + p * kStepPanel) : packed_ + (p * units_ + at_[i]) * kStepPanel;
      multiply<T>(count, operands + i * stride + begin, 1, panel, in_place ? pitch_[i] : kStepPanel, units<T>(depth_[i]), acc);
    }
    for_each_sum(count, acc, [&](int m, int v, vf& sum) FS_LAMBDA { store(out + (begin + m) * pitch + p * kStepPanel + v * W, sum, W); });
  }

  // What `count` rows from `begin` on start from at NV vectors of outputs from `o` on.
  template <class Count, int MR, int NV>
  FS_INLINE void set_first(Count count, int64_t o, int64_t begin, Start<T> start, const float* out, int64_t pitch, vf (&acc)[MR][NV]) const {
    const float* sums = start.add ? out + begin * pitch : bias_;
    const int64_t step = start.add ? pitch : 0;
    for_each_sum(count, acc, [&](int m, int v, vf& sum) FS_LAMBDA { sum = load_vector<vf>(sums + m * step + o + v * W); });
    if (!start.rows || start.add) return;
    if (o + NV * W <= outputs_) {
      for_each_sum(count, acc, [&](int m, int v, vf& sum) FS_LAMBDA { sum += load(start.rows[begin + m] + o + v * W, W); });
    } else {
      for_each_sum(count, acc, [&](int m, int v, vf& sum) FS_LAMBDA {
        const int64_t left = outputs_ - o - v * W;
        if (left > 0) sum += load(start.rows[begin + m] + o + v * W, left < W ? static_cast<int>(left) : W);
      });
    }
  }

  Over over_ = Over::columns;
  int64_t outputs_ = 0, panels_ = 0, units_ = 0;
  Use use_ = {};
  bool in_place_ = false;
  int parts_ = 0;
  const T* w_[kMaxParts] = {};
  int64_t pitch_[kMaxParts] = {}, depth_[kMaxParts] = {}, at_[kMaxParts] = {};
  uint32_t* packed_ = nullptr;
  float* bias_ = nullptr;
};

}  // namespace FS_ISA
}  // namespace fastseq
