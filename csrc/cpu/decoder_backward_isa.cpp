// The loop of an attention decoder, backward: against forward's order, what forward kept is only read.
//
// It leaves the gradients of every cell's gates, of the queries and of the readout's pre-activations, from which the gradients of
// weights and inputs follow as products over all steps, and gathers those of keys, memory and v on the way.
#include "decoder_loop.h"

namespace fastseq {
namespace FS_ISA {
namespace {

// What a cell's gate gradients are multiplied by. `candidate`: U_n of the GRU that resets before the product.
template <class T>
struct CellProducts {
  StepProduct<T> first, context, state, candidate;
};

template <class T>
struct BackwardBuffers {
  CellProducts<T> cells[kMaxCells];
  StepProduct<T> query, read[kMaxParts];
  Positions positions;
  KeyExponentials exponentials;
  float *v, *d_v;                // [padded]; [threads][padded]
  float *dh, *carry;             // [C][N][width], [running][N][width]
  float *d_feed, *d_context, *d_previous;  // [N][padded]
  float* part;                   // [N][padded]: one part before its mask, or d(r h)
  float *asked, *exp_asked, *d_asked, *weights, *d_weights;  // a thread's, of one row
  const uint32_t** operands;     // [kMaxParts][N]
  int64_t width, feed_width, context_width, part_width, query_width, weight_width;

  BackwardBuffers(Carver& carve, const Decoder& d, int threads)
      : positions(carve, d.source ? d.memory_rows() : 0, d.source),
        exponentials(carve, takes_exponentials(d) ? d.memory_rows() : 0, d.source, d.units, true) {
    using Over = typename StepProduct<T>::Over;
    const int64_t N = d.rows, H = d.hidden, GH = d.gate_count() * H;
    const Use use{(N + threads - 1) / threads, d.steps};
    width = padded(H), feed_width = padded(d.fed()), context_width = padded(d.features), query_width = padded(d.units);
    part_width = context_width > width ? context_width : width, weight_width = round_up(d.source, W);
    // The gates' rows of w, as they meet the columns of the gradients: a GRU's n has two, the input's comes last.
    auto over_gates = [&](const void* w, int64_t pitch, int64_t outputs, bool split) {
      StepProduct<T> product(Over::rows, outputs, use);
      product.add(w, pitch, split ? 2 * H : GH);
      if (split) product.add(static_cast<const T*>(w) + 2 * H * pitch, pitch, H);
      product.place(carve);
      return product;
    };
    const bool gru = d.cell == CellKind::gru;
    for (int i = 0; i < d.cells; ++i) {
      const DecoderCell& cell = d.of[i];
      const int64_t first = cell.feed ? d.fed() : cell.below ? H : 0;
      if (first) cells[i].first = over_gates(cell.w_ih, cell.pitch_ih, first, gru);
      if (cell.context) cells[i].context = over_gates(static_cast<const T*>(cell.w_ih) + first, cell.pitch_ih, d.features, gru);
      cells[i].state = StepProduct<T>(Over::rows, H, use);
      cells[i].state.add(cell.w_hh, H, d.cell == CellKind::gru_reset_before ? 2 * H : GH);
      cells[i].state.place(carve);
      if (d.cell != CellKind::gru_reset_before) continue;
      cells[i].candidate = StepProduct<T>(Over::rows, H, use);
      cells[i].candidate.add(static_cast<const T*>(cell.w_hh) + 2 * H * H, H, H);
      cells[i].candidate.place(carve);
    }
    if (d.w_q) {
      query = StepProduct<T>(Over::rows, H, use);
      query.add(d.w_q, H, d.units);
      query.place(carve);
    }
    ReadPart parts[kMaxParts];
    for (int i = 0, count = d.output ? read_parts(d, parts) : 0; i < count; ++i) {
      read[i] = StepProduct<T>(Over::rows, parts[i].width, use);
      read[i].add(static_cast<const T*>(d.w_r) + parts[i].at, d.r_pitch, d.read_rows());
      read[i].place(carve);
    }
    v = carve.take<float>(d.additive ? query_width : 0);
    d_v = carve.take<float>(d.additive ? threads * query_width : 0);
    dh = carve.take<float>(d.cells * N * width);
    carry = carve.take<float>(d.cells * N * width);
    d_feed = carve.take<float>(N * feed_width);
    d_context = carve.take<float>(N * context_width);
    d_previous = carve.take<float>(d.r_previous >= 0 ? N * width : 0);
    part = carve.take<float>(d.layer_masks || d.read_mask || d.cell == CellKind::gru_reset_before ? N * part_width : 0);
    exp_asked = carve.take<float>(takes_exponentials(d) ? threads * query_width : 0);
    asked = carve.take<float>(threads * query_width), d_asked = carve.take<float>(threads * query_width);
    weights = carve.take<float>(threads * weight_width), d_weights = carve.take<float>(threads * weight_width);
    operands = carve.take<const uint32_t*>(kMaxParts * N);
  }

