// The attention of a decoder's step. A row's is shared out to `pieces` blocks: of what is summed over features each has some
// positions, of what is summed over positions some features. So every sum has one owner, and nothing is added up twice.
#pragma once

#include "../scores.h"
#include "decoder_block.h"

namespace fastseq::cuda {

constexpr int kSeveral = 4;  // features that a thread loads at once, and positions that a warp sums together

// Some positions and features of what one row attends to.
template <class T>
struct Rectangle {
  const T* at;
  int64_t pitch;
  bool whole;  // rows start, and go on to, multiples of kSeveral elements; zeros fill the last
};

template <class P, class T, class M, bool kSearch = false>
struct AttentionBlock : DecoderBlock<P, T, kSearch> {
  using Base = DecoderBlock<P, T, kSearch>;
  using E = typename P::Element;
  using Base::a;
  using Base::exists;
  using Base::grid;
  using Base::group;
  using Base::row0;
  using Base::vector;
  using Base::warp;

  __device__ __forceinline__ AttentionBlock(const DecoderArgs& args, unsigned char* shared) : Base(args, shared) {
    for (int k = threadIdx.x; a.additive && k < rounded(a.A); k += kDecoderThreads)
      v()[k] = k < a.A ? to_float(static_cast<const T*>(a.at[k_v])[k]) : 0.f;
  }

  static FS_HD int rounded(int n) { return (n + kSeveral - 1) / kSeveral * kSeveral; }
  __device__ __forceinline__ float* v() const { return this->template memory<float>(a.v); }
  __device__ __forceinline__ float* asked() const { return this->template memory<float>(a.asked); }
  __device__ __forceinline__ float* partial() const { return this->template memory<float>(a.work); }
  __device__ __forceinline__ float* scores(int slot) const { return this->template memory<float>(a.scores) + slot * rounded(a.S); }
  __device__ __forceinline__ bool seen(int64_t b, int s) const {
    const uint8_t* mask = static_cast<const uint8_t*>(a.at[k_mask]);
    return !mask || mask[b * a.S + s];
  }

  // f(slot, row, piece) for each of this block's.
  template <class F>
  __device__ __forceinline__ void each_piece(F f) const {
    for (int slot = 0; slot < a.slots; ++slot) {
      const int index = slot * static_cast<int>(group.size) + static_cast<int>(group.rank), row = index / a.shape.pieces;
      if (row >= a.shape.rows || !exists(row)) return;
      f(slot, row, index - row * a.shape.pieces);
    }
  }
  static __device__ __forceinline__ int span(int piece, int of_each, int all) {  // what is left for this piece
    const int left = all - piece * of_each;
    return left < 0 ? 0 : left < of_each ? left : of_each;
  }

  // Of keys or memory [B, S, width]: `from` is the first position and feature.
  __device__ __forceinline__ Rectangle<T> rectangle(bool of_keys, int slot, int64_t b, int s, int k) const {
    const bool kept = of_keys ? a.shape.keys : a.shape.memory;
    const int width = of_keys ? a.A : a.D;
    if (kept) {
      const int rows = of_keys ? a.keys_rows : a.memory_rows, pitch = of_keys ? a.keys_pitch : a.memory_pitch;
      return {this->template memory<T>(of_keys ? a.keys : a.memory) + slot * rows * pitch, pitch, true};
    }
    const T* from = static_cast<const T*>(a.at[of_keys ? k_keys : k_memory]);
    return {from + (b * a.S + s) * width + k, width, width % kSeveral == 0};
  }

