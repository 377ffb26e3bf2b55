// Runs the native core alone, without Python, under ASan and UBSan: random problems on every ISA variant and team size.
//
// Every operand is a heap block of exactly its size. What must not be read holds NaN, what must not be written keeps it.
// Every variant and team size must agree with the baseline on one thread; pytest compares the values with an oracle.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/sequence.h"
#include "native_buffer.h"
#include "native_test.h"

namespace fastseq {
namespace {

constexpr int kProblems = 48;
constexpr int kTeams[] = {1, 2, 5};

int64_t pick(Random& random, std::vector<int64_t> from) { return from[random() % from.size()]; }
bool coin(Random& random) { return random() % 2; }

struct Problem {
  Shape shape;
  int64_t steps, rows;
  int directions;
  enum { full, lengths, packed } kind;
  std::vector<int64_t> sizes;  // lengths [rows] or batch sizes [steps]
  bool bias, initial, batch_major, wants_all;
  int64_t gap;  // unused elements between the rows of a sequence tensor
  bool resets;  // unless packed
  bool noise;
  unsigned seed;

  explicit Problem(unsigned seed) : seed(seed) {
    Random random(seed);
    const bool half = coin(random);
    shape = {coin(random) ? CellKind::lstm : CellKind::gru, half ? DType::bf16 : DType::f32, half && coin(random),
             pick(random, {1, 5, 16, 33}), pick(random, {1, 7, 16, 35})};
    steps = pick(random, {0, 1, 2, 9, 20}), rows = pick(random, {0, 1, 2, 5, 13, 40});
    if (rows <= 2 && coin(random)) shape.hidden = 130, steps = pick(random, {steps, 70});  // threads split the units
    if (rows == 1 && coin(random)) shape.hidden = 197, shape.input = pick(random, {shape.input, 201});  // weights read in place
    directions = 1 + coin(random);
    kind = static_cast<decltype(kind)>(random() % (rows ? 3 : 2));
    if (kind == lengths)
      for (int64_t r = 0; r < rows; ++r) sizes.push_back(random() % (steps + 1));
    if (kind == packed)
      for (int64_t t = 0, last = rows; t < steps; ++t) sizes.push_back(last = t == 0 ? rows : 1 + random() % last);
    bias = coin(random), initial = coin(random), batch_major = coin(random), wants_all = coin(random);
    gap = random() % 4;
    resets = kind != packed && coin(random), noise = coin(random);
  }

  SequencePlan plan() const {
    return kind == packed ? SequencePlan::packed(steps, rows, sizes.data())
                          : SequencePlan::padded(steps, rows, kind == lengths ? sizes.data() : nullptr);
  }

  std::string name() const {
    return "problem " + std::to_string(seed) + (shape.cell == CellKind::lstm ? " lstm" : " gru") +
           (shape.dtype == DType::f32 ? " f32" : " bf16") + " T=" + std::to_string(steps) + " B=" + std::to_string(rows) +
           " I=" + std::to_string(shape.input) + " H=" + std::to_string(shape.hidden) + " directions=" +
           std::to_string(directions) + " kind=" + std::to_string(kind) + (resets ? " resets" : "") + (noise ? " noise" : "");
  }
};

// A tensor with one row of features per active token, and NaN everywhere else.
struct SequenceTensor {
  int64_t features, step, row;
  Buffer buffer;

  SequenceTensor(const Problem& p, const Sequence& s, int64_t features)
      : features(features),
        step(p.kind == Problem::packed ? 0 : (p.batch_major ? features + p.gap : p.rows * (features + p.gap))),
        row(p.kind != Problem::packed && p.batch_major ? p.steps * step : features + p.gap),
        buffer(p.shape.dtype, extent(p, s)) {}

  int64_t extent(const Problem& p, const Sequence& s) const {  // the last row ends with its features, not its gap
    const int64_t rows = p.kind == Problem::packed ? s.tokens() : p.steps * p.rows;
    return rows ? rows * (features + p.gap) - p.gap : 0;
  }

  int64_t index(const Sequence& s, int64_t t, int64_t position) const {
    return s.packed ? (s.offsets[t] + position) * row : t * step + s.order[position] * row;
  }