  void pack(const Decoder& d, const Team& team) const {
    auto one = [&](const StepProduct<T>& product) {
      product.pack(share(product.panels(), team.rank, team.size));
      if (team.rank == 0 && product.panels()) std::memset(product.bias(), 0, sizeof(float) * product.panels() * kStepPanel);
    };
    for (int i = 0; i < d.cells; ++i) one(cells[i].first), one(cells[i].context), one(cells[i].state), one(cells[i].candidate);
    one(query);
    for (const StepProduct<T>& product : read) one(product);
    if (!d.additive) return;
    std::memset(d_v + team.rank * query_width, 0, sizeof(float) * query_width);
    if (team.rank == 0)
      for (int64_t u = 0; u < query_width; u += W)
        store(v + u, u < d.units ? load(static_cast<const T*>(d.v) + u, lanes_left(u, d.units)) : vf{}, W);
  }
};

template <class T>
class BackwardLoop {
 public:
  BackwardLoop(const Decoder& decoder, const BackwardBuffers<T>& buffers, const Team& team)
      : d(decoder), at_(decoder), buf_(buffers), team_(team), rows_(own_rows(decoder, team)), lstm_(decoder.cell == CellKind::lstm),
        exponentials_(takes_exponentials(decoder)) {}

  void run() {
    prepare();
    const int last = d.cells - 1;
    for (int64_t t = d.steps - 1; t >= 0; --t) {
      start(t);
      if (d.output) read_backward(t);
      for (int c = last; c >= 0; --c) {
        if (d.attend != Attend::none && d.attend != Attend::before && c == d.query_cell) attend_step(t);
        cell_step(c, t);
      }
      if (d.attend == Attend::before) attend_step(t);
      if (d.r_previous >= 0)
        for_rows([&](int64_t n) { add_to(dh_of(last, n), buf_.d_previous + n * buf_.width, buf_.width); });
    }
    finish();
  }

 private:
  int64_t count() const { return rows_.end - rows_.begin; }
  float* dh_of(int c, int64_t n) const { return buf_.dh + (c * at_.N + n) * buf_.width; }
  float* carry_of(int c, int64_t n) const { return buf_.carry + (at_.running(c) * at_.N + n) * buf_.width; }
  T* d_gates(int c, int64_t n, int64_t t) const { return static_cast<T*>(d.of[c].d_gates) + at_.token(n, t) * d.columns() * at_.H; }
  int chained(int c) const { return at_.between ? 1 - c : c; }  // whose state cell c starts from

  template <class F>
  FS_INLINE void for_rows(F&& f) const {
    for (int64_t n = rows_.begin; n < rows_.end; ++n) f(n);
  }

  static FS_INLINE void add_to(float* to, const float* from, int64_t width) {
    for (int64_t u = 0; u < width; u += W) store(to + u, load_vector<vf>(to + u) + load_vector<vf>(from + u), W);
  }

  template <class Row>
  FS_INLINE void set_operand(int part, Row&& row) const {
    const uint32_t** to = buf_.operands + part * at_.N + rows_.begin;
    for_rows([&](int64_t n) { to[n - rows_.begin] = reinterpret_cast<const uint32_t*>(row(n)); });
  }

  // out: [N][pitch] scratch, set or added to.
  void multiply_rows(const StepProduct<T>& product, float* out, int64_t pitch, int64_t t, bool add) const {
    product.run(count(), buf_.operands + rows_.begin, at_.N, {nullptr, add}, out + rows_.begin * pitch, pitch, t & 1);
  }

