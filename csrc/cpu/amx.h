// Tile registers: 16 rows of 64 bytes, multiplied by the CPU's matrix unit (Intel AMX). tdpbf16ps adds to 16 x 16 sums the product of
// 16 rows of 16 units and 16 units of 16 columns: a packed panel is what its second factor looks like.
//
// FS_AMX has them; with FS_EMULATE_AMX they are arrays, so that other CPUs, and the address sanitizer, test what multiplies by them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <type_traits>

#include "simd.h"
#include "team.h"

namespace fastseq {
namespace FS_ISA {

constexpr int kRegisterRows = 16;
#if defined(FS_AMX)
constexpr bool kTileRegisters = true;

template <int... I, class F>
FS_INLINE void unroll_constants(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}

#if defined(FS_EMULATE_AMX)
struct TileFile {
  bool configured = false;
  uint8_t rows[8][kRegisterRows][64];
};
inline thread_local TileFile tile_file;

FS_INLINE uint32_t bits_at(const uint8_t* p) {
  uint32_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits;
}

FS_INLINE TileFile& configured_tiles() {
  if (!tile_file.configured) std::abort();  // as a CPU would raise #UD
  return tile_file;
}

template <int I>
FS_INLINE void load_tile(const void* from, int64_t bytes) {
  for (int r = 0; r < kRegisterRows; ++r) std::memcpy(configured_tiles().rows[I][r], static_cast<const char*>(from) + r * bytes, 64);
}

template <int I>
FS_INLINE void store_tile(void* to, int64_t bytes) {
  for (int r = 0; r < kRegisterRows; ++r) std::memcpy(static_cast<char*>(to) + r * bytes, configured_tiles().rows[I][r], 64);
}

template <int Sums, int A, int B>
FS_INLINE void multiply_tiles() {
  TileFile& tiles = configured_tiles();
  for (int r = 0; r < kRegisterRows; ++r) {
    vf sums = load_vector<vf>(tiles.rows[Sums][r]);
    for (int k = 0; k < 16; ++k) {
      const vu a = vu{} + bits_at(tiles.rows[A][r] + 4 * k), b = load_vector<vu>(tiles.rows[B][k]), high = vu{} + 0xffff0000u;
      sums += bits_of<vf>(a << 16) * bits_of<vf>(b << 16);
      sums += bits_of<vf>(a & high) * bits_of<vf>(b & high);
    }
    std::memcpy(tiles.rows[Sums][r], &sums, 64);
  }
}

FS_INLINE void configure_tiles() { tile_file.configured = true; }
FS_INLINE void release_tiles() { tile_file.configured = false; }
#else
template <int I>
FS_INLINE void load_tile(const void* from, int64_t bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(bytes), "i"(I) : "memory");
}

template <int I>
FS_INLINE void store_tile(void* to, int64_t bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(bytes), "i"(I) : "memory");
}

template <int Sums, int A, int B>
FS_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(A), "i"(B));
}

FS_INLINE void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("ldtilecfg %0" : : "m"(config));
}

FS_INLINE void release_tiles() { asm volatile("tilerelease"); }
#endif

// acc[m][v] += sum over units of a[m][k] * panel[k * pitch + v * W ...] for m < rows; what the rest holds is anyone's guess.
template <int NV>
__attribute__((noinline)) void multiply_registers(int rows, const uint32_t* const* a, const uint32_t* panel, int64_t pitch, int64_t k,
                                                  vf (&acc)[kRegisterRows][NV]) {
  static_assert(NV <= 4, "sums, one A and three B take the eight registers");
  constexpr int kA = NV, kB = NV + 1, kCopies = 2, kRow = 64;
  const auto each = [](auto&& f) FS_LAMBDA { unroll_constants(std::make_integer_sequence<int, NV>{}, f); };
  const auto bytes_to = [&](int m) FS_LAMBDA { return reinterpret_cast<intptr_t>(a[m]) - reinterpret_cast<intptr_t>(a[m - 1]); };
  bool even = rows == kRegisterRows;
  const int64_t apart = even ? bytes_to(1) : 0;  // perhaps half units
  for (int m = 2; even && m < kRegisterRows; ++m) even = bytes_to(m) == apart;
  alignas(64) uint32_t copies[kCopies][kRegisterRows][W];  // of rows that do not lie evenly
  const auto copy = [&](int64_t i, int64_t units) FS_LAMBDA {
    auto& to = copies[i / W % kCopies];
    for (int m = 0; m < kRegisterRows; ++m) {
      const vu row = m >= rows ? vu{} : units >= W ? load_vector<vu>(a[m] + i) : bits_of<vu>(load_lanes(reinterpret_cast<const float*>(a[m] + i), static_cast<int>(units)));
      std::memcpy(to[m], &row, kRow);
    }
    load_tile<kA>(to, kRow);
  };
  const auto block = [&](const uint32_t* b, int64_t b_pitch) FS_LAMBDA {
    each([&](auto v) FS_LAMBDA {
      constexpr int kOf = kB + v % 3;
      load_tile<kOf>(b + v * W, 4 * b_pitch);
      multiply_tiles<v, kA, kOf>();
    });
  };
  each([&](auto v) FS_LAMBDA { load_tile<v>(&acc[0][v], NV * kRow); });
  int64_t i = 0;
  for (; i + W <= k; i += W) {
    if (even) {
      load_tile<kA>(a[0] + i, apart);
    } else {
      copy(i, W);
    }
    block(panel + i * pitch, pitch);
  }
  if (const int units = static_cast<int>(k - i)) {
    alignas(64) uint32_t rest[W][NV * W] = {};  // no unit past the last is read: it might be a NaN, or nowhere
    for (int u = 0; u < units; ++u) std::memcpy(rest[u], panel + (i + u) * pitch, NV * kRow);
    copy(i, units);
    block(rest[0], NV * W);
  }
  each([&](auto v) FS_LAMBDA { store_tile<v>(&acc[0][v], NV * kRow); });
}

// While it lives, its thread may multiply by tile registers.
struct TileRegisters {
  TileRegisters() { configure_tiles(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() { release_tiles(); }
};

// Of this variant's kernels: every thread has them.
template <class F>
void parallel(int threads, F&& body) {
  fastseq::parallel(threads, [&](int rank, int size) {
    const TileRegisters registers;
    body(rank, size);
  });
}
#else
constexpr bool kTileRegisters = false;

struct TileRegisters {};
#endif

}  // namespace FS_ISA
}  // namespace fastseq
