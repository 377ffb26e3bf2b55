// The loop of an attention decoder, forward: query -> scores -> softmax -> context -> cells -> what is fed back, step after step.
//
// Rows are independent, so each thread takes some memory rows through all steps and never waits. A step is a few products of all
// its rows with weights that were packed once (step_product.h), an attention row by row (attention.h), and element math between.
#include "decoder_loop.h"
#include "search.h"

namespace fastseq {
namespace FS_ISA {
namespace {

// One cell's products. An LSTM adds both to the same columns, so `input` has the state as its last part; a GRU keeps them apart,
// and with the reset gate before the product the candidate's recurrent one waits for r h.
template <class T>
struct CellProducts {
  StepProduct<T> input, hidden, candidate;
};

// Whether the first cell multiplies the embedded token at each step, since no table has that for all tokens.
FS_INLINE bool reads_tokens(const Decoder& d) { return d.search && !d.projected; }

template <class T>
struct ForwardBuffers {
  CellProducts<T> cells[kMaxCells];
  StepProduct<T> query, read, vocabulary;
  Positions positions;
  KeyExponentials exponentials;
  SearchBuffers search;
  float *v, *exp_query;          // [padded]; [threads][padded]
  float *h, *c;                  // [running][N][width] the states, fp32
  float *pre, *pre_hidden;       // [N][gate_width]
  float *queries, *contexts, *weights, *reads;  // [N][padded]
  T *below, *parts, *reset;      // operands that are no tensor's rows: [N][H], [N][r_pitch], [N][H]
  char* moved;                   // [N][moved_width] rows of any kind on their way from beam to beam
  const uint32_t** operands;     // [kMaxParts][N]
  const T** starts;              // [N]
  int64_t* running;              // [N]
  int64_t width, gate_width, query_width, context_width, weight_width, read_width, moved_width;

  ForwardBuffers(Carver& carve, const Decoder& d, int threads)
      : positions(carve, d.source ? d.memory_rows() : 0, d.source),
        exponentials(carve, takes_exponentials(d) ? d.memory_rows() : 0, d.source, d.units, false),
        search(carve, d, d.search ? padded(d.search->vocabulary) : 0) {
    using Over = typename StepProduct<T>::Over;
    const int64_t N = d.rows, H = d.hidden, GH = d.gate_count() * H;
    const Use use{(N + threads - 1) / threads, d.steps};
    width = padded(H), gate_width = padded(GH) + W, query_width = padded(d.units), context_width = padded(d.features);
    weight_width = round_up(d.source, W), read_width = padded(d.read_rows());
    for (int i = 0; i < d.cells; ++i) {
      const DecoderCell& cell = d.of[i];
      CellProducts<T>& to = cells[i];
      const int64_t first = cell.feed ? d.fed() : cell.below ? H : 0;
      to.input = {Over::columns, GH, use};
      if (i == 0 && reads_tokens(d)) to.input.add(static_cast<const T*>(cell.w_ih) - d.search->inputs, cell.pitch_ih, d.search->inputs);
      to.input.add(cell.w_ih, cell.pitch_ih, first);
      if (cell.context && !d.memory_gates) to.input.add(static_cast<const T*>(cell.w_ih) + first, cell.pitch_ih, d.features);
      if (d.cell == CellKind::lstm) to.input.add(cell.w_hh, H, H);
      to.input.place(carve);
      if (d.cell == CellKind::lstm) continue;
      const int64_t joint = d.cell == CellKind::gru ? GH : 2 * H;
      to.hidden = {Over::columns, joint, use};
      to.hidden.add(cell.w_hh, H, H);
      to.hidden.place(carve);
      if (d.cell == CellKind::gru) continue;
      to.candidate = {Over::columns, H, use};
      to.candidate.add(static_cast<const T*>(cell.w_hh) + joint * H, H, H);
      to.candidate.place(carve);
    }
    if (d.w_q) {
      query = {Over::columns, d.units, use};
      query.add(d.w_q, H, H);
      query.place(carve);
    }
    if (d.output) {
      read = {Over::columns, d.read_rows(), use};
      add_read_parts(d, d.w_r, read);
      read.place(carve);
    }
    if (d.search) {
      vocabulary = {Over::columns, d.search->vocabulary, use};
      if (d.output) {
        vocabulary.add(d.search->w_out, d.output, d.output);
      } else {
        add_read_parts(d, d.search->w_out, vocabulary);
      }
      vocabulary.place(carve);
    }
    v = carve.take<float>(d.additive ? query_width : 0);
    exp_query = carve.take<float>(takes_exponentials(d) ? threads * query_width : 0);
    const int64_t states = d.attend == Attend::between ? 1 : d.cells;
    h = carve.take<float>(states * N * width);
    c = carve.take<float>(d.cell == CellKind::lstm ? states * N * width : 0);
    pre = carve.take<float>(N * gate_width);
    pre_hidden = carve.take<float>(d.cell == CellKind::lstm ? 0 : N * gate_width);
    queries = carve.take<float>(d.w_q ? N * query_width : 0);
    contexts = carve.take<float>(d.units ? N * context_width : 0);
    const int64_t carried = width * static_cast<int64_t>(sizeof(float)), fed = d.fed() * static_cast<int64_t>(sizeof(T));
    moved_width = carried > fed ? carried : fed;
    moved = carve.take<char>(d.search ? N * moved_width : 0);
    weights = carve.take<float>(d.units ? N * weight_width : 0);
    reads = carve.take<float>(d.output ? N * read_width : 0);
    below = carve.take<T>(d.layer_masks ? N * H : 0);
    parts = carve.take<T>(d.read_mask ? N * d.r_pitch : 0);
    reset = carve.take<T>(d.cell == CellKind::gru_reset_before ? N * H : 0);
    operands = carve.take<const uint32_t*>(kMaxParts * N);
    starts = carve.take<const T*>(N);
    running = carve.take<int64_t>(N);
  }

