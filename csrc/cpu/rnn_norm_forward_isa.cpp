// Layer-normalised LSTM/GRU forward over a whole sequence. State stays in fp32; outputs keep the input dtype.
//
// Every thread has rows of its own from the first step to the last. A step multiplies them all by W_hh, panel by panel, into a buffer;
// then a row's statistics need the whole row, which is in the cache, and the cell follows.
#include "rnn_norm_rows.h"

namespace fastseq {
namespace FS_ISA {
namespace {

template <class Cell, class T>
struct NormForwardBuffers {
  StepProduct<T> product;
  NormGains gains;
  int64_t units_h, width;  // of a row
  float *sums;             // [B][pitch()] W_hh h
  uint32_t *operand;       // [B][units_h] h in T
  const uint32_t **operands;
  float *h, *c;            // [B][width]

  NormForwardBuffers(Carver& carve, const Shape& shape, const Sequence& seq, const NormForwardPass& pass)
      : product(StepProduct<T>::Over::columns, Cell::kGates * shape.hidden, Use{seq.rows, seq.steps}),
        gains(carve, Cell::kGates * shape.hidden, shape.hidden),
        units_h(units<T>(shape.hidden)), width((shape.hidden + W - 1) / W * W) {
    product.add(pass.w_hh, shape.hidden, shape.hidden);
    product.place(carve);
    sums = carve.take<float>(seq.rows * pitch());
    operand = carve.take<uint32_t>(seq.rows * units_h);
    operands = carve.take<const uint32_t*>(seq.rows);
    h = carve.take<float>(seq.rows * width);
    c = carve.take<float>(Cell::kCellState ? seq.rows * width : 0);
  }

  int64_t pitch() const { return product.panels() * kStepPanel; }
};

template <class Cell, class T>
class NormForward {
  static constexpr int kG = Cell::kGates, kColumns = Cell::kColumns;
  using Blocked = NormBlocks<Cell>;

 public:
  NormForward(const Shape& shape, const Sequence& seq, const NormForwardPass& pass, const NormForwardBuffers<Cell, T>& buffers, Team team)
      : shape_(shape), seq_(seq), pass_(pass), buf_(buffers), team_(team), rows_(team, seq.rows), H_(shape.hidden) {}

  void run() const {
    prepare(buf_.product, buf_.gains, pass_, team_);
    for (int64_t i = 0; i < rows_.count; ++i) start_row(i);
    team_.sync();
    for (int64_t s = 0; s < seq_.steps; ++s) step(s, pass_.reverse ? seq_.steps - 1 - s : s);
    for (int64_t i = 0; i < rows_.count; ++i) finish_row(i);
  }

 private:
  float* h_of(int64_t i) const { return buf_.h + (rows_.first + i) * buf_.width; }
  float* c_of(int64_t i) const { return buf_.c + (rows_.first + i) * buf_.width; }
  uint32_t* operand_of(int64_t i) const { return buf_.operand + (rows_.first + i) * buf_.units_h; }

  void start_row(int64_t i) const {
    const int64_t from = seq_.order[rows_.own.row(i)] * H_;
    uint32_t* operand = operand_of(i);
    buf_.operands[rows_.first + i] = operand;
    operand[buf_.units_h - 1] = 0;  // the half unit past an odd H
    for_vectors(H_, [&](int64_t u, int n) FS_LAMBDA {
      const vf h = load_state<T>(shape_, pass_.h0, from + u, n);
      store(h_of(i) + u, h, W);
      store(reinterpret_cast<T*>(operand) + u, recurrent_masked<T>(pass_.noise, h, from + u, n), n);
      if constexpr (Cell::kCellState) store(c_of(i) + u, load_state<T>(shape_, pass_.c0, from + u, n), W);
    });
  }

  void start_anew(int64_t i) const {
    std::memset(operand_of(i), 0, sizeof(uint32_t) * buf_.units_h);
    std::memset(h_of(i), 0, sizeof(float) * buf_.width);
    if constexpr (Cell::kCellState) std::memset(c_of(i), 0, sizeof(float) * buf_.width);
  }

