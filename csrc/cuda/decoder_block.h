// What both directions of a decoder's loop share: the vectors that phases exchange, and the products.
//
// A group of blocks runs a block of rows of the batch through all steps. Each block owns a slice of the units of every product;
// its weights lie, tile by tile, in its shared memory for all steps, and in `packed` where that is full. The phases of a step are
// data, so one kernel runs every decoder; between two that depend on each other the group meets.
#pragma once

#include "decoder.h"
#include "group.h"
#include "cell_math.h"
#include "product.h"

namespace fastseq::cuda {

constexpr int kDecoderThreads = 256, kDecoderWarps = kDecoderThreads / 32;
constexpr int kQuad = 4;  // tiles of a product that a warp takes together

template <class T, int V>
struct alignas(sizeof(T) * V) Several {
  T x[V];
};

template <class T>
__device__ __forceinline__ T* lying(const Lying& l, int64_t n, int64_t s) {
  return static_cast<T*>(l.at) + n * l.row + s * l.step;
}

// One of a phase's results at step t, always the same thread's.
struct Result {
  const DecoderPhase& p;
  int t;
  int row, chunk_row;  // of the group's rows; of those that a product takes at once
  int unit, u;         // of the block's units; of all
  int64_t n;           // row of the batch
};

template <class P, class T, bool kSearch = false>
struct DecoderBlock {
  using E = typename P::Element;
  static constexpr int kChunk = 16 / sizeof(E);

  const DecoderArgs& a;
  unsigned char* const shared;
  Group group;
  int row0 = 0;  // of the block of rows

  __device__ __forceinline__ DecoderBlock(const DecoderArgs& args, unsigned char* memory)
      : a(args), shared(memory), group(Group::of(args.shape, args.counters, args.stop, args.patience)) {
    load_weights();
    load_biases();
  }

  static __device__ __forceinline__ int warp() { return threadIdx.x >> 5; }
  template <class N>
  __device__ __forceinline__ N* memory(int at) const {
    return reinterpret_cast<N*>(shared + at);
  }
  __device__ __forceinline__ bool grid() const { return group.meeting == Meeting::kGrid; }
  __device__ __forceinline__ bool exists(int row) const { return row0 + row < a.N; }
  __device__ __forceinline__ E* vector(const DecoderVector& v, int s) const {
    return memory<E>(v.shared) + (v.slots == 2 && (s & 1) ? a.shape.rows * v.pitch : 0);
  }
  // In global memory; a search has room for two steps there.
  static __device__ __forceinline__ T* stored(const DecoderVector& v, int64_t n, int s) {
    return lying<T>(v.values, n, kSearch ? s & 1 : s);
  }
  __device__ __forceinline__ const unsigned char* packed() const {
    return a.packed + static_cast<int64_t>(group.rank) * a.packed_bytes;
  }

  __device__ __forceinline__ void load_weights() const {
    const uint4* from = reinterpret_cast<const uint4*>(packed());
    uint4* to = memory<uint4>(a.near);
    for (int i = threadIdx.x; i < a.near_bytes / 16; i += kDecoderThreads) to[i] = from[i];
  }

  __device__ __forceinline__ float added(const DecoderAddend& from, int64_t at) const {
    return from.wide ? static_cast<const float*>(from.from.at)[at] : to_float(static_cast<const T*>(from.from.at)[at]);
  }

  __device__ __forceinline__ void load_biases() const {
    for (int i = 0; i < a.phases; ++i) {
      const DecoderPhase& p = a.phase[i];
      for (int j = threadIdx.x; j < p.columns * p.units; j += kDecoderThreads) {
        const int column = j / p.units, unit = group.rank * p.units + j % p.units;
        float sum = 0.f;
        for (int k = p.addend; k < p.addend + p.addends && unit < p.width; ++k) {
          const DecoderAddend& of = a.addend[k];
          if (of.bias && of.from.at && of.columns[column] >= 0)
            sum += added(of, static_cast<int64_t>(of.columns[column]) * of.gate + unit * of.unit);
        }
        memory<float>(a.biases)[p.bias + j] = sum;
      }
    }
  }

