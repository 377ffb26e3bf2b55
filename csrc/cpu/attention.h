// Attention of one decoder row at one step, and back: scores against the keys -> masked softmax -> context.
// Scores are v . tanh(key + query) (additive form) or key . query (dot form). Everything computed is fp32.
#pragma once

#include "../scores.h"
#include "dot.h"
#include "scratch.h"

namespace fastseq {
namespace FS_ISA {

FS_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The positions that each memory row attends to, in rising order: what stands elsewhere is never read.
struct Positions {
  int32_t* at;     // [B][S]
  int32_t* count;  // [B]
  int64_t source;

  Positions(Carver& carve, int64_t batch, int64_t length) : source(length) {
    at = carve.take<int32_t>(batch * length);
    count = carve.take<int32_t>(batch);
  }

  void fill(const bool* mask, int64_t b) const {
    int32_t n = 0;
    for (int64_t s = 0; s < source; ++s)
      if (!mask || mask[b * source + s]) at[b * source + n++] = static_cast<int32_t>(s);
    count[b] = n;
  }
};

// One memory row as an attention reads it.
template <class T>
struct MemoryRow {
  const T *keys, *memory;  // [S][A], [S][D], contiguous
  int64_t units, features;  // A, D
  const int32_t* at;       // [count]
  int64_t count;
};

// Vectors of fp32 in scratch (query, v, context and their gradients) are padded to W with zeros.
template <class Score, class T>
FS_INLINE void score_row(const MemoryRow<T>& row, const float* query, const float* v, float* scores) {
  constexpr int kRows = 4;
  for (int64_t i = 0; i < row.count; i += W) {
    vf sums[W];
    set_zero(sums);
    for (int first = 0; first < W && i + first < row.count; first += kRows) {
      const T* keys[kRows];  // past the last one: that again
      for (int m = 0; m < kRows; ++m) keys[m] = row.keys + row.at[i + first + m < row.count ? i + first + m : row.count - 1] * row.units;
      vf some[kRows];
      set_zero(some);
      auto add = [&](int64_t u, int n) FS_LAMBDA {
        const vf q = load_vector<vf>(query + u), weight = Score::kHasV ? load_vector<vf>(v + u) : vf{};
        unroll<kRows>([&](int m) FS_LAMBDA { some[m] += Score::forward(load(keys[m] + u, n), q, weight); });
      };
      for_vectors(row.units, add);
      unroll<kRows>([&](int m) FS_LAMBDA { sums[first + m] = some[m]; });
    }
    store(scores + i, reduce(sums), W);
  }
}

// In place: scores -> weights that sum to 1. `scores` has room for whole vectors, of which the rest becomes 0.
FS_INLINE void softmax(float* scores, int64_t count) {
  if (!count) return;
  for (int64_t i = count; i % W; ++i) scores[i] = -__builtin_inff();
  vf most = load_vector<vf>(scores), sums = {};
  for (int64_t i = W; i < count; i += W) {
    const vf x = load_vector<vf>(scores + i);
    most = x > most ? x : most;
  }
  const vf top = splat(fold_lanes(most, [](vf a, vf b) FS_LAMBDA { return a > b ? a : b; }));
  for (int64_t i = 0; i < count; i += W) {
    const vf e = SimdMath::exp(load_vector<vf>(scores + i) - top);
    store(scores + i, e, W);
    sums += e;
  }
  const float scale = 1.f / sum_lanes(sums);
  for (int64_t i = 0; i < count; i += W) store(scores + i, load_vector<vf>(scores + i) * scale, W);
}

// context [D padded] = sum of weights[i] memory[at[i]], or adds that; zero where nothing is attended to.
template <class T>
FS_INLINE void context_row(const MemoryRow<T>& row, const float* weights, float* context, bool add = false) {
  constexpr int kVecs = 4;
  for (int64_t u = 0; u < row.features; u += kVecs * W) {
    vf sums[kVecs];
    set_zero(sums);
    const int whole = row.features - u >= kVecs * W;
    for (int64_t i = 0; i < row.count; ++i) {
      const T* memory = row.memory + row.at[i] * row.features + u;
      for (int k = 0; k < kVecs; ++k) {
        if (whole) {
          sums[k] += weights[i] * load(memory + k * W, W);
        } else if (u + k * W < row.features) {
          sums[k] += weights[i] * load(memory + k * W, lanes_left(u + k * W, row.features));
        }
      }
    }
    for (int k = 0; k < kVecs && u + k * W < row.features; ++k) {
      if (add) sums[k] += load_vector<vf>(context + u + k * W);
      store(context + u + k * W, sums[k], W);
    }
  }
}

template <class T>
FS_INLINE void score(const MemoryRow<T>& row, bool additive, const float* query, const float* v, float* scores) {
  additive ? score_row<AdditiveScore<SimdMath>>(row, query, v, scores) : score_row<DotScore<SimdMath>>(row, query, v, scores);
}

// From the attended ones of `source` positions to all, 0 elsewhere.
template <class T, class To>
FS_INLINE void spread(const MemoryRow<T>& row, int64_t source, const float* from, To* to) {
  if (row.count == source) {
    for_vectors(source, [&](int64_t s, int lanes) FS_LAMBDA { store(to + s, load(from + s, lanes), lanes); });
    return;
  }
  std::memset(to, 0, sizeof(To) * source);
  for (int64_t i = 0; i < row.count; ++i) store(to + row.at[i], splat(from[i]), 1);
}

// Gradients that gather over steps: fp32, the memory row's own.
struct MemoryGradients {
  float *keys, *memory;  // [S][A], [S][D]; keys in the additive form only
  float* v;              // [A padded], the thread's; additive form only
};

// d_weights [count]: gradients of the weights themselves in, of the scores out.
template <class T>
FS_INLINE void weights_backward(const MemoryRow<T>& row, const float* weights, const float* d_context, float* d_weights,
                                const MemoryGradients& into) {
  vf inner = {};
  for (int64_t i = 0; i < row.count; i += W) {
    const int n = lanes_left(i, row.count);
    vf sums[W];
    set_zero(sums);
    for (int m = 0; m < n; ++m) {
      const T* memory = row.memory + row.at[i + m] * row.features;
      float* gradient = into.memory + row.at[i + m] * row.features;
      const vf weight = splat(weights[i + m]);
      vf sum = {};
      for_vectors(row.features, [&](int64_t u, int lanes) FS_LAMBDA {
        const vf d = load_vector<vf>(d_context + u);
        sum += d * load(memory + u, lanes);
        store(gradient + u, load(gradient + u, lanes) + weight * d, lanes);
      });
      sums[m] = sum;
    }
    const vf d = load(d_weights + i, n) + reduce(sums);
    inner += load(weights + i, n) * d;
    store(d_weights + i, d, n);
  }
  const vf all = splat(sum_lanes(inner));
  for_vectors(row.count, [&](int64_t i, int n) FS_LAMBDA { store(d_weights + i, load(weights + i, n) * (load(d_weights + i, n) - all), n); });
}

// Of the additive form. d_scores: gradients of the scores.
template <class T>
FS_INLINE void score_backward(const MemoryRow<T>& row, const float* query, const float* v, const float* d_scores, float* d_query,
                               const MemoryGradients& into) {
  for (int64_t u = 0; u < row.units; u += W) {
    const int n = lanes_left(u, row.units);
    const vf q = load_vector<vf>(query + u), weight = load_vector<vf>(v + u);
    vf dq = {}, dv = {};
    for (int64_t i = 0; i < row.count; ++i) {
      const int64_t at = row.at[i] * row.units + u;
      vf d_key;
      AdditiveScore<SimdMath>::backward(load(row.keys + at, n), q, weight, splat(d_scores[i]), d_key, dq, dv);
      store(into.keys + at, load(into.keys + at, n) + d_key, n);
    }
    store(d_query + u, dq, W);
    store(into.v + u, load_vector<vf>(into.v + u) + dv, W);
  }
}

// Of the dot form: the query meets keys as weights meet the memory. Keys get d_scores times the queries, of all steps at once.
template <class T>
FS_INLINE void dot_backward(MemoryRow<T> row, const float* d_scores, float* d_query) {
  row.memory = row.keys, row.features = row.units;
  context_row(row, d_scores, d_query);
}

}  // namespace FS_ISA
}  // namespace fastseq