  void prepare() const {
    const int64_t H = at_.H, F = d.fed();
    for (int c = 0; c < d.cells; ++c) {
      for_rows([&](int64_t n) {
        fill(dh_of(c, n), buf_.width, d.of[c].d_h_n, n * H, H);
        if (c == 0 || !at_.between) fill(carry_of(c, n), buf_.width, lstm_ ? d.of[at_.between ? 1 : c].d_c_n : nullptr, n * H, H);
      });
    }
    for_rows([&](int64_t n) { fill(buf_.d_feed + n * buf_.feed_width, buf_.feed_width, d.d_feed_n, n * F, F); });
    if (!d.units || !d.source) return;
    for (int64_t b = rows_.begin / d.copies; b < rows_.end / d.copies; ++b) {
      buf_.positions.fill(d.mask, b);
      if (d.additive) std::memset(d.d_keys + b * d.source * d.units, 0, sizeof(float) * d.source * d.units);
      std::memset(d.d_memory + b * d.source * d.features, 0, sizeof(float) * d.source * d.features);
      if (exponentials_) buf_.exponentials.fill(b, at_.memory_row(b, buf_.positions));
    }
  }

  // to [width] = from [total] in the state's dtype, then zeros.
  FS_INLINE void fill(float* to, int64_t width, const void* from, int64_t first, int64_t total) const {
    for (int64_t u = 0; u < width; u += W) store(to + u, u < total ? at_.load_carried(from, first + u, lanes_left(u, total)) : vf{}, W);
  }

  // The context's gradient from outside, and from the next step where it is fed back.
  void start(int64_t t) const {
    if (!d.units) return;
    for_rows([&](int64_t n) {
      float* to = buf_.d_context + n * buf_.context_width;
      const T* outside = at_.row(static_cast<const T*>(d.d_contexts), at_.token(n, t), d.features);
      for (int64_t u = 0; u < buf_.context_width; u += W) {
        vf sum = outside && u < d.features ? load(outside + u, lanes_left(u, d.features)) : vf{};
        if (d.feed == Feed::context) sum += load_vector<vf>(buf_.d_feed + n * buf_.feed_width + u);
        store(to + u, sum, W);
      }
    });
  }

  void read_backward(int64_t t) const {
    const int64_t width = d.read_rows();
    for_rows([&](int64_t n) { combine_backward(n, t); });
    set_operand(0, [&](int64_t n) { return static_cast<const T*>(d.d_read) + at_.token(n, t) * width; });
    ReadPart parts[kMaxParts];
    const int last = d.cells - 1;
    read_parts(d, parts);
    int part = 0;
    auto next = [&](float* to, int64_t pitch, bool add) { part_backward(buf_.read[part], parts[part], to, pitch, t, add), ++part; };
    if (d.r_state >= 0) next(dh_of(last, 0), buf_.width, true);
    if (d.r_previous >= 0) next(buf_.d_previous, buf_.width, false);
    if (d.r_context >= 0) next(buf_.d_context, buf_.context_width, true);
  }

  void part_backward(const StepProduct<T>& product, const ReadPart& part, float* to, int64_t pitch, int64_t t, bool add) const {
    if (!d.read_mask) return multiply_rows(product, to, pitch, t, add);
    multiply_rows(product, buf_.part, buf_.part_width, t, false);
    for_rows([&](int64_t n) {
      const T* mask = static_cast<const T*>(d.read_mask) + at_.token(n, t) * d.r_pitch + part.at;
      through_mask(to + n * pitch, buf_.part + n * buf_.part_width, mask, part.width, add);
    });
  }

  static FS_INLINE void through_mask(float* to, const float* from, const T* mask, int64_t total, bool add) {
    for_vectors(total, [&](int64_t u, int n) FS_LAMBDA {
      const vf gradient = load_vector<vf>(from + u) * load(mask + u, n);
      store(to + u, add ? load_vector<vf>(to + u) + gradient : gradient, W);
    });
  }

