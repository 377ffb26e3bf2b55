// One step of a few rows, straight from the caller's weights: packing them would cost more than the product.
// Cells and T=1 layers come here, which is what most real programs call.
//
// A product is a set of dot products along the contiguous dimension: W accumulators of W lanes, for MR rows x UB units x
// kColumns columns, are reduced together to one vector.
#include "dot.h"
#include "driver.h"
#include "rnn_step.h"

namespace fastseq {
namespace FS_ISA {
namespace {

template <class Cell, class T>
class Step {
  static constexpr int kG = Cell::kGates, kColumns = Cell::kColumns, kTiles = W / kColumns;

 public:
  Step(const Shape& shape, const Sequence& seq, const ForwardPass& pass)
      : shape_(shape), seq_(seq), pass_(pass), H_(shape.hidden), I_(shape.input) {}

  void run(Range panels) const {
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      int64_t r = 0;
      for (; r + kTiles <= seq_.rows; r += kTiles) rows<kTiles>(p * W, r);
      if constexpr (kTiles > 2)
        for (; r + 2 <= seq_.rows; r += 2) rows<2>(p * W, r);
      for (; r < seq_.rows; ++r) rows<1>(p * W, r);
    }
  }

 private:
  template <int MR>
  void rows(int64_t u, int64_t r) const {
    constexpr int UB = kTiles / MR;
    const int n = H_ - u < W ? static_cast<int>(H_ - u) : W;
    const T *x[MR], *h[MR];
    for (int m = 0; m < MR; ++m) {
      x[m] = pass_.x.template at<T>(seq_, 0, r + m);
      h[m] = pass_.dir.h0 ? static_cast<const T*>(pass_.dir.h0) + (r + m) * H_ : nullptr;
    }
    alignas(64) float pre[MR][kColumns][W];
    if (n < W) std::memset(pre, 0, sizeof(pre));
    for (int first = 0; first < n; first += UB) {
      vf sums[W];
      set_zero(sums);
      add<MR, UB>(x, I_, static_cast<const T*>(pass_.dir.w_ih), u + first, Cell::kInput, sums);
      if (pass_.dir.h0) add<MR, UB>(h, H_, static_cast<const T*>(pass_.dir.w_hh), u + first, Cell::kHidden, sums);
      const vf reduced = reduce(sums);
      alignas(64) float lanes[W];
      store(lanes, reduced, W);
      for (int b = 0; b < UB; ++b)
        for (int m = 0; m < MR; ++m)
          for (int j = 0; j < kColumns; ++j) pre[m][j][first + b] = lanes[(b * MR + m) * kColumns + j];
    }
    for (int m = 0; m < MR; ++m) finish_row(u, r + m, n, pre[m]);
  }

  // sums[(b, m, columns[g])] += lanes of the products of source[m] and row (g, unit + b) of w. Units past H repeat the last.
  template <int MR, int UB>
  FS_INLINE void add(const T* const (&source)[MR], int64_t depth, const T* w, int64_t unit, const int (&columns)[kG],
                     vf (&sums)[W]) const {
    const T* rows[UB * kG];
    for (int b = 0; b < UB; ++b)
      for (int g = 0; g < kG; ++g) rows[b * kG + g] = w + (g * H_ + (unit + b < H_ ? unit + b : H_ - 1)) * depth;
    add_dots<T>(source, rows, depth, sums, [&](int r, int m, int) FS_LAMBDA { return (r / kG * MR + m) * kColumns + columns[r % kG]; });
  }

  FS_INLINE void finish_row(int64_t u, int64_t r, int n, const float (&sums)[kColumns][W]) const {
    vf pre[kColumns], saved[kColumns];
    for (int j = 0; j < kColumns; ++j) {
      pre[j] = load_vector<vf>(sums[j]);
      if (!pass_.dir.b_ih) continue;
      const int in = input_gate<Cell>(j), hidden = hidden_gate<Cell>(j);
      if (in >= 0) pre[j] += load(static_cast<const T*>(pass_.dir.b_ih) + in * H_ + u, n);
      if (hidden >= 0) pre[j] += load(static_cast<const T*>(pass_.dir.b_hh) + hidden * H_ + u, n);
    }
    vf h = load_state<T>(shape_, pass_.dir.h0, r * H_ + u, n), c = {};
    if constexpr (Cell::kCellState) c = load_state<T>(shape_, pass_.dir.c0, r * H_ + u, n);
    Cell::forward(pre, h, c, saved);
    if (pass_.out.data) store(pass_.out.template at<T>(seq_, 0, r) + u, h, n);
    store_state<T>(shape_, pass_.h_n, r * H_ + u, h, n);
    if constexpr (Cell::kCellState) store_state<T>(shape_, pass_.c_n, r * H_ + u, c, n);
    if (!pass_.gates) return;
    for (int j = 0; j < kColumns; ++j) store(static_cast<T*>(pass_.gates) + (r * kColumns + j) * H_ + u, saved[j], n);
    if constexpr (Cell::kCellState) store(pass_.cells + r * H_ + u, c, n);
  }

  const Shape& shape_;
  const Sequence& seq_;
  const ForwardPass& pass_;
  int64_t H_, I_;
};

}  // namespace

bool is_step(const Shape& shape, const Sequence& seq, const ForwardPass& pass) {
  const bool converts = shape.dtype == DType::bf16 && shape.state_is_f32 && pass.dir.h0;  // the product takes h in T
  const bool prefers_packed = pass.dir.packed && step_products(shape, seq.rows) >= kPackedProducts;
  return seq.steps == 1 && seq.rows <= kStepRows && seq.active(0) == seq.rows && !converts && !seq.resets && !prefers_packed &&
         !pass.noise.any && !pass.c_out.data;
}

void rnn_step(const Shape& shape, const Sequence& seq, const ForwardPass* passes, int directions, int threads) {
  const int64_t panels = (shape.hidden + W - 1) / W;
  dispatch(shape, [&](auto cell, auto element) {
    using S = Step<typename decltype(cell)::type, typename decltype(element)::type>;
    parallel(step_products(shape, seq.rows) < kParallelProducts ? 1 : usable_threads(threads), [&](int rank, int size) {
      for (int d = 0; d < directions; ++d) S(shape, seq, passes[d]).run(share(panels, rank, size));
    });
  });
}

}  // namespace FS_ISA
}  // namespace fastseq
