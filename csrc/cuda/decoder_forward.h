// A decoder's loop, forward: all phases of all steps. What the phases are, and in which order, the arguments say.
#pragma once

#include "decoder_attention.h"

namespace fastseq::cuda {

template <class P, class T, class M, bool kSearch>
struct DecoderForward : AttentionBlock<P, T, M, kSearch> {
  using Base = AttentionBlock<P, T, M, kSearch>;
  using Base::a;
  using Base::asked;
  using Base::each_piece;
  using Base::exists;
  using Base::grid;
  using Base::group;
  using Base::row0;
  using Base::scores;
  using Base::span;

  __device__ __forceinline__ DecoderForward(const DecoderArgs& args, unsigned char* shared) : Base(args, shared) {}

  // What a block carries of its units in fp32: [layers, rows, units] h, then c of an LSTM or z and the candidate's input.
  __device__ __forceinline__ float* carried(int which, int layer, int row, int unit) const {
    const int rows = a.shape.rows, units = a.state_units;
    return this->template memory<float>(a.state) + ((which * a.layers + layer) * rows + row) * units + unit;
  }
  __device__ __forceinline__ float* between(int which, int row, int unit) const { return carried(1, which, row, unit); }

  __device__ __forceinline__ Walk& walk(int row) const { return this->template memory<Walk>(a.walks)[row]; }

  template <class F>
  __device__ __forceinline__ void each_state(F f) const {  // f(layer, row, unit of the block, element of [N, H])
    const int units = a.state_units, unit0 = group.rank * units;
    for (int i = threadIdx.x; i < a.layers * a.shape.rows * units; i += kDecoderThreads) {
      const int unit = i % units, row = i / units % a.shape.rows;
      if (exists(row) && unit0 + unit < a.H)
        f(i / units / a.shape.rows, row, unit, static_cast<int64_t>(row0 + row) * a.H + unit0 + unit);
    }
  }
  __device__ __forceinline__ float state_of(DecoderTensor tensor, int layer, int64_t at) const {
    const void* from = a.at[tensor + layer];
    return a.wide ? static_cast<const float*>(from)[at] : to_float(static_cast<const T*>(from)[at]);
  }
  __device__ __forceinline__ void store_state(DecoderTensor tensor, int layer, int64_t at, float value) const {
    if (a.wide)
      static_cast<float*>(a.at[tensor + layer])[at] = value;
    else
      static_cast<T*>(a.at[tensor + layer])[at] = from_float<T>(value);
  }

  __device__ __forceinline__ void begin() const {
    this->begin_vectors();
    each_state([&](int layer, int row, int unit, int64_t at) {
      *carried(0, layer, row, unit) = state_of(k_h0, layer, at);
      if (a.cell == kDecoderLstm) *carried(1, layer, row, unit) = state_of(k_c0, layer, at);
    });
    this->load_rectangles(true, false);
    this->load_rectangles(false, true);
  }
  __device__ __forceinline__ void finish() const {
    each_state([&](int layer, int row, int unit, int64_t at) {
      store_state(k_h_n, layer, at, *carried(0, layer, row, unit));
      if (a.cell == kDecoderLstm) store_state(k_c_n, layer, at, *carried(1, layer, row, unit));
    });
  }

  __device__ __forceinline__ int64_t place(const DecoderAddend& of, const Result& r, int column) const {
    const int64_t u = r.u, gate = of.columns[column], n = kSearch && of.token ? walk(r.row).token : r.n;
    return n * of.from.row + r.t * of.from.step + u * of.unit + gate * of.gate;
  }
  __device__ __forceinline__ void prepare(const DecoderPhase& p, int t, int n0) const {
    if (p.ahead < 0) return;
    const DecoderAddend& of = a.addend[p.ahead];
    this->each_result(p, t, n0, [&](const Result& r) {
      for (int c = 0; c < p.columns; ++c)
        if (of.columns[c] >= 0) this->load_ahead(r, c, of.from.at, place(of, r, c));
    });
  }

  // All that is added up for one result: its columns.
  __device__ __forceinline__ void collect(const Result& r, float (&pre)[kMostColumns]) const {
    const DecoderPhase& p = r.p;
    const float* biases = this->template memory<float>(a.biases) + p.bias + r.unit;
#pragma unroll
    for (int c = 0; c < kMostColumns; ++c) pre[c] = c < p.columns ? this->summed(r, c) + biases[c * p.units] : 0.f;
    for (int j = p.addend; j < p.addend + p.addends; ++j) {
      const DecoderAddend& of = a.addend[j];
      if (of.bias || !of.from.at) continue;
#pragma unroll
      for (int c = 0; c < kMostColumns; ++c) {
        if (of.columns[c] < 0) continue;
        const int64_t at = place(of, r, c);
        pre[c] += j == p.ahead ? this->loaded(r, c, at) : this->added(of, at);
      }
    }
  }

