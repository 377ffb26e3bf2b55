// Layer-normalised LSTM/GRU backward over a whole sequence: what forward saved is only read.
//
// Threads have rows as in forward and walk against it. A row's cell comes first, then the gradient of its recurrent product before it
// was normalised, which W_hh takes to the step before; these stay, for dW_hh is one product over all tokens, as do those of the
// product with x. Gains' gradients are summed by each thread, then over threads.
#include "rnn_norm_rows.h"

namespace fastseq {
namespace FS_ISA {
namespace {

template <class Cell, class T>
struct NormBackwardBuffers {
  static constexpr int kG = Cell::kGates;
  StepProduct<T> product;
  NormGains gains;
  int64_t units_g, width, sums_size;
  float *dh, *carry, *kept;  // [B][pitch()], [B][width] gradients of the state, as masked_backward has them
  uint32_t* operand;  // [B][units_g] gradients of W_hh h in T
  const uint32_t** operands;
  float *d_hats;           // of a thread: [2][G * H] and [H]
  float* sums;             // of a thread, as the pass has them

  NormBackwardBuffers(Carver& carve, const Shape& shape, const Sequence& seq, const NormBackwardPass& pass, int threads)
      : product(StepProduct<T>::Over::rows, shape.hidden, Use{seq.rows, seq.steps}), gains(carve, kG * shape.hidden, shape.hidden),
        units_g(units<T>(kG * shape.hidden)), width((shape.hidden + W - 1) / W * W), sums_size((4 * kG + 2) * shape.hidden) {
    product.add(pass.w_hh, shape.hidden, kG * shape.hidden);
    product.place(carve);
    dh = carve.take<float>(seq.rows * pitch());
    carry = carve.take<float>(seq.rows * width);
    kept = carve.take<float>(pass.noise.any ? seq.rows * width : 0);
    operand = carve.take<uint32_t>(seq.rows * units_g);
    operands = carve.take<const uint32_t*>(seq.rows);
    d_hats = carve.take<float>(threads * scratch_size(shape.hidden));
    sums = carve.take<float>(threads * sums_size);
  }

  int64_t pitch() const { return product.panels() * kStepPanel; }
  static int64_t scratch_size(int64_t hidden) { return (2 * kG + 1) * hidden + W; }
};

template <class Cell, class T>
class NormBackward {
  static constexpr int kG = Cell::kGates, kColumns = Cell::kColumns;
  using Blocked = NormBlocks<Cell>;

 public:
  NormBackward(const Shape& shape, const Sequence& seq, const NormBackwardPass& pass, const NormBackwardBuffers<Cell, T>& buffers, Team team)
      : shape_(shape), seq_(seq), pass_(pass), buf_(buffers), team_(team), rows_(team, seq.rows), H_(shape.hidden) {
    const int64_t rows = kG * H_;
    d_hats_ = buf_.d_hats + team.rank * buf_.scratch_size(H_), d_hats_x_ = d_hats_ + rows, d_read_ = d_hats_x_ + rows;
    d_gain_ = buf_.sums + team.rank * buf_.sums_size, d_bias_ = d_gain_ + rows, d_gain_x_ = d_bias_ + rows, d_bias_x_ = d_gain_x_ + rows;
    d_cell_gain_ = d_bias_x_ + rows, d_cell_bias_ = d_cell_gain_ + H_;
  }

  void run() const {
    prepare(buf_.product, buf_.gains, pass_, team_);
    std::memset(d_gain_, 0, sizeof(float) * buf_.sums_size);
    for (int64_t i = 0; i < rows_.count; ++i) start_row(i);
    team_.sync();
    for (int64_t s = 0; s < seq_.steps; ++s) step(s, pass_.reverse ? s : seq_.steps - 1 - s);
    for (int64_t i = 0; i < rows_.count; ++i) finish_row(i);
    team_.sync();
    add_sums();
  }

 private:
  float* dh_of(int64_t i) const { return buf_.dh + (rows_.first + i) * buf_.pitch(); }
  float* carry_of(int64_t i) const { return buf_.carry + (rows_.first + i) * buf_.width; }
  float* kept_of(int64_t i) const { return buf_.kept + (rows_.first + i) * buf_.width; }
  uint32_t* operand_of(int64_t i) const { return buf_.operand + (rows_.first + i) * buf_.units_g; }

