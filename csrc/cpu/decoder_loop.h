// What the forward and the backward loop of an attention decoder share: where a row's values lie, and which row reads what.
#pragma once

#include "additive.h"
#include "decoder.h"
#include "driver.h"
#include "step_product.h"

namespace fastseq {
namespace FS_ISA {

// A row's values in the caller's tensors.
template <class T>
struct Places {
  const Decoder& d;
  int64_t N, T_, H, cells;
  bool between, rings;  // rings: of states, contexts and outputs the last two are kept

  explicit Places(const Decoder& decoder)
      : d(decoder), N(decoder.rows), T_(decoder.steps), H(decoder.hidden), cells(decoder.cells), between(decoder.attend == Attend::between),
        rings(decoder.search) {}

  // The state of cell c after `step` steps; step 0 is the initial one.
  FS_INLINE T* state(int c, int64_t n, int64_t step) const { return static_cast<T*>(d.hs) + place(c * N + n, step, T_ + 1) * H; }

  // What cell c starts from at step t. Of two cells around an attention the first goes on from the second, the second from the first.
  FS_INLINE const T* before(int c, int64_t n, int64_t t) const {
    return !between ? state(c, n, t) : c == 0 ? state(1, n, t) : state(0, n, t + 1);
  }

  // Which of the running states cell c has: two cells around an attention share one.
  FS_INLINE int running(int c) const { return between ? 0 : c; }

  FS_INLINE int64_t token(int64_t n, int64_t t) const { return n * T_ + t; }

  template <class E>
  static FS_INLINE E* row(E* tensor, int64_t token, int64_t width) {
    return tensor ? tensor + token * width : nullptr;
  }

  // Step t's place among `steps` of a row.
  FS_INLINE int64_t place(int64_t row, int64_t t, int64_t steps) const { return rings ? row * 2 + (t & 1) : row * steps + t; }

  // What step t is fed. Step T: what would be fed next.
  FS_INLINE T* fed(int64_t n, int64_t t) const {
    return static_cast<T*>(d.feed == Feed::context ? d.contexts : d.outs) + place(n, t, T_ + 1) * d.fed();
  }

  FS_INLINE T* context(int64_t n, int64_t t) const {
    return d.feed == Feed::context ? fed(n, t + 1) : static_cast<T*>(d.contexts) + place(n, t, T_) * d.features;
  }
  FS_INLINE T* out(int64_t n, int64_t t) const { return static_cast<T*>(d.outs) + place(n, t + 1, T_ + 1) * d.output; }
  FS_INLINE T* saved(int c, int64_t n, int64_t t) const { return static_cast<T*>(d.gates) + ((c * N + n) * T_ + t) * 4 * H; }
  FS_INLINE float* cell_state(int c, int64_t n, int64_t t) const { return d.cs + ((c * N + n) * T_ + t) * H; }

  FS_INLINE MemoryRow<T> memory_row(int64_t b, const Positions& positions) const {
    const int64_t S = d.source;
    return {static_cast<const T*>(d.keys) + b * S * d.units, static_cast<const T*>(d.memory) + b * S * d.features, d.units, d.features,
            positions.at + b * S, positions.count[b]};
  }

  FS_INLINE vf load_carried(const void* from, int64_t at, int n) const {
    if (!from) return vf{};
    return d.state_is_f32 ? load(static_cast<const float*>(from) + at, n) : load(static_cast<const T*>(from) + at, n);
  }

  FS_INLINE void store_carried(void* to, int64_t at, vf x, int n) const {
    d.state_is_f32 ? store(static_cast<float*>(to) + at, x, n) : store(static_cast<T*>(to) + at, x, n);
  }
};

// to[i] = from[i] * mask[i] in T; a null mask is 1.
template <class T, class From>
FS_INLINE void scaled(const From* from, const T* mask, T* to, int64_t total) {
  for_vectors(total, [&](int64_t u, int n) FS_LAMBDA {
    const vf x = load(from + u, n);
    store(to + u, mask ? x * load(mask + u, n) : x, n);
  });
}

// Columns of the readout's weights that the loop reads, in order: state, previous state, context, and of a search the input.
struct ReadPart {
  int64_t at, width;
};

FS_INLINE int read_parts(const Decoder& d, ReadPart (&parts)[kMaxParts]) {
  int count = 0;
  if (d.r_state >= 0) parts[count++] = {d.r_state, d.hidden};
  if (d.r_previous >= 0) parts[count++] = {d.r_previous, d.hidden};
  if (d.r_context >= 0) parts[count++] = {d.r_context, d.features};
  if (d.search && d.search->r_input >= 0 && !d.read_input) parts[count++] = {d.search->r_input, d.search->inputs};
  return count;
}

// Maxout takes the larger of two neighbours: which, 0 or 1. A NaN is the larger.
FS_INLINE int larger_of(float a, float b) { return a >= b || a != a ? 0 : 1; }

// Whether keys are met more than once: then their exponentials are taken beforehand.
FS_INLINE bool takes_exponentials(const Decoder& d) { return d.additive && d.copies * d.steps > 1; }

// A thread's rows: whole memory rows, and with them their decoder rows.
FS_INLINE Range own_rows(const Decoder& d, const Team& team) {
  const Range own = share(d.memory_rows(), team.rank, team.size);
  return {own.begin * d.copies, own.end * d.copies};
}

}  // namespace FS_ISA
}  // namespace fastseq