  __device__ __forceinline__ float* carried(int which, const Result& r) const { return carried(which, r.p.layer, r.row, r.unit); }
  __device__ __forceinline__ void publish(const Result& r, float value) const {
    Base::publish(a.vector[r.p.output], this->made_at(r.p, r.t), r.row, r.p.first, 0, r.u, value);
  }

  template <template <class> class Cell>
  __device__ __forceinline__ void run_cell(const Result& r, const float (&pre)[kMostColumns]) const {
    using C = Cell<M>;
    float saved[4], h = *carried(0, r), c = 0.f;
    if (C::kCellState) c = *carried(1, r);
    C::forward(pre, h, c, saved);
    *carried(0, r) = h;
    if (C::kCellState) *carried(1, r) = c;
    publish(r, h);
#pragma unroll
    for (int i = 0; i < 4; ++i) this->kept(r, i) = saved[i];
  }

  __device__ __forceinline__ void run_reset(const Result& r, const float (&pre)[kMostColumns]) const {
    const float columns[3] = {pre[0], pre[1], pre[2]};
    float saved[4];
    GruResetBefore<M>::reset(columns, *carried(0, r), saved);
    *between(0, r.row, r.unit) = saved[1];
    *between(1, r.row, r.unit) = pre[2];
    publish(r, saved[2]);
#pragma unroll
    for (int i = 0; i < 3; ++i) this->kept(r, i) = saved[i];
  }

  __device__ __forceinline__ void run_candidate(const Result& r, float sum) const {
    const float columns[3] = {0.f, 0.f, sum + *between(1, r.row, r.unit)};
    float saved[4] = {0.f, *between(0, r.row, r.unit), 0.f, 0.f};
    GruResetBefore<M>::candidate(columns, *carried(0, r), saved);
    publish(r, *carried(0, r));
    this->kept(r, 0) = saved[3];
  }

  __device__ __forceinline__ void run_read(const Result& r, const float (&pre)[kMostColumns]) const {
    float out = a.combine == kTanh ? M::tanh(pre[0]) : a.combine == kMaxout ? fmaxf(pre[0], pre[1]) : pre[0];
    if (a.combine == kMaxout && !(pre[0] == pre[0] && pre[1] == pre[1])) out = pre[0] + pre[1];  // fmaxf hides a NaN
    this->kept(r, 1) = a.combine == kMaxout ? pre[0] : out;
    this->kept(r, 2) = pre[1];
    if (r.p.factors[0] >= 0) out *= to_float(lying<T>(a.factor[r.p.factors[0]].from, r.n, r.t)[r.u]);
    publish(r, out);
    this->kept(r, 0) = out;
  }

  __device__ __forceinline__ void epilogue(const DecoderPhase& p, int t, int n0) const {
    this->each_result(p, t, n0, [&](const Result& r) {
      float pre[kMostColumns];
      collect(r, pre);
      if (p.kind == kCell) {
        a.cell == kDecoderLstm ? run_cell<Lstm>(r, pre) : run_cell<Gru>(r, pre);
      } else if (p.kind == kReset) {
        run_reset(r, pre);
      } else if (p.kind == kCandidate) {
        run_candidate(r, pre[0]);
      } else if (p.kind == kRead) {
        run_read(r, pre);
      } else {
        publish(r, pre[0]);
        this->kept(r, 0) = pre[0];
      }
    });
  }

