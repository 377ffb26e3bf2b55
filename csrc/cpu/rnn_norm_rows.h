// What both passes of a layer-normalised recurrence share: statistics of a row, gains in fp32, who has which rows.
#pragma once

#include "driver.h"
#include "rnn_norm.h"
#include "step_product.h"

namespace fastseq {
namespace FS_ISA {

constexpr double kTeamProducts = 1e6;  // multiplications from which a second thread pays

struct Moments {
  float mean, scale;  // scale: 1 / sqrt(variance + eps)
};

// sums: of all x, lane by lane. A second pass, for a variance from sums of squares would lose what the mean is larger by.
template <class E>
FS_INLINE Moments moments(const E* x, int64_t count, vf sums) {
  const float mean = sum_lanes(sums) / static_cast<float>(count);
  vf squares = {};
  for_vectors(count, [&](int64_t at, int n) FS_LAMBDA {
    const vf d = first_of(load(x + at, n) - mean, n);
    squares += d * d;
  });
  return {mean, 1.f / __builtin_sqrtf(sum_lanes(squares) / static_cast<float>(count) + kNormEps)};
}

template <class E>
FS_INLINE Moments moments(const E* x, int64_t count) {
  vf sums = {};
  for_vectors(count, [&](int64_t at, int n) FS_LAMBDA { sums += load(x + at, n); });
  return moments(x, count, sums);
}

// The blocks of a product that have statistics of their own: all gates of an LSTM; r and z, and n, of a GRU.
template <class Cell>
struct NormBlocks {
  static constexpr int kCount = Cell::kCellState ? 1 : 2;

  static constexpr int of(int gate) { return Cell::kCellState || gate < 2 ? 0 : 1; }
  static FS_INLINE int64_t begin(int block, int64_t hidden) { return block * 2 * hidden; }
  static FS_INLINE int64_t count(int block, int64_t hidden) { return Cell::kCellState ? 4 * hidden : block ? hidden : 2 * hidden; }
};

// Gains and biases of a call as fp32, which every thread reads.
struct NormGains {
  int64_t rows, hidden;
  float *gain, *bias, *gain_x, *bias_x, *cell_gain, *cell_bias;

  NormGains(Carver& carve, int64_t rows, int64_t hidden) : rows(rows), hidden(hidden) {
    for (float** of_rows : {&gain, &bias, &gain_x, &bias_x}) *of_rows = carve.take<float>(rows);
    cell_gain = carve.take<float>(hidden), cell_bias = carve.take<float>(hidden);
  }

  template <class T>
  void fill(const NormPass& pass) const {
    widen_all<T>(pass.gain, gain, rows), widen_all<T>(pass.bias, bias, rows);
    widen_all<T>(pass.gain_x, gain_x, rows), widen_all<T>(pass.bias_x, bias_x, rows);
    widen_all<T>(pass.cell_gain, cell_gain, pass.cell_gain ? hidden : 0);
    widen_all<T>(pass.cell_bias, cell_bias, pass.cell_bias ? hidden : 0);
  }

 private:
  template <class T>
  static void widen_all(const void* from, float* to, int64_t count) {
    for_vectors(count, [&](int64_t u, int n) FS_LAMBDA { store(to + u, from ? load(static_cast<const T*>(from) + u, n) : vf{}, n); });
  }
};

// A thread's share of what a pass multiplies by: W_hh, packed; gains, which the first thread widens.
template <class T>
void prepare(const StepProduct<T>& product, const NormGains& gains, const NormPass& pass, Team team) {
  product.pack(share(product.panels(), team.rank, team.size));
  if (team.rank > 0) return;
  std::memset(product.bias(), 0, sizeof(float) * product.panels() * kStepPanel);
  gains.fill<T>(pass);
}

// A thread's rows, and where they stand side by side among all threads' rows: a step needs no other thread.
struct NormRows {
  OwnRows own;
  int64_t first, count;

  NormRows(Team team, int64_t rows) : own{team.rank, team.size}, first(0), count(own.count(rows)) {
    for (int rank = 0; rank < team.rank; ++rank) first += OwnRows{rank, team.size}.count(rows);
  }
};

FS_INLINE int norm_threads(const Shape& shape, const Sequence& seq, int gates, int threads) {
  const double products = 1.0 * seq.tokens() * gates * shape.hidden * shape.hidden;
  const int64_t most = products < kTeamProducts ? 1 : seq.rows / 2;  // a tile of one row adds up in another order
  threads = usable_threads(threads);
  return most < 1 ? 1 : most < threads ? static_cast<int>(most) : threads;
}

template <class F>
FS_INLINE void norm_dispatch(const Shape& shape, F&& f) {
  dispatch(shape.dtype, [&](auto element) {
    shape.cell == CellKind::lstm ? f(Tag<NormLstm<SimdMath>>{}, element) : f(Tag<Gru<SimdMath>>{}, element);
  });
}

}  // namespace FS_ISA
}  // namespace fastseq