  void step(int64_t s, int64_t t) const {
    const int64_t active = rows_.own.count(seq_.active(t));
    if (active == 0) return;
    for (int64_t i = 0; i < active; ++i)
      if (seq_.starts_anew(t, rows_.own.row(i), pass_.reverse)) start_anew(i);
    const int64_t multiplied = active == 1 && rows_.count > 1 ? 2 : active;  // a tile of one row adds up in another order
    float* sums = buf_.sums + rows_.first * buf_.pitch();
    buf_.product.run(multiplied, buf_.operands + rows_.first, 0, {}, sums, buf_.pitch(), s & 1);
    for (int64_t i = 0; i < active; ++i) through_cell(t, i, sums + i * buf_.pitch());
  }

  // What one token reads and writes.
  struct Token {
    int64_t t, r;  // step, position
    T *inputs, *out, *gates, *hats, *operand;
    float *cells, *stats, *h, *c;
  };

  Token token_of(int64_t t, int64_t i) const {
    const int64_t r = rows_.own.row(i), at = seq_.offsets[t] + r;
    Token token{t, r, pass_.inputs.template at<T>(seq_, t, r), pass_.out.template at<T>(seq_, t, r), nullptr, nullptr,
                reinterpret_cast<T*>(operand_of(i)), nullptr, nullptr, h_of(i), Cell::kCellState ? c_of(i) : nullptr};
    if (!pass_.gates) return token;
    token.gates = static_cast<T*>(pass_.gates) + at * kColumns * H_, token.hats = static_cast<T*>(pass_.hats) + at * kG * H_;
    token.stats = pass_.stats + at * kNormStats;
    if constexpr (Cell::kCellState) token.cells = pass_.cells + at * H_;
    return token;
  }

  void through_cell(int64_t t, int64_t i, float* sums) const {
    const Token token = token_of(t, i);
    Moments of_h[Blocked::kCount], of_x[Blocked::kCount];
    for (int b = 0; b < Blocked::kCount; ++b) {
      of_h[b] = moments(sums + Blocked::begin(b, H_), Blocked::count(b, H_));
      of_x[b] = moments(token.inputs + Blocked::begin(b, H_), Blocked::count(b, H_));
      if (token.stats) token.stats[b] = of_h[b].scale, token.stats[kNormStatsOfX + b] = of_x[b].scale;
    }
    if constexpr (Cell::kCellState) {
      lstm(token, of_h, of_x, sums);
    } else {
      gru(token, of_h, of_x, sums);
    }
  }

  // Columns of n units from u on: both products, normalised.
  FS_INLINE void pre_activations(const Token& token, const Moments* of_h, const Moments* of_x, const float* sums, int64_t u, int n,
                                 vf (&pre)[kColumns]) const {
    const NormGains& gains = buf_.gains;
    unroll<kG>([&](int g) FS_LAMBDA {
      const int64_t at = g * H_ + u;
      const Moments m = of_h[Blocked::of(g)], m_x = of_x[Blocked::of(g)];
      const vf hat = (load(sums + at, n) - m.mean) * m.scale, hat_x = (load(token.inputs + at, n) - m_x.mean) * m_x.scale;
      if (token.hats) store(token.hats + at, hat, n), store(token.inputs + at, hat_x, n);
      const vf recurrent = hat * load(gains.gain + at, n) + load(gains.bias + at, n);
      const vf input = hat_x * load(gains.gain_x + at, n) + load(gains.bias_x + at, n);
      if (Cell::kInput[g] == Cell::kHidden[g]) {
        pre[Cell::kHidden[g]] = input + recurrent;
      } else {
        pre[Cell::kHidden[g]] = recurrent, pre[Cell::kInput[g]] = input;
      }
    });
  }

  FS_INLINE Masks<vf> masks(const Token& token, int64_t u, int n) const { return load_masks(pass_.noise, seq_, token.t, token.r, u, n); }

  FS_INLINE void publish(const Token& token, vf h, int64_t u, int n) const {
    store(token.h + u, h, W), store(token.out + u, h, n);
    store(token.operand + u, recurrent_masked<T>(pass_.noise, h, seq_.order[token.r] * H_ + u, n), n);
  }

