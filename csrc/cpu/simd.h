// One SIMD vector type for every instruction set: GCC/Clang vector extensions, with intrinsics only where they pay.
// Everything lives in the namespace of its ISA variant, so that no inline function compiled for one leaks into another.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

// Masked loads and stores are built into the compiler: the address sanitizer does not see them, and so is given copies.
#if defined(__SANITIZE_ADDRESS__)
#define FS_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FS_SANITIZED 1
#endif
#endif
#if defined(__AVX512F__) && !defined(FS_SANITIZED)
#define FS_MASKS_512
#elif defined(__AVX2__) && !defined(FS_SANITIZED)
#define FS_MASKS_256
#endif

// Inlined always where it is fast. A sanitizer's checks, copied along, take twenty times as long to compile.
#if defined(FS_SANITIZED)
#define FS_INLINE inline
#define FS_LAMBDA
#else
#define FS_INLINE inline __attribute__((always_inline))
#define FS_LAMBDA __attribute__((always_inline))
#endif

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
typedef uint8_t vb __attribute__((vector_size(W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

template <class F, int... I>
FS_INLINE void unroll(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}

// f of the constants 0 ... N - 1, one by one: vectors of an array that a loop walks through live in memory, not in registers.
template <int N, class F>
FS_INLINE void unroll(F&& f) {
  unroll(std::make_integer_sequence<int, N>{}, f);
}

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

// Not `= {}`, which GCC writes to memory with `rep stos`: that takes as long as many of the sums that follow.
template <int N>
FS_INLINE void set_zero(vf (&sums)[N]) {
  unroll<N>([&](int i) FS_LAMBDA { sums[i] = vf{}; });
}

template <class V, class T>
FS_INLINE V load_vector(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

#if defined(FS_MASKS_512)
FS_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
#elif defined(FS_MASKS_256)
FS_INLINE __m256i first_lanes(int n) { return bits_of<__m256i>(vi{0, 1, 2, 3, 4, 5, 6, 7} < n); }
#endif

// The first n 32-bit lanes, the rest zero.
FS_INLINE vf load_lanes(const float* p, int n) {
#if defined(FS_MASKS_512)
  return _mm512_maskz_loadu_ps(first_lanes(n), p);
#elif defined(FS_MASKS_256)
  return _mm256_maskload_ps(p, first_lanes(n));
#else
  float lanes[W] = {};
  std::memcpy(lanes, p, sizeof(float) * n);
  return load_vector<vf>(lanes);
#endif
}

// The first n of `p`'s 16-bit values as a vector V, the rest zero.
template <class V>
FS_INLINE V load_halves(const void* p, int n) {
#if defined(FS_MASKS_512)
  if constexpr (sizeof(V) == sizeof(__m512i)) {
    return bits_of<V>(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p));
  } else {
    return bits_of<V>(_mm256_maskz_loadu_epi16(first_lanes(n), p));
  }
#else
  uint16_t lanes[sizeof(V) / sizeof(uint16_t)] = {};
  std::memcpy(lanes, p, sizeof(uint16_t) * n);
  return load_vector<V>(lanes);
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
  return widen(n == W ? load_vector<vh>(p) : load_halves<vh>(p, n));
}

// Bytes as floats. GCC 12 makes some seventy instructions of the conversion by itself.
FS_INLINE vf floats_of(vb bytes) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepu8_epi32(0xffff, bits_of<__m128i>(bytes)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits_of<int64_t>(bytes))));
#else
  return __builtin_convertvector(bytes, vf);
#endif
}

// The first n <= W bools as 1 or 0.
FS_INLINE vf load_flags(const uint8_t* p, int n) {
  if (n == W) return floats_of(load_vector<vb>(p));
  uint8_t lanes[W] = {};
  std::memcpy(lanes, p, n);
  return floats_of(load_vector<vb>(lanes));
}

FS_INLINE void store(float* p, vf x, int n) {
  if (n == W) {
    __builtin_memcpy(p, &x, sizeof(x));
    return;
  }
#if defined(FS_MASKS_512)
  _mm512_mask_storeu_ps(p, first_lanes(n), x);
#elif defined(FS_MASKS_256)
  _mm256_maskstore_ps(p, first_lanes(n), x);
#else
  std::memcpy(p, &x, sizeof(float) * n);
#endif
}

FS_INLINE void store(bf16* p, vf x, int n) {
  const vh bits = narrow(x);
  if (n == W) {
    __builtin_memcpy(p, &bits, sizeof(bits));
  } else {
#if defined(FS_MASKS_512)
    _mm256_mask_storeu_epi16(p, first_lanes(n), bits_of<__m256i>(bits));
#else
    std::memcpy(p, &bits, sizeof(uint16_t) * n);
#endif
  }
}