  void add_read_parts(const Decoder& d, const void* w, StepProduct<T>& to) const {
    ReadPart part[kMaxParts];
    for (int i = 0, count = read_parts(d, part); i < count; ++i) to.add(static_cast<const T*>(w) + part[i].at, d.r_pitch, part[i].width);
  }

  // Each thread packs its share of every product and the biases' owner writes them.
  void pack(const Decoder& d, const Team& team) const {
    auto one = [&](const StepProduct<T>& product, const void* b, const void* second) {
      const Range own = share(product.panels(), team.rank, team.size);
      product.pack(own);
      if (team.rank) return;
      std::memset(product.bias(), 0, sizeof(float) * product.panels() * kStepPanel);
      product.add_bias(b), product.add_bias(second);
    };
    for (int i = 0; i < d.cells; ++i) {
      const DecoderCell& cell = d.of[i];
      const T* b_hh = static_cast<const T*>(cell.b_hh);
      const bool lstm = d.cell == CellKind::lstm, before = d.cell == CellKind::gru_reset_before;
      one(cells[i].input, cell.b_ih, lstm ? b_hh : nullptr);
      if (!lstm) one(cells[i].hidden, b_hh, nullptr);
      if (before) one(cells[i].candidate, b_hh ? b_hh + 2 * d.hidden : nullptr, nullptr);
    }
    if (d.w_q) one(query, nullptr, nullptr);
    if (d.output) one(read, d.b_r, nullptr);
    if (d.search) one(vocabulary, d.search->b_out, nullptr);
    if (team.rank == 0 && d.additive) {
      std::memset(v, 0, sizeof(float) * query_width);
      for_vectors(d.units, [&](int64_t u, int n) FS_LAMBDA { store(v + u, load(static_cast<const T*>(d.v) + u, n), n); });
    }
  }
};

template <class T>
class ForwardLoop {
 public:
  ForwardLoop(const Decoder& decoder, const ForwardBuffers<T>& buffers, const Team& team)
      : d(decoder), at_(decoder), buf_(buffers), rows_(own_rows(decoder, team)), running_(buffers.running + rows_.begin), lstm_(decoder.cell == CellKind::lstm),
        exponentials_(takes_exponentials(decoder)), exp_query_(buffers.exp_query + team.rank * buffers.query_width) {}

