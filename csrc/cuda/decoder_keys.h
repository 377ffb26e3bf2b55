// Gradients of additive scores' keys and v: decoder_keys.cu.
#pragma once

#include <cstdint>

#include "rnn.h"

namespace fastseq::cuda {

struct DecoderKeys {
  int B, M, S, A;          // M queries ask the keys of each row
  const void* queries;     // [B, M, A]
  const void* keys;        // [B, S, A]
  const void* v;           // [A]
  const float* d_scores;   // [B, M, S]; what is 0 is not looked at
  float* d_keys;           // [B, S, A]
  float* d_v;              // [B * decoder_key_blocks(S), A]: parts of a sum
};

int decoder_key_blocks(int S);
int launch_decoder_keys(Kind kind, const DecoderKeys& a, void* stream);

}  // namespace fastseq::cuda