  // Pieces of the rows' keys or memory into shared memory, 0 where there is nothing: padding must not bring a NaN.
  __device__ __forceinline__ void load_rectangles(bool of_keys, bool over_positions) const {
    if (!(of_keys ? a.shape.keys : a.shape.memory)) return;
    const int rows = of_keys ? a.keys_rows : a.memory_rows, pitch = of_keys ? a.keys_pitch : a.memory_pitch;
    const int width = of_keys ? a.A : a.D;
    const T* from = static_cast<const T*>(a.at[of_keys ? k_keys : k_memory]);
    each_piece([&](int slot, int row, int piece) {
      const int s0 = over_positions ? 0 : piece * a.span_s, k0 = over_positions ? piece * a.span_f : 0;
      const int count = over_positions ? a.S : span(piece, a.span_s, a.S);
      const int wide = over_positions ? span(piece, a.span_f, width) : width;
      const int64_t b = (row0 + row) / a.copies;
      T* to = this->template memory<T>(of_keys ? a.keys : a.memory) + slot * rows * pitch;
      for (int i = threadIdx.x; i < rows * pitch; i += kDecoderThreads) {
        const int s = i / pitch, k = i - s * pitch;
        to[i] = s < count && k < wide ? from[(b * a.S + s0 + s) * width + k0 + k] : from_float<T>(0.f);
      }
    });
  }

  // width features of a row of a vector at step s, in fp32, into `asked`; 0 behind them.
  __device__ __forceinline__ void ask(const DecoderVector& of, int s, int row) const {
    __syncthreads();  // what was asked before has been answered
    for (int k = threadIdx.x; k < rounded(of.width); k += kDecoderThreads) {
      float value = 0.f;
      if (k < of.width && grid()) value = to_float(load_cg(this->stored(of, row0 + row, s) + k));
      if (k < of.width && !grid()) value = to_float(vector(of, s)[row * of.pitch + k]);
      asked()[k] = value;
    }
    __syncthreads();
  }

  template <int V>
  static __device__ __forceinline__ void load(const T* from, float (&x)[V]) {
    const auto loaded = *reinterpret_cast<const Several<T, V>*>(from);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = to_float(loaded.x[i]);
  }