  void run() {
    prepare();
    if (d.search) return search();
    for (int64_t t = 0; t < d.steps; ++t) step(t);
    finish();
  }

 private:
  void step(int64_t t) const {
    if (d.attend == Attend::before) attend(t);
    for (int c = 0; c < d.cells; ++c) {
      step_cell(c, t);
      if (d.attend != Attend::none && d.attend != Attend::before && c == d.query_cell) attend(t);
    }
    if (d.output) read(t);
  }

  // Steps until all own rows have ended, each fed what the one before it chose. Rows that have ended are left out.
  void search() {
    const Searcher searcher(d, buf_.search, {rows_.begin / d.copies, rows_.end / d.copies});
    searcher.begin();
    for (int64_t t = 0; t < d.steps && count_; ++t) {
      step(t);
      if (!searcher.wants_logits(t)) {
        searcher.read_forced(t);
        continue;
      }
      d.output ? set_operand(0, [&](int64_t n) { return at_.out(n, t); }) : set_read_operands(t);
      multiply_rows(buf_.vocabulary, buf_.search.logits, buf_.search.pitch, t, nullptr);
      const auto move = [&](int64_t first, const int32_t* parents) { rearrange(first, parents, t); };
      count_ = searcher.advance(t, running_, count_, move);
    }
  }

  // Rows first ... first + k - 1 go on from where `parents` of them stand after step t.
  void rearrange(int64_t first, const int32_t* parents, int64_t t) const {
    const int64_t state = at_.H * static_cast<int64_t>(sizeof(T)), running = buf_.width * static_cast<int64_t>(sizeof(float));
    for (int c = 0; c < at_.cells; ++c) {
      move_rows(first, parents, state, [&](int64_t n) { return at_.state(c, n, t + 1); });
      if (c && at_.between) continue;
      move_rows(first, parents, running, [&](int64_t n) { return h_of(c, n); });
      if (lstm_) move_rows(first, parents, running, [&](int64_t n) { return c_of(c, n); });
    }
    const int64_t fed = d.fed() * static_cast<int64_t>(sizeof(T));
    if (fed) move_rows(first, parents, fed, [&](int64_t n) { return at_.fed(n, t + 1); });
  }

  template <class Row>
  FS_INLINE void move_rows(int64_t first, const int32_t* parents, int64_t bytes, Row&& row) const {
    const auto aside = [&](int64_t j) { return buf_.moved + (first + j) * buf_.moved_width; };
    for (int64_t j = 0; j < d.copies; ++j) std::memcpy(aside(j), row(first + parents[j]), bytes);
    for (int64_t j = 0; j < d.copies; ++j) std::memcpy(row(first + j), aside(j), bytes);
  }
  int64_t count() const { return count_; }
  float* h_of(int c, int64_t n) const { return buf_.h + (at_.running(c) * at_.N + n) * buf_.width; }
  float* c_of(int c, int64_t n) const { return buf_.c + (at_.running(c) * at_.N + n) * buf_.width; }
  const uint32_t** operand(int part) const { return buf_.operands + part * at_.N + rows_.begin; }

  // f(row, slot) of the rows that still run: what a step leaves for its own use lies by slot, without gaps.
  template <class F>
  FS_INLINE void for_rows(F&& f) const {
    for (int64_t i = 0; i < count_; ++i) f(running_[i], rows_.begin + i);
  }

  template <class Row>
  FS_INLINE void set_operand(int part, Row&& row) const {
    const uint32_t** to = operand(part);
    for (int64_t i = 0; i < count_; ++i) to[i] = reinterpret_cast<const uint32_t*>(row(running_[i]));
  }

