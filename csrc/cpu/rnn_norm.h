// The boundary of a layer-normalised recurrence (Ba, Kiros and Hinton 2016): one direction of an LSTM or a GRU, whose products with x
// and with h are normalised at every step, and an LSTM's c' as well. The product with x, of all steps, is the caller's.
//
// Letters as in rnn.h. N(x) = (x - mean) / sqrt(variance + kNormEps) over all gates of an LSTM; over r and z, and over n, of a GRU.
#pragma once

#include "rnn.h"

namespace fastseq {

constexpr float kNormEps = 1e-5f;
// A token's: 1 / deviation of W_hh h and, at kNormStatsOfX, of W_ih x (GRU: of r and z, of n); at 1 an LSTM's mean and that of c'.
constexpr int kNormStats = 5, kNormStatsOfX = 3;

// Saved tensors [N, ...] are in token order: active tokens first, step by step.
struct NormPass {
  bool reverse;
  const void *w_hh;                   // [G * H, H]
  const void *gain, *bias;            // [G * H], of N(W_hh h); bias: or null
  const void *gain_x, *bias_x;        // of N(W_ih x)
  const void *cell_gain, *cell_bias;  // [H], of N(c'); LSTM only
  const void *h0, *c0;                // [B, H] or null
  View inputs;                        // [G * H] each: forward W_ih x, which becomes N(W_ih x) if it saves; backward finds that
  View out;
  Noise noise{};
};

struct NormForwardPass : NormPass {
  void *h_n, *c_n;  // [B, H]
  void *gates;      // [N, kColumns, H], as Cell saves them; null, and so the rest: no backward will come
  void *hats;       // [N, G * H]: N(W_hh h)
  float *cells;     // [N, H] c after the step, zoneout's share of the old one in it; LSTM only
  float *stats;     // [N, kNormStats]
  View c_out{};     // every cell state, laid out as out; or null; LSTM only
};

struct NormBackwardPass : NormPass {
  const void *gates, *hats;
  const float *cells, *stats;
  View d_out;                 // data null: no gradient
  const void *d_h_n, *d_c_n;  // [B, H] or null
  View d_inputs;
  void *d_products;           // [N, G * H]: gradients of W_hh h
  void *before;               // [N, H]: the h of those products
  void *d_h0, *d_c0;          // [B, H] or null
  float *d_sums;              // of gain, bias, gain_x, bias_x [G * H each], cell_gain, cell_bias [H each]
  View d_c_out{};             // data null: no gradient
};

void rnn_norm_forward(const Shape& shape, const Sequence& seq, const NormForwardPass& pass, int threads);
void rnn_norm_backward(const Shape& shape, const Sequence& seq, const NormBackwardPass& pass, int threads);

}  // namespace fastseq
