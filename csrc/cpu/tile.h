// The one product of the CPU backend: a tile of MR rows by NV vectors, accumulated over packed panels in vector registers, or
// where the variant has them in tile registers.
//
// Operands are counted in *units* of 32 bits: one fp32, or two bf16 neighbours along the summed dimension, so that the same
// loops serve both types and a bf16 unit feeds vdpbf16ps, and a panel tdpbf16ps, directly.
#pragma once

#include "amx.h"
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
#if defined(__AVX512BF16__) && !defined(FS_AMX)  // CPUs with tile registers take four multiply-adds' time for it
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

// The rows of a tile: `value` of them in vector registers ...
template <int N>
struct Rows {
  static constexpr int value = N;
  static constexpr int count() { return N; }
};

// ... or the first `rows` of as many as two tile registers have; its sums are in memory before and after.
struct RegisterRows {
  static constexpr int value = kRegisterTileRows;
  int rows;
  FS_INLINE int count() const { return rows; }
};

constexpr int tile_rows(int vectors) { return kTileRegisters ? kRegisterTileRows : kAccumulators / vectors; }

// About how long a tile takes, in cycles.
FS_INLINE int64_t tile_cycles(int64_t rows, int64_t vectors, int64_t depth) {
  return kTileRegisters ? (rows + kRegisterRows - 1) / kRegisterRows * vectors * depth : rows * vectors * depth / 2;
}

// f(m, v, acc[m][v]) for each vector of a tile.
template <int N, int NV, class F>
FS_INLINE void for_each_sum(Rows<N>, vf (&acc)[N][NV], F&& f) {
  unroll<N * NV>([&](int i) FS_LAMBDA { f(i / NV, i % NV, acc[i / NV][i % NV]); });
}

template <int NV, class F>
FS_INLINE void for_each_sum(RegisterRows rows, vf (&acc)[kRegisterTileRows][NV], F&& f) {
  for (int m = 0; m < rows.count(); ++m) unroll<NV>([&](int v) FS_LAMBDA { f(m, v, acc[m][v]); });
}

template <class Count, int MR, int NV>
FS_INLINE void set_zero(Count rows, vf (&acc)[MR][NV]) {
  for_each_sum(rows, acc, [](int, int, vf& sum) FS_LAMBDA { sum = vf{}; });
}

// acc[m][v] += sum over k of a[m][k * stride] * panel[k * pitch + v * W ...], in units.
template <class T, int MR, int NV>
FS_INLINE void multiply(Rows<MR>, const uint32_t* const* a, int64_t stride, const uint32_t* panel, int64_t pitch, int64_t k,
                        vf (&acc)[MR][NV]) {
  const uint32_t* rows[MR];
  for (int m = 0; m < MR; ++m) rows[m] = a[m];
  // Few rows: a second set of sums, or the latency of one chain of additions is the limit.
  constexpr int kSets = MR * NV <= 6 ? 2 : 1;
  vf extra[kSets == 2 ? MR : 1][NV];
  if constexpr (kSets == 2) set_zero(Rows<MR>{}, extra);
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

// The same, but the sums are others before.
template <class T, int MR, int NV>
FS_INLINE void multiply(Rows<MR> rows, const uint32_t* const* a, int64_t stride, const uint32_t* panel, int64_t pitch, int64_t k,
                        const FirstSums<NV>& first, vf (&acc)[MR][NV]) {
  for_each_sum(rows, acc, [&](int m, int v, vf& sum) FS_LAMBDA { sum = load_vector<vf>(first.from[v] + m * first.pitch[v]); });
  multiply<T>(rows, a, stride, panel, pitch, k, acc);
}

#if defined(FS_AMX)
template <class T, int NV>
FS_INLINE void multiply(RegisterRows rows, const uint32_t* const* a, int64_t stride, const uint32_t* panel, int64_t pitch, int64_t k,
                        const FirstSums<NV>& first, vf (&acc)[kRegisterTileRows][NV]) {
  static_assert(Dot<T>::kPerUnit == 2, "tile registers multiply bf16");
  static_cast<void>(stride);  // 1: rows as they stand
  multiply_registers<NV>(rows.count(), a, panel, pitch, k, first, acc);
}

template <class T, int NV>
FS_INLINE void multiply(RegisterRows rows, const uint32_t* const* a, int64_t stride, const uint32_t* panel, int64_t pitch, int64_t k,
                        vf (&acc)[kRegisterTileRows][NV]) {
  FirstSums<NV> first;
  for (int v = 0; v < NV; ++v) first.from[v] = reinterpret_cast<const float*>(&acc[0][v]), first.pitch[v] = NV * W;
  multiply<T>(rows, a, stride, panel, pitch, k, first, acc);
}
#endif

// f(Rows<rows>{}), `rows` in 1..MR.
template <int MR, class F>
FS_INLINE void with_rows(int64_t rows, F&& f) {
  if constexpr (MR > 1) {
    if (rows < MR) return with_rows<MR - 1>(rows, f);
  }
  f(Rows<MR>{});
}

// The same for the tile of a product, MR = tile_rows(vectors).
template <int MR, class F>
FS_INLINE void with_tile(int64_t rows, F&& f) {
  if constexpr (kTileRegisters) {
    f(RegisterRows{static_cast<int>(rows)});  // one row, too: it adds up as it does among others
  } else {
    with_rows<MR>(rows, f);
  }
}

// Splits `rows` into the fewest blocks of at most `most`, as even as possible: even tiles run at the same rate, a narrow rest would not.
// `whole`: all but the last have `most` rows, as tile registers do that are full or not.
struct Blocks {
  int64_t count, size, longer, rows;  // the first `longer` blocks have size + 1 rows

  FS_INLINE Blocks(int64_t all, int64_t most, bool whole = false) : count((all + most - 1) / most), size(0), longer(0), rows(all) {
    if (whole) {
      size = most;
    } else if (count) {
      size = rows / count, longer = rows - size * count;
    }
  }
  FS_INLINE int64_t begin(int64_t block) const {
    const int64_t at = block * size + (block < longer ? block : longer);
    return at < rows ? at : rows;
  }
};

}  // namespace FS_ISA
}  // namespace fastseq