  // `out`: [N][pitch] scratch by slot. starts: T values that each running row starts from, or null.
  void multiply_rows(const StepProduct<T>& product, float* out, int64_t pitch, int64_t t, const T* const* starts) const {
    product.run(count(), operand(0), at_.N, {starts, false}, out + rows_.begin * pitch, pitch, t & 1);
  }

  template <class Row>
  FS_INLINE const T* const* starts(Row&& row) const {
    const T** to = buf_.starts + rows_.begin;
    for (int64_t i = 0; i < count_; ++i) to[i] = row(running_[i]);
    return to;
  }

  void prepare() {
    for (int64_t n = rows_.begin; n < rows_.end; ++n) running_[count_++] = n;
    for (int c = 0; c < at_.cells; ++c) {
      const DecoderCell& cell = d.of[at_.between ? 0 : c];
      for_rows([&](int64_t n, int64_t) {
        for (int64_t u = 0; u < buf_.width; u += W) store(h_of(c, n) + u, vf{}, W);
        for_vectors(at_.H, [&](int64_t u, int lanes) FS_LAMBDA {
          const vf h = at_.load_carried(cell.h0, n * at_.H + u, lanes);
          store(h_of(c, n) + u, h, lanes);
          store(at_.state(c, n, 0) + u, h, lanes);
          if (lstm_) store(c_of(c, n) + u, at_.load_carried(cell.c0, n * at_.H + u, lanes), lanes);
        });
      });
    }
    const int64_t F = d.fed();
    for_rows([&](int64_t n, int64_t) {
      for_vectors(F, [&](int64_t u, int lanes) FS_LAMBDA { store(at_.fed(n, 0) + u, at_.load_carried(d.feed0, n * F + u, lanes), lanes); });
    });
    if (d.search && d.search->context)
      for_rows([&](int64_t n, int64_t) {
        const T* from = static_cast<const T*>(d.search->context) + n / d.copies * d.features;
        for (int slot = 0; slot < 2; ++slot) std::memcpy(at_.context(n, slot), from, d.features * sizeof(T));
      });
    if (!d.units || !d.source) return;
    for (int64_t b = rows_.begin / d.copies; b < rows_.end / d.copies; ++b) {
      buf_.positions.fill(d.mask, b);
      if (exponentials_) buf_.exponentials.fill(b, at_.memory_row(b, buf_.positions));
    }
  }

  // The state that is asked: of this step after its cell, of the last one before it.
  int64_t asked(int64_t t) const { return d.attend == Attend::before ? t : t + 1; }

  void attend(int64_t t) const {
    if (d.w_q) {
      set_operand(0, [&](int64_t n) { return at_.state(d.query_cell, n, asked(t)); });
      multiply_rows(buf_.query, buf_.queries, buf_.query_width, t, nullptr);
    }
    for_rows([&](int64_t n, int64_t slot) { attend_row(n, slot, t); });
  }

  void attend_row(int64_t n, int64_t slot, int64_t t) const {
    const float* query = d.w_q ? buf_.queries + slot * buf_.query_width : h_of(d.query_cell, n);
    float *context = buf_.contexts + slot * buf_.context_width, *weights = buf_.weights + slot * buf_.weight_width;
    const int64_t token = at_.token(n, t), S = d.source;
    MemoryRow<T> row{nullptr, nullptr, d.units, d.features, nullptr, 0};
    if (S) row = at_.memory_row(n / d.copies, buf_.positions);
    if (!S || !exponentials_ || !buf_.exponentials.score(n / d.copies, row.count, query, exp_query_, buf_.v, weights))
      score(row, d.additive, query, buf_.v, weights);
    softmax(weights, row.count);
    context_row(row, weights, context);
    for_vectors(d.features, [&](int64_t u, int lanes) FS_LAMBDA { store(at_.context(n, t) + u, load_vector<vf>(context + u), lanes); });
    if (d.keep && d.w_q)
      for_vectors(d.units, [&](int64_t u, int lanes) FS_LAMBDA {
        store(static_cast<T*>(d.queries) + token * d.units + u, load_vector<vf>(query + u), lanes);
      });
    if (d.weights && S) spread(row, S, weights, static_cast<T*>(d.weights) + token * S);
  }

