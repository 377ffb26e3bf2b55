// Products of stationary weights and a small batch of states on one warp: D [16 x 8] += W [16 x K] S [K x 8], fp32 sums.
//
// A kind says how numbers are stored and multiplied. All kinds share one layout of D, and one size of a tile of W, 512 bytes,
// so that no kernel knows which kind it has: lane l = 4 g + t holds D[g][2t], D[g][2t+1], D[g+8][2t], D[g+8][2t+1].
// The rows of D are outputs (units), its columns rows of the batch.
#pragma once

#include "portable.h"

namespace fastseq::cuda {

constexpr int kTileRows = 16, kTileColumns = 8, kTileBytes = 512;

// 16-bit floats on tensor cores. Multiply is mma_bf16 or mma_fp16.
template <class E, void (*Multiply)(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2])>
struct Halves {
  using Element = E;
  static constexpr int kTileK = 16;
  struct Weights { uint32_t r[4]; };
  struct State { uint32_t r[2]; };

  static __device__ __forceinline__ E stored(float x) { return from_float<E>(x); }
  static FS_HD int offset(int row, int k) {  // bytes within a tile of W: lane by lane, so that a lane reads 16 of them
    return ((row & 7) * 4 + ((k & 7) >> 1)) * 16 + ((row >> 3) + ((k >> 3) << 1)) * 4 + (k & 1) * 2;
  }
  static __device__ __forceinline__ Weights load(const unsigned char* tile, int lane) {
    const uint4 v = *reinterpret_cast<const uint4*>(tile + lane * 16);
    return {{v.x, v.y, v.z, v.w}};
  }
  // s: the first of 8 rows, `pitch` elements apart, at the tile's first k
  static __device__ __forceinline__ State state(const E* s, int pitch, int lane) {
    const E* p = s + (lane >> 2) * pitch + (lane & 3) * 2;
    return {{*reinterpret_cast<const uint32_t*>(p), *reinterpret_cast<const uint32_t*>(p + 8)}};
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const Weights& w, const State& s) {
    Multiply(d, w.r, s.r);
  }
};

using BrainHalf = Halves<Bf16, mma_bf16>;
using Half = Halves<Fp16, mma_fp16>;

// fp32 with 10 bits of mantissa into the tensor cores.
struct Tensor32 {
  using Element = float;
  static constexpr int kTileK = 8;
  struct Weights { uint32_t r[4]; };
  struct State { uint32_t r[2]; };

  static __device__ __forceinline__ float stored(float x) { return round_tf32(x); }
  static FS_HD int offset(int row, int k) {
    return ((row & 7) * 4 + (k & 3)) * 16 + ((row >> 3) + ((k >> 2) << 1)) * 4;
  }
  static __device__ __forceinline__ Weights load(const unsigned char* tile, int lane) {
    const uint4 v = *reinterpret_cast<const uint4*>(tile + lane * 16);
    return {{v.x, v.y, v.z, v.w}};
  }
  static __device__ __forceinline__ State state(const float* s, int pitch, int lane) {
    const uint32_t* p = reinterpret_cast<const uint32_t*>(s + (lane >> 2) * pitch + (lane & 3));
    return {{p[0], p[4]}};
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const Weights& w, const State& s) {
    mma_tf32(d, w.r, s.r);
  }
};

// fp32 in full, by fused multiply-adds. Four lanes read each weight, which costs no bandwidth.
struct Full32 {
  using Element = float;
  static constexpr int kTileK = 8;
  struct Weights { float4 r[4]; };  // rows g and g + 8, 8 k each
  struct State { float4 r[4]; };    // columns 2t and 2t + 1

