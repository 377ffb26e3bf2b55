// Fused LSTM/GRU backward over a whole sequence: what forward saved is only read.
//
// Two phases share a team. The recurrence walks against forward's order: a register tile multiplies the gate gradients of the
// step before by W_hh, and the cell's backward runs on its accumulators. It leaves every gate gradient in one buffer; the
// weight and input gradients (backward_products.h) are then large products over all tokens.
#include "backward_products.h"

namespace fastseq {
namespace FS_ISA {
namespace {

constexpr double kSmallProducts = 2e6;  // FLOPs below which a second thread costs more than it brings
constexpr int64_t kInPlaceTokens = 16;  // tokens up to which W_hh is read where it stands: packing it would cost more

template <class Cell, class T>
class Backward {
  static constexpr int kColumns = Cell::kColumns;

 public:
  Backward(const Shape& shape, const Sequence& seq, const BackwardPass& pass, const BackwardBuffers<T>& buffers, Team team,
           Partition split, Barrier* step_barriers)
      : shape_(shape), seq_(seq), pass_(pass), buf_(buffers), team_(team), H_(shape.hidden) {
    carries_ = seq.steps > 1 || wants_initial();
    idle_ = team.rank >= split.size();
    own_ = {idle_ ? 0 : team.rank / split.unit_groups, split.row_groups};
    panels_ = share(buf_.panels, team.rank % split.unit_groups, split.unit_groups);
    step_team_ = {team.rank % split.unit_groups, split.unit_groups, step_barriers + own_.group};
  }

  void run() {
    prepare();
    team_.sync();
    if (idle_) return;
    int64_t before = 0;  // rows active at the step just done
    for (int64_t s = 0; s < seq_.steps + wants_initial(); ++s) {
      const int64_t t = time(s), active = s < seq_.steps ? seq_.active(t) : 0;
      step(s, t, before, active);
      before = active;
      step_team_.sync();
    }
    if (wants_initial()) finish_empty_rows();
  }

 private:
  bool wants_initial() const { return pass_.d_h0 || pass_.d_c0; }
  bool in_place(int64_t p) const { return seq_.tokens() <= kInPlaceTokens && is_panel<T>(H_, p); }

  // Walks against forward: the last step of the sequence first, unless forward was reversed.
  int64_t time(int64_t s) const { return pass_.dir.reverse ? s : seq_.steps - 1 - s; }

  int lanes(int64_t u) const { return H_ - u < W ? static_cast<int>(H_ - u) : W; }

  void prepare() {
    const Range own = share(buf_.panels, team_.rank, team_.size);
    const T* w = static_cast<const T*>(pass_.dir.w_hh);
    for (int64_t p = own.begin; p < own.end; ++p) {
      if (!carries_ || in_place(p)) continue;
      for (int g = 0; g < Cell::kGates; ++g) {
        pack_rows<T>([&](int64_t k) { return w + (g * H_ + k) * H_ + p * kPanel; }, H_, H_ - p * kPanel,
                     buf_.w_hh + (p * buf_.depth() + Cell::kHidden[g] * buf_.gate_units) * kPanel, kPanel);
      }
    }
    const Range rows = share(seq_.rows, team_.rank, team_.size);
    for (int64_t r = rows.begin; r < rows.end; ++r) prepare_row(r);
    if (team_.rank == 0) std::memset(buf_.zeros, 0, sizeof(uint32_t) * buf_.row_units());
  }

  void prepare_row(int64_t r) {
    const int64_t from = seq_.order[r] * H_;
    for (int64_t u = 0; u < H_; u += W) {
      const int n = lanes(u);
      store(buf_.pending + r * buf_.width + u, load_state<T>(shape_, pass_.d_h_n, from + u, n), W);
      store(buf_.carry + r * buf_.width + u, load_state<T>(shape_, Cell::kCellState ? pass_.d_c_n : nullptr, from + u, n), W);
      store(buf_.h0 + r * H_ + u, load_state<T>(shape_, pass_.dir.h0, from + u, n), n);
      if (pass_.noise.any) store(buf_.kept + r * buf_.width + u, vf{}, W);
    }
  }

  // Rows [0, before) carry a gradient through W_hh; rows [before, active) start here from dL/dh_n; rows [active, before) are
  // through, and what arrives is dL/dh_0.
  void step(int64_t s, int64_t t, int64_t before, int64_t active) const {
    const int64_t from = s == 0 ? t : time(s - 1);
    for (int64_t i = panels_.begin; i < panels_.end; ++i) {
      const int64_t p = s & 1 ? panels_.begin + panels_.end - 1 - i : i;
      own_.for_blocks(before > active ? before : active, kTileRows, [&](int64_t begin, int64_t end) {
        vf arrived[kTileRows][kVectors];
        with_tile<kTileRows>(end - begin, [&](auto count) { arriving(count, from, before, p, begin, arrived); });
        for (int64_t i = begin; i < end; ++i) {
          const int64_t r = own_.row(i);
          const bool anew = r < active && seq_.starts_anew(t, r, pass_.dir.reverse);
          for (int64_t u = p * kPanel; u < (p + 1) * kPanel && u < H_; u += W) {
            vf dh = arrived[i - begin][(u - p * kPanel) / W];
            if (r < before) dh = recurrent_masked<T>(pass_.noise, dh, seq_.order[r] * H_ + u, lanes(u));
            r < active ? through_cell(t, r, u, dh, anew) : to_initial_state(r, u, dh);
          }
        }
      });
    }
  }

