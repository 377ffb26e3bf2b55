// Additive scores, v . tanh(k + q), of many keys and queries: tanh(k + q) = 1 - 2 r with r = 1 / (1 + e^2k e^2q). The exponentials
// are taken once a key and once a query, which leaves two multiply-adds and a reciprocal for each pair of them.
#pragma once

#include "attention.h"
#include "dot.h"

namespace fastseq {
namespace FS_ISA {

constexpr float kMostExponent = 21;  // |k| and |q| up to which 1 + e^2k e^2q is finite
constexpr int kScoreRows = 4;        // keys at a time: independent chains of operations

// e^2x to full relative accuracy: the exponent 2x log2 e is taken in two parts, or its rounding would grow with x.
FS_INLINE vf exp_twice(vf x) {
  constexpr float kHigh = 2.884765625f, kLow = 6.24456814e-4f;  // 2 log2 e, of which kHigh has 11 bits
  const vf high = bits_of<vf>(bits_of<vu>(x) & (vu{} + 0xfffff000u));
  const vf t = x * 2.885390082f;
  Exp2 e = split_exp2(t);
  e.f += (high * kHigh - t) + (high * kLow + (x - high) * 2.885390082f);
  return e.power * (e.f * SimdMath::polynomial(e.f) + 1.f);
}

// to [padded to W] = e^2x of n elements, then zeros. Returns whether all are within kMostExponent; a NaN is.
template <class T>
FS_INLINE bool exp_row(const T* from, int64_t n, float* to) {
  vi outside = {};
  for (int64_t u = 0; u < n; u += W) {
    const int count = n - u < W ? static_cast<int>(n - u) : W;
    const vf x = load(from + u, count);
    outside |= (x > splat(kMostExponent)) | (x < splat(-kMostExponent));
    store(to + u, exp_twice(x), W);
    for (int i = count; i < W; ++i) to[u + i] = 0;
  }
  int any = 0;
  for (int i = 0; i < W; ++i) any |= outside[i];
  return !any;
}

// An odd number of cache lines, or a column of rows would fall into a few sets of the cache.
FS_INLINE int64_t odd_pitch(int64_t n) {
  const int64_t vectors = (n + W - 1) / W;
  return (vectors | 1) * W;
}

// scores [count, padded to W] of one query. keys: [count] rows of e^2k, `pitch` apart; query, v: [units]; units a multiple of W.
FS_INLINE void additive_scores(const float* keys, int64_t pitch, int64_t count, const float* query, const float* v, int64_t units,
                               float* scores) {
  for (int64_t i = 0; i < count; i += W) {
    vf sums[W];
    set_zero(sums);
    for (int first = 0; first < W && i + first < count; first += kScoreRows) {
      const float* rows[kScoreRows];  // past the last one: that again
      for (int m = 0; m < kScoreRows; ++m) rows[m] = keys + (i + first + m < count ? i + first + m : count - 1) * pitch;
      vf halves[kScoreRows];
      set_zero(halves);
      for (int64_t u = 0; u < units; u += W) {
        const vf q = load_vector<vf>(query + u), weight = load_vector<vf>(v + u);
        for (int m = 0; m < kScoreRows; ++m) halves[m] += weight * (0.5f - reciprocal(load_vector<vf>(rows[m] + u) * q + 1.f));
      }
      for (int m = 0; m < kScoreRows; ++m) sums[first + m] = halves[m];
    }
    store(scores + i, 2.f * reduce(sums), W);
  }
}

// The gradients of kScoreRows keys and of all queries in W units, from d_scores [queries][d_pitch] of these keys.
// Of keys and queries they lack the factor 4 v, of v the factor 2. query: rows of e^2q, d_query: added to, both `pitch` apart.
FS_INLINE void additive_backward(const vf (&key)[kScoreRows], const float* query, float* d_query, int64_t pitch, int64_t queries,
                                 const float* d_scores, int64_t d_pitch, vf (&d_key)[kScoreRows], vf& d_v) {
  for (int64_t i = 0; i < queries; ++i) {
    const vf q = load_vector<vf>(query + i * pitch);
    vf dq = load_vector<vf>(d_query + i * pitch);
    for (int m = 0; m < kScoreRows; ++m) {
      const vf r = reciprocal(key[m] * q + 1.f), d = splat(d_scores[i * d_pitch + m]), through = d * (r - r * r);
      dq += through;
      d_key[m] += through;
      d_v += d * (0.5f - r);
    }
    store(d_query + i * pitch, dq, W);
  }
}

// The gradients of one query and its keys: d_keys and d_v are added to. Those of query and keys lack the factor v.
FS_INLINE void additive_backward(const float* keys, int64_t pitch, int64_t count, const float* query, const float* d_scores, int64_t units,
                                 float* d_keys, float* d_query, float* d_v) {
  for (int64_t u = 0; u < units; u += W) store(d_query + u, vf{}, W);
  for (int64_t i = 0; i < count; i += kScoreRows) {
    vf d[kScoreRows];
    int64_t at[kScoreRows];  // past the last one: that again, of gradient 0
    for (int m = 0; m < kScoreRows; ++m) {
      d[m] = splat(i + m < count ? d_scores[i + m] : 0.f);
      at[m] = (i + m < count ? i + m : count - 1) * pitch;
    }
    for (int64_t u = 0; u < units; u += W) {
      const vf q = load_vector<vf>(query + u);
      vf dq = {}, dv = {};
      for (int m = 0; m < kScoreRows; ++m) {
        const vf r = reciprocal(load_vector<vf>(keys + at[m] + u) * q + 1.f), through = d[m] * (r - r * r);
        dq += through;
        dv += d[m] * (0.5f - r);
        store(d_keys + at[m] + u, load_vector<vf>(d_keys + at[m] + u) + 4.f * through, W);
      }
      store(d_query + u, load_vector<vf>(d_query + u) + 4.f * dq, W);
      store(d_v + u, load_vector<vf>(d_v + u) + 2.f * dv, W);
    }
  }
}

// The exponentials of all keys of a loop over steps, which read them again and again.
class KeyExponentials {
 public:
  // With `gradients`, room for those too.
  KeyExponentials(Carver& carve, int64_t batch, int64_t source, int64_t units, bool gradients)
      : units_(round_up(units, W)), pitch_(odd_pitch(units)), source_(source) {
    exp_ = carve.take<float>(batch * source * pitch_);
    gradient_ = gradients ? carve.take<float>(batch * source * pitch_) : nullptr;
    fit_ = carve.take<bool>(batch);
  }

