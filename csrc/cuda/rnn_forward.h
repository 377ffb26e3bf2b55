// A layer's recurrence, forward. A block owns `units` units: the rows of W_hh of all their gates stay in its registers and
// shared memory for all steps. A step's h of all units is in every block's shared memory; each block multiplies it by its
// rows, runs the cell of its units, and hands their new h to all blocks of its group (rnn_exchange.h).
#pragma once

#include "../cells.h"
#include "cell_math.h"
#include "product.h"
#include "rnn_exchange.h"
#include "rnn_noise.h"

namespace fastseq::cuda {

// How a block shares out its memory and its warps. fastseq/cuda/plan.py has the same sum, and a test compares.
template <class P, int kGates, int kColumns>
struct ForwardSizes {
  static constexpr int kElement = sizeof(typename P::Element), kChunk = 16 / kElement;  // elements of a message
  int unit_tiles, slices;  // of a block: tiles of 16 units, and shares of k; one warp for each pair of them
  int tiles, depth;        // of k in a share, and of all shares
  int pitch;               // elements between rows of h

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
    return z;
  }
  FS_HD int state_bytes(const RnnShape& shape) const { return shape.rows * pitch * kElement; }
  FS_HD int sum_bytes(const RnnShape& shape) const { return slices * kGates * shape.rows * shape.units * 4; }
  // Of a row, of H units; what a block of those from unit0 on sends is a part of it.
  static FS_HD int chunks(int H) { return H > 0 ? (H + kChunk - 1) / kChunk : 0; }
  static FS_HD int own_chunks(const RnnShape& shape, int H, int unit0) {
    const int left = chunks(H - unit0), most = shape.units / kChunk;
    return left < most ? left : most;
  }
  FS_HD int rest_bytes(const RnnShape& shape) const {
    return unit_tiles * slices * (tiles - shape.kept) * kGates * kTileBytes;
  }
  // In this order: what the exchange needs, h of the step (twice, except where a grid exchanges it), sums, the fp32 h and c of the
  // block's own units, biases, and the weights that stay in no register.
  FS_HD int shared(const RnnShape& shape) const {
    const int buffers = shape.meeting == static_cast<int>(Meeting::kGrid) ? 1 : 2;
    return Exchange::kBytes + buffers * state_bytes(shape) + sum_bytes(shape) + 2 * shape.rows * shape.units * 4 +
           kColumns * shape.units * 4 + rest_bytes(shape);
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
  const Steps steps;
  Exchange exchange;
  const int unit0;
  int row0 = 0;  // of the block of rows
  Pairs pairs;
  E *even, *odd;                 // h of all units as steps 0, 2, .. and 1, 3, .. multiply it: [rows, pitch]
  float *sums, *h, *c, *biases;  // h, c: fp32, in the order of Pairs
  Stationary<P, kGates, kKept> weights;

  __device__ __forceinline__ ForwardBlock(const RnnForward& args, unsigned char* shared)
      : a(args), z(Sizes::of(args.shape, args.H)),
        steps{args.batch, static_cast<int>(blockIdx.x / args.shape.blocks % args.directions)},
        exchange(Group::of(args.shape, args.counters, args.stop, args.patience), shared,
                 args.shape.rows * 16 * (Sizes::chunks(args.H) - Sizes::own_chunks(args.shape, args.H, first_unit(args.shape)))),
        unit0(first_unit(args.shape)) {
    const RnnShape& shape = a.shape;
    shared += Exchange::kBytes;
    even = reinterpret_cast<E*>(shared);
    if (!grid()) shared += z.state_bytes(shape);
    odd = reinterpret_cast<E*>(shared);
    shared += z.state_bytes(shape);
    sums = reinterpret_cast<float*>(shared);
    h = sums + z.sum_bytes(shape) / 4;
    c = h + shape.rows * shape.units;
    biases = c + shape.rows * shape.units;
    load_weights(reinterpret_cast<unsigned char*>(biases + kColumns * shape.units));
    load_biases();
  }

  static __device__ __forceinline__ int first_unit(const RnnShape& shape) { return blockIdx.x % shape.blocks * shape.units; }
  __device__ __forceinline__ bool grid() const { return exchange.group.meeting == Meeting::kGrid; }
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

  static __device__ __forceinline__ int own(int p) { return Pairs::own(p); }
  __device__ __forceinline__ int unit(int p) const { return pairs.unit(p); }
  __device__ __forceinline__ int64_t state_at(int p) const {
    return (static_cast<int64_t>(steps.direction) * a.batch.B + row0 + pairs.row(p)) * a.H + unit0 + unit(p);
  }
  __device__ __forceinline__ int64_t out_at(int p, int t) const {  // int64 first: token * H passes 2^31
    const int64_t token = steps.token(t, row0 + pairs.row(p));
    return (token * a.directions + steps.direction) * a.H + unit0 + unit(p);
  }
  __device__ __forceinline__ bool resets(int p, int t) const { return steps.resets(t, row0 + pairs.row(p), pairs.length[p]); }

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
                      steps.token_of_direction(t, row0 + pairs.row(p)) * kGates * a.H + unit0 + unit(p);
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) x[p][gate] = to_float(from[static_cast<int64_t>(gate) * a.H]);
    });
  }

  // sums [slice, gate, pair] of W_hh h
  __device__ __forceinline__ void multiply(const E* state) const {
    if (!multiplies()) return;
    const int rows = a.shape.rows;
    const E* s = state + slice() * z.tiles * P::kTileK;
    float* to = sums + slice() * kGates * rows * a.shape.units;
    for (int n0 = 0; n0 < rows; n0 += kN * kTileColumns) {
      float d[kN][kGates][4] = {};
      weights.template multiply<kN>(d, s + n0 * z.pitch, z.pitch);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        float* chunk = to + Pairs::chunk(n0 / kTileColumns + n, tile(), z.unit_tiles);
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) store_shared16(chunk + gate * rows * a.shape.units, d[n][gate]);
      }
    }
  }

  // The cell of pair p at step t: the new state into h and c.
  __device__ __forceinline__ void run_cell(int p, int t, const float (&x)[kGates], unsigned masks, float (&saved)[kColumns]) {
    constexpr auto map = column_map<C>();
    const int stride = a.shape.rows * a.shape.units;
    float pre[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) pre[column] = biases[column * a.shape.units + unit(p)];
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      const float* from = sums + gate * stride + own(p);
      float sum = 0.f;
      for (int i = 0; i < z.slices; ++i) sum += from[i * kGates * stride];
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
    const int b = row0 + pairs.row(p), u = unit0 + unit(p);
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
    E* next = grid() ? exchanged(s) : state(s);
    pairs.each([&](int p) {
      if (unit0 + unit(p) >= z.depth) return;  // units of the last block that do not exist
      const bool zero = pairs.length[p] < 0 || resets(p, steps.at(s));
      const E value = P::stored(zero ? 0.f : through_mask<T>(a.noise, h[own(p)], state_at(p)));
      E* at = next + pairs.row(p) * z.pitch + unit0 + unit(p);
      if (grid())
        store_cg(at, value);
      else
        *at = value;
    });
    if (exchange.sends()) send(next, s);
  }
  // Whole chunks of it, to the blocks that have units.
  __device__ __forceinline__ void send(E* next, int s) const {
    __syncthreads();
    const int chunks = Sizes::own_chunks(a.shape, a.H, unit0), peers = (a.H + a.shape.units - 1) / a.shape.units;
    for (int i = threadIdx.x & 31; i < a.shape.rows * chunks; i += 32) {
      E* chunk = next + i / chunks * z.pitch + unit0 + i % chunks * Sizes::kChunk;
      const uint4 value = *reinterpret_cast<const uint4*>(chunk);
      for (int peer = warp(); peer < peers; peer += kWarps)
        if (peer != static_cast<int>(exchange.group.rank)) exchange.send(chunk, value, peer, s);
    }
  }

  // A grid's h before step s: the group's [rows, pitch] in global memory.
  __device__ __forceinline__ E* exchanged(int s) const {
    return static_cast<E*>(a.exchange) + (blockIdx.x / a.shape.blocks * 2 + (s & 1)) * static_cast<int64_t>(a.shape.rows) * z.pitch;
  }
  __device__ __forceinline__ void fetch(int s) {
    const uint4* from = reinterpret_cast<const uint4*>(exchanged(s));
    const int filled = Sizes::chunks(a.H), chunks = z.pitch / Sizes::kChunk;
    for (int i = threadIdx.x; i < a.shape.rows * filled; i += kThreads) {
      const int at = i / filled * chunks + i % filled;
      reinterpret_cast<uint4*>(even)[at] = load_cg(from + at);
    }
    __syncthreads();
  }

  // All steps of one block of rows; false if the group broke up.
  __device__ __forceinline__ bool run() {
    begin();
    if (!exchange.meet()) return false;
    // A block of a cluster that is larger than needed may have no units: nobody sends to it.
    const bool whole = unit0 >= a.H || run_steps();
    if (whole)
      pairs.running(-1, [&](int p) {
        store_either<T>(a.h_n, state_at(p), a.wide, h[own(p)]);
        if (a.c_n) store_either<T>(a.c_n, state_at(p), a.wide, c[own(p)]);
      });
    return exchange.meet(whole);  // before the next block of rows, or the end, nobody reads or writes what was handed out
  }
  __device__ __forceinline__ bool run_steps() {
    for (int s = 0; s < a.batch.T; ++s) {
      const int t = steps.at(s);
      float x[kMostPairs][kGates] = {}, saved[kMostPairs][kColumns];
      load_inputs(t, x);  // before the wait, which covers it
      const unsigned masks = read_masks(*this, t);
      if (s) {
        if (!exchange.wait(s)) return false;
        if (grid()) fetch(s);
      }
      multiply(state(s));
      __syncthreads();
      if (exchange.broken()) return false;
      pairs.running(t, [&](int p) { run_cell(p, t, x[p], masks, saved[p]); });
      if (s + 1 < a.batch.T) {
        hand_out(s + 1);
        exchange.arrive();
      }
      pairs.running(t, [&](int p) { store(p, t, saved[p]); });  // after arrive: nobody waits for these
    }
    return true;
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
