// Additive scores, v . tanh(k + q), of many keys and queries: tanh(k + q) = 1 - 2 r with r = 1 / (1 + e^2k e^2q). The exponentials
// are taken once a key and once a query, which leaves two multiply-adds and a reciprocal for each pair of them.
#pragma once

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

// scores [count, padded to W] of one query. keys: [count] rows of e^2k, `pitch` apart; query, v: [units]; units a multiple of W.
FS_INLINE void additive_scores(const float* keys, int64_t pitch, int64_t count, const float* query, const float* v, int64_t units,
                               float* scores) {
  for (int64_t i = 0; i < count; i += W) {
    vf sums[W] = {};
    for (int first = 0; first < W && i + first < count; first += kScoreRows) {
      const float* rows[kScoreRows];  // past the last one: that again
      for (int m = 0; m < kScoreRows; ++m) rows[m] = keys + (i + first + m < count ? i + first + m : count - 1) * pitch;
      vf halves[kScoreRows] = {};
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

}  // namespace FS_ISA
}  // namespace fastseq
