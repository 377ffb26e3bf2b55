// Tile registers: 16 rows of 64 bytes, multiplied by the CPU's matrix unit (Intel AMX). tdpbf16ps adds to 16 x 16 sums the product of
// 16 rows of 16 units and 16 units of 16 columns: a packed panel is what its second factor looks like.
//
// FS_AMX has them; with FS_EMULATE_AMX they are arrays, so that other CPUs, and the address sanitizer, test what multiplies by them.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "simd.h"
#include "team.h"

namespace fastseq {
namespace FS_ISA {

constexpr int kRegisterRows = 16, kRegisterTileRows = 2 * kRegisterRows;

// What the sums of a tile start from: row m's vector v is at from[v] + m * pitch[v].
template <int NV>
struct FirstSums {
  const float* from[NV];
  int64_t pitch[NV];
};
#if defined(FS_AMX)
constexpr bool kTileRegisters = true;
static_assert(W == 16, "a row of a tile register is a vector");

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

// A tile of R by NV registers of sums, beside R registers of rows and up to three of columns, eight in all. Two by two read a panel half
// as often from the second-level cache as one by four.
template <int R, int NV>
struct RegisterTile {
  static constexpr int kA = R * NV, kB = kA + R, kColumns = NV < 8 - kB ? NV : 8 - kB, kBytes = 64;
  static_assert(kColumns > 0);

  int rows;
  const uint32_t* const* a;
  bool even[R];  // rows that lie evenly are loaded as they lie, others copied
  int64_t apart[R];  // in bytes
  alignas(64) uint32_t copies[2][R][kRegisterRows][W];

  RegisterTile(int count, const uint32_t* const* of) : rows(count), a(of) {
    for (int r = 0; r < R; ++r) {
      const auto bytes_to = [&](int m) FS_LAMBDA {
        return reinterpret_cast<intptr_t>(a[r * kRegisterRows + m]) - reinterpret_cast<intptr_t>(a[r * kRegisterRows + m - 1]);
      };
      even[r] = (r + 1) * kRegisterRows <= rows;
      apart[r] = even[r] ? bytes_to(1) : 0;  // perhaps not whole units
      for (int m = 2; even[r] && m < kRegisterRows; ++m) even[r] = bytes_to(m) == apart[r];
    }
  }

  // Units [i, i + units) of the rows.
  template <int Register>
  FS_INLINE void load_rows(int64_t i, int units) {
    if (even[Register] && units == W) return load_tile<kA + Register>(a[Register * kRegisterRows] + i, apart[Register]);
    auto& to = copies[i / W % 2][Register];
    for (int m = 0; m < kRegisterRows; ++m) {
      const int row = Register * kRegisterRows + m;
      const vu found = row >= rows     ? vu{}
                       : units == W ? load_vector<vu>(a[row] + i)
                                    : bits_of<vu>(load_lanes(reinterpret_cast<const float*>(a[row] + i), units));
      std::memcpy(to[m], &found, kBytes);
    }
    load_tile<kA + Register>(to, kBytes);
  }

  FS_INLINE void add(int64_t i, int units, const uint32_t* b, int64_t pitch) {
    unroll<R>([&](auto r) FS_LAMBDA { load_rows<r>(i, units); });
    unroll<NV>([&](auto v) FS_LAMBDA {
      constexpr int kV = decltype(v)::value, kColumn = kB + kV % kColumns;
      load_tile<kColumn>(b + kV * W, 4 * pitch);
      unroll<R>([&](auto r) FS_LAMBDA { multiply_tiles<decltype(r)::value * NV + kV, kA + decltype(r)::value, kColumn>(); });
    });
  }

  // Columns [v, v + NV) of the N.
  template <int N>
  FS_INLINE void run(const uint32_t* panel, int64_t pitch, int64_t k, const FirstSums<N>& first, int v, vf (*acc)[N]) {
    panel += v * W;
    unroll<R * NV>([&](auto i) FS_LAMBDA {
      const int64_t step = first.pitch[v + i % NV];
      load_tile<i>(first.from[v + i % NV] + i / NV * kRegisterRows * step, 4 * step);
    });
    int64_t i = 0;
    for (; i + W <= k; i += W) add(i, W, panel + i * pitch, pitch);
    if (const int units = static_cast<int>(k - i)) {
      alignas(64) uint32_t rest[W][NV * W] = {};  // no unit past the last is read: it might be a NaN, or nowhere
      for (int u = 0; u < units; ++u) std::memcpy(rest[u], panel + (i + u) * pitch, NV * kBytes);
      add(i, units, rest[0], NV * W);
    }
    unroll<R * NV>([&](auto i) FS_LAMBDA { store_tile<i>(&acc[i / NV * kRegisterRows][v + i % NV], N * kBytes); });
  }
};

constexpr int64_t kNearUnits = 128;  // of a panel that the first-level cache holds while all rows are multiplied by it

// acc[m][v] = first sums + sum over units of a[m][k] * panel[k * pitch + v * W ...] for m < rows; what the rest holds is anyone's guess.
template <int NV>
__attribute__((noinline)) void multiply_registers(int rows, const uint32_t* const* a, const uint32_t* panel, int64_t pitch, int64_t k,
                                                  FirstSums<NV> first, vf (&acc)[kRegisterTileRows][NV]) {
  if (rows % kRegisterRows) {  // those past the last row are nowhere
    for (int v = 0; v < NV; ++v) {
      for (int m = 0; m < rows; ++m) acc[m][v] = load_vector<vf>(first.from[v] + m * first.pitch[v]);
      first.from[v] = reinterpret_cast<const float*>(&acc[0][v]), first.pitch[v] = NV * W;
    }
  }
  if (k <= kNearUnits) {
    for (int r = 0; r < rows; r += kRegisterRows) {
      RegisterTile<1, NV>(rows - r, a + r).run(panel, pitch, k, first, 0, acc + r);
      for (int v = 0; v < NV; ++v) first.from[v] += kRegisterRows * first.pitch[v];
    }
    return;
  }
  if (rows <= kRegisterRows) return RegisterTile<1, NV>(rows, a).run(panel, pitch, k, first, 0, acc);
  if constexpr (NV > 1) {
    RegisterTile<2, 2> two(rows, a);
    for (int v = 0; v + 2 <= NV; v += 2) two.run(panel, pitch, k, first, v, acc);
  }
  if constexpr (NV % 2) RegisterTile<2, 1>(rows, a).run(panel, pitch, k, first, NV - 1, acc);
}

// While it lives, its thread may multiply by tile registers; one at a time.
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
