// Attention of sequences of queries on every ISA variant and team size, against the attention of one row in its baseline form, which
// attention_test.cpp checks. Every operand is a heap block of exactly its size; what is not attended to is NaN.
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "native_buffer.h"
#include "native_test.h"

#define FS_ISA base
#include "cpu/attention.h"

namespace fastseq {
namespace {

using base::bf16;

struct Sizes {
  int64_t batch, queries, source, units, features;
  float scale = 1;  // of queries and keys; where exponentials overflow, the additive score is computed another way
};

template <class T>
class Check {
 public:
  Check(const Sizes& sizes, bool additive, bool masked, unsigned seed)
      : s_(sizes), additive_(additive), random_(seed), q_(kType, s_.batch * s_.queries * s_.units), keys_(kType, s_.batch * s_.source * s_.units),
        memory_(kType, s_.batch * s_.source * s_.features), v_(kType, s_.units), d_context_(kType, s_.batch * s_.queries * s_.features),
        d_weights_(kType, s_.batch * s_.queries * s_.source), mask_(new bool[s_.batch * s_.source]) {
    q_.fill(random_, s_.scale), v_.fill(random_, 0.5f), d_context_.fill(random_, 1), d_weights_.fill(random_, 1);
    for (int64_t i = 0; i < s_.batch * s_.source; ++i) {
      mask_[i] = !masked || (i / s_.source != 1 && random_() % 3);  // of the second row nothing
      std::uniform_real_distribution<float> draw(-1, 1);
      for (int64_t u = 0; mask_[i] && u < s_.units; ++u) keys_.set(i * s_.units + u, s_.scale * draw(random_));
      for (int64_t f = 0; mask_[i] && f < s_.features; ++f) memory_.set(i * s_.features + f, draw(random_));
    }
    if (!masked) mask_.reset();
    expect_rows();
  }

  void run(int threads, const std::string& where) {
    what_ = "attention B" + std::to_string(s_.batch) + " Q" + std::to_string(s_.queries) + " S" + std::to_string(s_.source) + " A" +
            std::to_string(s_.units) + " D" + std::to_string(s_.features) + (additive_ ? " additive" : " dot") + where;
    const AttentionPass pass{kType, s_.batch, s_.queries, s_.source, s_.units, s_.features, q_.data(), keys_.data(), memory_.data(),
                             mask_.get(), additive_ ? v_.data() : nullptr};
    Buffer context(kType, d_context_.count()), weights(kType, d_weights_.count()), d_q(kType, q_.count()), d_keys(kType, keys_.count()),
        d_memory(kType, memory_.count()), d_v(kType, additive_ ? s_.units : 0), again(kType, d_context_.count());
    kernels(kType).attention_forward({pass, context.data(), weights.data()}, threads);
    kernels(kType).attention_forward({pass, again.data(), nullptr}, threads);
    kernels(kType).attention_backward({pass, weights.data(), d_context_.data(), d_weights_.data(), d_q.data(), d_keys.data(), d_memory.data(),
                                       additive_ ? d_v.data() : nullptr},
                                      threads);
    compare(context, context_, "context"), compare(weights, weights_, "weights"), compare(d_q, d_q_, "d_q");
    compare(d_keys, d_keys_, "d_keys"), compare(d_memory, d_memory_, "d_memory"), compare(d_v, d_v_, "d_v");
    for (int64_t i = 0; i < context.count(); ++i) expect(context.bits(i) == again.bits(i), what_ + " without weights");
  }

 private:
  static constexpr DType kType = sizeof(T) == 4 ? DType::f32 : DType::bf16;
  using Floats = std::vector<float>;

  static size_t padded(int64_t n) { return static_cast<size_t>(base::round_up(n, base::W)); }

  static Floats row_of(const Buffer& from, int64_t first, int64_t count) {
    Floats row(padded(count));
    for (int64_t i = 0; i < count; ++i) row[i] = from.get(first + i);
    return row;
  }

