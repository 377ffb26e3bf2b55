// A greedy search: the decoder's loop with one phase more, which makes the logits of the step's output and chooses what each row
// reads at the next one. The rules are those of fastseq/ops/chunked_search.py.
//
// A block looks at its own tokens. What it finds of a row, 16 bytes, goes to all blocks of the group; after the meeting each of
// them joins what all have found, in the same order, so that they agree on every row without another meeting.
#pragma once

#include "decoder_forward.h"

namespace fastseq::cuda {

template <class P, class T, class M>
struct DecoderSearch : DecoderForward<P, T, M, true> {
  using Base = DecoderForward<P, T, M, true>;
  using Base::a;
  using Base::exists;
  using Base::grid;
  using Base::group;
  using Base::row0;
  using Base::walk;
  using Base::warp;

  __device__ __forceinline__ DecoderSearch(const DecoderArgs& args, unsigned char* shared) : Base(args, shared) {}

  static __device__ __forceinline__ Choice none() { return {-INFINITY, 0.f, -INFINITY, 0x7fffffff}; }
  static __device__ __forceinline__ float exp_of(float x, float top) { return __expf(x - (top == -INFINITY ? 0.f : top)); }
  static __device__ __forceinline__ void prefer(Choice& one, float best, int token) {
    if (best > one.best || (best == one.best && token < one.token)) one.best = best, one.token = token;
  }

  // Of all lanes, in every lane.
  static __device__ __forceinline__ Choice over_lanes(Choice of) {
    const float top = Base::over_warp(of.top, [](float x, float y) { return fmaxf(x, y); });
    of.sum = Base::add_up(of.sum * exp_of(of.top, top));
    of.sum = __shfl_sync(0xffffffffu, of.sum, 0);  // one lane's: of two that add, the compiler may fuse each one's own product
    of.top = top;
#pragma unroll
    for (int by = 16; by > 0; by /= 2) {
      const float best = __shfl_xor_sync(0xffffffffu, of.best, by);
      prefer(of, best, __shfl_xor_sync(0xffffffffu, of.token, by));
    }
    return of;
  }

  // A row's choice of block `rank`: here, or in the grid's global memory.
  __device__ __forceinline__ Choice* choice(unsigned rank, int row) const {
    const int at = rank * a.shape.rows + row;
    if (!grid()) return this->template memory<Choice>(a.choices) + at;
    const int64_t of_group = blockIdx.x / group.size;
    return static_cast<Choice*>(a.at[k_choices]) + of_group * group.size * a.shape.rows + at;
  }
  __device__ __forceinline__ void give(int row, const Choice& found) const {
    const unsigned lane = threadIdx.x & 31;
    Choice* const to = choice(group.rank, row);
    if (group.meeting == Meeting::kCluster) {
      for (unsigned peer = lane; peer < group.size; peer += 32) *map_shared(to, peer) = found;
    } else if (lane == 0) {
      grid() ? store_cg(to, found) : void(*to = found);
    }
  }

  // A warp looks at the logits of one of rows n0.. and leaves the choice among this block's tokens to all.
  __device__ __forceinline__ void look(const DecoderPhase& p, int t, int n0) const {
    const int unit0 = group.rank * p.units, left = p.width - unit0, count = left < p.units ? left : p.units;
    for (int row = warp(); row < a.shape.chunk; row += kDecoderWarps) {
      if (!exists(n0 + row)) break;
      Choice found = none();
      const auto each = [&](auto f) {
        for (int unit = threadIdx.x & 31; unit < count; unit += 32)
          f(Result{p, t, n0 + row, row, unit, unit0 + unit, row0 + n0 + row});
      };
      each([&](const Result& r) {
        float logit[kMostColumns];
        this->collect(r, logit);
        this->kept(r, 0) = logit[0];
        found.top = fmaxf(found.top, logit[0]);
        if (t >= a.fewest || r.u != a.eos) prefer(found, logit[0], r.u);
      });
      each([&](const Result& r) { found.sum += exp_of(this->kept(r, 0), found.top); });
      give(n0 + row, over_lanes(found));
    }
  }

