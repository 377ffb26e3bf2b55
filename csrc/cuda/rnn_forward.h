// A layer's recurrence, forward. A block owns `units` units: the rows of W_hh of all their gates stay in its registers and
// shared memory for all steps. A step's h of all units is in every block's shared memory; each block multiplies it by its
// rows, runs the cell of its units, and hands their new h to all blocks of its group (group.h).
#pragma once

#include "../cells.h"
#include "group.h"
#include "cell_math.h"
#include "product.h"
#include "rnn_noise.h"

namespace fastseq::cuda {

// How a block shares out its memory and its warps. fastseq/cuda/plan.py has the same sum, and a test compares.
template <class P, int kGates, int kColumns>
struct ForwardSizes {
  static constexpr int kElement = sizeof(typename P::Element);
  int unit_tiles, slices;  // of a block: tiles of 16 units, and shares of k; one warp for each pair of them
  int tiles, depth;        // of k in a share, and of all shares
  int pitch, sum_pitch;    // elements between rows of h, and of sums

  static FS_HD ForwardSizes of(const RnnShape& shape, int H) {
    ForwardSizes z;
    z.unit_tiles = shape.units / kTileRows;
    z.slices = kWarps / z.unit_tiles;
    const int all = (H + P::kTileK - 1) / P::kTileK;
    z.tiles = (all + z.slices - 1) / z.slices;
    if (z.tiles < shape.kept) z.tiles = shape.kept;
    z.depth = z.slices * z.tiles * P::kTileK;
    // rows start 4 banks apart: 8 rows x 4 lanes then read from 32 of them
    z.pitch = ((z.depth * kElement / 4 + 31) / 32 * 32 + 4) * 4 / kElement;
    z.sum_pitch = shape.units + 4;  // so do two rows of sums 8 apart
    return z;
  }
  FS_HD int state_bytes(const RnnShape& shape) const { return shape.rows * pitch * kElement; }
  FS_HD int sum_bytes(const RnnShape& shape) const { return slices * kGates * shape.rows * sum_pitch * 4; }
  FS_HD int rest_bytes(const RnnShape& shape) const {
    return unit_tiles * slices * (tiles - shape.kept) * kGates * kTileBytes;
  }
  // In this order: h of the step (twice, except where a grid exchanges it), sums, the fp32 h and c of the block's own units,
  // biases, `gone`, and the weights that stay in no register.
  FS_HD int shared(const RnnShape& shape) const {
    const int buffers = shape.meeting == static_cast<int>(Meeting::kGrid) ? 1 : 2;
    return buffers * state_bytes(shape) + sum_bytes(shape) + 2 * shape.rows * shape.units * 4 + kColumns * shape.units * 4 + 16 +
           rest_bytes(shape);
  }
};

// P: product.h; T: the type of x; M: math.h; kKept tiles of k of each warp in registers; kN x 8 rows multiplied together.
template <class P, class T, template <class> class Cell, class M, int kKept, int kN>
struct ForwardBlock {
  using C = Cell<M>;
  using E = typename P::Element;
  static constexpr int kGates = C::kGates, kColumns = C::kColumns;
  using Sizes = ForwardSizes<P, kGates, kColumns>;

  const RnnForward& a;
  const Sizes z;
  Group group;
  const Steps steps;
  const int unit0;
  int row0 = 0;  // of the block of rows
  Pairs pairs;
  E *even, *odd;                 // h of all units as steps 0, 2, .. and 1, 3, .. multiply it: [rows, pitch]
  float *sums, *h, *c, *biases;  // h, c: [rows, units] fp32
  unsigned* gone;
  Stationary<P, kGates, kKept> weights;

