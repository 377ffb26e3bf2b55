// The loop of an attention decoder on random problems: every buffer is exactly as long as the boundary says, so that ASan sees a
// step outside, and starts as NaN, so that a read of what nothing has written shows. Every instruction set and team agrees with the
// base one, and the base one's gradients with central differences of its own forward pass.
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa.h"
#define FS_ISA base
#include "cpu/scratch.h"
#include "native_test.h"

namespace fastseq {
namespace {

constexpr float kDifference = 1e-2f, kSlopeBudget = 1e-2f;  // in fp32 a difference quotient errs by about 1e-7 / kDifference and its square
constexpr int kTeams[] = {1, 2, 3};

float widened(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

// A tensor in the dtype under test.
struct Tensor {
  bool bf16 = false;
  std::vector<float> f;
  std::vector<uint16_t> h;

  void* data() { return f.empty() && h.empty() ? nullptr : bf16 ? static_cast<void*>(h.data()) : f.data(); }
  size_t size() const { return bf16 ? h.size() : f.size(); }
  float at(size_t i) const { return bf16 ? widened(h[i]) : f[i]; }
  void set(size_t i, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bf16 ? void(h[i] = static_cast<uint16_t>(bits >> 16)) : void(f[i] = x);
  }
};

struct Run {
  Decoder d{};
  std::mt19937 draw;
  bool bf16;
  int threads = 1;
  bool shared = false;
  std::vector<uint8_t> mask;
  Tensor keys, memory, w_q, v, beside, memory_gates, projected, feed0, w_r, b_r, read_input, layer_masks, read_mask, out_mask;
  Tensor w_ih[3], w_hh[3], b_ih[3], b_hh[3], h0[3], c0[3], h_n[3], c_n[3];
  Tensor hs, contexts, outs, weights, gates, queries, read_saved, feed_n;
  std::vector<float> cs, d_keys, d_memory, d_v, d_scores;
  Tensor d_hs[3], d_contexts, d_outs, d_weights, d_feed_n, d_h_n[3], d_c_n[3];
  Tensor d_gates[3], d_h0[3], d_c0[3], d_queries, d_read, d_feed0;

  explicit Run(unsigned seed) : draw(seed) {
    auto pick = [&](int n) { return static_cast<int>(draw() % n); };
    bf16 = pick(3) == 0;
    const int64_t even = bf16 ? 2 : 1;
    d.cell = static_cast<CellKind>(pick(3)), d.dtype = bf16 ? DType::bf16 : DType::f32, d.state_is_f32 = !bf16;
    d.copies = 1 + pick(2), d.rows = d.copies * (1 + pick(9)), d.steps = 1 + pick(4), d.hidden = even * (1 + pick(20));
    d.attend = static_cast<Attend>(pick(4));
    if (d.attend != Attend::none) d.units = even * (1 + pick(20)), d.features = even * (1 + pick(20)), d.source = pick(8), d.additive = pick(2);
    d.cells = d.attend == Attend::between ? 2 : 1 + pick(3);
    d.query_cell = d.attend == Attend::between ? 0 : pick(d.cells);
    d.feed = static_cast<Feed>(pick(d.attend == Attend::none ? 1 : 2) + (pick(2) ? 1 : 0));
    if (d.attend == Attend::none && d.feed == Feed::context) d.feed = Feed::output;
    d.combine = static_cast<Combine>(pick(3));
    d.output = d.feed == Feed::output ? even * (1 + pick(20)) : 0;
    d.keep = true;
    inputs();
    outputs();
  }

  // Small enough that no gate saturates.
  Tensor random(int64_t count, float scale = 0.4f) {
    Tensor t = empty(count);
    std::normal_distribution<float> normal(0, scale);
    for (size_t i = 0; i < t.size(); ++i) t.set(i, normal(draw));
    return t;
  }

  Tensor empty(int64_t count) const {
    Tensor t;
    t.bf16 = bf16;
    bf16 ? t.h.assign(count, 0x7fc0) : t.f.assign(count, std::nanf(""));
    return t;
  }

  Tensor factors(int64_t count) {
    Tensor t = empty(count);
    for (size_t i = 0; i < t.size(); ++i) t.set(i, draw() % 3 ? 1.5f : 0.f);
    return t;
  }

  void inputs() {
    const int64_t N = d.rows, B = d.memory_rows(), T = d.steps, S = d.source, A = d.units, D = d.features, H = d.hidden, R = d.output;
    const int64_t GH = d.gate_count() * H, F = d.fed(), last = d.cells - 1;
    const bool attends = d.attend != Attend::none, drops = draw() % 2;
    d.keys = (keys = random(B * S * A)).data(), d.memory = (memory = random(B * S * D)).data();
    if (draw() % 2) {
      mask.resize(B * S);
      for (uint8_t& m : mask) m = draw() % 4 != 0;
      d.mask = reinterpret_cast<const bool*>(mask.data());
    }
    if (attends && (A != H || d.additive)) d.w_q = (w_q = random(A * H)).data();
    if (d.additive) d.v = (v = random(A)).data();
    if (d.additive && keys.size() && draw() % 2) keys.set(draw() % keys.size(), 60.f);  // past kMostExponent: that row goes another way
    for (int c = 0; c < d.cells; ++c) {
      DecoderCell& cell = d.of[c];
      cell.feed = c == 0 && d.feed != Feed::none, cell.below = c > 0 && d.attend != Attend::between;
      cell.context = d.attend == Attend::between ? c == 1 : attends && (d.attend == Attend::before ? draw() % 2 : c > d.query_cell);
      const int64_t width = (cell.feed ? F : 0) + (cell.below ? H : 0) + (cell.context ? D : 0);
      cell.pitch_ih = width, cell.w_ih = (w_ih[c] = random(GH * width)).data(), cell.w_hh = (w_hh[c] = random(GH * H)).data();
      cell.b_ih = (b_ih[c] = random(GH)).data(), cell.b_hh = (b_hh[c] = random(GH)).data();
      if (c == 0 || d.attend != Attend::between) cell.h0 = (h0[c] = random(N * H)).data(), cell.c0 = (c0[c] = random(N * H)).data();
    }
    d.projected = (projected = random(N * T * GH)).data(), d.projected_pitch = GH;
    if (!attends && d.cell == CellKind::gru) d.beside = (beside = random(N * GH)).data();
    if (d.feed != Feed::none) d.feed0 = (feed0 = random(N * F)).data();
    if (drops && d.cells > 1 && d.attend != Attend::between) d.layer_masks = (layer_masks = factors(last * N * T * H)).data();
    d.r_state = d.r_previous = d.r_context = -1;
    if (!R) return;
    const int64_t rows = d.read_rows();
    for (int64_t* part : {&d.r_state, &d.r_previous, &d.r_context}) {
      if (part == &d.r_context && !attends) continue;
      if (part != &d.r_state && draw() % 2) continue;
      *part = d.r_pitch, d.r_pitch += part == &d.r_context ? D : H;
    }
    d.w_r = (w_r = random(rows * d.r_pitch)).data(), d.b_r = (b_r = random(rows)).data();
    if (draw() % 2) d.read_input = (read_input = random(N * T * rows)).data();
    if (drops) d.read_mask = (read_mask = factors(N * T * d.r_pitch)).data(), d.out_mask = (out_mask = factors(N * T * R)).data();
  }

  void outputs() {
    const int64_t N = d.rows, B = d.memory_rows(), T = d.steps, S = d.source, A = d.units, D = d.features, H = d.hidden, R = d.output;
    const int64_t C = d.cells, F = d.fed(), rows = d.read_rows();
    const bool lstm = d.cell == CellKind::lstm, between = d.attend == Attend::between, attends = d.attend != Attend::none;
    d.hs = (hs = empty(C * N * (T + 1) * H)).data(), d.outs = (outs = empty(N * (T + 1) * R)).data();
    d.contexts = (contexts = empty(N * (T + (d.feed == Feed::context ? 1 : 0)) * D)).data();
    d.weights = (weights = empty(N * T * S)).data(), d.gates = (gates = empty(C * N * T * 4 * H)).data();
    if (d.w_q) d.queries = (queries = empty(N * T * A)).data();
    if (R && (d.out_mask || d.combine == Combine::maxout)) d.read_saved = (read_saved = empty(N * T * rows)).data();
    if (lstm) cs.assign(C * N * T * H, std::nanf("")), d.cs = cs.data();
    if (F) d.feed_n = (feed_n = empty(N * F)).data();
    d_keys.assign(d.additive ? B * S * A : 0, std::nanf("")), d_scores.assign(attends && !d.additive ? N * T * S : 0, std::nanf(""));
    d_memory.assign(B * S * D, std::nanf("")), d_v.assign(d.additive ? A : 0, std::nanf(""));
    d.d_keys = d_keys.data(), d.d_scores = d_scores.data(), d.d_memory = d_memory.data(), d.d_v = d_v.data();
    d.d_contexts = (d_contexts = random(N * T * D)).data(), d.d_outs = (d_outs = random(N * T * R)).data();
    d.d_weights = (d_weights = random(N * T * S)).data(), d.d_feed_n = (d_feed_n = random(N * F)).data();
    d.d_queries = (d_queries = empty(d.w_q ? N * T * A : 0)).data(), d.d_read = (d_read = empty(N * T * rows)).data();
    d.d_feed0 = (d_feed0 = empty(N * F)).data();
    for (int c = 0; c < C; ++c) {
      DecoderCell& cell = d.of[c];
      const bool ends = !between || c == 1, starts = !between || c == 0;
      if (ends) cell.h_n = (h_n[c] = empty(N * H)).data(), cell.d_h_n = (d_h_n[c] = random(N * H)).data();
      if (ends && lstm) cell.c_n = (c_n[c] = empty(N * H)).data(), cell.d_c_n = (d_c_n[c] = random(N * H)).data();
      cell.d_hs = (d_hs[c] = random(N * T * H)).data(), cell.d_hs_row = T * H, cell.d_hs_step = H;
      cell.d_gates = (d_gates[c] = empty(N * T * d.columns() * H)).data();
      if (starts) cell.d_h0 = (d_h0[c] = empty(N * H)).data();
      if (starts && lstm) cell.d_c0 = (d_c0[c] = empty(N * H)).data();
    }
  }

  // The one cell that reads the context; -1 where there is none, or several, or `memory_gates` does not apply.
  int reader() const {
    int found = -1, count = 0;
    for (int c = 0; c < d.cells; ++c)
      if (d.of[c].context) found = c, ++count;
    return count == 1 && !bf16 && d.attend != Attend::after && d.source ? found : -1;
  }

  void fill_memory_gates() {
    const DecoderCell& cell = d.of[reader()];
    const int64_t GH = d.gate_count() * d.hidden, D = d.features, positions = d.memory_rows() * d.source;
    d.memory_gates = (memory_gates = empty(positions * GH)).data();
    for (int64_t s = 0; s < positions; ++s)
      for (int64_t o = 0; o < GH; ++o) {
        float sum = 0;
        for (int64_t i = 0; i < D; ++i) sum += memory.at(s * D + i) * w_ih[reader()].at(o * cell.pitch_ih + cell.pitch_ih - D + i);
        memory_gates.set(s * GH + o, sum);
      }
  }

  // What backward makes lies where forward kept what it is made from, and the projection where gates will be saved.
  void share() {
    shared = true;
    d.projected = d.gates, d.projected_pitch = 4 * d.hidden;
    if (d.w_q && d.additive) d.d_queries = d.queries;
    if (d.read_saved) d.d_read = d.read_saved;
    for (int c = 0; c < d.cells && d.columns() == 4; ++c)
      d.of[c].d_gates = static_cast<char*>(d.gates) + c * d.rows * d.steps * 4 * d.hidden * (bf16 ? 2 : 4);
  }

  void forward() {
    const int64_t GH = d.gate_count() * d.hidden;
    for (int64_t i = 0; shared && i < d.rows * d.steps * GH; ++i) gates.set(i / GH * 4 * d.hidden + i % GH, projected.at(i));
    kernels(d.dtype).decoder_forward(d, threads);
  }

  void backward() {
    kernels(d.dtype).decoder_backward(d, threads);
    if (!shared) return;
    if (d.w_q && d.additive) d_queries = queries;
    if (d.read_saved) d_read = read_saved;
    for (int c = 0; c < d.cells && d.columns() == 4; ++c)
      for (size_t i = 0; i < d_gates[c].size(); ++i) d_gates[c].set(i, gates.at(c * d_gates[c].size() + i));
  }

  std::string name(unsigned seed) const {
    return "decoder " + std::to_string(seed) + ": cell " + std::to_string(static_cast<int>(d.cell)) + (bf16 ? " bf16" : " fp32") + ", attend " +
           std::to_string(static_cast<int>(d.attend)) + ", feed " + std::to_string(static_cast<int>(d.feed));
  }

  // What a caller gets to see.
  std::vector<float> results() const {
    std::vector<float> all;
    auto add = [&](const Tensor& t) {
      for (size_t i = 0; i < t.size(); ++i) all.push_back(t.at(i));
    };
    for (const Tensor* t : {&hs, &contexts, &outs, &weights, &feed_n, &d_queries, &d_read, &d_feed0}) add(*t);
    for (int c = 0; c < d.cells; ++c)
      for (const Tensor* t : {&h_n[c], &c_n[c], &d_gates[c], &d_h0[c], &d_c0[c]}) add(*t);
    for (const auto* t : {&d_keys, &d_memory, &d_v, &d_scores}) all.insert(all.end(), t->begin(), t->end());
    return all;
  }

  double loss() {
    forward();
    double sum = 0;
    const int64_t T = d.steps, H = d.hidden;
    // Rows of T * width, of which `before` more elements precede each of t's.
    auto add = [&](const Tensor& t, const Tensor& g, int64_t before = 0, int64_t width = 1) {
      for (int64_t i = 0; i < static_cast<int64_t>(g.size()); ++i)
        sum += static_cast<double>(t.at(i + (i / (T * width) + 1) * before)) * g.at(i);
    };
    add(contexts, d_contexts, d.feed == Feed::context ? d.features : 0, d.features), add(outs, d_outs, d.output, d.output);
    add(weights, d_weights), add(feed_n, d_feed_n);
    for (int c = 0; c < d.cells; ++c) {
      if (h_n[c].size()) add(h_n[c], d_h_n[c]);
      if (c_n[c].size()) add(c_n[c], d_c_n[c]);
      for (int64_t n = 0; n < d.rows; ++n)
        for (int64_t i = 0; i < T * H; ++i)
          sum += static_cast<double>(hs.at(((c * d.rows + n) * (T + 1) + 1) * H + i)) * d_hs[c].at(n * T * H + i);
    }
    return sum;
  }

  // A few elements of `input` against `gradient(i)`.
  template <class F>
  void slopes(Tensor& input, F&& gradient, const std::string& what) {
    for (int k = 0; k < 3 && input.size(); ++k) {
      const size_t i = draw() % input.size();
      const float x = input.at(i);
      input.set(i, x + kDifference);
      const double up = loss();
      input.set(i, x - kDifference);
      const double slope = (up - loss()) / (2 * static_cast<double>(kDifference)), got = gradient(i);
      input.set(i, x);
      expect(std::abs(got - slope) <= static_cast<double>(kSlopeBudget) * (1 + std::abs(slope)),
             what + "[" + std::to_string(i) + "] is " + std::to_string(got) + ", its difference quotient " + std::to_string(slope));
    }
  }

  // Of the dot form: a position's d_scores times the queries.
  float d_key(int64_t i) const {
    const int64_t T = d.steps, S = d.source, A = d.units, b = i / (S * A), s = i / A % S, u = i % A;
    float sum = 0;
    for (int64_t n = b * d.copies; n < (b + 1) * d.copies; ++n)
      for (int64_t t = 0; t < T; ++t) {
        const int64_t asked = (d.query_cell * d.rows + n) * (T + 1) + t + (d.attend == Attend::before ? 0 : 1);
        sum += d_scores[(n * T + t) * S + s] * (d.w_q ? queries.at((n * T + t) * A + u) : hs.at(asked * d.hidden + u));
      }
    return sum;
  }

  void check_slopes(const std::string& context) {
    backward();
    const int64_t H = d.hidden, G = d.gate_count(), columns = d.columns();
    slopes(projected, [&](size_t i) {
      const int64_t token = static_cast<int64_t>(i) / (G * H), gate = static_cast<int64_t>(i) / H % G, u = static_cast<int64_t>(i) % H;
      return d_gates[0].at((token * columns + (d.cell == CellKind::gru && gate == 2 ? 3 : gate)) * H + u);
    }, context + " projected");
    slopes(keys, [&](size_t i) { return d.additive ? d_keys[i] : d_key(static_cast<int64_t>(i)); }, context + " keys");
    slopes(memory, [&](size_t i) { return d_memory[i]; }, context + " memory");
    slopes(v, [&](size_t i) { return d_v[i]; }, context + " v");
    slopes(feed0, [&](size_t i) { return d_feed0.at(i); }, context + " feed0");
    for (int c = 0; c < d.cells; ++c) {
      slopes(h0[c], [&](size_t i) { return d_h0[c].at(i); }, context + " h0");
      if (d.cell == CellKind::lstm) slopes(c0[c], [&](size_t i) { return d_c0[c].at(i); }, context + " c0");
    }
  }
};

// The same decoder, choosing its tokens itself: greedily, or by two beams.
struct Searching : Run {
  Search s{};
  int wrong = 0;
  Tensor embedding, w_out, b_out, context, table, read_table;
  std::vector<int64_t> prefix, tokens, trail, lengths;
  std::vector<float> norms, scores;

  explicit Searching(unsigned seed) : Run(seed) {
    auto pick = [&](int n) { return static_cast<int>(draw() % n); };
    const int64_t even = bf16 ? 2 : 1, B = d.memory_rows(), most = 2 + pick(6);
    d.keep = false, d.layer_masks = d.read_mask = d.out_mask = d.read_input = d.memory_gates = nullptr;
    s.forced = 1 + pick(3), s.vocabulary = 3 + pick(60), s.inputs = even * (1 + pick(9)), s.returned = 1 + pick(static_cast<int>(d.copies));
    s.fewest = pick(3), s.eos = pick(3), s.stopping = static_cast<Stopping>(pick(3)), s.rewards_length = true, s.wrong = &wrong;
    d.steps = s.forced - 1 + most;
    if (d.attend == Attend::none) d.features = even * (1 + pick(20)), s.context = (context = random(B * d.features)).data();
    if (d.attend == Attend::none) d.of[0].context = pick(2);
    read(pick(2), pick(2));
    weights_of_input(pick(2));
    for (int64_t i = 0; i < B * s.forced; ++i) prefix.push_back(pick(static_cast<int>(s.vocabulary)));
    for (int64_t i = 0; i <= most; ++i) norms.push_back(static_cast<float>(i));
    s.prefix = prefix.data(), s.norms = norms.data(), d.search = &s;
    results_of_search(B);
  }

  // Where nothing fed is read out, with or without a product; parts anew in any case, for the input may be one.
  void read(bool reads, bool input) {
    const int64_t even = bf16 ? 2 : 1;
    if (!d.output && reads) d.output = even * (1 + static_cast<int64_t>(draw() % 20));
    d.r_state = 0, d.r_previous = draw() % 2 ? d.hidden : -1, d.r_pitch = d.hidden * (d.r_previous < 0 ? 1 : 2);
    d.r_context = d.r_pitch, d.r_pitch += d.features;
    s.r_input = input ? d.r_pitch : -1, d.r_pitch += input ? s.inputs : 0;
    if (d.output) d.w_r = (w_r = random(d.read_rows() * d.r_pitch, 1.f)).data(), d.b_r = (b_r = random(d.read_rows())).data();
    s.w_out = (w_out = random(s.vocabulary * (d.output ? d.output : d.r_pitch), 2.f)).data(), s.b_out = (b_out = random(s.vocabulary)).data();
  }

  void weights_of_input(bool tables) {
    const int64_t GH = d.gate_count() * d.hidden, V = s.vocabulary;
    DecoderCell& cell = d.of[0];
    const int64_t width = s.inputs + (cell.feed ? d.fed() : 0) + (cell.context ? d.features : 0);
    w_ih[0] = random(GH * width), cell.pitch_ih = width;
    cell.w_ih = bf16 ? static_cast<void*>(w_ih[0].h.data() + s.inputs) : w_ih[0].f.data() + s.inputs;
    if (d.feed == Feed::output) d.feed0 = (feed0 = random(d.rows * d.fed())).data();
    s.embedding = (embedding = random(V * s.inputs, 1.f)).data();
    d.projected = tables ? (table = random(V * GH)).data() : nullptr, d.projected_pitch = GH;
    d.read_input = tables && d.output && s.r_input >= 0 ? (read_table = random(V * d.read_rows())).data() : nullptr;
  }

  void results_of_search(int64_t B) {
    const int64_t N = d.rows, T = d.steps, R = s.returned;
    d.hs = (hs = empty(d.cells * N * 2 * d.hidden)).data(), d.contexts = (contexts = empty(N * 2 * d.features)).data();
    d.outs = (outs = empty(N * 2 * d.output)).data(), d.weights = (weights = empty(N * T * d.source)).data();
    d.feed_n = nullptr;
    tokens.assign(B * R * T, -1), trail.assign(B * R * T, -1), lengths.assign(B * R, -1), scores.assign(B * R, std::nanf(""));
    s.tokens = tokens.data(), s.trail = trail.data(), s.lengths = lengths.data(), s.scores = scores.data();
  }

  // Scores and lengths, and the tokens within these.
  std::vector<float> found() const {
    std::vector<float> all(scores);
    for (size_t i = 0; i < lengths.size(); ++i) {
      all.push_back(static_cast<float>(lengths[i]));
      for (int64_t t = 0; t < lengths[i]; ++t) {
        all.push_back(static_cast<float>(tokens[i * d.steps + t]));
        const int64_t row = trail[i * d.steps + t], token = tokens[i * d.steps + t];
        expect(row >= 0 && row < d.copies && token >= 0 && token < s.vocabulary, "a search's token or row is none");
      }
    }
    return all;
  }
};

void compare(const std::vector<float>& wanted, const std::vector<float>& got, float budget, const std::string& context) {
  expect(wanted.size() == got.size(), context + ": another number of results");
  for (size_t i = 0; i < wanted.size(); ++i)
    if (!(std::abs(wanted[i] - got[i]) <= budget * (1 + std::abs(wanted[i]))))
      fail(context + ": result " + std::to_string(i) + " is " + std::to_string(got[i]) + ", not " + std::to_string(wanted[i]));
}

}  // namespace

void check_decoder() {
  for (unsigned seed = 0; seed < 60; ++seed) {
    choose_isa("base");
    Run first(seed);
    first.forward(), first.backward();
    const std::string context = first.name(seed);
    const std::vector<float> wanted = first.results();
    for (const char* isa : available_isas()) {
      choose_isa(isa);
      for (int threads : kTeams) {
        Run other(seed);
        other.threads = threads;
        if (seed % 3) other.share();
        other.forward(), poison_scratch(), other.backward(), poison_scratch();
        if (other.reader() >= 0 && seed % 2) other.fill_memory_gates(), other.forward(), poison_scratch();
        compare(wanted, other.results(), other.bf16 ? 5e-2f : 1e-4f, context + " on " + isa + ", " + std::to_string(threads) + " threads");
      }
    }
    choose_isa("base");
    if (!first.bf16) first.check_slopes(context);
  }
}

void check_search() {
  for (unsigned seed = 0; seed < 60; ++seed) {
    choose_isa("base");
    Searching first(seed);
    first.forward();
    expect(first.wrong == 0, first.name(seed) + ": a search met NaN");
    const std::vector<float> wanted = first.found();
    for (const char* isa : available_isas()) {
      choose_isa(isa);
      for (int threads : kTeams) {
        Searching other(seed);
        other.threads = threads;
        other.forward(), poison_scratch();
        const std::string context = "search, " + first.name(seed) + " on " + isa + ", " + std::to_string(threads) + " threads";
        const std::vector<float> got = other.found();
        if (!first.bf16) compare(wanted, got, 1e-4f, context);  // in bf16 a rounding may tip a choice
        for (const float score : other.scores) expect(score <= 0, context + ": a log-probability above 0");
      }
    }
  }
}

}  // namespace fastseq