  // What all blocks have found of each row: its next token.
  __device__ __forceinline__ void choose(int t) const {
    bool any = false;
    for (int row = warp(); row < a.shape.rows; row += kDecoderWarps) {
      if (!exists(row)) break;
      Choice found = none();
      for (unsigned rank = threadIdx.x & 31; rank < group.size; rank += 32) {
        const Choice other = grid() ? load_cg(choice(rank, row)) : *choice(rank, row);
        const float top = fmaxf(found.top, other.top);
        found.sum = found.sum * exp_of(found.top, top) + other.sum * exp_of(other.top, top);
        found.top = top;
        prefer(found, other.best, other.token);
      }
      found = over_lanes(found);
      if ((threadIdx.x & 31) == 0) advance(row, t, found);
      __syncwarp();
      any |= walk(row).runs;
    }
    if ((threadIdx.x & 31) == 0) going()[warp()] = any;
    __syncthreads();
  }
  __device__ __forceinline__ int* going() const { return this->template memory<int>(a.walks + a.shape.rows * static_cast<int>(sizeof(Walk))); }
  __device__ __forceinline__ bool goes_on() const {
    bool any = false;
    for (int i = 0; i < kDecoderWarps; ++i) any |= going()[i] != 0;
    return any;
  }

  // Of a row's results one block stores each.
  __device__ __forceinline__ bool owns(int row) const { return row % group.size == group.rank; }
  __device__ __forceinline__ void advance(int row, int t, const Choice& found) const {
    Walk& of = walk(row);
    const bool runs = of.runs && found.best > -INFINITY;  // a row with nothing that may come ends
    if (of.runs && found.sum != found.sum && owns(row)) *static_cast<uint8_t*>(a.at[k_wrong]) = 1;
    if (runs) of.total += found.best - (found.top + logf(found.sum)), ++of.length;
    of.token = runs ? found.token : a.pad;
    of.runs = runs && of.token != a.eos;
    if (owns(row)) static_cast<int64_t*>(a.at[k_ids])[static_cast<int64_t>(row0 + row) * a.T + t] = of.token;
  }

  __device__ __forceinline__ void begin_walks() const {
    for (int row = threadIdx.x; row < a.shape.rows; row += kDecoderThreads) {
      const bool there = exists(row);
      walk(row) = {there ? static_cast<int>(static_cast<const int64_t*>(a.at[k_tokens])[row0 + row]) : a.pad, 0, 0.f, there};
    }
  }
  __device__ __forceinline__ void end_walks() const {
    for (int row = threadIdx.x; row < a.shape.rows; row += kDecoderThreads) {
      if (!exists(row) || !owns(row)) continue;
      static_cast<int64_t*>(a.at[k_lengths])[row0 + row] = walk(row).length;
      static_cast<float*>(a.at[k_total])[row0 + row] = walk(row).total;
    }
  }

  __device__ __forceinline__ bool run_phase(const DecoderPhase& p, int t) {
    const bool chooses = p.kind == kVocabulary;
    const auto prepare = [&](const DecoderPhase& of, int s, int n0) {
      if (!chooses || of.kind == kVocabulary) this->prepare(of, s, n0);  // what the next step reads all must meet to know
    };
    const auto epilogue = [&](int n0) { chooses ? look(p, t, n0) : this->epilogue(p, t, n0); };
    if (!Base::run_phase(p, t, prepare, epilogue)) return false;
    if (chooses) choose(t);
    return true;
  }

  // One block of rows, until all of them have ended; false if the group broke up.
  __device__ __forceinline__ bool run() {
    this->begin();
    begin_walks();
    if (!this->meet()) return false;
    for (int t = 0; t < a.T && (t == 0 || goes_on()); ++t) {
      this->prepare(a.phase[a.first], t, 0);
      for (int i = 0; i < a.phases; ++i)
        if (!run_phase(a.phase[i], t)) return false;
    }
    end_walks();
    return this->meet();  // the next rows' vectors begin anew
  }
};

template <class P, class T, class M>
__global__ void __launch_bounds__(kDecoderThreads, 1) decoder_search(const __grid_constant__ DecoderArgs a) {
  FS_DYNAMIC_SHARED(shared);
  DecoderSearch<P, T, M> block(a, shared);
  block.row0 = blockIdx.x / a.shape.blocks * a.shape.rows;
  for (; block.row0 < a.N; block.row0 += a.shape.groups * a.shape.rows)
    if (!block.run()) return;
}

}  // namespace fastseq::cuda
