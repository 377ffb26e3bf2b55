// Attention of one decoder row, forward and backward, against plain loops in double precision and their central differences.
// What stands at masked positions is NaN: reading it would show.
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "native_test.h"

#define FS_ISA base
#include "cpu/attention.h"

namespace fastseq {
namespace {

using base::bf16;
using Doubles = std::vector<double>;

constexpr double kDifference = 1e-5;
constexpr double kBudget = 2e-5;  // of sums of at most 70 terms of order 1 in fp32: 70 roundings of 6e-8, and the tanh's and exp's

struct Sizes {
  int64_t source, units, features;
  bool additive;
  int keep;  // every keep-th position is attended to; 0: none

  std::string name() const {
    return "attention S" + std::to_string(source) + " A" + std::to_string(units) + " D" + std::to_string(features) +
           (additive ? " additive" : " dot") + " keep " + std::to_string(keep);
  }
};

double value(float x) { return x; }
double value(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  return base::bits_of<float>(bits);
}
void set(float& x, double v) { x = static_cast<float>(v); }
void set(bf16& x, double v) { x.bits = static_cast<uint16_t>(base::bits_of<uint32_t>(static_cast<float>(v)) >> 16); }

// All inputs in one vector, so that differences can be taken of each: query [A], v [A], keys [S][A], memory [S][D].
struct Plain {
  Sizes s;
  std::vector<int32_t> at;

  int64_t v() const { return s.units; }
  int64_t keys() const { return 2 * s.units; }
  int64_t memory() const { return keys() + s.source * s.units; }
  int64_t size() const { return memory() + s.source * s.features; }

  // weights [count], then context [D]
  Doubles forward(const Doubles& x) const {
    const size_t count = at.size();
    Doubles out(count + s.features);
    double total = 0;
    for (size_t i = 0; i < count; ++i) {
      double score = 0;
      for (int64_t u = 0; u < s.units; ++u) {
        const double key = x[keys() + at[i] * s.units + u];
        score += s.additive ? x[v() + u] * std::tanh(key + x[u]) : key * x[u];
      }
      total += out[i] = std::exp(score);
    }
    for (size_t i = 0; i < count; ++i) {
      out[i] /= total;
      for (int64_t f = 0; f < s.features; ++f) out[count + f] += out[i] * x[memory() + at[i] * s.features + f];
    }
    return out;
  }

  double loss(const Doubles& x, const Doubles& d) const {
    const Doubles out = forward(x);
    double sum = 0;
    for (size_t i = 0; i < out.size(); ++i) sum += out[i] * d[i];
    return sum;
  }
};

void near(double got, double wanted, double scale, const std::string& what) {
  expect(std::abs(got - wanted) <= kBudget * (1 + scale), what + ": " + std::to_string(got) + " for " + std::to_string(wanted));
}

template <class T>
void check(const Sizes& s, std::mt19937& draw) {
  Plain plain{s, {}};
  for (int64_t i = 0; s.keep && i < s.source; i += s.keep) plain.at.push_back(static_cast<int32_t>(i));
  const size_t count = plain.at.size();
  std::normal_distribution<double> normal(0, 0.5);

  Doubles x(plain.size()), d(count + s.features);
  std::vector<T> keys(s.source * s.units), memory(s.source * s.features);
  for (double& e : x) e = normal(draw);
  for (double& e : d) e = normal(draw);
  for (T& e : keys) set(e, std::nan(""));
  for (T& e : memory) set(e, std::nan(""));
  for (const int32_t at : plain.at) {  // as rounded to T
    for (int64_t u = at * s.units; u < (at + 1) * s.units; ++u) set(keys[u], x[plain.keys() + u]), x[plain.keys() + u] = value(keys[u]);
    for (int64_t f = at * s.features; f < (at + 1) * s.features; ++f)
      set(memory[f], x[plain.memory() + f]), x[plain.memory() + f] = value(memory[f]);
  }

  const auto padded = [](int64_t n) { return static_cast<size_t>(base::round_up(n, base::W)); };
  std::vector<float> query(padded(s.units)), v(query.size()), weights(padded(count)), context(padded(s.features));
  for (int64_t u = 0; u < s.units; ++u) query[u] = static_cast<float>(x[u]), v[u] = static_cast<float>(x[plain.v() + u]);
  const base::MemoryRow<T> row{keys.data(), memory.data(), s.units, s.features, plain.at.data(), static_cast<int64_t>(count)};
  base::score(row, s.additive, query.data(), v.data(), weights.data());
  base::softmax(weights.data(), row.count);
  base::context_row(row, weights.data(), context.data());
  const Doubles wanted = plain.forward(x);
  for (size_t i = 0; i < count; ++i) near(weights[i], wanted[i], 0, s.name() + " weight");
  for (int64_t f = 0; f < s.features; ++f) near(context[f], wanted[count + f], 1, s.name() + " context");

  std::vector<float> d_context(context.size()), d_weights(weights.size()), d_query(query.size()), d_v(v.size()),
      d_keys(keys.size()), d_memory(memory.size());
  for (size_t i = 0; i < count; ++i) d_weights[i] = static_cast<float>(d[i]);
  for (int64_t f = 0; f < s.features; ++f) d_context[f] = static_cast<float>(d[count + f]);
  const base::MemoryGradients into{d_keys.data(), d_memory.data(), d_v.data()};
  base::weights_backward(row, weights.data(), d_context.data(), d_weights.data(), into);
  if (s.additive) {
    base::score_backward(row, query.data(), v.data(), d_weights.data(), d_query.data(), into);
  } else {
    base::dot_backward(row, d_weights.data(), d_query.data());
    for (int64_t i = 0; i < row.count; ++i)
      for (int64_t u = 0; u < row.units; ++u) into.keys[plain.at[i] * row.units + u] += d_weights[i] * query[u];
  }
  for (int64_t i = 0; i < plain.size(); ++i) {
    Doubles up = x, down = x;
    up[i] += kDifference, down[i] -= kDifference;
    const double slope = (plain.loss(up, d) - plain.loss(down, d)) / (2 * kDifference);
    const double got = i < plain.v()        ? d_query[i]
                       : i < plain.keys()   ? (s.additive ? d_v[i - plain.v()] : 0)
                       : i < plain.memory() ? d_keys[i - plain.keys()]
                                            : d_memory[i - plain.memory()];
    near(got, slope, std::sqrt(static_cast<double>(s.features)), s.name() + " gradient " + std::to_string(i));
  }
}

void check_positions() {
  const bool mask[2][3] = {{true, false, true}, {false, false, false}};
  alignas(64) char block[256];
  base::Carver carve(block);
  const base::Positions positions(carve, 2, 3);
  for (int64_t b = 0; b < 2; ++b) positions.fill(&mask[0][0], b);
  expect(positions.count[0] == 2 && positions.at[0] == 0 && positions.at[1] == 2, "positions of a mask");
  expect(positions.count[1] == 0, "positions of an empty mask");
  positions.fill(nullptr, 1);
  expect(positions.count[1] == 3 && positions.at[5] == 2, "positions without a mask");
}

}  // namespace

void check_attention() {
  check_positions();
  std::mt19937 draw(7);
  for (const bool additive : {true, false}) {
    for (const Sizes& s : {Sizes{1, 1, 1, additive, 1}, Sizes{9, 5, 18, additive, 1}, Sizes{7, 16, 3, additive, 2},
                           Sizes{13, 6, 35, additive, 3}, Sizes{4, 8, 16, additive, 0}}) {
      check<float>(s, draw);
      check<bf16>(s, draw);
    }
  }
}

}  // namespace fastseq
