// What the kernels of a decoder's loop are told: plain values. fastseq/cuda/decoder_program.py says which phases a step has and
// what each reads, decoder_plan.py how they are laid out, and decoder_layout.cpp makes DecoderArgs of the two.
//
// Letters: N rows, B rows of keys (N = copies * B), T steps, S source positions, H units, A attention units, D memory features.
#pragma once

#include <cstdint>

#include "rnn.h"

namespace fastseq::cuda {

constexpr int kMostCells = 8, kMostVectors = 16, kMostSegments = 48, kMostAddends = 48, kMostPhases = 24;
constexpr int kMostFactors = 32, kMostColumns = 4;

// Names of tensors, in the order of decoder_phases.py's TENSORS. Of those with a count there is one for each cell.
#define FS_DECODER_TENSORS(X)                                                                                           \
  X(projected, 1) X(read_input, 1) X(keys, 1) X(memory, 1) X(mask, 1) X(v, 1) X(beside, 1) X(w_query, 1) X(w_read, 1)   \
  X(b_read, 1) X(layer_masks, 1) X(read_mask, 1) X(out_mask, 1) X(hs, 1) X(contexts, 1) X(outs, 1) X(weights, 1)        \
  X(gates, 1) X(cs, 1) X(queries, 1) X(read_saved, 1) X(scores, 1) X(reset, 1) X(w_ih, 8) X(w_hh, 8) X(b_ih, 8)         \
  X(b_hh, 8) X(h0, 8) X(c0, 8) X(h_n, 8) X(c_n, 8) X(d_hs, 1) X(d_contexts, 1) X(d_outs, 1) X(d_weights, 1)             \
  X(d_feed_n, 1) X(d_h_n, 8) X(d_gates, 1) X(d_queries, 1) X(d_read, 1) X(d_context, 1) X(d_scores, 1) X(carry, 1)      \
  X(w_out, 1) X(b_out, 1) X(out_input, 1) X(choices, 1) X(tokens, 1) X(ids, 1) X(lengths, 1) X(total, 1) X(wrong, 1)

enum DecoderTensor : int {
#define FS_NAME(name, count) k_##name, k_##name##_last = k_##name + count - 1,
  FS_DECODER_TENSORS(FS_NAME)
#undef FS_NAME
  kDecoderTensors
};

enum DecoderCell : int { kDecoderLstm, kDecoderGru, kDecoderResetBefore };  // as in fastseq/ops/common.py
enum DecoderKind : int { kCell, kReset, kCandidate, kQuery, kScore, kContext, kRead, kVocabulary };
enum DecoderCombine : int { kTanh, kLinear, kMaxout };

// How a launch is laid out.
struct DecoderShape {
  int meeting;        // group.h: 0 one block, 1 a cluster, 2 a grid
  int blocks;         // that share a loop
  int rows;           // of the batch that they run together
  int groups;         // that run at once; each takes every groups-th block of rows
  int chunk;          // rows that a product takes at once: 8 or 16; rows is a multiple of it
  int pieces;         // blocks that share a row's attention
  bool keys, memory;  // so do those of the block's rows
};

// Element k of row n at step s lies at at[n * row + s * step + k].
struct Lying {
  void* at;           // null: there is none
  int64_t row, step;
};

// Small numbers have 8 bits: a step reads all of these, and the constants' first cache has 2 KB.

// What one phase makes of [rows, units] and others read. A group of one block or of a cluster holds it in every block's shared
// memory, a grid where `values` is.
struct DecoderVector {
  Lying values;
  int steps;                  // of values
  int width, padded;          // of a block of it: elements, and how far apart blocks are in shared memory
  int shared, pitch;          // bytes from the start of shared memory; elements between rows
  int8_t blocks;
  int8_t column[4], block[4];  // of values: which of its columns a block is, and the other way round
  int8_t slots;               // steps that shared memory has, 1 or 2
  bool raw;                   // not rounded as the product's kind rounds: no product reads it
  bool initial;               // values has it before the first step
};

// A part of what a product reads.
struct DecoderSegment {
  int8_t vector, shift;       // at step t + shift
  int8_t first, blocks;       // of the vector
  int8_t mask;                // the factor of its elements, or -1
  uint8_t pattern;            // of the 4 tiles of a quad, which it has weights for
  int tiles;                  // of k, in all of these blocks
  int near;                   // of these, how many have their weights in shared memory: the first
  int staged;                 // the element of a staged row where it is copied to, -1: it is read where it lies
};

// What is added to a phase's sums.
struct DecoderAddend {
  Lying from;
  int gate, unit;             // elements between columns' gates, and between units
  int8_t columns[4];          // each column's gate, or -1
  int8_t vector, shift;       // it is of this vector, unless that is -1, at step t + shift
  bool bias;                  // of all rows and steps: added up beforehand
  bool wide, last;            // it is fp32; it counts at the last step alone
  bool token;                 // row n is that of the token which the batch's row reads
};

struct DecoderFactor {
  Lying from;
  int shift;                  // of the step
};

struct DecoderPhase {
  int8_t kind, cell, layer;
  int8_t columns;             // sums of a unit: 1, 2 or 4
  int8_t segment, segments, addend, addends;
  int8_t output, first, blocks, each;  // the vector that is made, its blocks, and elements of it that a unit makes
  int8_t slices;              // shares of k
  int8_t factors[4];          // of each column, or -1
  int8_t ahead;               // the addend that is loaded while the product runs, or -1
  int8_t next;                // product; not behind this one if it is the next step's
  bool meets;                 // another block waits for what it makes
  bool stages;
  int width;                  // units of all blocks, 0: it is no product
  int units;                  // of a block
  int quads;                  // fours of tiles of 16 sums
  int near, near_quad;        // bytes in shared memory where the weights begin that stay there, and between quads
  int far, far_quad;          // the same of the others, in `packed`
  int bias;                   // float where they begin
};

// Where a row of a search is: the same in every block.
struct alignas(16) Walk {
  int token, length;  // what it reads next; new ones so far
  float total;        // their log-probability
  bool runs;
};

// What some tokens of a row come to.
struct alignas(16) Choice {
  float top, sum;  // the largest logit; the sum of exp(logit - top), NaN where a logit is NaN or +inf
  float best;      // the largest that may come, -inf: none
  int token;       // its first token
};

struct DecoderArgs {
  DecoderShape shape;
  int N, T, S, copies, H, A, D, R;
  int cells, layers, cell, combine;
  int query_vector, query_shift;  // what the scores ask with, at step t + shift
  int query_cell, query_offset;   // without a W_q: whose state asks, of step t - 1 (0) or t (1)
  int before[kMostCells], offset[kMostCells];  // the cell whose state a cell starts from, of step t - 1 (0) or t (1)
  bool wide, additive, save;
  bool search;                    // the last phase chooses what the next step reads; of vectors global memory has two steps
  int eos, pad, fewest;           // of a search; fewest: new tokens before eos may come
  int phases, vectors, first;     // the first product's phase
  int slots;                      // pieces of attention that a block has
  int span_s, span_f;             // positions of a piece; its features of what is summed over positions
  int state_units;                // of a cell's block
  int ahead;                      // and the bytes below: where parts of shared memory begin
  int stage, stage_pitch, work, state, biases, asked, v, scores, gone, keys, memory;  // bytes in shared memory; elements
  int walks, choices;             // of a search
  int keys_rows, keys_pitch, memory_rows, memory_pitch;  // of a piece in shared memory
  int near, near_bytes;           // the weights that stay in shared memory, which are the first of the packed ones
  int packed_bytes;               // of one block's weights
  const unsigned char* packed;    // [blocks, packed_bytes]
  unsigned* counters;             // [groups], 0
  unsigned* stop;                 // group.h
  uint64_t patience;
  DecoderVector vector[kMostVectors];
  DecoderSegment segment[kMostSegments];
  DecoderAddend addend[kMostAddends];
  DecoderFactor factor[kMostFactors];
  DecoderPhase phase[kMostPhases];
  void* at[kDecoderTensors];
};

// A segment's weights: of unit u and element k of block b in column c at w[(columns[c] + gates[b]) * gate + u * unit + k * k_].
struct DecoderWeights {
  const void* w;
  int64_t unit, k, gate;
  int columns[4], gates[4];  // columns[c] < 0: none
};

struct DecoderPacking {
  unsigned char* packed;
  DecoderWeights weights[kMostSegments];
};

struct DecoderLaunches {
  int (*pack)(const DecoderArgs&, const DecoderPacking&, void* stream);
  int (*forward)(const DecoderArgs&, int shared, void* stream);  // or search
  int (*backward)(const DecoderArgs&, int shared, void* stream);
};

static_assert(k_w_hh - k_w_ih == kMostCells, "tensors of cells come in kMostCells");

}  // namespace fastseq::cuda
