// Sigmoid and tanh of one number in a CUDA thread, as csrc/cells.h and csrc/scores.h take them.
#pragma once

#include "../cells.h"
#include "portable.h"

namespace fastseq::cuda {

// To within a few roundings of fp32. tanhf and not the formula of `Rounded`, whose relative error grows towards 0.
struct Exact {
  using V = float;
  static __device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }
  static __device__ __forceinline__ float tanh(float x) { return tanhf(x); }
};

// For fp16: absolute error 2e-7, two special-function instructions. No x overflows: e^2x = inf gives 1.
struct Rounded {
  using V = float;
  static __device__ __forceinline__ float sigmoid(float x) { return reciprocal_approx(1.f + __expf(-x)); }
  static __device__ __forceinline__ float tanh(float x) { return 1.f - 2.f * reciprocal_approx(1.f + __expf(2.f * x)); }
};

// For bf16, whose own rounding is 4e-3: one special-function instruction, relative error 2^-11 (PTX ISA, tanh.approx).
struct Approximate {
  using V = float;
  static __device__ __forceinline__ float sigmoid(float x) { return fmaf(tanh_approx(0.5f * x), 0.5f, 0.5f); }
  static __device__ __forceinline__ float tanh(float x) { return tanh_approx(x); }
};

// csrc/cells.h's kInput and kHidden, and where backward stores a column's gradient: those of the input product first, in its
// gates' order, then the rest. By value, for device code may not read a class's static arrays.
template <class C>
struct ColumnMap {
  int input[C::kGates], hidden[C::kGates], place[C::kColumns];
};
template <class C>
FS_HD constexpr ColumnMap<C> column_map() {
  ColumnMap<C> map{};
  for (int column = 0; column < C::kColumns; ++column) map.place[column] = -1;
  for (int gate = 0; gate < C::kGates; ++gate) {
    map.input[gate] = C::kInput[gate];
    map.hidden[gate] = C::kHidden[gate];
    map.place[C::kInput[gate]] = gate;
  }
  int free = C::kGates;
  for (int column = 0; column < C::kColumns; ++column)
    if (map.place[column] < 0) map.place[column] = free++;
  return map;
}

}  // namespace fastseq::cuda