  template <class F>
  void each_active(const Sequence& s, F&& f) {
    for (int64_t t = 0; t < s.steps; ++t)
      for (int64_t position = 0; position < s.active(t); ++position)
        for (int64_t i = 0; i < features; ++i) f(index(s, t, position) + i);
  }

  SequenceTensor& fill(Random& random, const Sequence& s) {
    std::uniform_real_distribution<float> draw(-1, 1);
    each_active(s, [&](int64_t i) { buffer.set(i, draw(random)); });
    return *this;
  }

  View view(int64_t offset_elements, DType dtype) {
    return {static_cast<char*>(buffer.data()) + offset_elements * (dtype == DType::f32 ? 4 : 2), step, row};
  }
};

class Results {
 public:
  // Only what the core had to write is finite, and all of that.
  void add(SequenceTensor& tensor, const Sequence& s, const std::string& name) {
    int64_t finite = 0, active = 0;
    each(tensor.buffer, [&](float value) { finite += std::isfinite(value); });
    tensor.each_active(s, [&](int64_t i) { active += std::isfinite(tensor.buffer.get(i)); });
    expect(active == s.tokens() * tensor.features, name + ": a token was not written, or is not finite");
    expect(finite == active, name + ": something was written beside the tokens");
    keep(tensor.buffer, name);
  }

  void add(const Buffer& buffer, const std::string& name) {
    each(buffer, [&](float value) { expect(std::isfinite(value), name + ": an element was not written, or is not finite"); });
    keep(buffer, name);
  }

  void compare(const Results& other, float tolerance, const std::string& context) const {
    for (size_t b = 0; b < values_.size(); ++b) {
      float largest = 1e-3f;
      for (float v : values_[b])
        if (std::fabs(v) > largest) largest = std::fabs(v);
      for (size_t i = 0; i < values_[b].size(); ++i) {
        const float a = values_[b][i], e = other.values_[b][i];
        if (std::isnan(a) && std::isnan(e)) continue;
        expect(std::fabs(a - e) <= tolerance * largest, context + ": " + names_[b] + "[" + std::to_string(i) + "] is " +
                                                            std::to_string(e) + ", the baseline has " + std::to_string(a));
      }
    }
  }

 private:
  template <class F>
  static void each(const Buffer& buffer, F&& f) {
    for (int64_t i = 0; i < buffer.count(); ++i) f(buffer.get(i));
  }

  void keep(const Buffer& buffer, const std::string& name) {
    names_.push_back(name), values_.emplace_back();
    each(buffer, [&](float value) { values_.back().push_back(value); });
  }

  std::vector<std::string> names_;
  std::vector<std::vector<float>> values_;
};

// Operands and results of one direction.
struct Side {
  Buffer w_ih, w_hh, b_ih, b_hh, h0, c0, h_n, c_n, gates, cells, d_h_n, d_c_n, d_h0, d_c0, d_w_ih, d_w_hh, d_b_ih, d_b_hh;
  std::vector<char> packed;  // a heap block of exactly its size too