  // d_read: through the output's mask and the combination, to its pre-activations.
  void combine_backward(int64_t n, int64_t t) const {
    const int64_t token = at_.token(n, t), R = d.output;
    const T *outside = at_.row(static_cast<const T*>(d.d_outs), token, R), *mask = at_.row(static_cast<const T*>(d.out_mask), token, R);
    const T *saved = at_.row(static_cast<const T*>(d.read_saved), token, d.read_rows()), *result = saved ? saved : at_.out(n, t);
    float* gradient = buf_.d_feed + n * buf_.feed_width;
    const bool fed = d.feed == Feed::output;
    T* to = static_cast<T*>(d.d_read) + token * d.read_rows();
    for_vectors(R, [&](int64_t u, int lanes) FS_LAMBDA {
      vf sum = fed ? load_vector<vf>(gradient + u) : vf{};
      if (outside) sum += load(outside + u, lanes);
      if (mask) sum = sum * load(mask + u, lanes);
      if (d.combine == Combine::tanh) {
        const vf y = load(result + u, lanes);
        sum = sum * (1.f - y * y);
      }
      if (d.combine != Combine::maxout) return store(to + u, sum, lanes);
      for (int i = 0; i < lanes; ++i) {
        vf pair = load(saved + 2 * (u + i), 2);
        const int larger = larger_of(pair[0], pair[1]);
        pair[larger] = sum[i], pair[1 - larger] = 0.f;
        store(to + 2 * (u + i), pair, 2);
      }
    });
  }

  void cell_step(int c, int64_t t) const {
    const DecoderCell& cell = d.of[c];
    const CellProducts<T>& products = buf_.cells[c];
    const int64_t H = at_.H;
    if (lstm_) {
      gate_rows<Lstm<SimdMath>>(c, t);
    } else if (d.cell == CellKind::gru) {
      gate_rows<Gru<SimdMath>>(c, t);
    } else {
      for_rows([&](int64_t n) { candidate_gates(c, n, t); });
      set_operand(0, [&](int64_t n) { return d_gates(c, n, t) + 2 * H; });
      multiply_rows(products.candidate, buf_.part, buf_.part_width, t, false);
      for_rows([&](int64_t n) { reset_gate(c, n, t); });
    }
    set_operand(0, [&](int64_t n) { return d_gates(c, n, t); });
    multiply_rows(products.state, buf_.dh + chained(c) * at_.N * buf_.width, buf_.width, t, false);
    if (d.cell == CellKind::gru) set_operand(1, [&](int64_t n) { return d_gates(c, n, t) + 3 * H; });
    if (cell.context) multiply_rows(products.context, buf_.d_context, buf_.context_width, t, true);
    if (cell.feed) multiply_rows(products.first, buf_.d_feed, buf_.feed_width, t, false);
    if (cell.below) below_backward(c, t);
  }

  void below_backward(int c, int64_t t) const {
    float* to = dh_of(c - 1, 0);
    if (!d.layer_masks) return multiply_rows(buf_.cells[c].first, to, buf_.width, t, true);
    multiply_rows(buf_.cells[c].first, buf_.part, buf_.part_width, t, false);
    const T* masks = static_cast<const T*>(d.layer_masks) + (c - 1) * at_.N * at_.T_ * at_.H;
    for_rows([&](int64_t n) {
      through_mask(to + n * buf_.width, buf_.part + n * buf_.part_width, masks + at_.token(n, t) * at_.H, at_.H, true);
    });
  }

  FS_INLINE vf arriving(int c, int64_t n, int64_t t, int64_t u, int lanes) const {
    const DecoderCell& cell = d.of[c];
    const vf dh = load_vector<vf>(dh_of(c, n) + u);
    return cell.d_hs ? dh + load(static_cast<const T*>(cell.d_hs) + n * cell.d_hs_row + t * cell.d_hs_step + u, lanes) : dh;
  }

  // The LSTM's c that cell c started from at step t.
  FS_INLINE vf cell_before(int c, int64_t n, int64_t t, int64_t u, int lanes) const {
    const int64_t earlier = at_.between && c == 1 ? t : t - 1;
    if (earlier < 0) return at_.load_carried(d.of[c].c0, n * at_.H + u, lanes);
    return load(at_.cell_state(chained(c), n, earlier) + u, lanes);
  }

