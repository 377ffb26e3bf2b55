// A layer's recurrence, backward. A block owns the units that it owns in forward, and keeps the same rows of W_hh, read the
// other way: from the gradients of its own gates it forms its part of dL/dh of every unit, in fp32, and hands each block the
// part that concerns it. Each adds up what it got in the order of the givers, so the same numbers give the same bits.
#pragma once

#include "../cells.h"
#include "cell_math.h"
#include "product.h"
#include "rnn_exchange.h"
#include "rnn_noise.h"

namespace fastseq::cuda {

// As ForwardSizes. kM: tiles of rows of the transposed W_hh that a warp multiplies together.
template <class P, int kGates, int kM>
struct BackwardSizes {
  static constexpr int kElement = sizeof(typename P::Element);
  int strips, slices;  // of kM x 16 outputs, and shares of the block's gate rows; a warp takes a share of one or more strips
  int tiles, depth;    // of k in a share, and of all
  int pitch;           // elements between rows of the gates' gradients
  int passes;          // strips of a warp
  int givers;          // blocks that have units

  static FS_HD BackwardSizes of(const RnnShape& shape, int H) {
    BackwardSizes z;
    z.strips = (H + kM * kTileRows - 1) / (kM * kTileRows);
    const int all = kGates * shape.units / P::kTileK;
    z.slices = z.strips >= kWarps ? 1 : kWarps / z.strips;
    if (shape.kept && z.slices > all / shape.kept) z.slices = all / shape.kept > 0 ? all / shape.kept : 1;
    if (z.slices > all) z.slices = all;
    z.tiles = (all + z.slices - 1) / z.slices;
    if (z.tiles < shape.kept) z.tiles = shape.kept;
    z.depth = z.slices * z.tiles * P::kTileK;
    z.pitch = ((z.depth * kElement / 4 + 31) / 32 * 32 + 4) * 4 / kElement;
    const int lanes = kWarps / z.slices;
    z.passes = (z.strips + lanes - 1) / lanes;
    z.givers = (H + shape.units - 1) / shape.units;
    return z;
  }
  FS_HD int slots() const { return givers * slices; }  // parts of a dL/dh
  FS_HD int gradient_bytes(const RnnShape& shape) const { return shape.rows * pitch * kElement; }
  FS_HD int slot_floats(const RnnShape& shape) const { return shape.rows * shape.units; }
  // A warp's first strip is in registers as far as those go.
  FS_HD int warp_tiles(const RnnShape& shape) const { return (passes * tiles - shape.kept) * kM; }
  FS_HD int rest_bytes(const RnnShape& shape) const { return kWarps * warp_tiles(shape) * kTileBytes; }
  // Of what a block with the units from unit0 on has, the tiles that are given to it: those with units that exist.
  static FS_HD int own_tiles(const RnnShape& shape, int H, int unit0) {
    const int left = H > unit0 ? (H - unit0 + kTileRows - 1) / kTileRows : 0, most = shape.units / kTileRows;
    return left < most ? left : most;
  }
  // In this order: what the exchange needs, the gates' gradients, carry and held dL/dh of the block's own units, slots (twice,
  // except where a grid exchanges them), staging, and the weights that stay in no register.
  FS_HD int shared(const RnnShape& shape) const {
    const int buffers = shape.meeting == static_cast<int>(Meeting::kGrid) ? 0 : 2;
    return Exchange::kBytes + gradient_bytes(shape) + (2 + buffers * slots()) * slot_floats(shape) * 4 +
           (shape.kept ? kWarps * kM * kTileBytes : 0) + rest_bytes(shape);
  }
};

template <class P, class T, template <class> class Cell, class M, int kM, int kKept, int kN>
struct BackwardBlock {
  using C = Cell<M>;
  using E = typename P::Element;
  static constexpr int kGates = C::kGates, kColumns = C::kColumns;
  using Sizes = BackwardSizes<P, kGates, kM>;

  const RnnBackward& a;
  const Sizes z;
  const Steps steps;
  Exchange exchange;
  const int unit0;
  int row0 = 0;  // of the block of rows
  Pairs pairs;
  E* gradients;         // [rows, pitch]: of gate g of own unit u at g * units + u
  float *carry, *held;  // in the order of Pairs: as the cell has it; what of dL/dh does not go through the step: all of a row behind
                        // its end, of others what zoneout keeps
  float *even, *odd;    // parts that steps 0, 2, .. and 1, 3, .. gave: [block and slice that gave it, pair]
  Stationary<P, kM, kKept> first;  // a warp's first strip
  unsigned char* rest;             // its others, [passes - 1, tiles, kM]

