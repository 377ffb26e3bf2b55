// A decoder's loop, backward: the phases undone, the last step first. Each phase pulls, by products with the weights read the other
// way, over all that was made of its value, so nobody adds to what another owns. It leaves the gradients of pre-activations,
// queries, readouts, contexts and scores; those of weights, keys and the like are products of all steps afterwards.
#pragma once

#include "decoder_attention.h"

namespace fastseq::cuda {

template <class P, class T, class M>
struct DecoderBackward : AttentionBlock<P, T, M> {
  using Base = AttentionBlock<P, T, M>;
  using Base::a;
  using Base::asked;
  using Base::each_piece;
  using Base::exists;
  using Base::grid;
  using Base::group;
  using Base::row0;
  using Base::scores;
  using Base::span;
  using Base::v;

  __device__ __forceinline__ DecoderBackward(const DecoderArgs& args, unsigned char* shared) : Base(args, shared) {}

  // What the cell carries (csrc/cells.h) of the block's own units, in fp32.
  __device__ __forceinline__ float* carry(int layer, int row, int unit) const {
    return this->template memory<float>(a.state) + (layer * a.shape.rows + row) * a.state_units + unit;
  }
  template <class F>
  __device__ __forceinline__ void each_carry(F f) const {  // f(its place here, its place in memory)
    const int units = a.state_units, unit0 = group.rank * units;
    for (int i = threadIdx.x; i < a.layers * a.shape.rows * units; i += kDecoderThreads) {
      const int unit = i % units, row = i / units % a.shape.rows, layer = i / units / a.shape.rows;
      if (!exists(row) || unit0 + unit >= a.H) continue;
      const int64_t at = (static_cast<int64_t>(layer) * a.N + row0 + row) * a.H + unit0 + unit;
      f(carry(layer, row, unit), static_cast<float*>(a.at[k_carry]) + at);
    }
  }

  // What is loaded ahead of a result: planes.
  enum : int { kGates, kAfter = 4, kBefore, kGiven };

  __device__ __forceinline__ int64_t gate_at(const Result& r, int gate) const {
    return (((static_cast<int64_t>(r.p.cell) * a.N + r.n) * a.T + r.t) * 4 + gate) * a.H + r.u;
  }
  __device__ __forceinline__ int64_t state_at(const Result& r) const {  // the state that the cell started from
    return ((static_cast<int64_t>(a.before[r.p.cell]) * a.N + r.n) * (a.T + 1) + r.t + a.offset[r.p.cell]) * a.H + r.u;
  }
  __device__ __forceinline__ int64_t cell_at(const Result& r, int cell, int s) const {
    return ((static_cast<int64_t>(cell) * a.N + r.n) * a.T + s) * a.H + r.u;
  }
  __device__ __forceinline__ int64_t read_at(const Result& r) const {
    if (a.combine == kMaxout) return ((r.n * a.T + r.t) * a.R + r.u) * 2;
    return a.at[k_read_saved] ? (r.n * a.T + r.t) * a.R + r.u : (r.n * (a.T + 1) + r.t + 1) * a.R + r.u;
  }
  static __device__ __forceinline__ int64_t place(const DecoderAddend& of, const Result& r) {
    return r.n * of.from.row + r.t * of.from.step + r.u;
  }

