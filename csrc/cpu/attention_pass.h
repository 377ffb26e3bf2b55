// The boundary of the attention of whole sequences of queries. As in rnn.h the caller owns every buffer and has checked every shape.
//
// B memory rows of S positions with A units (keys) and D features (memory); each is asked by `queries` of its own: those of all
// T steps of its decoder rows, which stand together. Every tensor is contiguous.
#pragma once

#include "rnn.h"

namespace fastseq {

struct AttentionPass {
  DType dtype;     // of all but the mask
  int64_t batch, queries, source, units, features;
  const void* q;       // [B, queries, A]
  const void* keys;    // [B, S, A]
  const void* memory;  // [B, S, D]
  const bool* mask;    // [B, S] or null: what is not attended to is never read
  const void* v;       // [A] of the additive score; null: the dot score
};

struct AttentionForward : AttentionPass {
  void* context;  // [B, queries, D]
  void* weights;  // [B, queries, S] or null
};

struct AttentionBackward : AttentionPass {
  const void* weights;
  const void *d_context, *d_weights;  // null: no gradient
  void *d_q, *d_keys, *d_memory;
  void* d_v;  // null for the dot score
};

}  // namespace fastseq