  // Results that no block waits for. A grid has already stored the vectors, which are results too.
  __device__ __forceinline__ void flush(const DecoderPhase& p, int t, int n0) const {
    const DecoderVector& made = a.vector[p.output];
    const bool of_state = p.kind == kCell || p.kind == kCandidate, gates = a.save && p.kind <= kCandidate;
    const int first = p.kind == kCandidate ? 3 : 0, count = p.kind == kCell ? 4 : p.kind == kReset ? 3 : 1;
    this->each_result(p, t, n0, [&](const Result& r) {
      if (!grid() && made.values.at)
        lying<T>(made.values, r.n, this->made_at(p, t))[r.u] = from_float<T>(of_state ? *carried(0, r) : this->kept(r, 0));
      const int64_t token = (static_cast<int64_t>(p.cell) * a.N + r.n) * a.T + t;
      T* to = static_cast<T*>(a.at[k_gates]) + (token * 4 + first) * a.H + r.u;
      for (int i = 0; gates && i < count; ++i) to[static_cast<int64_t>(i) * a.H] = from_float<T>(this->kept(r, i));
      if (a.save && p.kind == kCell && a.cell == kDecoderLstm)
        static_cast<float*>(a.at[k_cs])[token * a.H + r.u] = *carried(1, r);
      if (p.kind == kRead && a.at[k_read_saved]) {
        const int64_t pair = a.combine == kMaxout ? 2 : 1;
        T* read = static_cast<T*>(a.at[k_read_saved]) + ((r.n * a.T + t) * a.R + r.u) * pair;
        for (int i = 0; i < pair; ++i) read[i] = from_float<T>(this->kept(r, 1 + i));
      }
    });
  }

  __device__ __forceinline__ bool run_scores(const DecoderPhase& p, int t) {
    const DecoderVector& query = a.vector[a.query_vector];
    each_piece([&](int slot, int row, int piece) {
      const int64_t b = (row0 + row) / a.copies;
      const int s0 = piece * a.span_s, count = span(piece, a.span_s, a.S);
      this->ask(query, t + a.query_shift, row);
      this->sum_features(a.additive, this->rectangle(true, slot, b, s0, 0), count, a.A, [&](int s, float sum) {
        this->put_score(slot, row, s0 + s, this->seen(b, s0 + s) ? sum : -INFINITY);
      });
    });
    return this->meet_after(p);
  }

  __device__ __forceinline__ bool run_context(const DecoderPhase& p, int t) {
    const DecoderVector& context = a.vector[p.output];
    const int s = this->made_at(p, t);
    each_piece([&](int slot, int row, int piece) {
      const int64_t n = row0 + row;
      const int k0 = piece * a.span_f;
      this->collect_scores(slot, row);
      this->softmax(scores(slot));
      const Rectangle<T> memory = this->rectangle(false, slot, n / a.copies, 0, k0);
      this->sum_positions(false, memory, span(piece, a.span_f, a.D), scores(slot), asked(), [&](int k, float sum) {
        Base::publish(context, s, row, 0, 0, k0 + k, sum);
        if (!kSearch && !grid()) lying<T>(context.values, n, s)[k0 + k] = from_float<T>(sum);
      });
      if (a.at[k_weights] && piece == 0 && !(kSearch && !walk(row).runs))
        for (int i = threadIdx.x; i < a.S; i += kDecoderThreads)
          static_cast<T*>(a.at[k_weights])[(n * a.T + t) * a.S + i] = from_float<T>(scores(slot)[i]);
    });
    this->give_pieces(context, s);
    return this->meet_after(p);
  }

  template <class Prepare, class Epilogue>
  __device__ __forceinline__ bool run_phase(const DecoderPhase& p, int t, Prepare prepare, Epilogue epilogue) {
    if (p.kind == kScore) return run_scores(p, t);
    if (p.kind == kContext) return run_context(p, t);
    return this->product(p, t, 1, prepare, epilogue, [&](int n0) {
      if (!kSearch) flush(p, t, n0);
    });
  }

  // All steps of one block of rows; false if the group broke up.
  __device__ __forceinline__ bool run() {
    begin();
    if (a.T > 0) prepare(a.phase[a.first], 0, 0);
    if (!this->meet()) return false;
    for (int t = 0; t < a.T; ++t)
      for (int i = 0; i < a.phases; ++i) {
        const DecoderPhase& p = a.phase[i];
        const auto prepared = [&](const DecoderPhase& of, int s, int n0) { prepare(of, s, n0); };
        if (!run_phase(p, t, prepared, [&](int n0) { epilogue(p, t, n0); })) return false;
      }
    finish();
    return this->meet();  // the next rows' vectors begin anew
  }
};

template <class P, class T, class M>
__global__ void __launch_bounds__(kDecoderThreads, 1) decoder_forward(const __grid_constant__ DecoderArgs a) {
  FS_DYNAMIC_SHARED(shared);
  DecoderForward<P, T, M, false> block(a, shared);
  block.row0 = blockIdx.x / a.shape.blocks * a.shape.rows;
  for (; block.row0 < a.N; block.row0 += a.shape.groups * a.shape.rows)
    if (!block.run()) return;
}

}  // namespace fastseq::cuda