// Element i is element at(i) of a and b side by side, both taken as vectors of E; `at` folds to a constant.
template <class E, class At>
FS_INLINE vu shuffle(vu a, vu b, At&& at) {
  constexpr int kCount = sizeof(vu) / sizeof(E);
  typedef E V __attribute__((vector_size(sizeof(vu))));
#if defined(__clang__)
  V result;
  for (int i = 0; i < kCount; ++i) result[i] = at(i) < kCount ? bits_of<V>(a)[at(i)] : bits_of<V>(b)[at(i) - kCount];
  return bits_of<vu>(result);
#else
  V from;
  for (int i = 0; i < kCount; ++i) from[i] = at(i);
  return bits_of<vu>(__builtin_shuffle(bits_of<V>(a), bits_of<V>(b), from));
#endif
}

// Elements of a and b by turns, those of the lower and of the upper half of each 128 bits: whatever crosses them takes longer.
template <class E>
FS_INLINE void interleave(vu a, vu b, vu& lower, vu& upper) {
  constexpr int kCount = sizeof(vu) / sizeof(E), kQuad = 16 / sizeof(E);
  const auto at = [](int i) FS_LAMBDA { return i / kQuad * kQuad + i % kQuad / 2 + i % 2 * kCount; };
  lower = shuffle<E>(a, b, at);
  upper = shuffle<E>(a, b, [&](int i) FS_LAMBDA { return at(i) + kQuad / 2; });
}

// The even and the odd 128 bits of a and b side by side.
FS_INLINE void deal(vu a, vu b, vu& even, vu& odd) {
  const auto at = [](int i) FS_LAMBDA { return i / 2 * 4 + i % 2; };
  even = shuffle<uint64_t>(a, b, at);
  odd = shuffle<uint64_t>(a, b, [&](int i) FS_LAMBDA { return at(i) + 2; });
}

// The lower and the upper halves of a and b side by side.
FS_INLINE void halve(vu a, vu b, vu& lower, vu& upper) {
  constexpr int kHalf = W / 4;
  const auto at = [](int i) FS_LAMBDA { return i < kHalf ? i : i + kHalf; };
  lower = shuffle<uint64_t>(a, b, at);
  upper = shuffle<uint64_t>(a, b, [&](int i) FS_LAMBDA { return at(i) + kHalf; });
}

// All lanes folded into one by halves: a chain over them would take W additions.
template <int kHalf = W / 2, class F>
FS_INLINE float fold_lanes(vf x, F&& f) {
  if constexpr (kHalf == 0) {
    return x[0];
  } else {
    const vu other = shuffle<uint32_t>(bits_of<vu>(x), bits_of<vu>(x), [](int i) FS_LAMBDA { return (i + kHalf) % W; });
    return fold_lanes<kHalf / 2>(f(x, bits_of<vf>(other)), f);
  }
}

FS_INLINE float sum_lanes(vf x) {
  return fold_lanes(x, [](vf a, vf b) FS_LAMBDA { return a + b; });
}

FS_INLINE int lanes_left(int64_t at, int64_t total) { return total - at < W ? static_cast<int>(total - at) : W; }

// f(first, lanes) for the vectors of `total` elements.
template <class F>
FS_INLINE void for_vectors(int64_t total, F&& f) {
  for (int64_t u = 0; u < total; u += W) f(u, lanes_left(u, total));
}

// x, its lanes past n zero, whatever they were.
FS_INLINE vf first_of(vf x, int n) {
  if (n == W) return x;
  vi lane;
  unroll<W>([&](int i) FS_LAMBDA { lane[i] = i; });
  return bits_of<vf>(bits_of<vi>(x) & (lane < n));
}

// 16 bytes each from W / 4 places, `pitch` elements apart.
template <class T>
FS_INLINE vu load_quads(const T* p, int64_t pitch) {
#if defined(__AVX512F__)
  const auto quad = [&](int i) FS_LAMBDA { return load_vector<__m128i>(p + i * pitch); };
  const __m512i two = _mm512_inserti32x4(_mm512_castsi128_si512(quad(0)), quad(1), 1);
  return bits_of<vu>(_mm512_inserti32x4(_mm512_inserti32x4(two, quad(2), 2), quad(3), 3));
#elif defined(__AVX2__)
  const __m256i first = _mm256_castsi128_si256(load_vector<__m128i>(p));
  return bits_of<vu>(_mm256_inserti128_si256(first, load_vector<__m128i>(p + pitch), 1));
#else
  static_cast<void>(pitch);
  return load_vector<vu>(p);
#endif
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