  void start_row(int64_t i) const {
    const int64_t from = seq_.order[rows_.own.row(i)] * H_;
    buf_.operands[rows_.first + i] = operand_of(i);
    operand_of(i)[buf_.units_g - 1] = 0;  // the half unit past an odd G * H
    for_vectors(H_, [&](int64_t u, int n) FS_LAMBDA {
      store(dh_of(i) + u, load_state<T>(shape_, pass_.d_h_n, from + u, n), W);
      store(carry_of(i) + u, load_state<T>(shape_, Cell::kCellState ? pass_.d_c_n : nullptr, from + u, n), W);
      if (pass_.noise.any) store(kept_of(i) + u, vf{}, W);
    });
  }

  // Rows that have not begun keep dL/dh_n, those that are through keep dL/dh_0: the product writes to active ones alone.
  void step(int64_t s, int64_t t) const {
    const int64_t active = rows_.own.count(seq_.active(t));
    for (int64_t i = 0; i < active; ++i) through_row(t, i);
    const bool last = s + 1 == seq_.steps && !pass_.d_h0;
    if (!active || last) return;
    buf_.product.run(active, buf_.operands + rows_.first, 0, {}, dh_of(0), buf_.pitch(), s & 1);
    if (!pass_.noise.recurrent) return;
    for (int64_t i = 0; i < active; ++i) {
      const int64_t at = seq_.order[rows_.own.row(i)] * H_;
      for_vectors(H_, [&](int64_t u, int n) FS_LAMBDA {
        store(dh_of(i) + u, recurrent_masked<T>(pass_.noise, load(dh_of(i) + u, n), at + u, n), n);
      });
    }
  }

  // What one token reads and writes.
  struct Token {
    int64_t t, r;  // step, position
    const T *gates, *hats, *hats_x, *d_out, *out_before;
    const float *cells, *cells_before, *stats, *dh;
    T *d_inputs, *d_products, *before;
    float *carry, *kept;
    int64_t state;  // where the initial state is that is before it; -1: none
  };

  Token token_of(int64_t t, int64_t i, bool anew) const {
    const int64_t r = rows_.own.row(i), at = seq_.offsets[t] + r, e = anew ? -1 : step_before(seq_, t, r, pass_.reverse);
    Token token{t, r, static_cast<const T*>(pass_.gates) + at * kColumns * H_, static_cast<const T*>(pass_.hats) + at * kG * H_,
                pass_.inputs.template at<T>(seq_, t, r), pass_.d_out.data ? pass_.d_out.template at<T>(seq_, t, r) : nullptr,
                e >= 0 ? pass_.out.template at<T>(seq_, e, r) : nullptr, nullptr, nullptr, pass_.stats + at * kNormStats, dh_of(i),
                pass_.d_inputs.template at<T>(seq_, t, r), static_cast<T*>(pass_.d_products) + at * kG * H_,
                static_cast<T*>(pass_.before) + at * H_, carry_of(i), kept_of(i), anew || e >= 0 ? -1 : seq_.order[r] * H_};
    if constexpr (Cell::kCellState) {
      token.cells = pass_.cells + at * H_;
      if (e >= 0) token.cells_before = pass_.cells + (seq_.offsets[e] + r) * H_;
    }
    return token;
  }

  FS_INLINE vf h_before(const Token& token, int64_t u, int n) const {
    if (token.out_before) return load(token.out_before + u, n);
    return token.state < 0 ? vf{} : load_state<T>(shape_, pass_.h0, token.state + u, n);
  }
  FS_INLINE vf c_before(const Token& token, int64_t u, int n) const {
    if (token.cells_before) return load(token.cells_before + u, n);
    return token.state < 0 ? vf{} : load_state<T>(shape_, pass_.c0, token.state + u, n);
  }
  FS_INLINE Masks<vf> masks(const Token& token, int64_t u, int n) const { return load_masks(pass_.noise, seq_, token.t, token.r, u, n); }

  void through_row(int64_t t, int64_t i) const {
    const bool anew = seq_.starts_anew(t, rows_.own.row(i), pass_.reverse);
    const Token token = token_of(t, i, anew);
    for_vectors(H_, [&](int64_t u, int n) FS_LAMBDA {
      store(token.before + u, recurrent_masked<T>(pass_.noise, h_before(token, u, n), seq_.order[token.r] * H_ + u, n), n);
    });
    BlockSums of_h[Blocked::kCount], of_x[Blocked::kCount];
    if constexpr (Cell::kCellState) {
      lstm(token, of_h, of_x);
    } else {
      gru(token, of_h, of_x);
    }
    T* operand = reinterpret_cast<T*>(operand_of(i));
    for (int b = 0; b < Blocked::kCount; ++b) {
      const int64_t count = Blocked::count(b, H_);
      through_norm(token.hats, d_hats_, of_h[b].means(count), token.stats[b], b, operand, token.d_products);
      through_norm(token.hats_x, d_hats_x_, of_x[b].means(count), token.stats[kNormStatsOfX + b], b, token.d_inputs, nullptr);
    }
    if (!anew) return;
    std::memset(operand, 0, sizeof(uint32_t) * buf_.units_g);
    std::memset(token.carry, 0, sizeof(float) * buf_.width);
    if (pass_.noise.any) std::memset(token.kept, 0, sizeof(float) * buf_.width);
  }