  // give(position, sum over k of term(row[k], asked[k], v[k])) for each of `count` positions: by one lane.
  template <int V, bool kAdditive, class Give>
  __device__ __forceinline__ void sum_features(const Rectangle<T>& of, int count, int width, Give give) const {
    const int lane = threadIdx.x & 31;
    for (int s0 = warp() * kSeveral; s0 < count; s0 += kDecoderWarps * kSeveral) {
      float sum[kSeveral] = {};
      for (int k = lane * V; k < width; k += 32 * V) {
#pragma unroll
        for (int i = 0; i < kSeveral; ++i) {
          if (s0 + i >= count) break;
          float x[V];
          load<V>(of.at + (s0 + i) * of.pitch + k, x);
#pragma unroll
          for (int e = 0; e < V; ++e) {
            if constexpr (kAdditive)
              sum[i] += AdditiveScore<M>::forward(x[e], asked()[k + e], v()[k + e]);
            else
              sum[i] = fmaf(x[e], asked()[k + e], sum[i]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kSeveral; ++i) {
#pragma unroll
        for (int by = 16; by > 0; by /= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], by);
        if (lane == i && s0 + i < count) give(s0 + i, sum[i]);
      }
    }
  }
  template <class Give>
  __device__ __forceinline__ void sum_features(bool additive, const Rectangle<T>& of, int count, int width, Give give) const {
    if (additive)
      of.whole ? sum_features<kSeveral, true>(of, count, width, give) : sum_features<1, true>(of, count, width, give);
    else
      of.whole ? sum_features<kSeveral, false>(of, count, width, give) : sum_features<1, false>(of, count, width, give);
  }

  // give(k, sum over positions of by[position] * row[k], or, kAdditive, times the tanh's derivative): a group of threads
  // for each some positions.
  template <int V, bool kAdditive, class Give>
  __device__ __forceinline__ void sum_positions(const Rectangle<T>& of, int width, const float* by, const float* query,
                                                Give give) const {
    const int across = (width + V - 1) / V;
    for (int first = 0; first < across; first += kDecoderThreads) {
      const int columns = across - first < kDecoderThreads ? across - first : kDecoderThreads, groups = kDecoderThreads / columns;
      const int of_group = threadIdx.x / columns, k = (first + threadIdx.x % columns) * V;
      __syncthreads();  // of the last sums nobody reads parts any more
      if (of_group < groups) {
        float sum[V] = {};
        for (int s = of_group; s < a.S; s += groups) {
          const float factor = by[s];
          if (factor == 0.f) continue;  // behind the mask may be NaN
          float x[V];
          load<V>(of.at + s * of.pitch + k, x);
#pragma unroll
          for (int e = 0; e < V; ++e) {
            if constexpr (kAdditive) {
              const float t = M::tanh(x[e] + query[k + e]);
              sum[e] = fmaf(factor, 1.f - t * t, sum[e]);
            } else {
              sum[e] = fmaf(factor, x[e], sum[e]);
            }
          }
        }
#pragma unroll
        for (int e = 0; e < V; ++e) partial()[of_group * columns * V + threadIdx.x % columns * V + e] = sum[e];
      }
      __syncthreads();
      for (int i = threadIdx.x; i < columns * V && first * V + i < width; i += kDecoderThreads) {
        float sum = 0.f;
        for (int g = 0; g < groups; ++g) sum += partial()[g * columns * V + i];
        give(first * V + i, sum);
      }
    }
  }
  template <class Give>
  __device__ __forceinline__ void sum_positions(bool additive, const Rectangle<T>& of, int width, const float* by,
                                                const float* query, Give give) const {
    constexpr int kV = kSeveral;
    if (additive)
      of.whole ? sum_positions<kV, true>(of, width, by, query, give) : sum_positions<1, true>(of, width, by, query, give);
    else
      of.whole ? sum_positions<kV, false>(of, width, by, query, give) : sum_positions<1, false>(of, width, by, query, give);
  }

  // Position s of what all pieces of a row need.
  __device__ __forceinline__ void put_score(int slot, int row, int s, float value) const {
    if (a.shape.pieces == 1) {
      scores(slot)[s] = value;
    } else if (grid()) {
      store_cg(static_cast<float*>(a.at[k_scores]) + static_cast<int64_t>(row0 + row) * a.S + s, value);
    } else {
      for (int piece = 0; piece < a.shape.pieces; ++piece) {
        const int index = row * a.shape.pieces + piece, size = group.size;
        *map_shared(scores(index / size) + s, index % size) = value;
      }
    }
  }
  __device__ __forceinline__ void collect_scores(int slot, int row) const {
    if (grid() && a.shape.pieces > 1)
      for (int s = threadIdx.x; s < a.S; s += kDecoderThreads)
        scores(slot)[s] = load_cg(static_cast<const float*>(a.at[k_scores]) + static_cast<int64_t>(row0 + row) * a.S + s);
    __syncthreads();
  }

  // Over the warp, the same in every lane.
  template <class Join>
  static __device__ __forceinline__ float over_warp(float value, Join join) {
#pragma unroll
    for (int by = 16; by > 0; by /= 2) value = join(value, __shfl_xor_sync(0xffffffffu, value, by));
    return value;
  }
  static __device__ __forceinline__ float add_up(float value) {
    return over_warp(value, [](float x, float y) { return x + y; });
  }

  // A row's scores to weights, in place. Of a row that sees nothing they are 0.
  __device__ __forceinline__ void softmax(float* row) const {
    const int lane = threadIdx.x & 31;
    float most = -INFINITY, total = 0.f;
    for (int s = lane; s < a.S; s += 32) most = fmaxf(most, row[s]);
    most = over_warp(most, [](float x, float y) { return fmaxf(x, y); });
    if (most == -INFINITY) most = 0.f;
    for (int s = lane; s < a.S; s += 32) total += __expf(row[s] - most);
    total = add_up(total);
    const float share = 1.f / (total == 0.f ? 1.f : total);
    __syncthreads();  // every warp has read all of it
    for (int s = threadIdx.x; s < a.S; s += kDecoderThreads) row[s] = __expf(row[s] - most) * share;
    __syncthreads();
  }

  // This block's pieces of a vector that attention made, to the other blocks of the cluster.
  __device__ __forceinline__ void give_pieces(const DecoderVector& of, int s) const {
    if (group.meeting != Meeting::kCluster) return;
    __syncthreads();
    each_piece([&](int, int row, int piece) {
      this->give_row(of, s, row, piece * a.span_f, span(piece, a.span_f, of.padded));
    });
  }

  __device__ __forceinline__ bool meet_after(const DecoderPhase& p) {
    if (p.meets) return this->meet();
    __syncthreads();
    return true;
  }
};

}  // namespace fastseq::cuda