  __device__ __forceinline__ BackwardBlock(const RnnBackward& args, unsigned char* shared)
      : a(args), z(Sizes::of(args.shape, args.H)),
        steps{args.batch, static_cast<int>(blockIdx.x / args.shape.blocks % args.directions)},
        exchange(Group::of(args.shape, args.counters, args.stop, args.patience), shared,
                 (z.givers - 1) * z.slices * Sizes::own_tiles(args.shape, args.H, first_unit(args.shape)) *
                     (args.shape.rows / kTileColumns) * kTileBytes),
        unit0(first_unit(args.shape)) {
    const RnnShape& shape = a.shape;
    const int own = z.slot_floats(shape), given = grid() ? 0 : z.slots() * own;
    shared += Exchange::kBytes;
    gradients = reinterpret_cast<E*>(shared);
    carry = reinterpret_cast<float*>(shared + z.gradient_bytes(shape));
    held = carry + own;
    even = held + own;
    odd = even + given;
    unsigned char* staging = reinterpret_cast<unsigned char*>(odd + given);
    rest = staging + (kKept ? kWarps * kM * kTileBytes : 0) + warp() * z.warp_tiles(shape) * kTileBytes;
    load_weights(staging + warp() * kM * kTileBytes);
  }

  static __device__ __forceinline__ int first_unit(const RnnShape& shape) { return blockIdx.x % shape.blocks * shape.units; }
  __device__ __forceinline__ bool grid() const { return exchange.group.meeting == Meeting::kGrid; }
  __device__ __forceinline__ float* slots(int s) const { return s & 1 ? odd : even; }
  static __device__ __forceinline__ int warp() { return threadIdx.x >> 5; }
  __device__ __forceinline__ int slice() const { return warp() % z.slices; }
  __device__ __forceinline__ int strip(int pass) const { return warp() / z.slices + pass * (kWarps / z.slices); }
  __device__ __forceinline__ bool multiplies(int pass) const {
    return warp() / z.slices < kWarps / z.slices && strip(pass) < z.strips;
  }