  __device__ __forceinline__ void prepare(const DecoderPhase& p, int t, int n0) const {
    this->each_result(p, t, n0, [&](const Result& r) {
      if (p.ahead >= 0) this->load_ahead(r, kGiven, a.addend[p.ahead].from.at, place(a.addend[p.ahead], r));
      if (p.kind <= kCandidate) {
        for (int gate = 0; gate < 4; ++gate) this->load_ahead(r, kGates + gate, a.at[k_gates], gate_at(r, gate));
        const int s = t - 1 + a.offset[p.cell];
        if (a.cell == kDecoderLstm) {
          this->template load_ahead<float>(r, kAfter, a.at[k_cs], cell_at(r, p.cell, t));
          if (s >= 0) this->template load_ahead<float>(r, kBefore, a.at[k_cs], cell_at(r, a.before[p.cell], s));
        } else {
          this->load_ahead(r, kBefore, a.at[k_hs], state_at(r));
        }
      } else if (p.kind == kRead && a.combine != kLinear) {
        const void* from = a.at[k_read_saved] ? a.at[k_read_saved] : a.at[k_outs];
        this->load_ahead(r, 0, from, read_at(r));
        if (a.combine == kMaxout) this->load_ahead(r, 1, from, read_at(r) + 1);
      }
    });
  }

  // What is pulled for one result.
  __device__ __forceinline__ float collect(const Result& r) const {
    const DecoderPhase& p = r.p;
    float sum = 0.f;
    for (int c = 0; c < p.columns; ++c) {
      float part = this->summed(r, c);
      if (p.factors[c] >= 0 && p.kind != kRead) {
        const DecoderFactor& by = a.factor[p.factors[c]];
        const int s = r.t + by.shift;
        part *= s < a.T ? to_float(lying<T>(by.from, r.n, s)[r.u]) : 0.f;
      }
      sum += part;
    }
    for (int j = p.addend; j < p.addend + p.addends; ++j) {
      const DecoderAddend& of = a.addend[j];
      if (of.vector >= 0)
        sum += element(a.vector[of.vector], r.row, r.t + of.shift, r.u);
      else if (j == p.ahead)
        sum += this->loaded(r, kGiven, place(of, r));
      else if (of.from.at && (!of.last || r.t == a.T - 1))
        sum += this->added(of, place(of, r));
    }
    return sum;
  }
  __device__ __forceinline__ float element(const DecoderVector& of, int row, int s, int k) const {
    if (!grid()) return to_float(this->vector(of, s)[row * of.pitch + k]);
    return s < of.steps ? to_float(load_cg(lying<T>(of.values, row0 + row, s) + k)) : 0.f;
  }

  // Number i of what is made of a result: element k of a column.
  __device__ __forceinline__ void give(const Result& r, int i, int column, int k, float value) const {
    const DecoderVector& of = a.vector[r.p.output];
    Base::publish(of, r.t, r.row, of.block[column], column, k, value);
    this->kept(r, i) = value;
  }

  __device__ __forceinline__ float saved(const Result& r, int gate) const {
    return this->loaded(r, kGates + gate, gate_at(r, gate));
  }
  __device__ __forceinline__ float cell_before(const Result& r) const {
    if (r.t - 1 + a.offset[r.p.cell] >= 0) return this->template loaded<float>(r, kBefore, 0);
    const void* c0 = a.at[k_c0 + r.p.layer];
    const int64_t at = r.n * a.H + r.u;
    return a.wide ? static_cast<const float*>(c0)[at] : to_float(static_cast<const T*>(c0)[at]);
  }

  template <template <class> class Cell>
  __device__ __forceinline__ void undo_cell(const Result& r, float dh) const {
    using C = Cell<M>;
    float* const carried = carry(r.p.layer, r.row, r.unit);
    float of_forward[4], d[4], through = *carried;
#pragma unroll
    for (int i = 0; i < 4; ++i) of_forward[i] = saved(r, i);
    const float after = C::kCellState ? this->template loaded<float>(r, kAfter, 0) : 0.f;
    const float before = C::kCellState ? cell_before(r) : this->loaded(r, kBefore, state_at(r));
    C::backward(of_forward, before, after, dh, through, d);
    *carried = through;
#pragma unroll
    for (int i = 0; i < 4; ++i) give(r, i, i, r.u, d[i]);
  }