  void gru(const Token& token, const Moments* of_h, const Moments* of_x, const float* sums) const {
    for_vectors(H_, [&](int64_t u, int n) FS_LAMBDA {
      vf pre[kColumns], saved[kColumns], h = load_vector<vf>(token.h + u), none = {};
      pre_activations(token, of_h, of_x, sums, u, n, pre);
      if (pass_.noise.any) {
        masked_forward<Cell>(pre, h, none, saved, masks(token, u, n));
      } else {
        Cell::forward(pre, h, none, saved);
      }
      publish(token, h, u, n);
      if (token.gates) unroll<kColumns>([&](int j) FS_LAMBDA { store(token.gates + j * H_ + u, saved[j], n); });
    });
  }

  // Leaves o where its sums were, for the second phase; under masks c', of which h is made, where those of g were.
  void lstm(const Token& token, const Moments* of_h, const Moments* of_x, float* sums) const {
    vf total = {};
    float* const own = pass_.noise.any ? sums + 2 * H_ : token.c;
    for_vectors(H_, [&](int64_t u, int n) FS_LAMBDA {
      vf pre[kColumns], saved[kColumns], c = load_vector<vf>(token.c + u);
      pre_activations(token, of_h, of_x, sums, u, n, pre);
      if (pass_.noise.any) {
        const Masks<vf> m = masks(token, u, n);
        const vf old = c;
        Cell::write(pre, c, saved, m.update);
        store(own + u, c, n);
        total += first_of(c, n);
        c = m.keep_c * old + (1.f - m.keep_c) * c;
      } else {
        Cell::write(pre, c, saved);
        total += first_of(c, n);
      }
      store(token.c + u, c, W), store(sums + 3 * H_ + u, saved[3], n);
      if (pass_.c_out.data) store(pass_.c_out.template at<T>(seq_, token.t, token.r) + u, c, n);
      if (!token.gates) return;
      unroll<kColumns>([&](int j) FS_LAMBDA { store(token.gates + j * H_ + u, saved[j], n); });
      store(token.cells + u, c, n);
    });
    const Moments m = moments(own, H_, total);
    if (token.stats) token.stats[1] = m.mean, token.stats[2] = m.scale;
    for_vectors(H_, [&](int64_t u, int n) FS_LAMBDA {
      const vf hat = (load(own + u, n) - m.mean) * m.scale;
      vf h = Cell::output(load(sums + 3 * H_ + u, n), hat * load(buf_.gains.cell_gain + u, n) + load(buf_.gains.cell_bias + u, n));
      if (pass_.noise.any) {
        const vf keep = masks(token, u, n).keep_h;
        h = keep * load_vector<vf>(token.h + u) + (1.f - keep) * h;
      }
      publish(token, h, u, n);
    });
  }

  void finish_row(int64_t i) const {
    const int64_t to = seq_.order[rows_.own.row(i)] * H_;
    for_vectors(H_, [&](int64_t u, int n) FS_LAMBDA {
      store_state<T>(shape_, pass_.h_n, to + u, load_vector<vf>(h_of(i) + u), n);
      if constexpr (Cell::kCellState) store_state<T>(shape_, pass_.c_n, to + u, load_vector<vf>(c_of(i) + u), n);
    });
  }

  const Shape& shape_;
  const Sequence& seq_;
  const NormForwardPass& pass_;
  const NormForwardBuffers<Cell, T>& buf_;
  Team team_;
  NormRows rows_;
  int64_t H_;
};

}  // namespace

void rnn_norm_forward(const Shape& shape, const Sequence& seq, const NormForwardPass& pass, int threads) {
  norm_dispatch(shape, [&](auto cell, auto element) {
    using C = typename decltype(cell)::type;
    using T = typename decltype(element)::type;
    Scratch scratch;
    NormForwardBuffers<C, T>(scratch.measure, shape, seq, pass);
    Carver carve = scratch.allocate();
    const NormForwardBuffers<C, T> buffers(carve, shape, seq, pass);
    Barrier barrier;
    parallel(norm_threads(shape, seq, C::kGates, threads),
             [&](int rank, int size) { NormForward<C, T>(shape, seq, pass, buffers, Team{rank, size, &barrier}).run(); });
  });
}

}  // namespace FS_ISA
}  // namespace fastseq
