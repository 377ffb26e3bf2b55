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
constexpr int kStepRows = kAccumulators / kStepVectors;
constexpr int kMaxParts = 3;

// Measured at H = 256, one row: a step takes 29 us packed and 40 us in place, packing 100 us.
FS_INLINE bool reads_weights_in_place(int64_t rows, int64_t steps) { return (rows <= 2 && steps <= 8) || (rows <= 16 && steps <= 2); }

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
  StepProduct(Over over, int64_t outputs, bool in_place)
      : over_(over), outputs_(outputs), panels_((outputs + kStepPanel - 1) / kStepPanel), in_place_(in_place) {}

  // `depth` elements of the summed dimension; with columns, w is that part's first one.
  FS_INLINE void add(const void* w, int64_t pitch, int64_t depth) {
    if (depth == 0) return;
    w_[parts_] = static_cast<const T*>(w), pitch_[parts_] = pitch, depth_[parts_] = depth, at_[parts_] = units_;
    units_ += units<T>(depth);
    ++parts_;
  }

  FS_INLINE void place(Carver& carve) {
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
  // backwards by turns, so that what the cache still holds of the last step is read first.
  void run(int64_t rows, const uint32_t* const* operands, int64_t stride, Start<T> start, float* out, int64_t pitch, bool backwards) const {
    if (in_place_ && over_ == Over::columns) return dots(rows, operands, stride, start, out, pitch);
    const Blocks blocks(rows, kStepRows);
    for (int64_t i = 0; i < panels_; ++i) {
      const int64_t p = backwards ? panels_ - 1 - i : i;
      for (int64_t b = 0; b < blocks.count; ++b) tile(p, blocks.begin(b), blocks.begin(b + 1), operands, stride, start, out, pitch);
    }
  }

 private:
  // Whether panel p is read where it stands: over rows, fp32 ones are as a packed panel would be, but for their pitch.
  FS_INLINE bool stands(int64_t p) const {
    return in_place_ && (over_ == Over::columns || (Dot<T>::kPerUnit == 1 && (p + 1) * kStepPanel <= outputs_));
  }

  void dots(int64_t rows, const uint32_t* const* operands, int64_t stride, Start<T> start, float* out, int64_t pitch) const {
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) dot_rows<2>(r, operands, stride, start, out, pitch);
    if (r < rows) dot_rows<1>(r, operands, stride, start, out, pitch);
  }

  template <int MR>
  __attribute__((noinline)) void dot_rows(int64_t r, const uint32_t* const* operands, int64_t stride, Start<T> start, float* out, int64_t pitch) const {
    constexpr int kOutputs = W / MR;
    for (int64_t o = 0; o < (outputs_ + W - 1) / W * W; o += kOutputs) {  // whole vectors, as a tile would leave them
      vf sums[W];
      set_zero(sums);
      for (int i = 0; i < parts_; ++i) {
        const T *a[MR], *w[kOutputs];
        for (int m = 0; m < MR; ++m) a[m] = reinterpret_cast<const T*>(operands[i * stride + r + m]);
        for (int j = 0; j < kOutputs; ++j) w[j] = w_[i] + (o + j < outputs_ ? o + j : outputs_ - 1) * pitch_[i];
        add_dots<T, MR>(a, w, depth_[i], sums, [](int j, int m) FS_LAMBDA { return m * kOutputs + j; });
      }
      alignas(64) float lanes[W];
      store(lanes, reduce(sums), W);
      for (int m = 0; m < MR; ++m)
        for (int j = 0; j < kOutputs; ++j) {
          float& lane = lanes[m * kOutputs + j];
          lane = o + j < outputs_ ? lane + first_lane(o + j, r + m, start, out, pitch) : 0.f;
        }
      for (int m = 0; m < MR; ++m) std::memcpy(out + (r + m) * pitch + o, lanes + m * kOutputs, sizeof(float) * kOutputs);
    }
  }

  FS_INLINE float first_lane(int64_t o, int64_t r, Start<T> start, const float* out, int64_t pitch) const {
    if (start.add) return out[r * pitch + o];
    return bias_[o] + (start.rows ? load(start.rows[r] + o, 1)[0] : 0.f);
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

  __attribute__((noinline)) void tile(int64_t p, int64_t begin, int64_t end, const uint32_t* const* operands, int64_t stride, Start<T> start, float* out,
            int64_t pitch) const {
    with_rows<kStepRows>(end - begin, [&](auto count) {
      constexpr int MR = decltype(count)::value;
      vf acc[MR][kStepVectors];
      set_first(p * kStepPanel, begin, start, out, pitch, acc);
      for (int i = 0; i < parts_; ++i) {
        const bool in_place = stands(p);
        const uint32_t* panel = in_place ? reinterpret_cast<const uint32_t*>(w_[i] + p * kStepPanel) : packed_ + (p * units_ + at_[i]) * kStepPanel;
        multiply<T, MR, kStepVectors>(operands + i * stride + begin, 1, panel, in_place ? pitch_[i] : kStepPanel, units<T>(depth_[i]), acc);
      }
      for_each_sum(acc, [&](int m, int v, vf& sum) FS_LAMBDA { store(out + (begin + m) * pitch + p * kStepPanel + v * W, sum, W); });
    });
  }

  // What rows [begin, begin + MR) of the panel at output `o` start from.
  template <int MR>
  FS_INLINE void set_first(int64_t o, int64_t begin, Start<T> start, const float* out, int64_t pitch, vf (&acc)[MR][kStepVectors]) const {
    const float* sums = start.add ? out + begin * pitch : bias_;
    const int64_t step = start.add ? pitch : 0;
    for_each_sum(acc, [&](int m, int v, vf& sum) FS_LAMBDA { sum = load_vector<vf>(sums + m * step + o + v * W); });
    if (!start.rows || start.add) return;
    if (o + kStepPanel <= outputs_) {
      for_each_sum(acc, [&](int m, int v, vf& sum) FS_LAMBDA { sum += load(start.rows[begin + m] + o + v * W, W); });
    } else {
      for_each_sum(acc, [&](int m, int v, vf& sum) FS_LAMBDA {
        const int64_t left = outputs_ - o - v * W;
        if (left > 0) sum += load(start.rows[begin + m] + o + v * W, left < W ? static_cast<int>(left) : W);
      });
    }
  }

  Over over_ = Over::columns;
  int64_t outputs_ = 0, panels_ = 0, units_ = 0;
  bool in_place_ = false;
  int parts_ = 0;
  const T* w_[kMaxParts] = {};
  int64_t pitch_[kMaxParts] = {}, depth_[kMaxParts] = {}, at_[kMaxParts] = {};
  uint32_t* packed_ = nullptr;
  float* bias_ = nullptr;
};

}  // namespace FS_ISA
}  // namespace fastseq
