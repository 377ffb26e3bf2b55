// All that kernels use of a GPU, the same in CUDA (cuda_device.h) and in its emulation on a CPU (tests/emulation).
// Kernels include this file alone.
#pragma once

#include <stdint.h>

namespace fastseq::cuda {

struct Bf16 {
  uint16_t bits;
};

struct Fp16 {
  uint16_t bits;
};

struct LaunchShape {
  unsigned grid = 1;     // blocks
  unsigned block = 1;    // threads of a block
  unsigned cluster = 1;  // blocks of a cluster
  unsigned shared = 0;   // bytes of dynamic shared memory of a block
  bool cooperative = false;
  void* stream = nullptr;
};

}  // namespace fastseq::cuda

#if defined(FS_EMULATE)
#include "cuda_emulation.h"
#else
#include "cuda_device.h"
#endif