  template <class T>
  void fill(int64_t b, const MemoryRow<T>& row) const {
    fit_[b] = true;
    for (int64_t i = 0; i < row.count; ++i) fit_[b] &= exp_row(row.keys + row.at[i] * row.units, row.units, exp_of(b) + i * pitch_);
    if (gradient_) std::memset(gradient_of(b), 0, sizeof(float) * row.count * pitch_);
  }

  // exp_query [units padded]: scratch. False, and nothing done, where an exponential would overflow.
  bool score(int64_t b, int64_t count, const float* query, float* exp_query, const float* v, float* scores) const {
    if (!fit_[b] || !exp_row(query, units_, exp_query)) return false;
    additive_scores(exp_of(b), pitch_, count, exp_query, v, units_, scores);
    return true;
  }

  // Likewise. d_query [units padded] is set, d_v added to; the keys' gradients gather here.
  bool backward(int64_t b, int64_t count, const float* query, float* exp_query, const float* v, const float* d_scores, float* d_query,
                float* d_v) const {
    if (!fit_[b] || !exp_row(query, units_, exp_query)) return false;
    additive_backward(exp_of(b), pitch_, count, exp_query, d_scores, units_, gradient_of(b), d_query, d_v);
    for (int64_t u = 0; u < units_; u += W) store(d_query + u, load_vector<vf>(d_query + u) * load_vector<vf>(v + u), W);
    return true;
  }

  // d_keys [S][A] += what gathered.
  template <class T>
  void finish(int64_t b, const MemoryRow<T>& row, const float* v, float* d_keys) const {
    for (int64_t i = 0; i < row.count; ++i)
      for (int64_t u = 0; u < row.units; u += W) {
        float* to = d_keys + row.at[i] * row.units + u;
        const int n = lanes_left(u, row.units);
        store(to, load(to, n) + load_vector<vf>(gradient_of(b) + i * pitch_ + u) * load_vector<vf>(v + u), n);
      }
  }

 private:
  FS_INLINE float* exp_of(int64_t b) const { return exp_ + b * source_ * pitch_; }
  FS_INLINE float* gradient_of(int64_t b) const { return gradient_ + b * source_ * pitch_; }

  int64_t units_, pitch_, source_;
  float *exp_, *gradient_;
  bool* fit_;
};

}  // namespace FS_ISA
}  // namespace fastseq