  void step_cell(int c, int64_t t) const {
    const DecoderCell& cell = d.of[c];
    const CellProducts<T>& products = buf_.cells[c];
    int part = 0;
    if (c == 0 && reads_tokens(d)) set_operand(part++, [&](int64_t n) { return embedded(n); });
    if (cell.feed) set_operand(part++, [&](int64_t n) { return at_.fed(n, t); });
    if (cell.below) set_operand(part++, [&](int64_t n) { return below(c, n, t); });
    if (cell.context && !d.memory_gates) set_operand(part++, [&](int64_t n) { return at_.context(n, t); });
    if (lstm_) set_operand(part, [&](int64_t n) { return at_.before(c, n, t); });
    const int64_t GH = d.gate_count() * at_.H;
    const bool projects = c == 0 && d.projected;
    multiply_rows(products.input, buf_.pre, buf_.gate_width, t,
                  projects ? starts([&](int64_t n) { return static_cast<const T*>(d.projected) + input_row(n, t) * d.projected_pitch; }) : nullptr);
    if (cell.context && d.memory_gates) for_rows([&](int64_t n, int64_t slot) { add_memory_gates(n, slot); });
    if (lstm_) return finish_rows<Lstm<SimdMath>>(c, t);
    set_operand(0, [&](int64_t n) { return at_.before(c, n, t); });
    multiply_rows(products.hidden, buf_.pre_hidden, buf_.gate_width, t,
                  c == 0 && d.beside ? starts([&](int64_t n) { return static_cast<const T*>(d.beside) + n * GH; }) : nullptr);
    if (d.cell == CellKind::gru) return finish_rows<Gru<SimdMath>>(c, t);
    for_rows([&](int64_t n, int64_t slot) { reset(c, n, slot, t); });
    set_operand(0, [&](int64_t n) { return buf_.reset + n * at_.H; });
    multiply_rows(products.candidate, buf_.pre_hidden, buf_.gate_width, t, nullptr);
    for_rows([&](int64_t n, int64_t slot) { finish_candidate(c, n, slot, t); });
  }

  // Which row of what was made of the inputs beforehand: by step, or in a search by token.
  FS_INLINE int64_t input_row(int64_t n, int64_t t) const { return d.search ? buf_.search.tokens[n] : at_.token(n, t); }

  FS_INLINE const T* embedded(int64_t n) const {
    return static_cast<const T*>(d.search->embedding) + buf_.search.tokens[n] * d.search->inputs;
  }

  void add_memory_gates(int64_t n, int64_t slot) const {
    if (!d.source) return;
    MemoryRow<T> row = at_.memory_row(n / d.copies, buf_.positions);
    row.features = d.gate_count() * at_.H;
    row.memory = static_cast<const T*>(d.memory_gates) + n / d.copies * d.source * row.features;
    context_row(row, buf_.weights + slot * buf_.weight_width, buf_.pre + slot * buf_.gate_width, true);
  }

  const T* below(int c, int64_t n, int64_t t) const {
    const T* state = at_.state(c - 1, n, t + 1);
    if (!d.layer_masks) return state;
    const int64_t H = at_.H;
    T* to = buf_.below + n * H;
    scaled(state, static_cast<const T*>(d.layer_masks) + ((c - 1) * at_.N * at_.T_ + at_.token(n, t)) * H, to, H);
    return to;
  }

  FS_INLINE void store_state(int c, int64_t n, int64_t t, int64_t u, vf h, int lanes) const {
    store(h_of(c, n) + u, h, lanes);
    store(at_.state(c, n, t + 1) + u, h, lanes);
  }