  __device__ __forceinline__ ForwardBlock(const RnnForward& args, unsigned char* shared)
      : a(args), z(Sizes::of(args.shape, args.H)), group(Group::of(args.shape, args.counters, args.stop, args.patience)),
        steps{args.batch, static_cast<int>(blockIdx.x / args.shape.blocks % args.directions)},
        unit0(group.rank * args.shape.units) {
    const RnnShape& shape = a.shape;
    even = reinterpret_cast<E*>(shared);
    if (group.meeting != Meeting::kGrid) shared += z.state_bytes(shape);
    odd = reinterpret_cast<E*>(shared);
    shared += z.state_bytes(shape);
    sums = reinterpret_cast<float*>(shared);
    h = sums + z.sum_bytes(shape) / 4;
    c = h + shape.rows * shape.units;
    biases = c + shape.rows * shape.units;
    gone = reinterpret_cast<unsigned*>(biases + kColumns * shape.units);
    load_weights(reinterpret_cast<unsigned char*>(gone) + 16);
    load_biases();
  }

  __device__ __forceinline__ E* state(int s) const { return s & 1 ? odd : even; }
  static __device__ __forceinline__ int warp() { return threadIdx.x >> 5; }
  __device__ __forceinline__ bool multiplies() const { return warp() < z.unit_tiles * z.slices; }
  __device__ __forceinline__ int tile() const { return warp() % z.unit_tiles; }
  __device__ __forceinline__ int slice() const { return warp() / z.unit_tiles; }

  __device__ __forceinline__ void load_weights(unsigned char* rest) {
    if (!multiplies()) return;
    const T* w = static_cast<const T*>(a.w_hh[steps.direction]);
    const int first = unit0 + tile() * kTileRows, k0 = slice() * z.tiles * P::kTileK, H = a.H;
    // before the first step nothing is summed: each warp stages in a part of the sums
    unsigned char* staging = reinterpret_cast<unsigned char*>(sums) + warp() * kGates * kTileBytes;
    weights.load(rest + warp() * (z.tiles - kKept) * kGates * kTileBytes, staging, z.tiles, [=](int gate, int row, int k) {
      const int unit = first + row, from = k0 + k;
      return unit < H && from < H ? to_float(w[(static_cast<int64_t>(gate) * H + unit) * H + from]) : 0.f;
    });
  }

  __device__ __forceinline__ void load_biases() {
    const T* input = static_cast<const T*>(a.b_ih[steps.direction]);
    const T* hidden = static_cast<const T*>(a.b_hh[steps.direction]);
    constexpr auto map = column_map<C>();
    for (int i = threadIdx.x; i < kColumns * a.shape.units; i += kThreads) {
      const int column = i / a.shape.units, unit = unit0 + i % a.shape.units;
      float bias = 0.f;
      if (input && unit < a.H)
        for (int gate = 0; gate < kGates; ++gate) {
          if (map.input[gate] == column) bias += to_float(input[gate * a.H + unit]);
          if (map.hidden[gate] == column) bias += to_float(hidden[gate * a.H + unit]);
        }
      biases[i] = bias;
    }
  }

  static __device__ __forceinline__ int own(int p) { return Pairs::own(p); }  // of [rows, units]
  __device__ __forceinline__ int unit(int p) const { return own(p) - pairs.row[p] * a.shape.units; }
  __device__ __forceinline__ int64_t state_at(int p) const {
    return (static_cast<int64_t>(steps.direction) * a.batch.B + row0 + pairs.row[p]) * a.H + unit0 + unit(p);
  }
  __device__ __forceinline__ int64_t out_at(int p, int t) const {  // int64 first: token * H passes 2^31
    const int64_t token = steps.token(t, row0 + pairs.row[p]);
    return (token * a.directions + steps.direction) * a.H + unit0 + unit(p);
  }
  __device__ __forceinline__ bool resets(int p, int t) const { return steps.resets(t, row0 + pairs.row[p], pairs.length[p]); }