  __device__ __forceinline__ void load_weights(unsigned char* staging) {
    const T* w = static_cast<const T*>(a.w_hh[steps.direction]);
    const int H = a.H, units = a.shape.units, u0 = unit0, k0 = slice() * z.tiles * P::kTileK;
    for (int pass = 0; pass < z.passes; ++pass) {
      if (!multiplies(pass)) break;
      const int out0 = strip(pass) * kM * kTileRows;
      const auto weight = [=](int m, int row, int k) {
        const int out = out0 + m * kTileRows + row, gate = (k0 + k) / units, unit = u0 + (k0 + k) % units;
        return out < H && unit < H && gate < kGates ? to_float(w[(static_cast<int64_t>(gate) * H + unit) * H + out]) : 0.f;
      };
      if (pass == 0) {
        first.load(rest, staging, z.tiles, weight);
        rest += (z.tiles - kKept) * kM * kTileBytes;
      } else {
        Stationary<P, kM, 0> other;
        other.load(rest + (pass - 1) * z.tiles * kM * kTileBytes, staging, z.tiles, weight);
      }
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

  __device__ __forceinline__ void begin() {
    pairs.set(steps, a.shape, row0, unit0, a.H);
    for (int i = threadIdx.x; i < a.shape.rows * z.pitch; i += kThreads) gradients[i] = P::stored(0.f);
    pairs.each([&](int p) {
      const bool real = pairs.length[p] >= 0;
      held[own(p)] = real && a.d_h_n ? load_either<T>(a.d_h_n, state_at(p), a.wide) : 0.f;
      carry[own(p)] = real && C::kCellState && a.d_c_n ? load_either<T>(a.d_c_n, state_at(p), a.wide) : 0.f;
    });
  }

  // What a step reads of forward: all of it before the wait, which covers it.
  struct Read {
    float d_out, saved[kColumns], before, after;
  };
  __device__ __forceinline__ void read(int t, Read (&r)[kMostPairs]) {
    pairs.running(t, [&](int p) {
      const int b = row0 + pairs.row(p), u = unit0 + unit(p);
      const int64_t token = steps.token_of_direction(t, b);  // int64 first: token * H passes 2^31
      const T* gates = static_cast<const T*>(a.gates) + token * kColumns * a.H + u;
#pragma unroll
      for (int column = 0; column < kColumns; ++column) r[p].saved[column] = to_float(gates[static_cast<int64_t>(column) * a.H]);
      r[p].d_out = 0.f;
      if (a.d_out) r[p].d_out = to_float(static_cast<const T*>(a.d_out)[out_at(p, t)]);
      r[p].after = C::kCellState ? a.cells[token * a.H + u] : 0.f;
      r[p].before = C::kCellState ? cell_before(p, t) : h_before(p, t);
      if constexpr (C::kCellState)
        if (a.d_cells) carry[own(p)] += a.d_cells[token * a.H + u];
    });
  }
  __device__ __forceinline__ float cell_before(int p, int t) const {
    if (resets(p, t)) return 0.f;
    const int earlier = steps.before(t);
    if (earlier >= 0 && earlier < pairs.length[p])
      return a.cells[steps.token_of_direction(earlier, row0 + pairs.row(p)) * a.H + unit0 + unit(p)];
    return a.c0 ? load_either<T>(a.c0, state_at(p), a.wide) : 0.f;
  }
  __device__ __forceinline__ float h_before(int p, int t) const {
    if (resets(p, t)) return 0.f;
    const int earlier = steps.before(t);
    if (earlier >= 0 && earlier < pairs.length[p]) return to_float(static_cast<const T*>(a.out)[out_at(p, earlier)]);
    return a.h0 ? load_either<T>(a.h0, state_at(p), a.wide) : 0.f;
  }

  // A block's share of the group's parts that a step left, where a grid exchanges them: [slots, pairs].
  __device__ __forceinline__ float* exchanged(int s, int block) const {
    const int64_t of_block = static_cast<int64_t>(z.slots()) * z.slot_floats(a.shape);
    return a.exchange + ((blockIdx.x / a.shape.blocks * 2 + (s & 1)) * a.shape.blocks + block) * of_block;
  }
  // dL/dh of pair p, but for what comes from outside the recurrence: step s - 1 gave it.
  __device__ __forceinline__ float gathered(int p, int s) const {
    if (!s) return 0.f;
    const int stride = z.slot_floats(a.shape), count = z.slots();
    float sum = 0.f;
    if (grid()) {
      const float* from = exchanged(s - 1, exchange.group.rank) + own(p);
#pragma unroll 4
      for (int i = 0; i < count; ++i) sum += load_cg(from + static_cast<int64_t>(i) * stride);
    } else {
      const float* from = slots(s - 1) + own(p);
#pragma unroll 4
      for (int i = 0; i < count; ++i) sum += from[i * stride];
    }
    return pairs.length[p] < 0 ? sum : through_mask<T>(a.noise, sum, state_at(p));
  }

  // Gradients of pair p's pre-activations at step t, also as the product multiplies them.
  __device__ __forceinline__ void run_cell(int p, int t, const Read& r, float dh, unsigned masks, float (&d_pre)[kColumns]) {
    constexpr auto map = column_map<C>();
    float through = carry[own(p)], kept = 0.f;
    if (a.noise.any)
      masked_backward<C>(r.saved, r.before, dh, through, kept, d_pre, masks_of(a.noise, masks, p));
    else
      C::backward(r.saved, r.before, r.after, dh, through, d_pre);
    const bool cut = resets(p, t);
    carry[own(p)] = cut ? 0.f : through;
    held[own(p)] = cut ? 0.f : kept;
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate)
      gradients[pairs.row(p) * z.pitch + gate * a.shape.units + unit(p)] = P::stored(cut ? 0.f : d_pre[map.hidden[gate]]);
  }
  __device__ __forceinline__ void hold(int p, float dh) {
    held[own(p)] = dh;
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate)
      gradients[pairs.row(p) * z.pitch + gate * a.shape.units + unit(p)] = P::stored(0.f);
  }