  template <class Count>
  FS_INLINE void arriving(Count count, int64_t from, int64_t before, int64_t p, int64_t begin, vf (&arrived)[kTileRows][kVectors]) const {
    const uint32_t* gates[Count::value];
    const float* pending[Count::value];  // of rows that start here, else null
    for (int m = 0; m < count.count(); ++m) {
      const int64_t r = own_.row(begin + m);
      const bool starts = r >= before;
      gates[m] = starts || seq_.starts_anew(from, r, pass_.dir.reverse) ? buf_.zeros : buf_.gate_row(seq_.offsets[from] + r);
      pending[m] = starts ? buf_.pending + r * buf_.width + p * kPanel : nullptr;
    }
    const auto add_up = [&](vf (&acc)[Count::value][kVectors]) FS_LAMBDA {
      for_each_sum(count, acc, [&](int m, int v, vf& sum) FS_LAMBDA { sum = pending[m] ? load_vector<vf>(pending[m] + v * W) : vf{}; });
      if (own_.row(begin) >= before) return;
      const uint32_t* panel = in_place(p) ? static_cast<const uint32_t*>(pass_.dir.w_hh) + p * kPanel : buf_.w_hh + p * buf_.depth() * kPanel;
      multiply<T>(count, gates, 1, panel, in_place(p) ? H_ : kPanel, buf_.depth(), acc);
    };
    if constexpr (Count::value == kTileRows && kTileRegisters) {
      add_up(arrived);
    } else {
      vf acc[Count::value][kVectors];  // in registers
      add_up(acc);
      for_each_sum(count, acc, [&](int m, int v, vf& sum) FS_LAMBDA { arrived[m][v] = sum; });
    }
  }

  // h before step t of a row: of the step before, or the initial one.
  FS_INLINE vf load_h_before(int64_t t, int64_t r, int64_t u, int n) const {
    const int64_t e = step_before(seq_, t, r, pass_.dir.reverse);
    return e >= 0 ? load(pass_.out.template at<T>(seq_, e, r) + u, n) : load_state<T>(shape_, pass_.dir.h0, seq_.order[r] * H_ + u, n);
  }

  // anew: the row started from zeros at this step, so that nothing goes on to the step before.
  FS_INLINE void through_cell(int64_t t, int64_t r, int64_t u, vf dh, bool anew) const {
    const int n = lanes(u);
    const int64_t token = seq_.offsets[t] + r;
    if (pass_.d_out.data) dh += load(pass_.d_out.template at<T>(seq_, t, r) + u, n);
    vf saved[kColumns], dpre[kColumns], after = {}, previous;
    for (int j = 0; j < kColumns; ++j) saved[j] = load(static_cast<const T*>(pass_.gates) + (token * kColumns + j) * H_ + u, n);
    if constexpr (Cell::kCellState) {
      const int64_t e = step_before(seq_, t, r, pass_.dir.reverse);
      after = load(pass_.cells + token * H_ + u, n);
      previous = e >= 0 ? load(pass_.cells + (seq_.offsets[e] + r) * H_ + u, n)
                        : load_state<T>(shape_, pass_.dir.c0, seq_.order[r] * H_ + u, n);
    } else {
      previous = load_h_before(t, r, u, n);
    }
    if (anew) previous = vf{};
    float* carried = buf_.carry + r * buf_.width + u;
    vf carry = load_vector<vf>(carried);
    if constexpr (Cell::kCellState)
      if (pass_.d_c_out.data) carry += load(pass_.d_c_out.template at<T>(seq_, t, r) + u, n);
    if (pass_.noise.any) {
      through_masked_cell(t, r, u, saved, previous, dh, anew, carry, dpre);
    } else {
      Cell::backward(saved, previous, after, dh, carry, dpre);
    }
    store(carried, anew ? vf{} : carry, W);
    T* row = reinterpret_cast<T*>(buf_.gate_row(token));
    for (int j = 0; j < kColumns; ++j) {
      T* to = row + j * buf_.gate_units * Dot<T>::kPerUnit + u;
      store(to, dpre[j], n);
      if (Dot<T>::kPerUnit == 2 && n < W && H_ % 2) to[n] = T{};  // the half unit past an odd H
    }
  }

