// The products of linear layers on every ISA variant and team size, against plain loops. Every operand is a heap block of exactly
// its size; what lies between rows is NaN in operands, and must stay as it was in results.
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "native_buffer.h"
#include "native_test.h"

namespace fastseq {
namespace {

struct Sizes {
  int64_t outer, inner, depth, columns;
};

// [outer, inner, features] in a block of `gap` more features a row and one more row an outer index, ending with the last element.
struct Rows {
  Tokens at;
  int64_t outer, features;
  Buffer buffer;

  Rows(DType dtype, int64_t outer_size, int64_t inner, int64_t width, int64_t gap)
      : at{nullptr, inner, (inner + 1) * (width + gap), width + gap}, outer(outer_size), features(width),
        buffer(dtype, outer && inner && width ? (outer - 1) * at.outer_stride + (inner - 1) * at.inner_stride + width : 0) {
    at.data = buffer.data();
  }
  Rows(const Rows& other) : at(other.at), outer(other.outer), features(other.features), buffer(other.buffer) { at.data = buffer.data(); }

  int64_t place(int64_t token, int64_t feature) const {
    return token / at.inner * at.outer_stride + token % at.inner * at.inner_stride + feature;
  }
  int64_t tokens() const { return outer * at.inner; }
  double get(int64_t token, int64_t feature) const { return buffer.get(place(token, feature)); }

  Rows& fill(Random& random) {
    std::uniform_real_distribution<float> draw(-1, 1);
    for (int64_t t = 0; t < tokens(); ++t)
      for (int64_t f = 0; f < features; ++f) buffer.set(place(t, f), draw(random));
    return *this;
  }

  // Both hold the same where no row is, bit for bit.
  void keeps_gaps(const Rows& before, const std::string& what) const {
    std::vector<bool> inside(buffer.count());
    for (int64_t t = 0; t < tokens(); ++t)
      for (int64_t f = 0; f < features; ++f) inside[place(t, f)] = true;
    for (int64_t i = 0; i < buffer.count(); ++i)
      expect(inside[i] || buffer.bits(i) == before.buffer.bits(i), what + " writes between rows, at " + std::to_string(i));
  }
};

class Check {
 public:
  Check(DType dtype, const Sizes& sizes, bool add, unsigned seed)
      : dtype_(dtype), s_(sizes), add_(add), random_(seed), x_(rows(s_.depth)), y_(rows(s_.columns)), w_(matrix()), b_(dtype, s_.columns) {
    x_.fill(random_), y_.fill(random_), w_.fill(random_);
    b_.fill(random_, 1);
  }

  void run(int threads, const std::string& where) {
    what_ = "products " + std::to_string(s_.outer) + "x" + std::to_string(s_.inner) + " K" + std::to_string(s_.depth) + " O" +
            std::to_string(s_.columns) + (dtype_ == DType::f32 ? " fp32" : " bf16") + (add_ ? " add" : "") + where;
    forward(threads);
    to_input(threads);
    to_weights(threads);
  }

 private:
  Rows rows(int64_t features) { return {dtype_, s_.outer, s_.inner, features, static_cast<int64_t>(random_() % 3)}; }
  Rows matrix() { return {dtype_, 1, s_.columns, s_.depth, static_cast<int64_t>(random_() % 3)}; }
  int64_t tokens() const { return s_.outer * s_.inner; }

  // Half a unit in the last place for each partial sum in fp32, all of them below 2 sqrt(terms) + 1, and one for each rounding to T.
  void near(double got, double wanted, int64_t terms, const char* name) const {
    const double n = static_cast<double>(terms) + 2, rounding = dtype_ == DType::f32 ? 1.2e-7 : 8e-3;
    const double budget = 6e-8 * n * (2 * std::sqrt(n) + 1) + rounding * std::abs(wanted);
    expect(std::abs(got - wanted) <= budget, what_ + ", " + name + ": " + std::to_string(got) + " for " + std::to_string(wanted));
  }

