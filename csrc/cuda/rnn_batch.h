// Where the row-steps of a layer's tensors lie, which of them a direction runs, and which of them are a thread's own.
#pragma once

#include "product.h"
#include "rnn.h"

namespace fastseq::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMostPairs = 2;  // (row, unit) pairs of a thread: rows * units of a block <= 512

// The steps of one direction. Direction 1 runs t = T-1 .. 0 and holds its initial state while t >= length.
struct Steps {
  const RnnBatch& batch;
  int direction;

  __device__ __forceinline__ int length(int b) const {  // -1 of a row that does not exist
    if (b >= batch.B) return -1;
    if (!batch.lengths) return batch.T;
    const int64_t given = batch.lengths_wide ? static_cast<const int64_t*>(batch.lengths)[b]
                                             : static_cast<const int32_t*>(batch.lengths)[b];
    return given < 0 ? 0 : given < batch.T ? static_cast<int>(given) : batch.T;
  }
  __device__ __forceinline__ int at(int s) const { return direction ? batch.T - 1 - s : s; }
  __device__ __forceinline__ int before(int t) const { return direction ? t + 1 : t - 1; }
  __device__ __forceinline__ int after(int t) const { return direction ? t - 1 : t + 1; }
  // int64 throughout: T * B * H passes 2^31
  __device__ __forceinline__ int64_t token(int t, int b) const {
    return batch.starts ? batch.starts[t] + b : t * batch.step + b * batch.row;
  }
  __device__ __forceinline__ int64_t token_of_direction(int t, int b) const {
    return direction * batch.tokens + token(t, b);
  }
  // Whether row b's state is zeroed before step t: where its segment begins, or, in direction 1, where it ends.
  __device__ __forceinline__ bool resets(int t, int b, int length) const {
    const int at = direction ? t + 1 : t;
    return batch.resets && t >= 0 && t < length && at < length && batch.resets[token(at, b)];
  }
};

// The (row, unit) pairs of a thread, of a block of rows and of units: the same for all steps, so that no state changes hands.
//
// They lie tile by tile, 16 units of 8 rows, as a product leaves them (product.h): what lane l = 4 g + t holds, rows 2t and
// 2t + 1 of units g and g + 8, are 16 bytes in a row, at chunk 8 t + (g ^ 2t) of a tile. Swapped so, what 8 lanes write lies in
// all banks, and so do the 8 chunks that a warp reads: 2 rows of 16 units, whole sectors of global memory.
struct Pairs {
  int place[kMostPairs], length[kMostPairs];  // row and unit, in one register; length: -1 if there is no such row or unit
  int count;                                  // within the blocks

  static __device__ __forceinline__ int own(int p) { return threadIdx.x + p * kThreads; }  // of [rows / 8, units / 16, 8, 16]
  __device__ __forceinline__ int row(int p) const { return place[p] >> 8; }
  __device__ __forceinline__ int unit(int p) const { return place[p] & 0xff; }
  // Where a lane's four numbers of a product begin: of a tile of units, of `tiles`, and of a tile of rows.
  static __device__ __forceinline__ int chunk(int tile_of_rows, int tile, int tiles) {
    const int lane = threadIdx.x & 31, t = lane & 3;
    return (tile_of_rows * tiles + tile) * (kTileRows * kTileColumns) + (8 * t + (lane >> 2 ^ 2 * t)) * 4;
  }

  // f(p) for each. Unrolled, since a variable index would move all of a kernel's arrays out of its registers.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll
    for (int p = 0; p < kMostPairs; ++p)
      if (p < count) f(p);
  }
  // f(p) for those that run step t.
  template <class F>
  __device__ __forceinline__ void running(int t, F f) const {
#pragma unroll
    for (int p = 0; p < kMostPairs; ++p)
      if (t < length[p]) f(p);
  }
  __device__ __forceinline__ void set(const Steps& steps, const RnnShape& shape, int row0, int unit0, int H) {
    count = 0;
#pragma unroll
    for (int p = 0; p < kMostPairs; ++p) {
      const int at = own(p), tiles = shape.units / kTileRows, tile = at / (kTileRows * kTileColumns), twice_t = at >> 4 & 6;
      const int row = tile / tiles * kTileColumns + twice_t + (at & 1);
      const int unit = tile % tiles * kTileRows + (at & 2) * 4 + ((at >> 2 & 7) ^ twice_t);
      place[p] = row << 8 | unit;
      if (row < shape.rows) count = p + 1;
      length[p] = row < shape.rows && unit0 + unit < H ? steps.length(row0 + row) : -1;
    }
  }
};

// A number that Python hands over may have one of two types.
template <class T>
__device__ __forceinline__ float load_either(const void* p, int64_t at, bool wide) {
  return wide ? static_cast<const float*>(p)[at] : to_float(static_cast<const T*>(p)[at]);
}
template <class T>
__device__ __forceinline__ void store_either(void* p, int64_t at, bool wide, float value) {
  if (wide)
    static_cast<float*>(p)[at] = value;
  else
    static_cast<T*>(p)[at] = from_float<T>(value);
}

}  // namespace fastseq::cuda