  // All vectors 0, but for those that have something before the first step.
  __device__ __forceinline__ void begin_vectors() const {
    for (int i = 0; i < a.vectors && !grid(); ++i) {
      const DecoderVector& v = a.vector[i];
      for (int j = threadIdx.x; j < v.slots * a.shape.rows * v.pitch; j += kDecoderThreads) {
        const int row = j / v.pitch, k = j % v.pitch;
        const bool real = v.initial && row < a.shape.rows && exists(row) && k < v.width;
        memory<E>(v.shared)[j] = P::stored(real ? to_float(lying<T>(v.values, row0 + row, 0)[k]) : 0.f);
      }
    }
  }

  // Elements k.. of block b of v at step s: of a row that does not exist, beyond the width and after the last step 0.
  __device__ __forceinline__ void fetch(const DecoderVector& v, int b, int row, int s, int k, E (&chunk)[kChunk]) const {
    if (!grid()) {
      const auto loaded = *reinterpret_cast<const Several<E, kChunk>*>(vector(v, s) + row * v.pitch + b * v.padded + k);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) chunk[i] = loaded.x[i];
      return;
    }
    const bool there = exists(row) && s < v.steps;
    const T* from = stored(v, row0 + row, s) + v.column[b] * v.width + k;
    if (v.width % kChunk == 0) {
      Several<T, kChunk> loaded{};
      if (there && k < v.width) loaded = load_cg(reinterpret_cast<const Several<T, kChunk>*>(from));
#pragma unroll
      for (int i = 0; i < kChunk; ++i) chunk[i] = P::stored(to_float(loaded.x[i]));
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) chunk[i] = P::stored(there && k + i < v.width ? to_float(load_cg(from + i)) : 0.f);
    }
  }

  // Rows n0.. of what phase p multiplies and cannot read where it lies.
  __device__ __forceinline__ void stage(const DecoderPhase& p, int t, int n0) const {
    for (int j = p.segment; j < p.segment + p.segments; ++j) {
      const DecoderSegment& from = a.segment[j];
      if (from.staged < 0) continue;
      const DecoderVector& v = a.vector[from.vector];
      const int chunks = v.padded / kChunk, all = from.blocks * chunks, s = t + from.shift;
      for (int i = threadIdx.x; i < a.shape.chunk * all; i += kDecoderThreads) {
        const int row = n0 + i / all, b = i % all / chunks, k = i % chunks * kChunk;
        E chunk[kChunk];
        fetch(v, from.first + b, row, s, k, chunk);
        if (from.mask >= 0 && exists(row)) {
          const T* factors = lying<T>(a.factor[from.mask].from, row0 + row, t) + k;
#pragma unroll
          for (int e = 0; e < kChunk; ++e)
            if (k + e < v.width) chunk[e] = P::stored(to_float(from_float<T>(to_float(chunk[e]) * to_float(factors[e]))));
        }
        Several<E, kChunk> whole;
#pragma unroll
        for (int e = 0; e < kChunk; ++e) whole.x[e] = chunk[e];
        E* to = memory<E>(a.stage) + (row - n0) * a.stage_pitch + from.staged + b * v.padded + k;
        *reinterpret_cast<Several<E, kChunk>*>(to) = whole;
      }
    }
  }

  __device__ __forceinline__ float* sums(const DecoderPhase& p, int plane, int row) const {
    return memory<float>(a.work) + (plane * a.shape.chunk + row) * (p.units + 4);  // two rows are 8 banks apart
  }

  // d += weights times state, for the tiles of k of this warp's slice. tile: the first; bits: which of the quad there are.
  template <int kN>
  static __device__ __forceinline__ void multiply_tiles(float (&d)[kN][kQuad][4], const unsigned char* tile, unsigned bits,
                                                        int count, int i, int step, int tiles, const E* state, int pitch) {
    const int lane = threadIdx.x & 31;
    for (tile += i * count * kTileBytes; i < tiles; i += step, tile += (step - 1) * count * kTileBytes) {
      typename P::State s[kN];
#pragma unroll
      for (int n = 0; n < kN; ++n) s[n] = P::state(state + n * kTileColumns * pitch + i * P::kTileK, pitch, lane);
#pragma unroll
      for (int m = 0; m < kQuad; ++m) {
        if (!(bits >> m & 1)) continue;
        const auto w = P::load(tile, lane);
        tile += kTileBytes;
#pragma unroll
        for (int n = 0; n < kN; ++n) P::multiply(d[n][m], w, s[n]);
      }
    }
  }

  // The sums of rows n0.. of this block's units, one plane for each slice of k and column.
  template <int kN>
  __device__ __forceinline__ void multiply(const DecoderPhase& p, int t, int n0) const {
    const int beside = p.quads < kDecoderWarps ? p.quads : kDecoderWarps, slice = warp() / beside;
    if (slice >= p.slices) return;
    const int all = p.units / kTileRows * p.columns;
    for (int q = warp() % beside; q < p.quads; q += beside) {
      const unsigned live = all - q * kQuad >= kQuad ? (1u << kQuad) - 1 : (1u << (all - q * kQuad)) - 1;
      const unsigned char *near = shared + p.near + q * p.near_quad, *far = packed() + p.far + q * p.far_quad;
      float d[kN][kQuad][4] = {};
      for (int j = p.segment; j < p.segment + p.segments; ++j) {
        const DecoderSegment& of = a.segment[j];
        const DecoderVector& v = a.vector[of.vector];
        const unsigned bits = of.pattern & live;
        const int count = (bits & 1) + (bits >> 1 & 1) + (bits >> 2 & 1) + (bits >> 3);
        const bool direct = of.staged < 0;
        const int pitch = direct ? v.pitch : a.stage_pitch, left = of.tiles - of.near;
        const E* state = memory<E>(a.stage) + of.staged;
        if (direct) state = vector(v, t + of.shift) + n0 * pitch + of.first * v.padded;
        multiply_tiles<kN>(d, near, bits, count, slice, p.slices, of.near, state, pitch);
        multiply_tiles<kN>(d, far, bits, count, slice, p.slices, left, state + of.near * P::kTileK, pitch);
        near += of.near * count * kTileBytes;
        far += left * count * kTileBytes;
      }
      put<kN>(p, q, slice, live, d);
    }
  }

  template <int kN>
  __device__ __forceinline__ void put(const DecoderPhase& p, int q, int slice, unsigned live,
                                      const float (&d)[kN][kQuad][4]) const {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < kQuad; ++m) {
      if (!(live >> m & 1)) continue;
      const int tile = q * kQuad + m, column = tile % p.columns;
      const int unit = tile / p.columns * kTileRows + (lane >> 2);
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = n * kTileColumns + (lane & 3) * 2 + (i & 1);
          sums(p, slice * p.columns + column, row)[unit + (i >> 1) * 8] = d[n][m][i];
        }
    }
  }

  __device__ __forceinline__ float summed(const Result& r, int column) const {
    float sum = 0.f;
    for (int i = 0; i < r.p.slices; ++i) sum += sums(r.p, i * r.p.columns + column, r.chunk_row)[r.unit];
    return sum;
  }

  // f(result) for each of rows n0.. that exists.
  template <class F>
  __device__ __forceinline__ void each_result(const DecoderPhase& p, int t, int n0, F f) const {
    const int unit0 = group.rank * p.units;
    for (int i = threadIdx.x; i < a.shape.chunk * p.units; i += kDecoderThreads) {
      const int row = i / p.units, unit = i - row * p.units;
      if (exists(n0 + row) && unit0 + unit < p.width) f(Result{p, t, n0 + row, row, unit, unit0 + unit, row0 + n0 + row});
    }
  }

  // A number that an epilogue will need, loaded while the product runs: it comes from far away. Copies have 4 bytes, so of 16-bit
  // numbers the neighbour comes along. All of it is the thread's own.
  __device__ __forceinline__ uint32_t* ahead(const Result& r, int plane) const {
    return memory<uint32_t>(a.ahead) + (plane * a.shape.chunk + r.chunk_row) * r.p.units + r.unit;
  }
  template <class N = T>
  __device__ __forceinline__ void load_ahead(const Result& r, int plane, const void* tensor, int64_t at) const {
    constexpr int kOfWord = 4 / sizeof(N);
    async_copy4(ahead(r, plane), static_cast<const N*>(tensor) + at / kOfWord * kOfWord);
  }
  template <class N = T>
  __device__ __forceinline__ float loaded(const Result& r, int plane, int64_t at) const {
    constexpr int kOfWord = 4 / sizeof(N);
    return to_float(reinterpret_cast<const N*>(ahead(r, plane))[at % kOfWord]);
  }

  // What the flush after the meeting stores. Where the thread's own sums were, of which it has no more need.
  __device__ __forceinline__ float& kept(const Result& r, int i) const { return sums(r.p, i, r.chunk_row)[r.unit]; }

  // One element of a vector, to be handed out.
  __device__ __forceinline__ void publish(const DecoderVector& v, int s, int row, int b, int column, int k, float value) const {
    if (grid())
      store_cg(stored(v, row0 + row, s) + column * v.width + k, from_float<T>(value));
    else
      vector(v, s)[row * v.pitch + b * v.padded + k] = v.raw ? from_float<E>(value) : P::stored(value);
  }

  // One row's elements k0.. of a vector of this block to the others of the cluster, by one warp for each few of them.
  __device__ __forceinline__ void give_row(const DecoderVector& v, int s, int row, int k0, int count) const {
    E* from = vector(v, s) + row * v.pitch + k0;
    for (int i = threadIdx.x & 31; i < count / kChunk; i += 32) {
      const uint4 value = reinterpret_cast<const uint4*>(from)[i];
      for (unsigned peer = warp(); peer < group.size; peer += kDecoderWarps)
        if (peer != group.rank) map_shared(reinterpret_cast<uint4*>(from), peer)[i] = value;
    }
  }

  // Rows n0.. of this block's units of what phase p made.
  __device__ __forceinline__ void hand_out(const DecoderPhase& p, int t, int n0) const {
    if (group.meeting != Meeting::kCluster || (kSearch && p.kind == kVocabulary)) return;  // whose choices are small
    __syncthreads();
    const DecoderVector& v = a.vector[p.output];
    const int k0 = group.rank * p.units * p.each, left = v.padded - k0, count = p.units * p.each < left ? p.units * p.each : left;
    if (count <= 0) return;
    const int chunks = count / kChunk, all = a.shape.chunk * p.blocks * chunks, s = made_at(p, t);
    for (int i = threadIdx.x & 31; i < all; i += 32) {
      const int row = n0 + i / (p.blocks * chunks), b = i / chunks % p.blocks, k = k0 + i % chunks * kChunk;
      uint4* from = reinterpret_cast<uint4*>(vector(v, s) + row * v.pitch + (p.first + b) * v.padded + k);
      const uint4 value = *from;
      for (unsigned peer = warp(); peer < group.size; peer += kDecoderWarps)
        if (peer != group.rank) *map_shared(from, peer) = value;
    }
  }

  // The step of its vector that phase p makes at step t: one whose first is from before the loop has one more.
  __device__ __forceinline__ int made_at(const DecoderPhase& p, int t) const {
    return t + (a.vector[p.output].steps > a.T ? 1 : 0);
  }

  __device__ __forceinline__ bool meet() {
    __syncwarp();  // the cluster's barrier wants whole warps
    group.arrive();
    return group.wait(memory<unsigned>(a.gone));
  }

  // The next product's first loads ahead, at step t or at one `onward`: before the meeting, which takes as long as they do.
  template <class Prepare>
  __device__ __forceinline__ void prepare_next(const DecoderPhase& p, int t, int onward, Prepare prepare) const {
    const DecoderPhase& next = a.phase[p.next];
    const int s = &next > &p ? t : t + onward;
    if (s >= 0 && s < a.T) prepare(next, s, 0);
    async_commit();
  }

  // prepare(p, t, n0) starts loads for rows n0.. of the results, epilogue(n0) makes them of their sums, flush(n0) stores what no
  // other block waits for.
  template <class Prepare, class Epilogue, class Flush>
  __device__ __forceinline__ bool product(const DecoderPhase& p, int t, int onward, Prepare prepare, Epilogue epilogue,
                                          Flush flush) {
    for (int n0 = 0; n0 < a.shape.rows; n0 += a.shape.chunk) {
      if (n0) prepare(p, t, n0);
      async_commit();
      if (p.stages) {
        stage(p, t, n0);
        __syncthreads();
      }
      if (a.shape.chunk == kTileColumns)
        multiply<1>(p, t, n0);
      else
        multiply<2>(p, t, n0);
      async_wait<0>();
      __syncthreads();
      epilogue(n0);
      hand_out(p, t, n0);
      if (n0 + a.shape.chunk >= a.shape.rows) break;
      flush(n0);
      __syncthreads();
    }
    __syncwarp();
    group.arrive();
    flush(a.shape.rows - a.shape.chunk);
    // a group of several has met within arrive; what the next loads ahead may lie where another warp's epilogue still reads
    if (group.meeting == Meeting::kAlone) __syncthreads();
    prepare_next(p, t, onward, prepare);
    if (group.meeting == Meeting::kCluster) __syncthreads();  // the next product's sums lie where the flush reads
    return group.wait(memory<unsigned>(a.gone));
  }
};