  Side(const Problem& p, int64_t tokens, int64_t gates_per_unit, DType state, Random& random)
      : w_ih(p.shape.dtype, gates_per_unit * p.shape.hidden * p.shape.input),
        w_hh(p.shape.dtype, gates_per_unit * p.shape.hidden * p.shape.hidden),
        b_ih(p.shape.dtype, gates_per_unit * p.shape.hidden),
        b_hh(b_ih), h0(state, p.rows * p.shape.hidden), c0(h0), h_n(h0), c_n(h0),
        gates(p.shape.dtype, tokens * 4 * p.shape.hidden),
        cells(DType::f32, tokens * p.shape.hidden),
        d_h_n(h0), d_c_n(h0), d_h0(h0), d_c0(h0), d_w_ih(w_ih), d_w_hh(w_hh), d_b_ih(b_ih), d_b_hh(b_ih) {
    const float scale = 1 / std::sqrt(static_cast<float>(p.shape.hidden));
    for (Buffer* b : {&w_ih, &w_hh, &b_ih, &b_hh}) b->fill(random, scale);
    for (Buffer* b : {&h0, &c0, &d_h_n, &d_c_n}) b->fill(random, 1);
  }
};

class Run {
 public:
  Run(const Problem& p, int threads)
      : p_(p), plan_(p.plan()), s_(plan_.view()), threads_(threads), random_(p.seed), lstm_(p.shape.cell == CellKind::lstm),
        x_(p, s_, p.shape.input), out_(p, s_, p.directions * p.shape.hidden), d_out_(out_), d_x_(x_) {
    const DType state = p.shape.state_is_f32 ? DType::f32 : p.shape.dtype;
    for (int d = 0; d < p.directions; ++d) sides_.emplace_back(p, s_.tokens(), lstm_ ? 4 : 3, state, random_);
    x_.fill(random_, s_), d_out_.fill(random_, s_);
    const int64_t tokens = p.kind == Problem::packed ? s_.tokens() : p.steps * p.rows;
    for (int d = 0; d < p.directions; ++d) masked_.emplace_back(p.shape.dtype, tokens, p.rows, p.shape.hidden, random_);
    if (!p.resets) return;
    resets_.reset(new bool[p.steps * p.rows]);
    for (int64_t i = 0; i < p.steps * p.rows; ++i) resets_[i] = random_() % 3 == 0;
    s_.resets = resets_.get(), s_.reset_step = p.batch_major ? 1 : p.rows, s_.reset_row = p.batch_major ? p.steps : 1;
  }

  Results go() {
    forward(true);
    backward();
    Results results;
    results.add(out_, s_, "out");
    if (p_.wants_all) results.add(d_x_, s_, "d_x");
    for (Side& side : sides_) {
      results.add(side.h_n, "h_n"), results.add(side.d_w_ih, "d_w_ih"), results.add(side.d_w_hh, "d_w_hh");
      if (lstm_) results.add(side.c_n, "c_n");
      if (p_.bias) results.add(side.d_b_ih, "d_b_ih"), results.add(side.d_b_hh, "d_b_hh");
      if (p_.wants_all) results.add(side.d_h0, "d_h0");
      if (p_.wants_all && lstm_) results.add(side.d_c0, "d_c0");
    }
    forward(false);
    results.add(out_, s_, "out of inference");
    pack();
    forward(false);
    results.add(out_, s_, "out of packed weights");
    return results;
  }

 private:
  Direction direction(int d) {
    Side& side = sides_[d];
    return {d == 1,
            side.w_ih.data(),
            side.w_hh.data(),
            p_.bias ? side.b_ih.data() : nullptr,
            p_.bias ? side.b_hh.data() : nullptr,
            p_.initial ? side.h0.data() : nullptr,
            p_.initial && lstm_ ? side.c0.data() : nullptr,
            side.packed.empty() ? nullptr : side.packed.data()};
  }

  // From here on no call reads w_ih and w_hh but the steps that prefer them.
  void pack() {
    const Kernels& of = kernels(p_.shape.dtype);
    for (size_t d = 0; d < sides_.size(); ++d) {
      std::vector<char> packed(of.packed_bytes(p_.shape));
      of.pack(p_.shape, direction(static_cast<int>(d)), packed.data(), threads_);
      sides_[d].packed = std::move(packed);
    }
  }

  Noise noise(int d) { return p_.noise ? masked_[d].noise(p_.kind == Problem::packed, lstm_) : Noise{}; }

  View half(SequenceTensor& tensor, int d) { return tensor.view(d * p_.shape.hidden, p_.shape.dtype); }

  void forward(bool training) {
    std::vector<ForwardPass> passes;
    for (int d = 0; d < p_.directions; ++d) {
      Side& side = sides_[d];
      passes.push_back({direction(d), x_.view(0, p_.shape.dtype), half(out_, d), side.h_n.data(),
                        lstm_ ? side.c_n.data() : nullptr, training ? side.gates.data() : nullptr,
                        training && lstm_ ? static_cast<float*>(side.cells.data()) : nullptr, View{}, noise(d)});
    }
    kernels(p_.shape.dtype).forward(p_.shape, s_, passes.data(), p_.directions, threads_);
  }