  // The initial state: of all units as the first step multiplies it, of the block's own in fp32.
  __device__ __forceinline__ void begin() {
    pairs.set(steps, a.shape, row0, unit0, a.H);
    for (int i = threadIdx.x; i < a.shape.rows * z.pitch; i += kThreads) {
      const int unit = i % z.pitch;
      const int b = row0 + i / z.pitch;
      float value = 0.f;
      if (a.h0 && b < a.batch.B && unit < a.H && !steps.resets(steps.at(0), b, steps.length(b))) {
        const int64_t at = (static_cast<int64_t>(steps.direction) * a.batch.B + b) * a.H + unit;
        value = through_mask<T>(a.noise, load_either<T>(a.h0, at, a.wide), at);
      }
      odd[i] = P::stored(0.f);  // of units that do not exist it stays so
      even[i] = P::stored(value);
    }
    pairs.each([&](int p) {
      const bool real = pairs.length[p] >= 0;
      h[own(p)] = real && a.h0 ? load_either<T>(a.h0, state_at(p), a.wide) : 0.f;
      c[own(p)] = real && a.c0 ? load_either<T>(a.c0, state_at(p), a.wide) : 0.f;
    });
  }

  __device__ __forceinline__ void load_inputs(int t, float (&x)[kMostPairs][kGates]) const {
    pairs.running(t, [&](int p) {
      const T* from = static_cast<const T*>(a.inputs) +
                      steps.token_of_direction(t, row0 + pairs.row[p]) * kGates * a.H + unit0 + unit(p);
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) x[p][gate] = to_float(from[static_cast<int64_t>(gate) * a.H]);
    });
  }

