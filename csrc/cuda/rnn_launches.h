// What rnn_kind.cu defines for each kind of numbers, and bindings.cpp chooses from.
#pragma once

#include "rnn.h"

namespace fastseq::cuda {

constexpr int kNoSuchKernel = -1;  // of this shape; otherwise 0 or CUDA's error

struct RnnSizes {
  int shared;  // bytes of shared memory of a block
  int pitch;   // of forward: elements between rows of what a grid exchanges; of backward: parts of a dL/dh
  int element; // bytes of those
};

// A kernel that cannot be started gives its error, and has then changed nothing.
struct RnnLaunches {
  int (*forward)(CellKind, const RnnForward&, void* stream);
  int (*backward)(CellKind, const RnnBackward&, void* stream);
  int (*step)(CellKind, const RnnStep&, void* stream);
  RnnSizes (*sizes)(CellKind, bool forward, const RnnShape&, int H);  // all 0 where there is no such kernel
  int (*clusters)(CellKind, bool forward, const RnnShape&, int H, int shared, int* count);  // resident at once
};
extern const RnnLaunches full32_launches, tensor32_launches, brain_half_launches, half_launches;

}  // namespace fastseq::cuda