  static __device__ __forceinline__ float stored(float x) { return x; }
  static FS_HD int offset(int row, int k) { return (row * 8 + k) * 4; }
  static __device__ __forceinline__ Weights load(const unsigned char* tile, int lane) {
    const float4* p = reinterpret_cast<const float4*>(tile) + (lane >> 2) * 2;
    return {{p[0], p[1], p[16], p[17]}};
  }
  static __device__ __forceinline__ State state(const float* s, int pitch, int lane) {
    const float* p = s + (lane & 3) * 2 * pitch;
    const float4 *even = reinterpret_cast<const float4*>(p), *odd = reinterpret_cast<const float4*>(p + pitch);
    return {{even[0], even[1], odd[0], odd[1]}};
  }
  static __device__ __forceinline__ float dot(const float4& a, const float4& b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const Weights& w, const State& s) {
    for (int half = 0; half < 2; ++half) {
      d[0] = dot(w.r[half], s.r[half], d[0]);
      d[1] = dot(w.r[half], s.r[2 + half], d[1]);
      d[2] = dot(w.r[2 + half], s.r[half], d[2]);
      d[3] = dot(w.r[2 + half], s.r[2 + half], d[3]);
    }
  }
};

// A warp's share of a product: `tiles` tiles of k for each of kM tiles of rows. The first kKept of them stay in registers for
// as long as the kernel runs, the others in shared memory.
template <class P, int kM, int kKept>
struct Stationary {
  typename P::Weights kept[kKept > 0 ? kKept : 1][kM];
  const unsigned char* rest;  // [tiles - kKept][kM] tiles
  int tiles;

  // slice: where rest lies; staging: kM tiles, the warp's own, unless kKept is 0. weight(m, row, k): the tile's element,
  // 0 beyond the matrix.
  template <class F>
  __device__ __forceinline__ void load(unsigned char* slice, unsigned char* staging, int count, F weight) {
    const int lane = threadIdx.x & 31;
    rest = slice;
    tiles = count;
    const auto fill = [&](unsigned char* tile, int m, int i) {
#pragma unroll  // so that all loads are in flight at once
      for (int j = 0; j < kTileRows * P::kTileK / 32; ++j) {
        const int at = j * 32 + lane, row = at / P::kTileK, k = at % P::kTileK;
        *reinterpret_cast<typename P::Element*>(tile + P::offset(row, k)) = P::stored(weight(m, row, i * P::kTileK + k));
      }
    };
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
#pragma unroll 1  // with the addresses of all at once registers would run out
      for (int m = 0; m < kM; ++m) fill(staging + m * kTileBytes, m, i);
      __syncwarp();
#pragma unroll
      for (int m = 0; m < kM; ++m) kept[i][m] = P::load(staging + m * kTileBytes, lane);
      __syncwarp();
    }
    for (int i = kKept; i < count; ++i)
      for (int m = 0; m < kM; ++m) fill(slice + ((i - kKept) * kM + m) * kTileBytes, m, i);
    __syncwarp();
  }

  // sums [kN][kM] += W S for kN x 8 rows of the batch. s: the first row, at this share's first k.
  template <int kN>
  __device__ __forceinline__ void multiply(float (&sums)[kN][kM][4], const typename P::Element* s, int pitch) const {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const auto state = P::state(s + n * kTileColumns * pitch + i * P::kTileK, pitch, lane);
#pragma unroll
        for (int m = 0; m < kM; ++m) P::multiply(sums[n][m], kept[i][m], state);
      }
    }
    const unsigned char* tile = rest;
#pragma unroll 2
    for (int i = kKept; i < tiles; ++i) {
      typename P::State state[kN];
#pragma unroll
      for (int n = 0; n < kN; ++n)
        state[n] = P::state(s + n * kTileColumns * pitch + i * P::kTileK, pitch, lane);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const auto weights = P::load(tile + m * kTileBytes, lane);
#pragma unroll
        for (int n = 0; n < kN; ++n) P::multiply(sums[n][m], weights, state[n]);
      }
      tile += kM * kTileBytes;
    }
  }
};

}  // namespace fastseq::cuda
