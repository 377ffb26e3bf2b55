// The one product of the CPU backend: a register tile of MR rows by NV vectors, accumulated over packed panels.
//
// Operands are counted in *units* of 32 bits: one fp32, or two bf16 neighbours along the summed dimension, so that the same
// loops serve both types and a bf16 unit feeds vdpbf16ps directly.
#pragma once

#include "simd.h"

namespace fastseq {
namespace FS_ISA {

template <class T>
struct Dot;

template <>
struct Dot<float> {
  static constexpr int kPerUnit = 1;
  static FS_INLINE vf fma(vu a, vu b, vf acc) { return bits_of<vf>(a) * bits_of<vf>(b) + acc; }
};

template <>
struct Dot<bf16> {
  static constexpr int kPerUnit = 2;
  static FS_INLINE vf fma(vu a, vu b, vf acc) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(acc, bits_of<__m512bh>(a), bits_of<__m512bh>(b));
#else
    const vu high = vu{} + 0xffff0000u;
    acc = bits_of<vf>(a << 16) * bits_of<vf>(b << 16) + acc;
    return bits_of<vf>(a & high) * bits_of<vf>(b & high) + acc;
#endif
  }
};

template <class T>
FS_INLINE int64_t units(int64_t elements) {
  return (elements + Dot<T>::kPerUnit - 1) / Dot<T>::kPerUnit;
}

FS_INLINE vu splat_unit(const uint32_t* p) {
#if defined(__AVX512F__)
  int32_t bits;
  __builtin_memcpy(&bits, p, 4);
  return bits_of<vu>(_mm512_set1_epi32(bits));
#else
  uint32_t bits;
  __builtin_memcpy(&bits, p, 4);
  return vu{} + bits;
#endif
}

// f(m, v, acc[m][v]) for each vector of a tile.
template <int MR, int NV, class F>
FS_INLINE void for_each_sum(vf (&acc)[MR][NV], F&& f) {
  unroll<MR * NV>([&](int i) FS_LAMBDA { f(i / NV, i % NV, acc[i / NV][i % NV]); });
}

template <int MR, int NV>
FS_INLINE void set_zero(vf (&acc)[MR][NV]) {
  for_each_sum(acc, [](int, int, vf& sum) FS_LAMBDA { sum = vf{}; });
}

// acc[m][v] += sum over k of a[m][k * stride] * panel[k * pitch + v * W ...], in units.
template <class T, int MR, int NV>
FS_INLINE void multiply(const uint32_t* const* a, int64_t stride, const uint32_t* panel, int64_t pitch, int64_t k,
                        vf (&acc)[MR][NV]) {
  const uint32_t* rows[MR];
  for (int m = 0; m < MR; ++m) rows[m] = a[m];
  // Few rows: a second set of sums, or the latency of one chain of additions is the limit.
  constexpr int kSets = MR * NV <= 6 ? 2 : 1;
  vf extra[kSets == 2 ? MR : 1][NV];
  if constexpr (kSets == 2) set_zero(extra);
  int64_t i = 0;
  if constexpr (kSets == 2) {
    for (; i + 2 <= k; i += 2) {
      vu b[2][NV];
      for (int v = 0; v < NV; ++v) b[0][v] = load_vector<vu>(panel + i * pitch + v * W);
      for (int v = 0; v < NV; ++v) b[1][v] = load_vector<vu>(panel + (i + 1) * pitch + v * W);
      for (int m = 0; m < MR; ++m) {
        const vu even = splat_unit(rows[m] + i * stride), odd = splat_unit(rows[m] + (i + 1) * stride);
        for (int v = 0; v < NV; ++v) acc[m][v] = Dot<T>::fma(even, b[0][v], acc[m][v]);
        for (int v = 0; v < NV; ++v) extra[m][v] = Dot<T>::fma(odd, b[1][v], extra[m][v]);
      }
    }
  }
  for (; i < k; ++i) {
    vu b[NV];
    for (int v = 0; v < NV; ++v) b[v] = load_vector<vu>(panel + i * pitch + v * W);
    for (int m = 0; m < MR; ++m) {
      const vu x = splat_unit(rows[m] + i * stride);
      for (int v = 0; v < NV; ++v) acc[m][v] = Dot<T>::fma(x, b[v], acc[m][v]);
    }
  }
  if constexpr (kSets == 2) {
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) acc[m][v] += extra[m][v];
  }
}

// Calls f(std::integral_constant-like tag) with the compile-time row count equal to `rows` in 1..MR.
template <int N>
struct Rows {
  static constexpr int value = N;
};

template <int MR, class F>
FS_INLINE void with_rows(int64_t rows, F&& f) {
  if constexpr (MR > 1) {
    if (rows < MR) return with_rows<MR - 1>(rows, f);
  }
  f(Rows<MR>{});
}

// Splits `rows` into the fewest blocks of at most MR, as even as possible: even tiles run at the same rate, a narrow rest would not.
struct Blocks {
  int64_t count, size, longer;  // the first `longer` blocks have size + 1 rows

  FS_INLINE Blocks(int64_t rows, int64_t most) : count((rows + most - 1) / most), size(0), longer(0) {
    if (count) size = rows / count, longer = rows - size * count;
  }
  FS_INLINE int64_t begin(int64_t block) const { return block * size + (block < longer ? block : longer); }
};

}  // namespace FS_ISA
}  // namespace fastseq