// A warp for each tile of a block's weights. Threads of the warp follow the order of the source's rows of k.
template <class P, class T>
__device__ __forceinline__ void pack_tile(const DecoderPhase& p, const DecoderVector& v, const DecoderWeights& w,
                                          int rank, int tile, int k0, unsigned char* to) {
  const int column = tile % p.columns, first = rank * p.units + tile / p.columns * kTileRows;
  const int64_t of_column = w.columns[column];
  for (int j = threadIdx.x & 31; j < kTileRows * P::kTileK; j += 32) {
    const int row = j / P::kTileK, at = j % P::kTileK, k = (k0 + at) % v.padded, b = (k0 + at) / v.padded, unit = first + row;
    float value = 0.f;
    if (unit < p.width && k < v.width)
      value = to_float(static_cast<const T*>(w.w)[(of_column + w.gates[b]) * w.gate + unit * w.unit + k * w.k]);
    *reinterpret_cast<typename P::Element*>(to + P::offset(row, at)) = P::stored(value);
  }
}

template <class P, class T>
__global__ void __launch_bounds__(kDecoderThreads) decoder_pack(const __grid_constant__ DecoderArgs a,
                                                                const __grid_constant__ DecoderPacking of) {
  const int rank = blockIdx.x, warp = threadIdx.x >> 5;
  for (int i = 0; i < a.phases; ++i) {
    const DecoderPhase& p = a.phase[i];
    const int all = p.units / kTileRows * p.columns;
    unsigned char* const to = of.packed + static_cast<int64_t>(rank) * a.packed_bytes;
    for (int q = 0; q < p.quads; ++q) {
      unsigned char *near = to + p.near - a.near + q * p.near_quad, *far = to + p.far + q * p.far_quad;
      for (int j = p.segment; j < p.segment + p.segments; ++j) {
        const DecoderSegment& s = a.segment[j];
        for (int k = 0; k < s.tiles; ++k) {
          const bool stays = k < s.near;
          for (int m = 0; m < kQuad; ++m) {
            if (!(s.pattern >> m & 1) || q * kQuad + m >= all) continue;
            if ((q + k + m) % kDecoderWarps == warp)
              pack_tile<P, T>(p, a.vector[s.vector], of.weights[j], rank, q * kQuad + m, k * P::kTileK, stays ? near : far);
            near += stays ? kTileBytes : 0;
            far += stays ? 0 : kTileBytes;
          }
        }
      }
    }
  }
}

}  // namespace fastseq::cuda
