// The layer-normalised recurrence under the sanitizers: every ISA variant and team size agrees with the baseline on one thread. Every
// operand is a heap block of exactly its size.
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/sequence.h"
#include "native_buffer.h"
#include "native_test.h"

namespace fastseq {
namespace {

struct Problem {
  Shape shape;
  int64_t steps, rows;
  std::vector<int64_t> lengths;
  bool bias, reverse, resets, noise;
  unsigned seed;

  explicit Problem(unsigned seed) : seed(seed) {
    Random random(seed);
    auto pick = [&](std::vector<int64_t> from) { return from[random() % from.size()]; };
    const bool half = random() % 2;
    shape = {random() % 2 ? CellKind::lstm : CellKind::gru, half ? DType::bf16 : DType::f32, half && random() % 2, 0, pick({1, 2, 7, 16, 35})};
    steps = pick({1, 2, 9, 40}), rows = pick({0, 1, 2, 5, 13, 40});
    if (rows <= 2 && random() % 2) shape.hidden = 130;
    for (int64_t r = 0; r < rows; ++r) lengths.push_back(random() % (steps + 1));
    bias = random() % 2, reverse = random() % 2, resets = random() % 2, noise = random() % 2;
  }

  std::string name() const {
    return "normalised problem " + std::to_string(seed) + (shape.cell == CellKind::lstm ? " lstm" : " gru") + " T=" + std::to_string(steps) +
           " B=" + std::to_string(rows) + " H=" + std::to_string(shape.hidden) + (noise ? " noise" : "");
  }
};

using Results = std::vector<std::vector<float>>;

// What one pair of calls leaves: out, h_n, d_products, d_inputs, d_h0, d_sums, every cell state. Rows end early, so unwritten tokens stay NaN.
Results run(const Problem& p, int threads) {
  Random random(p.seed);
  const SequencePlan plan = SequencePlan::padded(p.steps, p.rows, p.lengths.data());
  Sequence seq = plan.view();
  const bool lstm = p.shape.cell == CellKind::lstm;
  const int64_t H = p.shape.hidden, G = (lstm ? 4 : 3) * H, N = seq.tokens(), all = p.steps * p.rows;
  const DType type = p.shape.dtype, state = p.shape.state_is_f32 ? DType::f32 : type;
  std::unique_ptr<bool[]> resets(new bool[all]);
  for (int64_t i = 0; i < all; ++i) resets[i] = random() % 3 == 0;
  if (p.resets) seq.resets = resets.get(), seq.reset_step = p.rows, seq.reset_row = 1;
  const auto drawn = [&](DType of, int64_t count, float scale) { return Buffer(of, count).fill(random, scale); };
  Buffer w = drawn(type, G * H, 1 / std::sqrt(static_cast<float>(H))), inputs = drawn(type, all * G, 1), d_out = drawn(type, all * H, 1);
  Buffer gain = drawn(type, G, 1), bias = drawn(type, G, 1), gain_x = drawn(type, G, 1), bias_x = drawn(type, G, 1);
  Buffer cell_gain = drawn(type, H, 1), cell_bias = drawn(type, H, 1);
  Buffer h0 = drawn(state, p.rows * H, 1), c0 = drawn(state, p.rows * H, 1), d_h_n = drawn(state, p.rows * H, 1);
  Buffer out(type, all * H), h_n(state, p.rows * H), c_n(h_n), d_h0(h_n), d_c0(h_n), gates(type, N * 4 * H), hats(type, N * G);
  Buffer cells(DType::f32, N * H), stats(DType::f32, N * kNormStats), d_inputs(type, all * G), d_products(type, N * G), before(type, N * H);
  Buffer d_sums(DType::f32, 4 * G + 2 * H);
  Buffer c_out(type, all * H), d_c_out = drawn(type, all * H, 1);
  Masked masked(type, all, p.rows, H, random);
  const auto f32 = [](Buffer& b) { return static_cast<float*>(b.data()); };
  const auto view = [&](Buffer& b, int64_t features) { return View{b.data(), p.rows * features, features}; };
  const NormPass pass{p.reverse, w.data(), gain.data(), p.bias ? bias.data() : nullptr, gain_x.data(), p.bias ? bias_x.data() : nullptr,
                      lstm ? cell_gain.data() : nullptr, lstm ? cell_bias.data() : nullptr, h0.data(), lstm ? c0.data() : nullptr,
                      view(inputs, G), view(out, H), p.noise ? masked.noise(false, lstm) : Noise{}};
  const bool states = p.noise && lstm;
  const NormForwardPass forward{pass, h_n.data(), lstm ? c_n.data() : nullptr, gates.data(), hats.data(), lstm ? f32(cells) : nullptr, f32(stats),
                                states ? view(c_out, H) : View{}};
  kernels(type).norm_forward(p.shape, seq, forward, threads);
  const NormBackwardPass backward{pass, gates.data(), hats.data(), lstm ? f32(cells) : nullptr, f32(stats), view(d_out, H), d_h_n.data(),
                                  nullptr, view(d_inputs, G), d_products.data(), before.data(), d_h0.data(), lstm ? d_c0.data() : nullptr,
                                  f32(d_sums), states ? view(d_c_out, H) : View{}};
  kernels(type).norm_backward(p.shape, seq, backward, threads);
  Results results;
  for (Buffer* b : {&out, &h_n, &d_products, &before, &d_inputs, &d_h0, &d_sums, &c_out}) {
    results.emplace_back();
    for (int64_t i = 0; i < b->count(); ++i) results.back().push_back(b->get(i));
  }
  for (size_t k : {1, 2, 3, 5, 6})
    for (float value : results[k]) expect(std::isfinite(value), p.name() + ": result " + std::to_string(k) + " is not finite");
  return results;
}

void compare(const Results& expected, const Results& found, float tolerance, const std::string& context) {
  for (size_t k = 0; k < expected.size(); ++k) {
    float largest = 1e-3f;
    for (float v : expected[k])
      if (std::fabs(v) > largest) largest = std::fabs(v);
    for (size_t i = 0; i < expected[k].size(); ++i) {
      const float a = expected[k][i], b = found[k][i];
      if (std::isnan(a) && std::isnan(b)) continue;  // a token behind its row's end, in both
      expect(std::fabs(a - b) <= tolerance * largest, context + ": result " + std::to_string(k) + "[" + std::to_string(i) + "] is " +
                                                          std::to_string(b) + ", the baseline has " + std::to_string(a));
    }
  }
}

}  // namespace

void check_normalised() {
  for (unsigned seed = 0; seed < 24; ++seed) {
    const Problem p(seed);
    choose_isa("base");
    const Results expected = run(p, 1);
    for (const char* isa : available_isas())
      for (int threads : {1, 2, 5}) {
        choose_isa(isa);
        // Statistics of one or two numbers divide by next to nothing, as do those of h = 0 where rows begin anew.
        const float tolerance = (p.shape.dtype == DType::f32 ? 1e-2f : 0.2f) * (p.shape.hidden <= 2 ? 10 : 1);
        compare(expected, run(p, threads), tolerance, p.name() + " " + isa + " threads=" + std::to_string(threads));
      }
  }
  choose_isa("");
}

}  // namespace fastseq
