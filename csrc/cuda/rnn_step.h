// One step of a layer or a cell: both products and the cell in one launch. A block has 16 units of all gates and some rows of the
// batch; its warps share out the features of x and h, each reading every weight once, from global memory.
#pragma once

#include "../cells.h"
#include "cell_math.h"
#include "product.h"
#include "rnn_batch.h"

namespace fastseq::cuda {

constexpr int kStepRows = 16, kStepTiles = kStepRows / kTileColumns;

// Planes of sums: one if every gate adds to the same column from x and from h, as an LSTM's.
template <class C>
constexpr int step_planes() {
  int planes = 1;
  for (int gate = 0; gate < C::kGates; ++gate)
    if (C::kInput[gate] != C::kHidden[gate]) planes = 2;
  return planes;
}

template <class P, class T, template <class> class Cell, class M>
struct StepBlock {
  using C = Cell<M>;
  using E = typename P::Element;
  static constexpr int kGates = C::kGates, kColumns = C::kColumns;
  static constexpr int kPlanes = step_planes<C>();
  static constexpr int kPitch = kTileRows + 4;                       // of sums, and
  static constexpr int kStatePitch = P::kTileK + 16 / sizeof(E);  // of states: rows start 4 banks apart

  const RnnStep& a;
  const int unit0, row0;
  unsigned char* tiles;  // a warp's: kGates of weights
  E* states;             // a warp's: [kStepRows, kStatePitch]
  float* sums;           // [warp][plane][gate][row][unit]

  // One tile of k of W s, of `source` [.., features] with rows `pitch` apart.
  __device__ __forceinline__ void load(const void* w, const void* source, int64_t pitch, bool wide, int features, int k0) const {
    const int lane = threadIdx.x & 31;
    const T* weights = static_cast<const T*>(w);
#pragma unroll
    for (int i = 0; i < kTileRows * P::kTileK / 32; ++i) {
      const int at = i * 32 + lane, row = at / P::kTileK, k = at % P::kTileK;
      const bool inside = unit0 + row < a.H && k0 + k < features;
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        const float value = inside ? to_float(weights[(static_cast<int64_t>(gate) * a.H + unit0 + row) * features + k0 + k]) : 0.f;
        *reinterpret_cast<E*>(tiles + gate * kTileBytes + P::offset(row, k)) = P::stored(value);
      }
      const int b = row0 + row;  // kStepRows is kTileRows
      const bool there = b < a.B && k0 + k < features;
      states[row * kStatePitch + k] = P::stored(there ? load_either<T>(source, b * pitch + k0 + k, wide) : 0.f);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void multiply(float (&d)[kStepTiles][kGates][4]) const {
    const int lane = threadIdx.x & 31;
    typename P::State s[kStepTiles];
#pragma unroll
    for (int n = 0; n < kStepTiles; ++n) s[n] = P::state(states + n * kTileColumns * kStatePitch, kStatePitch, lane);
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      const auto w = P::load(tiles + gate * kTileBytes, lane);
#pragma unroll
      for (int n = 0; n < kStepTiles; ++n) P::multiply(d[n][gate], w, s[n]);
    }
    __syncwarp();
  }

  using Sums = float[kStepTiles][kGates][4];