  // The block's parts of dL/dh of all units, each to its owner.
  __device__ __forceinline__ void hand_out(int s) {
    for (int pass = 0; pass < z.passes; ++pass) {
      if (!multiplies(pass)) break;
      const E* from = gradients + slice() * z.tiles * P::kTileK;
      for (int n0 = 0; n0 < a.shape.rows; n0 += kN * kTileColumns) {
        float d[kN][kM][4] = {};
        if (pass == 0) {
          first.template multiply<kN>(d, from + n0 * z.pitch, z.pitch);
        } else {
          Stationary<P, kM, 0> other;
          other.rest = rest + (pass - 1) * z.tiles * kM * kTileBytes;
          other.tiles = z.tiles;
          other.template multiply<kN>(d, from + n0 * z.pitch, z.pitch);
        }
        give(s, strip(pass), n0, d);
      }
    }
  }
  __device__ __forceinline__ void give(int s, int strip, int n0, const float (&d)[kN][kM][4]) const {
    const int tiles = a.shape.units / kTileRows, rank = exchange.group.rank;
    const int slot = (rank * z.slices + slice()) * z.slot_floats(a.shape);
    int owner = strip * kM / tiles, tile = strip * kM - owner * tiles;  // a tile is one block's: units come in 16s
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if ((strip * kM + m) * kTileRows >= a.H) break;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int at = slot + Pairs::chunk(n0 / kTileColumns + n, tile, tiles);
        if (grid())
          store_cg(reinterpret_cast<float4*>(exchanged(s, owner) + at),
                   make_float4(d[n][m][0], d[n][m][1], d[n][m][2], d[n][m][3]));
        else if (owner == rank)
          store_shared16(slots(s) + at, d[n][m]);
        else
          exchange.send(slots(s) + at, d[n][m], owner, s);
      }
      if (++tile < tiles) continue;
      tile = 0;
      ++owner;
    }
  }

  __device__ __forceinline__ void store(int p, int t, const Read& r, const float (&d_pre)[kColumns]) const {
    constexpr auto map = column_map<C>();
    const int64_t u = unit0 + unit(p), token = steps.token_of_direction(t, row0 + pairs.row(p));
    T* to = static_cast<T*>(a.d_gates) + token * kColumns * a.H + u;
#pragma unroll
    for (int column = 0; column < kColumns; ++column)
      to[static_cast<int64_t>(map.place[column]) * a.H] = from_float<T>(d_pre[column]);
    if (!a.h_before) return;
    const float h = C::kCellState ? h_before(p, t) : r.before;
    static_cast<T*>(a.h_before)[token * a.H + u] = from_float<T>(through_mask<T>(a.noise, h, state_at(p)));
  }

  __device__ __forceinline__ void finish() {
    pairs.running(-1, [&](int p) {
      const float through = carry[own(p)], dh = held[own(p)] + gathered(p, a.batch.T) + C::direct(C::kCellState ? 0.f : through);
      if (a.d_h0) store_either<T>(a.d_h0, state_at(p), a.wide, dh);
      if (a.d_c0) store_either<T>(a.d_c0, state_at(p), a.wide, through);
    });
  }

  // All steps of one block of rows, from the last to the first; false if the group broke up.
  __device__ __forceinline__ bool run() {
    begin();
    if (!exchange.meet()) return false;
    // A block of a cluster that is larger than needed may have no units: nobody sends to it.
    const bool whole = unit0 >= a.H || !a.batch.T || run_steps();
    if (whole) finish();
    return exchange.meet(whole);
  }
  __device__ __forceinline__ bool run_steps() {
    for (int s = 0; s < a.batch.T; ++s) {
      const int t = steps.at(a.batch.T - 1 - s);
      Read r[kMostPairs];
      float d_pre[kMostPairs][kColumns];
      read(t, r);
      const unsigned masks = read_masks(*this, t);
      if (s && !wait_for(s - 1)) return false;
      pairs.each([&](int p) {
        const float dh = held[own(p)] + gathered(p, s);
        if (t < pairs.length[p])
          run_cell(p, t, r[p], dh + r[p].d_out, masks, d_pre[p]);
        else
          hold(p, dh);
      });
      pairs.running(t, [&](int p) { store(p, t, r[p], d_pre[p]); });  // before handing out: there it would hold more registers
      __syncthreads();
      if (exchange.broken()) return false;
      hand_out(s);
      exchange.arrive();
    }
    return wait_for(a.batch.T - 1);
  }
  // The parts of step s, also those of the block's own, which no message counts; and until its gradients have been multiplied.
  __device__ __forceinline__ bool wait_for(int s) {
    if (exchange.sends()) __syncthreads();
    return exchange.wait(s);
  }
};

template <class P, class T, template <class> class Cell, class M, int kM, int kKept, int kN>
__global__ void __launch_bounds__(kThreads, 1) rnn_backward(const __grid_constant__ RnnBackward a) {
  FS_DYNAMIC_SHARED(shared);
  BackwardBlock<P, T, Cell, M, kM, kKept, kN> block(a, shared);
  block.row0 = blockIdx.x / (a.shape.blocks * a.directions) * a.shape.rows;
  for (; block.row0 < a.batch.B; block.row0 += a.shape.groups * a.shape.rows)
    if (!block.run()) return;
}

}  // namespace fastseq::cuda