  template <class Cell>
  void finish_rows(int c, int64_t t) const {
    constexpr bool kLstm = Cell::kCellState;
    const int64_t H = at_.H;
    for_rows([&](int64_t n, int64_t slot) {
      const float *pre = buf_.pre + slot * buf_.gate_width, *hidden = kLstm ? pre : buf_.pre_hidden + slot * buf_.gate_width;
      for_vectors(H, [&](int64_t u, int lanes) FS_LAMBDA {
        vf columns[Cell::kColumns], saved[Cell::kColumns], h = load_vector<vf>(h_of(c, n) + u), cell = {};
        for (int j = 0; j < Cell::kColumns; ++j) {
          const int in = input_gate<Cell>(j), rec = hidden_gate<Cell>(j);
          columns[j] = in >= 0 ? load_vector<vf>(pre + in * H + u) : vf{};
          if (!kLstm && rec >= 0) columns[j] += load_vector<vf>(hidden + rec * H + u);
        }
        if constexpr (kLstm) cell = load_vector<vf>(c_of(c, n) + u);
        Cell::forward(columns, h, cell, saved);
        store_state(c, n, t, u, h, lanes);
        if constexpr (kLstm) store(c_of(c, n) + u, cell, W);
        if (!d.keep) return;
        for (int j = 0; j < Cell::kColumns; ++j) store(at_.saved(c, n, t) + j * H + u, saved[j], lanes);
        if constexpr (kLstm) store(at_.cell_state(c, n, t) + u, cell, lanes);
      });
    });
  }

  // The gates r and z, and r h, which the candidate's product reads. z stays in `pre`, where r was added up.
  void reset(int c, int64_t n, int64_t slot, int64_t t) const {
    using Cell = GruResetBefore<SimdMath>;
    const int64_t H = at_.H;
    float* pre = buf_.pre + slot * buf_.gate_width;
    const float* hidden = buf_.pre_hidden + slot * buf_.gate_width;
    for_vectors(H, [&](int64_t u, int lanes) FS_LAMBDA {
      vf columns[Cell::kColumns], saved[Cell::kSaved];
      for (int j = 0; j < 2; ++j) columns[j] = load_vector<vf>(pre + j * H + u) + load_vector<vf>(hidden + j * H + u);
      Cell::reset(columns, load_vector<vf>(h_of(c, n) + u), saved);
      store(pre + u, saved[1], lanes);
      store(buf_.reset + n * H + u, saved[2], lanes);
      if (!d.keep) return;
      for (int j = 0; j < 3; ++j) store(at_.saved(c, n, t) + j * H + u, saved[j], lanes);
    });
  }

  void finish_candidate(int c, int64_t n, int64_t slot, int64_t t) const {
    using Cell = GruResetBefore<SimdMath>;
    const int64_t H = at_.H;
    const float *pre = buf_.pre + slot * buf_.gate_width, *hidden = buf_.pre_hidden + slot * buf_.gate_width;
    for_vectors(H, [&](int64_t u, int lanes) FS_LAMBDA {
      vf columns[Cell::kColumns], saved[Cell::kSaved], h = load_vector<vf>(h_of(c, n) + u);
      saved[1] = load_vector<vf>(pre + u);
      columns[2] = load_vector<vf>(pre + 2 * H + u) + load_vector<vf>(hidden + u);
      Cell::candidate(columns, h, saved);
      store_state(c, n, t, u, h, lanes);
      if (d.keep) store(at_.saved(c, n, t) + 3 * H + u, saved[3], lanes);
    });
  }

  // The parts that a readout, or what stands in its place, reads.
  void set_read_operands(int64_t t) const {
    const int last = d.cells - 1;
    ReadPart parts[kMaxParts];
    read_parts(d, parts);
    int part = 0;
    auto masked = [&](int64_t n, const T* from) {
      if (!d.read_mask) return from;
      T* to = buf_.parts + n * d.r_pitch + parts[part].at;
      scaled(from, static_cast<const T*>(d.read_mask) + at_.token(n, t) * d.r_pitch + parts[part].at, to, parts[part].width);
      return static_cast<const T*>(to);
    };
    auto add = [&](auto&& from) { set_operand(part, [&](int64_t n) { return masked(n, from(n)); }), ++part; };
    if (d.r_state >= 0) add([&](int64_t n) { return at_.state(last, n, t + 1); });
    if (d.r_previous >= 0) add([&](int64_t n) { return at_.state(last, n, t); });
    if (d.r_context >= 0) add([&](int64_t n) { return at_.context(n, t); });
    if (d.search && d.search->r_input >= 0 && !d.read_input) add([&](int64_t n) { return embedded(n); });
  }

