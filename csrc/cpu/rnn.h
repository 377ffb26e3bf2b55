// The boundary of the native core: one recurrent layer, forward and backward, as plain structs of raw pointers.
// Nothing here knows Python or torch; the caller owns every buffer and has checked every shape.
//
// Letters: T steps, B rows, I input features, H units, N tokens (active row-steps), G gates (4 LSTM, 3 GRU, 1 RNN).
#pragma once

#include <cstdint>

// Included by every ISA variant: a function that is not inlined would be one symbol, compiled for one of them, called by all.
#define FS_ALWAYS_INLINE inline __attribute__((always_inline))

namespace fastseq {

enum class CellKind : int { lstm, gru, gru_reset_before, rnn_tanh, rnn_relu };
enum class DType : int { f32, bf16 };

// Which rows are active at which step. Rows are ordered by falling length, so the active ones are a prefix.
struct Sequence {
  int64_t steps;           // T
  int64_t rows;            // B
  const int64_t* offsets;  // [T + 1] tokens before each step; active(t) = offsets[t + 1] - offsets[t]
  const int64_t* order;    // [B] position -> row in the caller's tensors
  bool packed;             // sequence tensors are [N, ...], in token order, instead of [T, B, ...]
  const bool* resets = nullptr;  // at t * reset_step + row * reset_row: a segment of the row begins at t. Null: none; so if packed
  int64_t reset_step = 0, reset_row = 0;

  FS_ALWAYS_INLINE int64_t active(int64_t t) const { return offsets[t + 1] - offsets[t]; }
  FS_ALWAYS_INLINE int64_t tokens() const { return offsets[steps]; }

  // Whether a row starts from zeros at step t of a direction: its segment begins there, or backwards ends there, where the next one
  // begins at t + 1. No step that is not there does, nor one behind a row's end.
  FS_ALWAYS_INLINE bool starts_anew(int64_t t, int64_t position, bool reverse) const {
    if (!resets) return false;
    const int64_t begin = t + reverse;
    return t >= 0 && begin < steps && position < active(begin) && resets[begin * reset_step + order[position] * reset_row];
  }
};

struct Shape {
  CellKind cell;
  DType dtype;         // of x, weights, out, gates and the gradients of x, weights and out
  bool state_is_f32;   // h0, c0, h_n, c_n and their gradients are fp32 although dtype is bf16
  int64_t input, hidden;
};

// One direction of a layer. Typed pointers are void* here and cast once, where the dtype is dispatched.
struct Direction {
  bool reverse;
  const void *w_ih, *w_hh;  // [G * H, I], [G * H, H], row-major
  const void *b_ih, *b_hh;  // [G * H] or null
  const void *h0, *c0;      // [B, H] or null for zeros; c0: LSTM only
  const void* packed = nullptr;  // what rnn_pack made of w_ih and w_hh, or null: the call packs them itself
};

// A sequence tensor: the features of one row at one step are contiguous. Strides count elements.
struct View {
  void* data;
  int64_t step, row;

  template <class T>
  FS_ALWAYS_INLINE T* at(const Sequence& s, int64_t t, int64_t position) const {
    return static_cast<T*>(data) + (s.packed ? (s.offsets[t] + position) * row : t * step + s.order[position] * row);
  }
};

// Random masks of a direction's steps. A mask is bool, laid out as `out`; null: the same share at every step.
struct Noise {
  bool any = false;
  View update{}, keep_h{}, keep_c{};
  float update_scale = 1, share_h = 0, share_c = 0;  // update where its mask is true; what is kept of h and c without a mask
  const void* recurrent = nullptr;  // [B, H] in T: multiplies h on its way into W_hh; or null
};

struct ForwardPass {
  Direction dir;
  View x, out;
  void *h_n, *c_n;  // [B, H]
  void* gates;      // [N, kColumns, H] for backward, or null
  float* cells;     // [N, H] cell states for backward, or null; LSTM only
  View c_out{};     // every cell state, laid out as out; or null; LSTM only
  Noise noise{};
};

struct BackwardPass {
  Direction dir;
  View x, out;
  View d_out;              // data null: no gradient
  View d_x;                // data null: not wanted
  bool add_to_d_x;         // the second direction of a layer adds
  const void *d_h_n, *d_c_n;  // [B, H] or null
  const void* gates;
  const float* cells;
  void *d_h0, *d_c0;       // [B, H] or null: not wanted
  void *d_w_ih, *d_w_hh;   // null: not wanted
  void *d_b_ih, *d_b_hh;
  View d_c_out{};          // data null: no gradient
  Noise noise{};
};

// Up to two directions of one layer; `threads` is a request, the team that comes is what counts.
void rnn_forward(const Shape& shape, const Sequence& seq, const ForwardPass* passes, int directions, int threads);
void rnn_backward(const Shape& shape, const Sequence& seq, const BackwardPass* passes, int directions, int threads);

// Multiplications per gate from which one step by itself is faster on packed weights, if there are any, than on those that stand. One
// thread, Zen 4, I = H: below it 0.92 to 1.10 times as fast, from there on 0.99 to 1.56 (GRU, B = 8, H = 512), of which the question
// whether the weights are still the same takes a microsecond.
constexpr double kPackedProducts = 1.2e5;

// w_ih and w_hh of a direction as rnn_forward multiplies by them, packed once for many calls: of any T, B and number of threads,
// but of the same cell, dtype, sizes and ISA variant. `to`: rnn_packed_bytes, aligned to a cache line.
int64_t rnn_packed_bytes(const Shape& shape);
void rnn_pack(const Shape& shape, const Direction& dir, void* to, int threads);

}  // namespace fastseq