  // Every query by itself.
  void expect_rows() {
    std::vector<int32_t> at;
    const Floats v = row_of(v_, 0, s_.units);
    Floats d_v(v.size());
    d_keys_.resize(keys_.count()), d_memory_.resize(memory_.count());
    weights_.resize(d_weights_.count()), context_.resize(d_context_.count()), d_q_.resize(q_.count());
    for (int64_t b = 0; b < s_.batch; ++b) {
      at.clear();
      for (int64_t s = 0; s < s_.source; ++s)
        if (!mask_ || mask_[b * s_.source + s]) at.push_back(static_cast<int32_t>(s));
      const int64_t count = static_cast<int64_t>(at.size()), first = b * s_.source;
      const base::MemoryRow<T> row{static_cast<const T*>(keys_.data()) + first * s_.units,
                                   static_cast<const T*>(memory_.data()) + first * s_.features, s_.units, s_.features, at.data(), count};
      for (int64_t n = b * s_.queries; n < (b + 1) * s_.queries; ++n) {
        const Floats query = row_of(q_, n * s_.units, s_.units), d_context = row_of(d_context_, n * s_.features, s_.features);
        Floats weights(padded(count)), context(padded(s_.features)), d_weights(padded(count)), d_query(query.size());
        base::score(row, additive_, query.data(), v.data(), weights.data());
        base::softmax(weights.data(), count);
        base::context_row(row, weights.data(), context.data());
        for (int64_t i = 0; i < count; ++i) d_weights[i] = d_weights_.get(n * s_.source + at[i]), weights_[n * s_.source + at[i]] = weights[i];
        const base::MemoryGradients into{d_keys_.data() + first * s_.units, d_memory_.data() + first * s_.features, d_v.data()};
        base::weights_backward(row, weights.data(), d_context.data(), d_weights.data(), into);
        if (additive_) {
          base::score_backward(row, query.data(), v.data(), d_weights.data(), d_query.data(), into);
        } else {
          base::dot_backward(row, d_weights.data(), d_query.data());
          for (int64_t i = 0; i < count; ++i)
            for (int64_t u = 0; u < row.units; ++u) into.keys[at[i] * row.units + u] += d_weights[i] * query[u];
        }
        for (int64_t f = 0; f < s_.features; ++f) context_[n * s_.features + f] = context[f];
        for (int64_t u = 0; u < s_.units; ++u) d_q_[n * s_.units + u] = d_query[u];
      }
    }
    d_v_.assign(d_v.begin(), d_v.begin() + (additive_ ? s_.units : 0));
  }

  // bf16 rounds the weights that backward reads, which is as much as its results are rounded.
  void compare(const Buffer& got, const Floats& wanted, const char* name) const {
    float most = 1e-3f;
    for (const float x : wanted) most = std::abs(x) > most ? std::abs(x) : most;
    const float budget = most * (kType == DType::f32 ? 2e-5f : 2e-2f);
    expect(got.count() == static_cast<int64_t>(wanted.size()), what_ + ", size of " + name);
    for (int64_t i = 0; i < got.count(); ++i)
      expect(std::abs(got.get(i) - wanted[i]) <= budget,
             what_ + ", " + name + " " + std::to_string(i) + ": " + std::to_string(got.get(i)) + " for " + std::to_string(wanted[i]));
  }

  Sizes s_;
  bool additive_;
  Random random_;
  Buffer q_, keys_, memory_, v_, d_context_, d_weights_;
  std::unique_ptr<bool[]> mask_;
  Floats context_, weights_, d_q_, d_keys_, d_memory_, d_v_;
  std::string what_;
};

}  // namespace

void check_attention_of_sequences() {
  const Sizes all[] = {{1, 1, 1, 1, 1},  {3, 4, 9, 19, 13},   {2, 13, 33, 5, 70},     {2, 5, 16, 32, 64},
                       {0, 3, 4, 5, 6},  {2, 0, 4, 5, 6},     {2, 3, 0, 5, 6},        {3, 3, 5, 6, 7, 30},
                       {4, 5, 20, 70, 33}};
  unsigned seed = 0;
  for (const Sizes& sizes : all) {
    const auto on_every_variant = [&](auto&& check) {
      for (const char* isa : available_isas()) {
        choose_isa(isa);
        for (const int threads : {1, 2, 5}) check.run(threads, std::string(" on ") + isa + ", " + std::to_string(threads) + " threads");
      }
    };
    for (const bool additive : {false, true}) {
      if (!additive && sizes.scale != 1) continue;
      for (const bool masked : {false, true}) {
        on_every_variant(Check<float>(sizes, additive, masked, ++seed));
        on_every_variant(Check<bf16>(sizes, additive, masked, ++seed));
      }
    }
  }
}

}  // namespace fastseq
