// The boundary of the native core for attention decoders: what of a decoder feeds back, over all steps, forward and backward.
// As in rnn.h: plain structs of raw pointers, nothing checked, every buffer the caller's.
//
// Letters: N decoder rows, B = N / copies memory rows, T steps, S source positions, A attention units, D memory features, H units,
// G gates, R features of a fed readout, C cells in the loop. Typed pointers are void*: fp32 or bf16, as `dtype` says.
#pragma once

#include "rnn.h"

namespace fastseq {

enum class Attend : int { none, before, after, between };
enum class Feed : int { none, context, output };
enum class Combine : int { tanh, linear, maxout };

constexpr int kMaxCells = 16;

// A cell's input is what the loop reads, side by side in w_ih: what is fed back (first cell) or the state below, then the context.
struct DecoderCell {
  const void* w_ih;  // its first column that the loop reads
  int64_t pitch_ih;  // elements between its rows
  const void *w_hh, *b_ih, *b_hh;  // [G * H, H], [G * H]; biases may be null
  bool below, feed, context;
  const void *h0, *c0;  // [N, H] in the state's dtype
  void *h_n, *c_n;      // null: not wanted

  // Backward. d_hs: gradient of this cell's states, `d_hs_row` and `d_hs_step` elements apart, or null.
  const void* d_hs;
  int64_t d_hs_row, d_hs_step;
  const void *d_h_n, *d_c_n;  // or null
  void* d_gates;              // [N, T, columns, H]; of as many columns as `gates` perhaps there
  void *d_h0, *d_c0;          // null: not wanted
};

enum class Stopping : int { unbeaten, first, never };  // early_stopping: False, True, "never"

// A search: the loop's inputs are the tokens that it chooses itself, as search.h says. k = copies rows of a memory row: beams.
// V tokens, I input features, R hypotheses wanted, P forced tokens from bos on; T = P - 1 + the most new tokens.
struct Search {
  int64_t vocabulary, inputs, returned, forced, fewest;  // V, I, R, P, the fewest new tokens before eos
  int64_t eos, pad;
  Stopping stopping;
  bool rewards_length;        // the norm rises with the length
  const void* embedding;      // [V, I]
  const void *w_out, *b_out;  // [V, the readout's result, or where there is none its parts side by side]; [V] or null
  const void* context;        // [B, D]: of a decoder without attention, or null
  int64_t r_input;            // where the input's part of the readout starts, or -1
  const int64_t* prefix;      // [B, P]
  const float* norms;         // [T - P + 2]: what a hypothesis of so many new tokens is divided by
  int64_t *tokens, *trail;    // [B, R, T]: without bos; the row, 0 to k - 1, whose step chose each
  int64_t* lengths;           // [B, R]
  float* scores;              // [B, R]
  int* wrong;                 // becomes 1 where a logit is NaN
};

struct Decoder {
  CellKind cell;
  DType dtype;
  bool state_is_f32;
  int64_t rows, copies, steps, source, units, features, hidden, output;  // N, N / B, T, S, A (0: no attention), D, H, R (0: none)
  int cells;
  Attend attend;
  int query_cell;
  Feed feed;
  Combine combine;
  bool additive, keep;  // keep: forward fills what backward reads

  DecoderCell of[kMaxCells];

  const void *keys, *memory;  // [B, S, A], [B, S, D]
  const bool* mask;           // [B, S] or null
  const void *w_q, *v;        // [A, H] or null: the query is h; [A], additive form
  // [B, S, G * H] the memory through the context's columns of w_ih, or null: then the one cell that reads the context adds these by
  // their weights instead of multiplying the context, which for few rows with short sources is much less to read.
  const void* memory_gates;
  const void* beside;         // [N, G * H] joins the first cell's recurrent product, or null
  // [N, T, G * H] what the first cell reads of y, without bias, perhaps where its `gates` go; of a search [V, G * H], or null.
  const void* projected;
  int64_t projected_pitch;    // elements between its tokens
  const void* feed0;          // [N, F] in the state's dtype
  const void *w_r, *b_r;      // readout: rows of R, or 2 R of maxout
  int64_t r_pitch, r_state, r_previous, r_context;  // where each part's columns start, or -1; both states are the last cell's
  const void* read_input;     // [N, T, R'] the input's part of the readout, or null; of a search [V, R']
  const void *layer_masks, *read_mask, *out_mask;  // [C - 1, N, T, H], [N, T, r_pitch], [N, T, R], or null

  // [C, N, T + 1, H], [N, T, D], [N, T, R]; hs, outs and contexts that are fed back, [N, T + 1, .], from the initial value on. A
  // search keeps of each the last two.
  void *hs, *contexts, *outs;
  void* weights;               // [N, T, S] or null
  void *gates, *queries, *read_saved;  // [C, N, T, 4, H], [N, T, A], [N, T, R'] (tanh before out_mask; maxout's pre-activations)
  float* cs;                   // [C, N, T, H], LSTM
  void* feed_n;                // [N, F] in the state's dtype, or null

  const void *d_contexts, *d_outs, *d_weights, *d_feed_n;  // contiguous, or null
  void *d_queries, *d_read;      // [N, T, A], [N, T, R']; perhaps at `queries` and `read_saved`
  void* d_feed0;                 // [N, F] in the state's dtype or null
  float *d_keys, *d_memory, *d_v;      // [B, S, A] of the additive form, [B, S, D], [A]
  float* d_scores;                     // [N, T, S] of the dot form: with the queries they make d_keys, all steps at once

  const Search* search;  // or null

  FS_ALWAYS_INLINE int64_t gate_count() const { return cell == CellKind::lstm ? 4 : 3; }
  FS_ALWAYS_INLINE int64_t columns() const { return cell == CellKind::gru_reset_before ? 3 : 4; }
  FS_ALWAYS_INLINE int64_t fed() const { return feed == Feed::context ? features : feed == Feed::output ? output : 0; }
  FS_ALWAYS_INLINE int64_t read_rows() const { return combine == Combine::maxout ? 2 * output : output; }
  FS_ALWAYS_INLINE int64_t memory_rows() const { return rows / copies; }
};

}  // namespace fastseq
