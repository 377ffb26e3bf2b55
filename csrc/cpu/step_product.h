// The products inside a loop over steps: weights packed once before it, multiplied by a few rows at every step.
//
// Weights lie in panels of kStepPanel outputs, [panel][unit of depth][kStepPanel]. The summed dimension may be several operands
// side by side (what is fed back, the context, the state): a row of each, wherever it stands.
#pragma once

#include "pack.h"
#include "partition.h"
#include "scratch.h"

namespace fastseq {
namespace FS_ISA {

constexpr int kStepVectors = 4, kStepPanel = kStepVectors * W;
constexpr int kStepRows = kAccumulators / kStepVectors;
constexpr int kMaxParts = 3;

FS_INLINE int64_t padded(int64_t n) { return (n + kStepPanel - 1) / kStepPanel * kStepPanel; }

// What a tile starts from: a bias, and per row T values, or the sums that are there.
template <class T>
struct Start {
  const T* const* rows = nullptr;
  bool add = false;
};

template <class T>
class StepProduct {
 public:
  // Sums over the columns of w (out[o] = a . w[o]), or over its rows (out[o] = sum of a[k] w[k][o]).
  enum class Over { columns, rows };

  StepProduct() = default;
  StepProduct(Over over, int64_t outputs) : over_(over), outputs_(outputs), panels_((outputs + kStepPanel - 1) / kStepPanel) {}

  // `depth` elements of the summed dimension; with columns, w is that part's first one.
  FS_INLINE void add(const void* w, int64_t pitch, int64_t depth) {
    if (depth == 0) return;
    w_[parts_] = static_cast<const T*>(w), pitch_[parts_] = pitch, depth_[parts_] = depth, at_[parts_] = units_;
    units_ += units<T>(depth);
    ++parts_;
  }

  FS_INLINE void place(Carver& carve) {
    packed_ = carve.take<uint32_t>(panels_ * units_ * kStepPanel);
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
      for (int i = 0; i < parts_; ++i) {
        uint32_t* panel = packed_ + (p * units_ + at_[i]) * kStepPanel;
        over_ == Over::columns ? pack_columns(p, i, panel) : pack_depth(p, i, panel);
      }
    }
  }

  // out[r][o] for r in [0, rows): operand(i)[r] is row r of part i, all `stride` apart in `operands`. Panels are visited
  // backwards by turns, so that what the cache still holds of the last step is read first.
  void run(int64_t rows, const uint32_t* const* operands, int64_t stride, Start<T> start, float* out, int64_t pitch, bool backwards) const {
    const Blocks blocks(rows, kStepRows);
    for (int64_t i = 0; i < panels_; ++i) {
      const int64_t p = backwards ? panels_ - 1 - i : i;
      for (int64_t b = 0; b < blocks.count; ++b) tile(p, blocks.begin(b), blocks.begin(b + 1), operands, stride, start, out, pitch);
    }
  }

 private:
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

  void tile(int64_t p, int64_t begin, int64_t end, const uint32_t* const* operands, int64_t stride, Start<T> start, float* out,
            int64_t pitch) const {
    with_rows<kStepRows>(end - begin, [&](auto count) {
      constexpr int MR = decltype(count)::value;
      vf acc[MR][kStepVectors];
      for (int m = 0; m < MR; ++m)
        for (int v = 0; v < kStepVectors; ++v) acc[m][v] = first(p * kStepPanel + v * W, begin + m, start, out, pitch);
      for (int i = 0; i < parts_; ++i)
        multiply<T, MR, kStepVectors>(operands + i * stride + begin, 1, packed_ + (p * units_ + at_[i]) * kStepPanel, kStepPanel,
                                      units<T>(depth_[i]), acc);
      for (int m = 0; m < MR; ++m)
        for (int v = 0; v < kStepVectors; ++v) store(out + (begin + m) * pitch + p * kStepPanel + v * W, acc[m][v], W);
    });
  }

  FS_INLINE vf first(int64_t o, int64_t r, Start<T> start, const float* out, int64_t pitch) const {
    if (start.add) return load_vector<vf>(out + r * pitch + o);
    vf sum = load_vector<vf>(bias_ + o);
    const int64_t left = outputs_ - o;
    if (start.rows && left > 0) sum += load(start.rows[r] + o, left < W ? static_cast<int>(left) : W);
    return sum;
  }

  Over over_ = Over::columns;
  int64_t outputs_ = 0, panels_ = 0, units_ = 0;
  int parts_ = 0;
  const T* w_[kMaxParts] = {};
  int64_t pitch_[kMaxParts] = {}, depth_[kMaxParts] = {}, at_[kMaxParts] = {};
  uint32_t* packed_ = nullptr;
  float* bias_ = nullptr;
};

}  // namespace FS_ISA
}  // namespace fastseq