  template <class Cell>
  void gate_rows(int c, int64_t t) const {
    constexpr bool kLstm = Cell::kCellState;
    constexpr int kColumns = Cell::kColumns;
    const int64_t H = at_.H;
    for_rows([&](int64_t n) {
      const T *kept = at_.saved(c, n, t), *start = at_.before(c, n, t);
      float* carried = carry_of(c, n);
      T* to = d_gates(c, n, t);
      for_vectors(H, [&](int64_t u, int lanes) FS_LAMBDA {
        vf saved[kColumns], dpre[kColumns], after = {}, before, carry = load_vector<vf>(carried + u);
        for (int j = 0; j < kColumns; ++j) saved[j] = load(kept + j * H + u, lanes);
        if constexpr (kLstm) {
          after = load(at_.cell_state(c, n, t) + u, lanes), before = cell_before(c, n, t, u, lanes);
        } else {
          before = load(start + u, lanes);
        }
        Cell::backward(saved, before, after, arriving(c, n, t, u, lanes), carry, dpre);
        store(carried + u, carry, W);
        for (int j = 0; j < kColumns; ++j) store(to + j * H + u, dpre[j], lanes);
      });
    });
  }

  void candidate_gates(int c, int64_t n, int64_t t) const {
    using Cell = GruResetBefore<SimdMath>;
    const int64_t H = at_.H;
    const T *kept = at_.saved(c, n, t), *start = at_.before(c, n, t);
    float* carried = carry_of(c, n);
    for_vectors(H, [&](int64_t u, int lanes) FS_LAMBDA {
      vf saved[Cell::kSaved], dpre[Cell::kColumns], carry = load_vector<vf>(carried + u);
      for (int j = 0; j < Cell::kSaved; ++j) saved[j] = load(kept + j * H + u, lanes);
      Cell::candidate_backward(saved, load(start + u, lanes), arriving(c, n, t, u, lanes), carry, dpre);
      store(carried + u, carry, W);
      for (int j = 1; j < 3; ++j) store(d_gates(c, n, t) + j * H + u, dpre[j], lanes);
    });
  }

  void reset_gate(int c, int64_t n, int64_t t) const {
    using Cell = GruResetBefore<SimdMath>;
    const int64_t H = at_.H;
    const T* kept = at_.saved(c, n, t);
    float* carried = carry_of(c, n);
    for_vectors(H, [&](int64_t u, int lanes) FS_LAMBDA {
      vf saved[Cell::kSaved], dpre[Cell::kColumns], carry = load_vector<vf>(carried + u);
      for (int j = 0; j < Cell::kSaved; ++j) saved[j] = load(kept + j * H + u, lanes);
      Cell::reset_backward(saved, load_vector<vf>(buf_.part + n * buf_.part_width + u), carry, dpre);
      store(carried + u, carry, W);
      store(d_gates(c, n, t) + u, dpre[0], lanes);
    });
  }

  // From the context's and the weights' gradients to those of query, keys, memory and v; the query's goes to the state that asked.
  void attend_step(int64_t t) const {
    const int64_t A = d.units;
    float* to = dh_of(d.query_cell, 0);
    float* d_query = buf_.d_asked + team_.rank * buf_.query_width;
    for_rows([&](int64_t n) {
      for (int64_t u = 0; u < buf_.query_width; u += W) store(d_query + u, vf{}, W);
      if (d.source) attend_row(n, t, d_query);
      if (d.w_q) {
        T* row = static_cast<T*>(d.d_queries) + at_.token(n, t) * A;
        for_vectors(A, [&](int64_t u, int lanes) FS_LAMBDA { store(row + u, load_vector<vf>(d_query + u), lanes); });
      } else {
        add_to(to + n * buf_.width, d_query, round_up(A, W));
      }
    });
    if (!d.w_q) return;
    set_operand(0, [&](int64_t n) { return static_cast<const T*>(d.d_queries) + at_.token(n, t) * A; });
    multiply_rows(buf_.query, to, buf_.width, t, true);
  }

  // The attended ones of all positions.
  void gather(const MemoryRow<T>& row, const T* from, float* to) const {
    if (row.count == d.source) {
      for_vectors(d.source, [&](int64_t i, int lanes) FS_LAMBDA { store(to + i, load(from + i, lanes), W); });
    } else {
      for (int64_t i = 0; i < row.count; ++i) to[i] = load(from + row.at[i], 1)[0];
    }
  }