  FS_INLINE void through_masked_cell(int64_t t, int64_t r, int64_t u, const vf (&saved)[kColumns], vf previous, vf dh, bool anew,
                                     vf& carry, vf (&dpre)[kColumns]) const {
    const int n = lanes(u);
    float* held = buf_.kept + r * buf_.width + u;
    vf kept = load_vector<vf>(held);
    masked_backward<Cell>(saved, previous, dh, carry, kept, dpre, load_masks(pass_.noise, seq_, t, r, u, n));
    store(held, anew ? vf{} : kept, W);
    if (!pass_.noise.recurrent) return;
    vf h = previous;
    if constexpr (Cell::kCellState) h = anew ? vf{} : load_h_before(t, r, u, n);
    store(buf_.operands + (seq_.offsets[t] + r) * H_ + u, recurrent_masked<T>(pass_.noise, h, seq_.order[r] * H_ + u, n), n);
  }

  FS_INLINE void to_initial_state(int64_t r, int64_t u, vf dh) const {
    const int64_t at = seq_.order[r] * H_ + u;
    const vf carry = load_vector<vf>(buf_.carry + r * buf_.width + u);
    if (pass_.noise.any) dh += load_vector<vf>(buf_.kept + r * buf_.width + u);
    if (pass_.d_h0) store_state<T>(shape_, pass_.d_h0, at, dh + Cell::direct(carry), lanes(u));
    if constexpr (Cell::kCellState)
      if (pass_.d_c0) store_state<T>(shape_, pass_.d_c0, at, carry, lanes(u));
  }

  void finish_empty_rows() const {
    const int64_t first = seq_.steps ? seq_.active(0) : 0;
    for (int64_t i = own_.count(first); i < own_.count(seq_.rows); ++i)
      for (int64_t u = panels_.begin * kPanel; u < panels_.end * kPanel && u < H_; u += W)
        to_initial_state(own_.row(i), u, load_vector<vf>(buf_.pending + own_.row(i) * buf_.width + u));
  }

  const Shape& shape_;
  const Sequence& seq_;
  const BackwardPass& pass_;
  const BackwardBuffers<T>& buf_;
  Team team_, step_team_;
  int64_t H_;
  OwnRows own_;
  Range panels_;
  bool idle_, carries_;  // carries: some gradient goes through W_hh
};

template <class Cell, class T>
void run(const Shape& shape, const Sequence& seq, const BackwardPass* passes, int directions, int threads) {
  using B = BackwardBuffers<T>;
  using P = Products<T>;
  const Gates cell = Gates::of<Cell>();
  threads = usable_threads(threads);
  Scratch scratch;
  const Noise& noise = passes[0].noise;  // both directions have the same kinds
  const B measured(scratch.measure, cell, shape, seq, noise);
  if (directions == 2) B(scratch.measure, cell, shape, seq, noise);
  typename P::Buffers(scratch.measure, P(shape, seq, passes[0], measured), threads);
  Carver carve = scratch.allocate();
  const B first(carve, cell, shape, seq, noise), second = directions == 2 ? B(carve, cell, shape, seq, noise) : first;
  const B* buffers[2] = {&first, &second};
  const P forwards(shape, seq, passes[0], first), backwards(shape, seq, passes[directions - 1], second);
  const P* products[2] = {&forwards, &backwards};
  const typename P::Buffers shared(carve, forwards, threads);

  const Blocks blocks(seq.rows, kTileRegisters ? kRegisterRows : kTileRows, kTileRegisters);
  const int64_t rows = blocks.count ? (seq.rows + blocks.count - 1) / blocks.count : 0;
  auto plan = [&](int size) {
    return Partition::choose(size, blocks.count, first.panels, tile_cycles(rows, kVectors, first.depth()) + 400 * rows,
                             first.depth() * kPanel * 4);
  };
  run_directions(directions, plan, threads, [&](int d, Team team, Partition split, Barrier* steps) {
    Backward<Cell, T>(shape, seq, passes[d], *buffers[d], team, split, steps).run();
  });
  const double flops = 2.0 * seq.tokens() * Cell::kGates * shape.hidden * (2 * shape.input + shape.hidden);
  Barrier barrier;
  parallel(flops < kSmallProducts ? 1 : threads, [&](int rank, int size) {
    for (int d = 0; d < directions; ++d) products[d]->run(shared, Team{rank, size, &barrier});
  });
}

}  // namespace

void rnn_backward(const Shape& shape, const Sequence& seq, const BackwardPass* passes, int directions, int threads) {
  dispatch(shape, [&](auto cell, auto element) {
    run<typename decltype(cell)::type, typename decltype(element)::type>(shape, seq, passes, directions, threads);
  });
}

}  // namespace FS_ISA
}  // namespace fastseq