  // Sums of a block's d_hat and d_hat hat.
  struct BlockSums {
    vf plain = {}, by_hat = {};

    FS_INLINE Moments means(int64_t count) const {
      return {sum_lanes(plain) / static_cast<float>(count), sum_lanes(by_hat) / static_cast<float>(count)};
    }
  };

  FS_INLINE vf arrived(const Token& token, int64_t u, int n) const {
    const vf dh = load(token.dh + u, n);
    return token.d_out ? dh + load(token.d_out + u, n) : dh;
  }

  static FS_INLINE void add(float* sums, vf x, int n) { store(sums, load(sums, n) + x, n); }

  // From the columns' gradients: those of the gains, and of both normalised products, which through_norm takes on.
  FS_INLINE void through_gains(const Token& token, const vf (&dpre)[kColumns], BlockSums* of_h, BlockSums* of_x, int64_t u, int n) const {
    unroll<kG>([&](int g) FS_LAMBDA {
      const int64_t at = g * H_ + u;
      const vf d = dpre[Cell::kHidden[g]], hat = load(token.hats + at, n), d_hat = d * load(buf_.gains.gain + at, n);
      add(d_gain_ + at, d * hat, n), add(d_bias_ + at, d, n);
      store(d_hats_ + at, d_hat, n);
      of_h[Blocked::of(g)].plain += d_hat, of_h[Blocked::of(g)].by_hat += d_hat * hat;
      const vf d_x = dpre[Cell::kInput[g]], hat_x = load(token.hats_x + at, n), d_hat_x = d_x * load(buf_.gains.gain_x + at, n);
      add(d_gain_x_ + at, d_x * hat_x, n), add(d_bias_x_ + at, d_x, n);
      store(d_hats_x_ + at, d_hat_x, n);
      of_x[Blocked::of(g)].plain += d_hat_x, of_x[Blocked::of(g)].by_hat += d_hat_x * hat_x;
    });
  }

  void gru(const Token& token, BlockSums* of_h, BlockSums* of_x) const {
    for_vectors(H_, [&](int64_t u, int n) FS_LAMBDA {
      vf saved[kColumns], dpre[kColumns], carry = load_vector<vf>(token.carry + u);
      unroll<kColumns>([&](int j) FS_LAMBDA { saved[j] = load(token.gates + j * H_ + u, n); });
      if (pass_.noise.any) {
        vf kept = load_vector<vf>(token.kept + u);
        masked_backward<Cell>(saved, h_before(token, u, n), arrived(token, u, n), carry, kept, dpre, masks(token, u, n));
        store(token.kept + u, kept, W);
      } else {
        Cell::backward(saved, h_before(token, u, n), vf{}, arrived(token, u, n), carry, dpre);
      }
      store(token.carry + u, carry, W);
      through_gains(token, dpre, of_h, of_x, u, n);
    });
  }