  // sums [slice, gate, row, unit] of W_hh h
  __device__ __forceinline__ void multiply(const E* state) const {
    if (!multiplies()) return;
    const int lane = threadIdx.x & 31, rows = a.shape.rows;
    const E* s = state + slice() * z.tiles * P::kTileK;
    float* to = sums + slice() * kGates * rows * z.sum_pitch + tile() * kTileRows + (lane >> 2);
    for (int n0 = 0; n0 < rows; n0 += kN * kTileColumns) {
      float d[kN][kGates][4] = {};
      weights.template multiply<kN>(d, s + n0 * z.pitch, z.pitch);
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = n0 + n * kTileColumns + (lane & 3) * 2 + (i & 1);
            to[(gate * rows + row) * z.sum_pitch + (i >> 1) * 8] = d[n][gate][i];
          }
    }
  }

  // The cell of pair p at step t: the new state into h and c.
  __device__ __forceinline__ void run_cell(int p, int t, const float (&x)[kGates], unsigned masks, float (&saved)[kColumns]) {
    constexpr auto map = column_map<C>();
    float pre[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) pre[column] = biases[column * a.shape.units + unit(p)];
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      const float* from = sums + (gate * a.shape.rows + pairs.row[p]) * z.sum_pitch + unit(p);
      float sum = 0.f;
      for (int i = 0; i < z.slices; ++i) sum += from[i * kGates * a.shape.rows * z.sum_pitch];
      pre[map.hidden[gate]] += sum;
      pre[map.input[gate]] += x[gate];
    }
    const bool zeroed = resets(p, t);
    float new_h = zeroed ? 0.f : h[own(p)], new_c = zeroed ? 0.f : c[own(p)];
    if (a.noise.any)
      masked_forward<C>(pre, new_h, new_c, saved, masks_of(a.noise, masks, p));
    else
      C::forward(pre, new_h, new_c, saved);
    h[own(p)] = new_h;
    c[own(p)] = new_c;
  }

  __device__ __forceinline__ void store(int p, int t, const float (&saved)[kColumns]) const {
    const int b = row0 + pairs.row[p], u = unit0 + unit(p);
    const int64_t token = steps.token_of_direction(t, b);  // int64 first: token * H passes 2^31
    static_cast<T*>(a.out)[out_at(p, t)] = from_float<T>(h[own(p)]);
    if (a.cells) a.cells[token * a.H + u] = c[own(p)];
    if (!a.gates) return;
    T* gates = static_cast<T*>(a.gates) + token * kColumns * a.H + u;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) gates[static_cast<int64_t>(column) * a.H] = from_float<T>(saved[column]);
  }

  // The block's new h, as step s multiplies it, to all blocks of the group.
  __device__ __forceinline__ void hand_out(int s) {
    E* next = group.meeting == Meeting::kGrid ? exchanged(s) : state(s);
    pairs.each([&](int p) {
      if (unit0 + unit(p) >= z.depth) return;  // units of the last block that do not exist
      const bool zero = pairs.length[p] < 0 || resets(p, steps.at(s));
      const E value = P::stored(zero ? 0.f : through_mask<T>(a.noise, h[own(p)], state_at(p)));
      E* at = next + pairs.row[p] * z.pitch + unit0 + unit(p);
      if (group.meeting == Meeting::kGrid)
        store_cg(at, value);
      else
        *at = value;
    });
    if (group.meeting != Meeting::kCluster) return;
    __syncthreads();
    constexpr int kChunk = 16 / sizeof(E);
    const int chunks = a.shape.units / kChunk;
    for (int i = threadIdx.x & 31; i < a.shape.rows * chunks; i += 32) {
      const int unit = unit0 + i % chunks * kChunk;
      if (unit >= z.depth) continue;
      E* chunk = next + i / chunks * z.pitch + unit;
      const uint4 value = *reinterpret_cast<const uint4*>(chunk);
      for (unsigned peer = warp(); peer < group.size; peer += kWarps)
        if (peer != group.rank) *reinterpret_cast<uint4*>(map_shared(chunk, peer)) = value;
    }
  }

  // A grid's h before step s: the group's [rows, pitch] in global memory.
  __device__ __forceinline__ E* exchanged(int s) const {
    return static_cast<E*>(a.exchange) + (blockIdx.x / group.size * 2 + (s & 1)) * static_cast<int64_t>(a.shape.rows) * z.pitch;
  }
  __device__ __forceinline__ void fetch(int s) {
    constexpr int kChunk = 16 / sizeof(E);
    const uint4* from = reinterpret_cast<const uint4*>(exchanged(s));
    const int filled = (a.H + kChunk - 1) / kChunk, chunks = z.pitch / kChunk;
    for (int i = threadIdx.x; i < a.shape.rows * filled; i += kThreads) {
      const int at = i / filled * chunks + i % filled;
      reinterpret_cast<uint4*>(even)[at] = load_cg(from + at);
    }
    __syncthreads();
  }

  __device__ __forceinline__ bool meet() {
    group.arrive();
    return group.wait(gone);
  }

  // All steps of one block of rows; false if the group broke up.
  __device__ __forceinline__ bool run() {
    begin();
    if (!meet()) return false;
    for (int s = 0; s < a.batch.T; ++s) {
      const int t = steps.at(s);
      float x[kMostPairs][kGates] = {}, saved[kMostPairs][kColumns];
      load_inputs(t, x);  // before the wait, which covers it
      const unsigned masks = read_masks(*this, t);
      if (s) {
        if (!group.wait(gone)) return false;
        if (group.meeting == Meeting::kGrid) fetch(s);
      }
      multiply(state(s));
      __syncthreads();
      pairs.running(t, [&](int p) { run_cell(p, t, x[p], masks, saved[p]); });
      if (s + 1 < a.batch.T) {
        hand_out(s + 1);
        group.arrive();
      }
      pairs.running(t, [&](int p) { store(p, t, saved[p]); });  // after arrive: nobody waits for these
    }
    pairs.running(-1, [&](int p) {
      store_either<T>(a.h_n, state_at(p), a.wide, h[own(p)]);
      if (a.c_n) store_either<T>(a.c_n, state_at(p), a.wide, c[own(p)]);
    });
    return meet();  // before the next block of rows, or the end, nobody reads or writes what was handed out
  }
};

template <class P, class T, template <class> class Cell, class M, int kKept, int kN>
__global__ void __launch_bounds__(kThreads, 1) rnn_forward(const __grid_constant__ RnnForward a) {
  FS_DYNAMIC_SHARED(shared);
  ForwardBlock<P, T, Cell, M, kKept, kN> block(a, shared);
  block.row0 = blockIdx.x / (a.shape.blocks * a.directions) * a.shape.rows;
  for (; block.row0 < a.batch.B; block.row0 += a.shape.groups * a.shape.rows)
    if (!block.run()) return;
}

}  // namespace fastseq::cuda