  // d += this warp's share of one of the two products.
  __device__ __forceinline__ void product(Sums& d, const void* w, const void* source, int64_t pitch, bool wide, int features) {
    if (source)
      for (int k0 = (threadIdx.x >> 5) * P::kTileK; k0 < features; k0 += kWarps * P::kTileK) {
        load(w, source, pitch, wide, features, k0);
        multiply(d);
      }
  }
  __device__ __forceinline__ void put(int plane, const Sums& d) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int n = 0; n < kStepTiles; ++n)
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = n * kTileColumns + (lane & 3) * 2 + (i & 1), unit = (lane >> 2) + (i >> 1) * 8;
          sums[(((warp * kPlanes + plane) * kGates + gate) * kStepRows + row) * kPitch + unit] = d[n][gate][i];
        }
  }

  __device__ __forceinline__ float summed(int plane, int gate, int row, int unit) const {
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp)
      sum += sums[(((warp * kPlanes + plane) * kGates + gate) * kStepRows + row) * kPitch + unit];
    return sum;
  }

  __device__ __forceinline__ void run_cell(int row, int unit) const {
    constexpr auto map = column_map<C>();
    const int64_t b = row0 + row, u = unit0 + unit, at = b * a.H + u;
    const T *b_ih = static_cast<const T*>(a.b_ih), *b_hh = static_cast<const T*>(a.b_hh);
    float pre[kColumns] = {}, saved[kColumns];
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      const int64_t of_gate = static_cast<int64_t>(gate) * a.H + u;
      pre[map.input[gate]] += summed(0, gate, row, unit) + (b_ih ? to_float(b_ih[of_gate]) : 0.f);
      pre[map.hidden[gate]] += b_hh ? to_float(b_hh[of_gate]) : 0.f;
      if (kPlanes == 2) pre[map.hidden[gate]] += summed(1, gate, row, unit);
    }
    float h = a.h0 ? load_either<T>(a.h0, at, a.wide) : 0.f, c = a.c0 ? load_either<T>(a.c0, at, a.wide) : 0.f;
    C::forward(pre, h, c, saved);
    store_either<T>(a.h, at, a.wide, h);
    if (a.out) static_cast<T*>(a.out)[at] = from_float<T>(h);
    if (C::kCellState) store_either<T>(a.c, at, a.wide, c);
    if (a.cells) a.cells[at] = c;
    if (!a.gates) return;
#pragma unroll
    for (int column = 0; column < kColumns; ++column)
      static_cast<T*>(a.gates)[(b * kColumns + column) * a.H + u] = from_float<T>(saved[column]);
  }
};

template <class P, class T, template <class> class Cell, class M>
__global__ void __launch_bounds__(kThreads, 1) rnn_step(const __grid_constant__ RnnStep a) {
  using Block = StepBlock<P, T, Cell, M>;
  using E = typename P::Element;
  constexpr int kGates = Block::kGates;
  FS_DYNAMIC_SHARED(shared);
  const int unit_tiles = (a.H + kTileRows - 1) / kTileRows, warp = threadIdx.x >> 5;
  unsigned char* states = shared + kWarps * kGates * kTileBytes;
  float* sums = reinterpret_cast<float*>(states + kWarps * kStepRows * Block::kStatePitch * sizeof(E));
  Block block{a, static_cast<int>(blockIdx.x) % unit_tiles * kTileRows, static_cast<int>(blockIdx.x) / unit_tiles * kStepRows,
              shared + warp * kGates * kTileBytes, reinterpret_cast<E*>(states) + warp * kStepRows * Block::kStatePitch, sums};
  typename Block::Sums of_x = {}, of_h = {};
  block.product(of_x, a.w_ih, a.x, a.x_row, false, a.I);
  block.product(Block::kPlanes == 1 ? of_x : of_h, a.w_hh, a.h0, a.H, a.wide, a.H);
  block.put(0, of_x);
  if (Block::kPlanes == 2) block.put(1, of_h);
  __syncthreads();
  const int row = threadIdx.x / kTileRows, unit = threadIdx.x % kTileRows;  // kStepRows * kTileRows = kThreads
  if (block.row0 + row < a.B && block.unit0 + unit < a.H) block.run_cell(row, unit);
}

// Bytes of shared memory of a block of rnn_step: below the 99 KB of the smallest GPUs.
template <class P, class C>
constexpr int step_shared() {
  constexpr int kGates = C::kGates;
  return kWarps * (kGates * kTileBytes + kStepRows * (P::kTileK * static_cast<int>(sizeof(typename P::Element)) + 16) +
                   step_planes<C>() * kGates * kStepRows * (kTileRows + 4) * 4);
}

}  // namespace fastseq::cuda