  // Under masks what came out of the step is not the c' that h was made of: that is taken again, and waits in d_hats_.
  void lstm(const Token& token, BlockSums* of_h, BlockSums* of_x) const {
    const Moments m{token.stats[1], token.stats[2]};
    const float* const own = pass_.noise.any ? d_hats_ : token.cells;
    const auto hat_of_c = [&](int64_t u, int n) FS_LAMBDA { return (load(own + u, n) - m.mean) * m.scale; };
    BlockSums of_c;
    for_vectors(H_, [&](int64_t u, int n) FS_LAMBDA {
      vf dh = arrived(token, u, n);
      if (pass_.noise.any) {
        vf saved[kColumns] = {};
        unroll<3>([&](int j) FS_LAMBDA { saved[j] = load(token.gates + j * H_ + u, n); });
        const Masks<vf> mask = masks(token, u, n);
        store(d_hats_ + u, Cell::next_c(saved, c_before(token, u, n), mask.update), n);
        dh += load_vector<vf>(token.kept + u);
        const vf kept = dh * mask.keep_h;
        store(token.kept + u, kept, W);
        dh -= kept;
      }
      const vf hat = hat_of_c(u, n), gain = load(buf_.gains.cell_gain + u, n);
      vf dpre_o;
      const vf d = Cell::output_backward(load(token.gates + 3 * H_ + u, n), hat * gain + load(buf_.gains.cell_bias + u, n), dh, dpre_o);
      add(d_cell_gain_ + u, d * hat, n), add(d_cell_bias_ + u, d, n);
      store(d_read_ + u, d * gain, W), store(d_hats_ + 3 * H_ + u, dpre_o, n);
      of_c.plain += d * gain, of_c.by_hat += d * gain * hat;
    });
    const Moments means = of_c.means(H_);
    for_vectors(H_, [&](int64_t u, int n) FS_LAMBDA {
      vf saved[kColumns], dpre[kColumns], carry = load_vector<vf>(token.carry + u);
      unroll<kColumns>([&](int j) FS_LAMBDA { saved[j] = load(token.gates + j * H_ + u, n); });
      if (pass_.d_c_out.data) carry += load(pass_.d_c_out.template at<T>(seq_, token.t, token.r) + u, n);
      const vf through = (load_vector<vf>(d_read_ + u) - means.mean - hat_of_c(u, n) * means.scale) * m.scale;
      dpre[3] = load(d_hats_ + 3 * H_ + u, n);
      if (pass_.noise.any) {
        const Masks<vf> mask = masks(token, u, n);
        const vf held = carry * mask.keep_c;
        Cell::write_backward(saved, c_before(token, u, n), carry - held + through, carry, dpre, mask.update);
        carry += held;
      } else {
        Cell::write_backward(saved, c_before(token, u, n), carry + through, carry, dpre);
      }
      store(token.carry + u, carry, W);
      through_gains(token, dpre, of_h, of_x, u, n);
    });
  }

  // means: of d_hat, and (as `scale`) of d_hat hat. also: or null.
  FS_INLINE void through_norm(const T* hats, const float* d_hats, Moments means, float scale, int block, T* to, T* also) const {
    const int64_t first = Blocked::begin(block, H_);
    for_vectors(Blocked::count(block, H_), [&](int64_t u, int n) FS_LAMBDA {
      const vf d = (load(d_hats + first + u, n) - means.mean - load(hats + first + u, n) * means.scale) * scale;
      store(to + first + u, d, n);
      if (also) store(also + first + u, d, n);
    });
  }

  void finish_row(int64_t i) const {
    const int64_t to = seq_.order[rows_.own.row(i)] * H_;
    for_vectors(H_, [&](int64_t u, int n) FS_LAMBDA {
      const vf carry = load_vector<vf>(carry_of(i) + u);
      vf dh = load_vector<vf>(dh_of(i) + u) + Cell::direct(carry);
      if (pass_.noise.any) dh += load_vector<vf>(kept_of(i) + u);
      if (pass_.d_h0) store_state<T>(shape_, pass_.d_h0, to + u, dh, n);
      if constexpr (Cell::kCellState)
        if (pass_.d_c0) store_state<T>(shape_, pass_.d_c0, to + u, carry, n);
    });
  }

  // Each thread a share of what all threads have summed.
  void add_sums() const {
    const Range own = share(buf_.sums_size, team_.rank, team_.size);
    for_vectors(own.end - own.begin, [&](int64_t u, int n) FS_LAMBDA {
      vf sum = {};
      for (int rank = 0; rank < team_.size; ++rank) sum += load(buf_.sums + rank * buf_.sums_size + own.begin + u, n);
      store(pass_.d_sums + own.begin + u, sum, n);
    });
  }

  const Shape& shape_;
  const Sequence& seq_;
  const NormBackwardPass& pass_;
  const NormBackwardBuffers<Cell, T>& buf_;
  Team team_;
  NormRows rows_;
  int64_t H_;
  float *d_hats_, *d_hats_x_, *d_read_, *d_gain_, *d_bias_, *d_gain_x_, *d_bias_x_, *d_cell_gain_, *d_cell_bias_;  // this thread's
};

}  // namespace

void rnn_norm_backward(const Shape& shape, const Sequence& seq, const NormBackwardPass& pass, int threads) {
  norm_dispatch(shape, [&](auto cell, auto element) {
    using C = typename decltype(cell)::type;
    using T = typename decltype(element)::type;
    const int team = norm_threads(shape, seq, C::kGates, threads);
    Scratch scratch;
    NormBackwardBuffers<C, T>(scratch.measure, shape, seq, pass, team);
    Carver carve = scratch.allocate();
    const NormBackwardBuffers<C, T> buffers(carve, shape, seq, pass, team);
    Barrier barrier;
    parallel(team, [&](int rank, int size) { NormBackward<C, T>(shape, seq, pass, buffers, Team{rank, size, &barrier}).run(); });
  });
}

}  // namespace FS_ISA
}  // namespace fastseq