  void attend_row(int64_t n, int64_t t, float* d_query) const {
    const int64_t token = at_.token(n, t), b = n / d.copies, S = d.source, A = d.units;
    const MemoryRow<T> row = at_.memory_row(b, buf_.positions);
    float *weights = buf_.weights + team_.rank * buf_.weight_width, *d_weights = buf_.d_weights + team_.rank * buf_.weight_width;
    float* query = buf_.asked + team_.rank * buf_.query_width;
    const T* kept = static_cast<const T*>(d.weights) + token * S;
    const T* outside = at_.row(static_cast<const T*>(d.d_weights), token, S);
    gather(row, kept, weights);
    if (outside) {
      gather(row, outside, d_weights);
    } else {
      for (int64_t i = 0; i < row.count; i += W) store(d_weights + i, vf{}, W);
    }
    const MemoryGradients into{d.additive ? d.d_keys + b * S * A : nullptr, d.d_memory + b * S * d.features,
                               d.additive ? buf_.d_v + team_.rank * buf_.query_width : nullptr};
    weights_backward(row, weights, buf_.d_context + n * buf_.context_width, d_weights, into);
    if (!d.additive) {
      spread(row, S, d_weights, d.d_scores + token * S);
      return dot_backward(row, d_weights, d_query);
    }
    const T* asked = d.w_q ? static_cast<const T*>(d.queries) + token * A
                           : at_.state(d.query_cell, n, d.attend == Attend::before ? t : t + 1);
    for (int64_t u = 0; u < A; u += W) store(query + u, load(asked + u, lanes_left(u, A)), W);
    float* exp_query = buf_.exp_asked + team_.rank * buf_.query_width;
    if (exponentials_ && buf_.exponentials.backward(b, row.count, query, exp_query, buf_.v, d_weights, d_query, into.v)) return;
    score_backward(row, query, buf_.v, d_weights, d_query, into);
  }

  void finish() const {
    const int64_t H = at_.H, F = d.fed();
    for (int c = 0; c < (at_.between ? 1 : d.cells); ++c) {
      const DecoderCell& cell = d.of[c];
      for_rows([&](int64_t n) {
        for_vectors(H, [&](int64_t u, int lanes) FS_LAMBDA {
          const vf carry = load_vector<vf>(carry_of(c, n) + u);
          if (cell.d_h0) at_.store_carried(cell.d_h0, n * H + u, load_vector<vf>(dh_of(chained(c), n) + u) + (lstm_ ? vf{} : carry), lanes);
          if (cell.d_c0) at_.store_carried(cell.d_c0, n * H + u, carry, lanes);
        });
      });
    }
    if (d.d_feed0)
      for_rows([&](int64_t n) {
        for_vectors(F, [&](int64_t u, int lanes) FS_LAMBDA {
          at_.store_carried(d.d_feed0, n * F + u, load_vector<vf>(buf_.d_feed + n * buf_.feed_width + u), lanes);
        });
      });
    if (!d.additive) return;
    for (int64_t b = rows_.begin / d.copies; exponentials_ && d.source && b < rows_.end / d.copies; ++b)
      buf_.exponentials.finish(b, at_.memory_row(b, buf_.positions), buf_.v, d.d_keys + b * d.source * d.units);
    team_.sync();
    if (team_.rank == 0)
      for_vectors(d.units, [&](int64_t u, int lanes) FS_LAMBDA {
        vf sum = {};
        for (int i = 0; i < team_.size; ++i) sum += load_vector<vf>(buf_.d_v + i * buf_.query_width + u);
        store(d.d_v + u, sum, lanes);
      });
  }

  const Decoder& d;
  const Places<T> at_;
  const BackwardBuffers<T>& buf_;
  const Team team_;
  Range rows_;
  bool lstm_, exponentials_;
};

template <class T>
void run(const Decoder& decoder, int threads) {
  const int64_t most = decoder.memory_rows();
  threads = usable_threads(threads < most ? threads : static_cast<int>(most));
  Scratch scratch;
  BackwardBuffers<T>(scratch.measure, decoder, threads);
  Carver carve = scratch.allocate();
  const BackwardBuffers<T> buffers(carve, decoder, threads);
  Barrier barrier;
  parallel(threads, [&](int rank, int size) {
    const Team team{rank, size, &barrier};
    buffers.pack(decoder, team);
    team.sync();
    BackwardLoop<T>(decoder, buffers, team).run();
  });
}

}  // namespace

void decoder_backward(const Decoder& decoder, int threads) {
  dispatch(decoder.dtype, [&](auto element) { run<typename decltype(element)::type>(decoder, threads); });
  release_scratch();  // packed weights for the most part; their gradients, as large, come next
}

}  // namespace FS_ISA
}  // namespace fastseq
