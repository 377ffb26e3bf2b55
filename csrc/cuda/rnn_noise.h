// Random masks within a recurrence: how a block of rnn_forward.h or rnn_backward.h reads those of its pairs. The formulas are
// csrc/cells.h's.
#pragma once

#include "../cells.h"
#include "rnn_batch.h"

namespace fastseq::cuda {

constexpr int kMaskKinds = 3;  // update, keep_h, keep_c

// Those of pair p lie from bit p * kMaskKinds on: a register for all of them, so that a block can read them before its wait, which
// covers the time, and keep them until after it.
template <class Block>
__device__ __forceinline__ unsigned read_masks(const Block& block, int t) {
  const RnnNoise& noise = block.a.noise;
  unsigned bits = 0;
  if (!noise.any) return bits;
  block.pairs.running(t, [&](int p) {
    const int64_t at = block.out_at(p, t);
    unsigned of_pair = noise.update ? noise.update[at] : 1u;
    if (noise.keep_h) of_pair |= noise.keep_h[at] << 1;
    if (noise.keep_c) of_pair |= noise.keep_c[at] << 2;
    bits |= of_pair << p * kMaskKinds;
  });
  return bits;
}

__device__ __forceinline__ Masks<float> masks_of(const RnnNoise& noise, unsigned bits, int p) {
  const unsigned own = bits >> p * kMaskKinds;
  return {{own & 1 ? noise.update_scale : 0.f}, own & 2 ? 1.f : noise.share_h, own & 4 ? 1.f : noise.share_c};
}

// x, on its way into the recurrent product or back out of it; at: of [D, B, H].
template <class T>
__device__ __forceinline__ float through_mask(const RnnNoise& noise, float x, int64_t at) {
  return noise.recurrent ? x * to_float(static_cast<const T*>(noise.recurrent)[at]) : x;
}

}  // namespace fastseq::cuda