  // Luong et al. 2015, eq. 5.
  void read(int64_t t) const {
    set_read_operands(t);
    const int64_t width = d.read_rows();
    multiply_rows(buf_.read, buf_.reads, buf_.read_width, t,
                  d.read_input ? starts([&](int64_t n) { return static_cast<const T*>(d.read_input) + input_row(n, t) * width; }) : nullptr);
    for_rows([&](int64_t n, int64_t slot) { finish_read(n, slot, t); });
  }

  void finish_read(int64_t n, int64_t slot, int64_t t) const {
    float* sums = buf_.reads + slot * buf_.read_width;
    const int64_t token = at_.token(n, t), width = d.read_rows();
    if (d.combine == Combine::tanh) {
      for_vectors(width, [&](int64_t u, int) FS_LAMBDA { store(sums + u, SimdMath::tanh(load_vector<vf>(sums + u)), W); });
    }
    if (d.keep && d.read_saved)
      for_vectors(width, [&](int64_t u, int lanes) FS_LAMBDA {
        store(static_cast<T*>(d.read_saved) + token * width + u, load_vector<vf>(sums + u), lanes);
      });
    if (d.combine == Combine::maxout)
      for (int64_t i = 0; i < d.output; ++i) sums[i] = sums[2 * i + larger_of(sums[2 * i], sums[2 * i + 1])];
    const T* mask = d.out_mask ? static_cast<const T*>(d.out_mask) + token * d.output : nullptr;
    scaled(sums, mask, at_.out(n, t), d.output);
  }

  void finish() const {
    for (int c = 0; c < at_.cells; ++c) {
      const DecoderCell& cell = d.of[c];
      for_rows([&](int64_t n, int64_t) {
        for_vectors(at_.H, [&](int64_t u, int lanes) FS_LAMBDA {
          if (cell.h_n) at_.store_carried(cell.h_n, n * at_.H + u, load_vector<vf>(h_of(c, n) + u), lanes);
          if (cell.c_n) at_.store_carried(cell.c_n, n * at_.H + u, load_vector<vf>(c_of(c, n) + u), lanes);
        });
      });
    }
    const int64_t F = d.fed();
    if (d.feed_n)
      for_rows([&](int64_t n, int64_t) {
        for_vectors(F, [&](int64_t u, int lanes) FS_LAMBDA { at_.store_carried(d.feed_n, n * F + u, load(at_.fed(n, d.steps) + u, lanes), lanes); });
      });
  }

  const Decoder& d;
  const Places<T> at_;
  const ForwardBuffers<T>& buf_;
  Range rows_;
  int64_t count_ = 0, *running_;  // of the own rows, those that run
  bool lstm_, exponentials_;
  float* exp_query_;  // this thread's
};

template <class T>
void run(const Decoder& decoder, int threads) {
  const int64_t most = decoder.memory_rows();
  threads = usable_threads(threads < most ? threads : static_cast<int>(most));
  Scratch scratch;
  ForwardBuffers<T>(scratch.measure, decoder, threads);
  Carver carve = scratch.allocate();
  const ForwardBuffers<T> buffers(carve, decoder, threads);
  Barrier barrier;
  parallel(threads, [&](int rank, int size) {
    const Team team{rank, size, &barrier};
    buffers.pack(decoder, team);
    team.sync();
    ForwardLoop<T>(decoder, buffers, team).run();
  });
}

}  // namespace

void decoder_forward(const Decoder& decoder, int threads) {
  dispatch(decoder.dtype, [&](auto element) { run<typename decltype(element)::type>(decoder, threads); });
}

}  // namespace FS_ISA
}  // namespace fastseq
