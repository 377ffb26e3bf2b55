// One SIMD vector type for every instruction set: GCC/Clang vector extensions, with intrinsics only where they pay.
// Everything lives in the namespace of its ISA variant, so that no inline function compiled for one leaks into another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define FS_INLINE inline __attribute__((always_inline))
#define FS_LAMBDA __attribute__((always_inline))

namespace fastseq {
namespace FS_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;             // floats in a vector
constexpr int kAccumulators = 24;  // of 32 registers, the rest for operands
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int kAccumulators = 12;
#else
constexpr int W = 4;
constexpr int kAccumulators = 12;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

struct bf16 {
  uint16_t bits;
};

template <class A, class B>
FS_INLINE A bits_of(B b) {
  static_assert(sizeof(A) == sizeof(B), "bits_of needs equal sizes");
  A a;
  __builtin_memcpy(&a, &b, sizeof(a));
  return a;
}

FS_INLINE vf splat(float x) { return x - vf{}; }

template <class V, class T>
FS_INLINE V load_vector(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// The first n 32-bit lanes, the rest zero.
FS_INLINE vf load_lanes(const float* p, int n) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#else
  float lanes[W] = {};
  std::memcpy(lanes, p, sizeof(float) * n);
  return load_vector<vf>(lanes);
#endif
}

FS_INLINE vf widen(vh bits) { return bits_of<vf>(__builtin_convertvector(bits, vu) << 16); }

FS_INLINE vh narrow(vf x) {  // round to nearest even, NaN stays NaN
#if defined(__AVX512BF16__)
  return bits_of<vh>(_mm512_cvtneps_pbh(x));
#else
  const vu u = bits_of<vu>(x);
  const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const vu quiet = (u >> 16) | 0x40;
  return __builtin_convertvector(x != x ? quiet : rounded, vh);
#endif
}

// n <= W elements as floats; lanes past n are zero and their memory is not touched.
FS_INLINE vf load(const float* p, int n) { return n == W ? load_vector<vf>(p) : load_lanes(p, n); }

FS_INLINE vf load(const bf16* p, int n) {
  if (n == W) return widen(load_vector<vh>(p));
  uint16_t lanes[W] = {};
  std::memcpy(lanes, p, sizeof(uint16_t) * n);
  return widen(load_vector<vh>(lanes));
}

FS_INLINE void store(float* p, vf x, int n) {
  if (n == W) {
    __builtin_memcpy(p, &x, sizeof(x));
    return;
  }
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), x);
#else
  std::memcpy(p, &x, sizeof(float) * n);
#endif
}

FS_INLINE void store(bf16* p, vf x, int n) {
  const vh bits = narrow(x);
  if (n == W) {
    __builtin_memcpy(p, &bits, sizeof(bits));
  } else {
    std::memcpy(p, &bits, sizeof(uint16_t) * n);
  }
}

#if defined(__clang__)
template <int... L>
FS_INLINE vu shuffle(vu a, vu b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, L...);
}
#endif

// Lanes of a and b alternating: of their lower halves, of their upper halves.
FS_INLINE void interleave(vu a, vu b, vu& lower, vu& upper) {
  vu lo, hi;
  for (int i = 0; i < W / 2; ++i) {
    lo[2 * i] = i, lo[2 * i + 1] = W + i;
    hi[2 * i] = W / 2 + i, hi[2 * i + 1] = W + W / 2 + i;
  }
#if defined(__clang__)
  for (int i = 0; i < W; ++i) {
    lower[i] = lo[i] < W ? a[lo[i]] : b[lo[i] - W];
    upper[i] = hi[i] < W ? a[hi[i]] : b[hi[i] - W];
  }
#else
  lower = __builtin_shuffle(a, b, lo);
  upper = __builtin_shuffle(a, b, hi);
#endif
}

// A W x W transpose in place, as log2(W) perfect shuffles of the rows.
FS_INLINE void transpose(vu (&rows)[W]) {
  for (int stage = 1; stage < W; stage *= 2) {
    vu next[W];
    for (int i = 0; i < W / 2; ++i) interleave(rows[i], rows[i + W / 2], next[2 * i], next[2 * i + 1]);
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

// 2^t = 2^n (1 + fraction), t = n + f, |f| <= 1/2: powers of two saturate instead of wrapping, a NaN stays NaN.
struct Exp2 {
  vf power, f;
};

#if defined(__AVX512F__)
constexpr __mmask16 kAll = 0xffff;  // masked forms: GCC 12 warns of its own header in the plain ones
FS_INLINE vf at_most(vf x, float limit) { return _mm512_maskz_min_ps(kAll, splat(limit), x); }
FS_INLINE Exp2 split_exp2(vf t) {
  const vf n = _mm512_maskz_roundscale_ps(kAll, t, _MM_FROUND_TO_NEAREST_INT);
  return {_mm512_maskz_scalef_ps(kAll, splat(1.f), n), _mm512_maskz_reduce_ps(kAll, t, _MM_FROUND_TO_NEAREST_INT)};
}
#else
FS_INLINE vf at_most(vf x, float limit) { return splat(limit) < x ? splat(limit) : x; }
FS_INLINE Exp2 split_exp2(vf t) {
  t = at_most(t, 126.f);
  t = t < splat(-126.f) ? splat(-126.f) : t;
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it drops the fraction
  const vf n = (t + magic) - magic;
  return {bits_of<vf>((__builtin_convertvector(n, vi) + 127) << 23), t - n};
}
#endif

// 1 / x of a finite x >= 1, to the last place but one; a division takes twice as long.
FS_INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
  const vf estimate = _mm512_maskz_rcp14_ps(kAll, x);
  return estimate * (2.f - x * estimate);
#else
  return 1.f / x;
#endif
}

// The value type of csrc/cells.h on the CPU.
struct SimdMath {
  using V = vf;

  // 2^f - 1 = f p(f): p is minimax, relative error 1.1e-8, so that tanh keeps full relative accuracy near zero.
  static FS_INLINE vf polynomial(vf f) {
    vf p = f * 1.540350824e-4f + 1.339073546e-3f;
    p = p * f + 9.618237508e-3f;
    p = p * f + 5.550357434e-2f;
    p = p * f + 2.402264979e-1f;
    return p * f + 6.931471879e-1f;
  }

  static FS_INLINE vf sigmoid(vf x) {  // 1 / (1 + 2^(-x log2 e))
    const Exp2 e = split_exp2(x * -1.442695041f);
    return 1.f / (e.power * (e.f * polynomial(e.f) + 1.f) + 1.f);
  }

  static FS_INLINE vf exp(vf x) {
    const Exp2 e = split_exp2(x * 1.442695041f);
    return e.power * (e.f * polynomial(e.f) + 1.f);
  }

  static FS_INLINE vf tanh(vf x) {  // m / (m + 2), m = 2^(2 x log2 e) - 1
    const Exp2 e = split_exp2(at_most(x * 2.885390082f, 60.f));
    const vf m = e.power * (e.f * polynomial(e.f)) + (e.power - 1.f);
    return m / (m + 2.f);
  }
};

}  // namespace FS_ISA
}  // namespace fastseq