  void backward() {
    const bool all = p_.wants_all;
    const View none{nullptr, 0, 0};
    std::vector<BackwardPass> passes;
    for (int d = 0; d < p_.directions; ++d) {
      Side& side = sides_[d];
      auto state = [&](Buffer& buffer, bool wanted) { return wanted ? buffer.data() : nullptr; };
      passes.push_back({direction(d), x_.view(0, p_.shape.dtype), half(out_, d), half(d_out_, d),
                        all ? d_x_.view(0, p_.shape.dtype) : none, d > 0, state(side.d_h_n, all),
                        state(side.d_c_n, all && lstm_), side.gates.data(),
                        lstm_ ? static_cast<const float*>(side.cells.data()) : nullptr, state(side.d_h0, all),
                        state(side.d_c0, all && lstm_), side.d_w_ih.data(), side.d_w_hh.data(), state(side.d_b_ih, p_.bias),
                        state(side.d_b_hh, p_.bias), View{}, noise(d)});
    }
    kernels(p_.shape.dtype).backward(p_.shape, s_, passes.data(), p_.directions, threads_);
  }

  const Problem& p_;
  SequencePlan plan_;
  Sequence s_;
  int threads_;
  Random random_;
  bool lstm_;
  SequenceTensor x_, out_, d_out_, d_x_;
  std::vector<Side> sides_;
  std::vector<Masked> masked_;
  std::unique_ptr<bool[]> resets_;  // of exactly its size, as every operand
};

template <class F>
void expect_throw(F&& f, const std::string& part) {
  try {
    f();
  } catch (const std::exception& error) {
    expect(std::string(error.what()).find(part) != std::string::npos, "unexpected message: " + std::string(error.what()));
    return;
  }
  fail("nothing was thrown for: " + part);
}

void refuse_bad_input() {
  const int64_t lengths[] = {2, 5}, growing[] = {1, 2}, falling[] = {-1};
  expect_throw([&] { SequencePlan::padded(4, 2, lengths); }, "lengths[1] is 5");
  expect_throw([&] { SequencePlan::packed(2, 2, growing); }, "batch_sizes[1] is 2");
  expect_throw([&] { SequencePlan::packed(1, 2, falling); }, "batch_sizes[0] is -1");
  expect_throw([&] { choose_isa("sse9"); }, "sse9");
}

void agree_on_random_problems() {
  for (unsigned seed = 0; seed < kProblems; ++seed) {
    const Problem problem(seed);
    choose_isa("base");
    const Results baseline = Run(problem, 1).go();
    for (const char* isa : available_isas()) {
      choose_isa(isa);
      for (int threads : kTeams) {
        const std::string context = problem.name() + " on " + isa + ", " + std::to_string(threads) + " threads";
        baseline.compare(Run(problem, threads).go(), problem.shape.dtype == DType::f32 ? 1e-4f : 5e-2f, context);
      }
    }
  }
}

}  // namespace
}  // namespace fastseq

// All checks, or those of the given names; `names` prints the names, longest check first.
int main(int count, char** names) {
  const std::pair<const char*, void (*)()> checks[] = {
      {"recurrence", fastseq::agree_on_random_problems}, {"products", fastseq::check_products},
      {"decoder", fastseq::check_decoder},               {"normalised", fastseq::check_normalised},
      {"attention", fastseq::check_attention},           {"attention_of_sequences", fastseq::check_attention_of_sequences},
      {"search", fastseq::check_search},                 {"cells", fastseq::check_cells},
      {"bad_input", fastseq::refuse_bad_input}};
  if (count == 2 && !std::strcmp(names[1], "names")) {
    for (auto& check : checks) std::puts(check.first);
    return 0;
  }
  for (int i = 1; i < count; ++i)
    fastseq::expect(std::any_of(std::begin(checks), std::end(checks), [&](auto& check) { return !std::strcmp(check.first, names[i]); }),
                    std::string("no check is named ") + names[i]);
  for (auto& [name, check] : checks) {
    if (count > 1 && std::none_of(names + 1, names + count, [&, name = name](char* given) { return !std::strcmp(given, name); })) continue;
    check();
    for (const char* isa : fastseq::available_isas()) std::printf("%s under sanitizers: %s ok\n", name, isa);
  }
}
