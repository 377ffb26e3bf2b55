// What the recurrent kernels are told: plain values, filled in by fastseq/cuda/rnn.py. Letters: T steps, B rows, H units, G gates,
// D directions. Tokens of a padded batch lie at t * step + b * row, of a packed one at starts[t] + b.
#pragma once

#include <cstdint>

namespace fastseq::cuda {

enum class Kind : int { kFull32, kTensor32, kBrainHalf, kHalf };  // product.h
enum class CellKind : int { kLstm, kGru, kRnnTanh = 3, kRnnRelu };  // as in fastseq/ops/cells.py

// How a launch is laid out: fastseq/cuda/plan.py decides.
struct RnnShape {
  int meeting;      // group.h: 0 one block, 1 a cluster, 2 a grid
  int blocks;       // that share a recurrence
  int units;        // of each block, a multiple of 16, at most 128
  int rows;         // of the batch that they run together, a multiple of 8
  int groups;       // that run at once in each direction; each takes every groups-th block of rows
  int kept;         // tiles of k of a warp's weights that stay in registers: 0 or what rnn_kind.cu has
};

struct RnnBatch {
  int T, B;
  int64_t tokens, step, row;
  const int64_t* starts;       // [T], or null
  const void* lengths;         // [B] int32 or int64, clamped here to [0, T]; or null
  bool lengths_wide;           // they are int64
  const uint8_t* resets;       // laid out as tokens, or null
};

// Random masks: bytes 0 and 1 laid out as `out`, or null: what stands beside them holds at every step.
struct RnnNoise {
  bool any;
  const uint8_t *update, *keep_h, *keep_c;
  const void* recurrent;       // [D, B, H] of x's type: multiplies h on its way into W_hh; or null
  float update_scale, share_h, share_c;  // what is written, where its mask is 1; the share of h and c that stays, where theirs is 0
};

struct RnnForward {
  RnnBatch batch;
  RnnShape shape;
  int H, directions;
  bool wide;                   // h0, c0, h_n, c_n are fp32 and not of x's type
  const void* inputs;          // [D, tokens, G * H]: x W_ih'
  const void* w_hh[2];         // [G * H, H]
  const void *b_ih[2], *b_hh[2];  // [G * H] or null
  const void *h0, *c0;         // [D, B, H] or null
  void* out;                   // [tokens, D, H]; nothing is written behind a row's length
  void *h_n, *c_n;             // [D, B, H]; c_n null for a cell without
  void* gates;                 // [D, tokens, columns, H] or null; may be inputs, if there are as many of them
  float* cells;                // [D, tokens, H] or null
  void* exchange;              // a grid: [D * groups, 2, rows, pitch] of the kind's elements
  unsigned* counters;          // [D * groups], 0
  unsigned* stop;              // group.h
  uint64_t patience;
  RnnNoise noise;
};

struct RnnBackward {
  RnnBatch batch;
  RnnShape shape;
  int H, directions;
  bool wide;
  const void* d_out;           // [tokens, D, H] or null
  const void *d_h_n, *d_c_n;   // [D, B, H] or null
  const float* d_cells;        // [D, tokens, H] or null: of every cell state
  const void* w_hh[2];
  const void *h0, *c0;
  const void* out;             // as forward left them
  const void* gates;
  const float* cells;
  void* d_gates;               // [D, tokens, columns, H]; column k at kPlace[k]
  void* h_before;              // [D, tokens, H] or null: what W_hh multiplied, masked
  void *d_h0, *d_c0;           // [D, B, H] or null
  float* exchange;             // a grid: [D * groups, 2, blocks, slots, rows, units]
  unsigned* counters;
  unsigned* stop;
  uint64_t patience;
  RnnNoise noise;
};

// One step, of B rows: both products and the cell in one launch.
struct RnnStep {
  int B, I, H;
  int64_t x_row;               // elements between rows of x
  bool wide;
  const void *x, *w_ih, *w_hh, *b_ih, *b_hh, *h0, *c0;
  void *out, *h, *c;           // out null for a cell
  void* gates;                 // [B, columns, H] or null
  float* cells;                // [B, H] or null
};

}  // namespace fastseq::cuda