  __device__ __forceinline__ void undo_candidate(const Result& r, float dh) const {
    const float of_forward[4] = {0.f, saved(r, 1), 0.f, saved(r, 3)};
    const float before = this->loaded(r, kBefore, state_at(r));
    float d[3];
    GruResetBefore<M>::candidate_backward(of_forward, before, dh, *carry(r.p.layer, r.row, r.unit), d);
    give(r, 1, 1, r.u, d[1]);
    give(r, 2, 2, r.u, d[2]);
  }

  __device__ __forceinline__ void undo_reset(const Result& r, float d_reset) const {
    const float of_forward[4] = {saved(r, 0), 0.f, saved(r, 2), 0.f};
    float d[3];
    GruResetBefore<M>::reset_backward(of_forward, d_reset, *carry(r.p.layer, r.row, r.unit), d);
    give(r, 0, 0, r.u, d[0]);
  }

  __device__ __forceinline__ void undo_read(const Result& r, float d) const {
    if (r.p.factors[0] >= 0) d *= to_float(lying<T>(a.factor[r.p.factors[0]].from, r.n, r.t)[r.u]);
    const float first = a.combine == kLinear ? 0.f : this->loaded(r, 0, read_at(r));
    if (a.combine != kMaxout) return give(r, 0, 0, r.u, d * (1.f - first * first));
    const bool chosen = first >= this->loaded(r, 1, read_at(r) + 1);
    give(r, 0, 0, 2 * r.u, chosen ? d : 0.f);
    give(r, 1, 0, 2 * r.u + 1, chosen ? 0.f : d);
  }

  __device__ __forceinline__ void epilogue(const DecoderPhase& p, int t, int n0) const {
    this->each_result(p, t, n0, [&](const Result& r) {
      const float d = collect(r);
      if (p.kind == kCell)
        a.cell == kDecoderLstm ? undo_cell<Lstm>(r, d) : undo_cell<Gru>(r, d);
      else if (p.kind == kCandidate)
        undo_candidate(r, d);
      else if (p.kind == kReset)
        undo_reset(r, d);
      else if (p.kind == kRead)
        undo_read(r, d);
      else
        give(r, 0, 0, r.u, d);
    });
  }

  // The vector as a result, which a grid has stored already.
  __device__ __forceinline__ void flush(const DecoderPhase& p, int t, int n0) const {
    if (grid()) return;
    const DecoderVector& made = a.vector[p.output];
    this->each_result(p, t, n0, [&](const Result& r) {
      T* to = lying<T>(made.values, r.n, t);
      for (int b = p.first; made.blocks > 1 && b < p.first + p.blocks; ++b)
        to[made.column[b] * made.width + r.u] = from_float<T>(this->kept(r, made.column[b]));
      for (int i = 0; made.blocks == 1 && i < p.each; ++i) to[r.u * p.each + i] = from_float<T>(this->kept(r, i));
    });
  }

  // The weights' gradients, to all pieces of the row.
  __device__ __forceinline__ bool undo_scores(const DecoderPhase& p, int t) {
    const DecoderVector& d_context = a.vector[a.query_vector];
    const T* given = static_cast<const T*>(a.at[k_d_weights]);
    each_piece([&](int slot, int row, int piece) {
      const int64_t n = row0 + row, b = n / a.copies;
      const int s0 = piece * a.span_s, count = span(piece, a.span_s, a.S);
      this->ask(d_context, t, row);
      this->sum_features(false, this->rectangle(false, slot, b, s0, 0), count, a.D, [&](int s, float sum) {
        if (given) sum += to_float(given[(n * a.T + t) * a.S + s0 + s]);
        this->put_score(slot, row, s0 + s, this->seen(b, s0 + s) ? sum : 0.f);
      });
    });
    return this->meet_after(p);
  }