  void forward(int threads) {
    Rows out = rows(s_.columns);
    if (add_) out.fill(random_);
    const Rows before = out;
    kernels(dtype_).product({dtype_, tokens(), s_.depth, s_.columns, x_.at, out.at, w_.at.data, w_.at.inner_stride, add_ ? nullptr : b_.data(), add_},
                            threads);
    for (int64_t t = 0; t < tokens(); ++t) {
      for (int64_t o = 0; o < s_.columns; ++o) {
        double sum = add_ ? before.get(t, o) : b_.get(o);
        for (int64_t k = 0; k < s_.depth; ++k) sum += x_.get(t, k) * w_.get(o, k);
        near(out.get(t, o), sum, s_.depth, "product");
      }
    }
    out.keeps_gaps(before, what_ + ", product");
  }

  void to_input(int threads) {
    Rows out = rows(s_.depth);
    if (add_) out.fill(random_);
    const Rows before = out;
    kernels(dtype_).input_gradient({dtype_, tokens(), s_.columns, s_.depth, y_.at, out.at, w_.at.data, w_.at.inner_stride, nullptr, add_}, threads);
    for (int64_t t = 0; t < tokens(); ++t) {
      for (int64_t k = 0; k < s_.depth; ++k) {
        double sum = add_ ? before.get(t, k) : 0;
        for (int64_t o = 0; o < s_.columns; ++o) sum += y_.get(t, o) * w_.get(o, k);
        near(out.get(t, k), sum, s_.columns, "input gradient");
      }
    }
    out.keeps_gaps(before, what_ + ", input gradient");
  }

  void to_weights(int threads) {
    Rows d_w = matrix();
    const Rows before = d_w;
    Buffer d_b(dtype_, s_.columns);
    kernels(dtype_).weight_gradient(
        {dtype_, tokens(), s_.columns, s_.depth, y_.at, x_.at, d_w.at.data, d_w.at.inner_stride, add_ ? nullptr : d_b.data()}, threads);
    for (int64_t o = 0; o < s_.columns; ++o) {
      double bias = 0;
      for (int64_t t = 0; t < tokens(); ++t) bias += y_.get(t, o);
      if (!add_) near(d_b.get(o), bias, tokens(), "bias gradient");
      for (int64_t k = 0; k < s_.depth; ++k) {
        double sum = 0;
        for (int64_t t = 0; t < tokens(); ++t) sum += y_.get(t, o) * x_.get(t, k);
        near(d_w.get(o, k), sum, tokens(), "weight gradient");
      }
    }
    d_w.keeps_gaps(before, what_ + ", weight gradient");
  }

  DType dtype_;
  Sizes s_;
  bool add_;
  Random random_;
  Rows x_, y_, w_;
  Buffer b_;
  std::string what_;
};

}  // namespace

void check_products() {
  // The fourth is more tokens than are read in place, the fifth more than are summed at a time; the next are deeper than a block, and
  // one row more than eight blocks of dW; the last fills pairs of tile registers, whole and in part, with a panel that the first cache does not hold.
  const Sizes all[] = {{1, 1, 1, 1}, {2, 3, 5, 18}, {1, 13, 33, 67}, {5, 8, 34, 70}, {3, 90, 9, 21},
                       {0, 3, 4, 5}, {2, 3, 0, 5},  {2, 3, 4, 0},    {1, 3, 1031, 3}, {1, 40, 3, 1025},
                       {2, 28, 533, 67}};
  unsigned seed = 0;
  for (const Sizes& sizes : all) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const bool add : {false, true}) {
        Check check(dtype, sizes, add, ++seed);
        for (const char* isa : available_isas()) {
          choose_isa(isa);
          for (const int threads : {1, 2, 5}) check.run(threads, std::string(" on ") + isa + ", " + std::to_string(threads) + " threads");
        }
      }
    }
  }
}

}  // namespace fastseq
