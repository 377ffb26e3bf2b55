// The element math of every cell, forward and backward, against the papers' formulas in double precision and their central
// differences: in double, where only the algebra can be wrong, and as the CPU kernels use it.
#include <array>
#include <cmath>
#include <random>
#include <string>

#include "native_test.h"

#define FS_ISA base
#include "cells.h"
#include "cpu/simd.h"

namespace fastseq {
namespace {

constexpr int kRounds = 300;
constexpr double kDifference = 1e-5;  // errs by about its square, and by 1e-16 / kDifference
constexpr float kProduct = 0.7f;      // U_n, in one dimension

double logistic(double x) { return 1 / (1 + std::exp(-x)); }

struct DoubleMath {
  using V = double;
  static double sigmoid(double x) { return logistic(x); }
  static double tanh(double x) { return std::tanh(x); }
};

int lanes(double) { return 1; }
double lane(double v, int) { return v; }
void set_lane(double& v, int, double x) { v = x; }
int lanes(base::vf) { return base::W; }
double lane(base::vf v, int i) { return v[i]; }
void set_lane(base::vf& v, int i, double x) { v[i] = static_cast<float>(x); }

enum { kH = 4, kC = 5, kInputs = 6 };  // behind the pre-activations: the state before the step
using Inputs = std::array<double, kInputs>;

struct State {
  double h, c;
};

// One step both ways: dh and carry as the drivers hand them to backward; d: the gradients of the inputs.
template <class M>
struct Step {
  using V = typename M::V;
  std::array<V, kInputs> in{};
  V dh{}, carry{}, h{}, c{};
  std::array<V, kInputs> d{};
};

template <template <class> class Cell>
struct OneProduct {
  static constexpr bool kCellState = Cell<DoubleMath>::kCellState;

  template <class M>
  static void run(Step<M>& s) {
    using C = Cell<M>;
    typename M::V pre[C::kColumns], saved[C::kColumns], dpre[C::kColumns], carry = s.carry;
    for (int j = 0; j < C::kColumns; ++j) pre[j] = s.in[j];
    s.h = s.in[kH], s.c = s.in[kC];
    C::forward(pre, s.h, s.c, saved);
    C::backward(saved, s.in[kCellState ? kC : kH], s.c, s.dh, carry, dpre);
    for (int j = 0; j < C::kColumns; ++j) s.d[j] = dpre[j];
    s.d[kH] = C::direct(carry);
    if (kCellState) s.d[kC] = carry;
  }
};

struct LstmCase : OneProduct<Lstm> {
  static State formula(const Inputs& in) {
    const double c = logistic(in[1]) * in[kC] + logistic(in[0]) * std::tanh(in[2]);
    return {logistic(in[3]) * std::tanh(c), c};
  }
};

struct RnnTanhCase : OneProduct<RnnTanh> {
  static State formula(const Inputs& in) { return {std::tanh(in[0]), in[kC]}; }
};

struct RnnReluCase : OneProduct<RnnRelu> {
  static State formula(const Inputs& in) { return {in[0] > 0 ? in[0] : 0, in[kC]}; }
};

struct GruCase : OneProduct<Gru> {
  static State formula(const Inputs& in) {
    const double z = logistic(in[1]), n = std::tanh(in[3] + logistic(in[0]) * in[2]);
    return {(1 - z) * n + z * in[kH], in[kC]};
  }
};

struct GruResetBeforeCase {
  static constexpr bool kCellState = false;

  template <class M>
  static void run(Step<M>& s) {
    using C = GruResetBefore<M>;
    const auto product = typename M::V{} + kProduct;
    typename M::V pre[C::kColumns] = {s.in[0], s.in[1], {}}, saved[C::kSaved], dpre[C::kColumns], carry = s.carry;
    s.h = s.in[kH], s.c = s.in[kC];
    C::reset(pre, s.h, saved);
    pre[2] = s.in[2] + product * saved[2];
    C::candidate(pre, s.h, saved);
    C::candidate_backward(saved, s.in[kH], s.dh, carry, dpre);
    C::reset_backward(saved, product * dpre[2], carry, dpre);
    for (int j = 0; j < C::kColumns; ++j) s.d[j] = dpre[j];
    s.d[kH] = C::direct(carry);
  }

  static State formula(const Inputs& in) {
    const double r = logistic(in[0]), z = logistic(in[1]);
    const double n = std::tanh(in[2] + kProduct * (r * in[kH]));
    return {(1 - z) * n + z * in[kH], in[kC]};
  }
};

void near(double value, double expected, double tolerance, const std::string& what) {
  expect(std::fabs(value - expected) <= tolerance * std::fmax(1, std::fabs(expected)),
         what + " is " + std::to_string(value) + ", the formula gives " + std::to_string(expected));
}

template <class Case, class M>
void check_lane(const Step<M>& s, int i, double forward, double backward, const std::string& name) {
  Inputs in;
  for (int k = 0; k < kInputs; ++k) in[k] = lane(s.in[k], i);
  const State state = Case::formula(in);
  near(lane(s.h, i), state.h, forward, name + ": h'");
  near(lane(s.c, i), state.c, forward, name + ": c'");
  const double dh = lane(s.dh, i), carry = lane(s.carry, i);
  auto loss = [&](const Inputs& at) {
    const State after = Case::formula(at);
    return dh * after.h + carry * (Case::kCellState ? after.c : after.h);
  };
  for (int k = 0; k < kInputs; ++k) {
    Inputs more = in, less = in;
    more[k] += kDifference, less[k] -= kDifference;
    near(lane(s.d[k], i), (loss(more) - loss(less)) / (2 * kDifference), backward, name + ": gradient " + std::to_string(k));
  }
}

template <class Case, class M>
void check(double forward, double backward, const std::string& name) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> draw(-4, 4);
  for (int round = 0; round < kRounds; ++round) {
    Step<M> s;
    for (int i = 0; i < lanes(s.h); ++i) {
      for (auto& v : s.in) set_lane(v, i, draw(random));
      set_lane(s.dh, i, draw(random)), set_lane(s.carry, i, draw(random));
    }
    Case::run(s);
    for (int i = 0; i < lanes(s.h); ++i) check_lane<Case>(s, i, forward, backward, name);
  }
}

template <class Case>
void check_both(const std::string& name) {
  check<Case, DoubleMath>(1e-14, 1e-9, name + " in double");
  check<Case, base::SimdMath>(1e-6, 1e-5, name + " in SIMD");
}

}  // namespace

void check_cells() {
  check_both<LstmCase>("lstm");
  check_both<GruCase>("gru");
  check_both<RnnTanhCase>("rnn_tanh");
  check_both<RnnReluCase>("rnn_relu");
  check_both<GruResetBeforeCase>("gru_reset_before");
}

}  // namespace fastseq