  // What asked, as the scores had it.
  __device__ __forceinline__ void ask_again(int64_t n, int t, int k0, int count) const {
    const int64_t state = (static_cast<int64_t>(a.query_cell) * a.N + n) * (a.T + 1) + t + a.query_offset;
    const T* from = static_cast<const T*>(a.at[k_queries]) + (n * a.T + t) * a.A;
    if (!a.at[k_queries]) from = static_cast<const T*>(a.at[k_hs]) + state * a.H;
    for (int k = threadIdx.x; k < Base::rounded(count); k += kDecoderThreads)
      asked()[k] = k < count ? to_float(from[k0 + k]) : 0.f;
  }

  // Gradients of the scores, in place of those of the weights: by the softmax.
  __device__ __forceinline__ void undo_softmax(float* row, int64_t token, bool stores) const {
    const T* weights = static_cast<const T*>(a.at[k_weights]) + token * a.S;
    float mean = 0.f;
    for (int s = threadIdx.x & 31; s < a.S; s += 32) mean += to_float(weights[s]) * row[s];
    mean = Base::add_up(mean);
    __syncthreads();  // every warp has read all of it
    for (int s = threadIdx.x; s < a.S; s += kDecoderThreads) {
      row[s] = to_float(weights[s]) * (row[s] - mean);
      if (stores) static_cast<float*>(a.at[k_d_scores])[token * a.S + s] = row[s];
    }
    __syncthreads();
  }

  __device__ __forceinline__ bool undo_query(const DecoderPhase& p, int t) {
    const DecoderVector& made = a.vector[p.output];
    each_piece([&](int slot, int row, int piece) {
      const int64_t n = row0 + row;
      const int k0 = piece * a.span_f, count = span(piece, a.span_f, a.A);
      this->collect_scores(slot, row);
      ask_again(n, t, k0, count);
      undo_softmax(scores(slot), n * a.T + t, piece == 0);
      const Rectangle<T> keys = this->rectangle(true, slot, n / a.copies, 0, k0);
      this->sum_positions(a.additive, keys, count, scores(slot), asked(), [&](int k, float sum) {
        if (a.additive) sum *= v()[k0 + k];
        Base::publish(made, t, row, 0, 0, k0 + k, sum);
        if (!grid()) lying<T>(made.values, n, t)[k0 + k] = from_float<T>(sum);
      });
    });
    this->give_pieces(made, t);
    return this->meet_after(p);
  }

  __device__ __forceinline__ bool run_phase(const DecoderPhase& p, int t) {
    if (p.kind == kScore) return undo_scores(p, t);
    if (p.kind == kQuery) return undo_query(p, t);
    return this->product(
        p, t, -1, [&](const DecoderPhase& of, int s, int n0) { prepare(of, s, n0); }, [&](int n0) { epilogue(p, t, n0); },
        [&](int n0) { flush(p, t, n0); });
  }

  // All steps of one block of rows; false if the group broke up.
  __device__ __forceinline__ bool run() {
    this->begin_vectors();
    each_carry([](float* here, const float* there) { *here = *there; });
    this->load_rectangles(true, true);
    this->load_rectangles(false, false);
    if (a.T > 0) prepare(a.phase[a.first], a.T - 1, 0);
    if (!this->meet()) return false;
    for (int t = a.T - 1; t >= 0; --t)
      for (int i = 0; i < a.phases; ++i)
        if (!run_phase(a.phase[i], t)) return false;
    each_carry([](const float* here, float* there) { *there = *here; });
    return this->meet();  // the next rows' vectors begin anew
  }
};

template <class P, class T, class M>
__global__ void __launch_bounds__(kDecoderThreads, 1) decoder_backward(const __grid_constant__ DecoderArgs a) {
  FS_DYNAMIC_SHARED(shared);
  DecoderBackward<P, T, M> block(a, shared);
  block.row0 = blockIdx.x / a.shape.blocks * a.shape.rows;
  for (; block.row0 < a.N; block.row0 += a.shape.groups * a.shape.rows)
    if (!block.run()) return;
}

}  // namespace fastseq::cuda
