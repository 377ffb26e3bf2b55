// What the forward and the backward driver share: dispatch by cell and dtype, state buffers, teams for one or two directions.
#pragma once

#include "../cells.h"
#include "pack.h"
#include "partition.h"
#include "rnn.h"
#include "scratch.h"

namespace fastseq {
namespace FS_ISA {

template <class X>
struct Tag {
  using type = X;
};

// The dtypes that this variant is compiled for: isa.cpp sends it no other.
#if defined(FS_ONLY_BF16)
constexpr bool kHasF32 = false;
#else
constexpr bool kHasF32 = true;
#endif

template <class F>
FS_INLINE void dispatch(DType dtype, F&& f) {
  if constexpr (kHasF32)
    if (dtype == DType::f32) f(Tag<float>{});
  if (dtype == DType::bf16) f(Tag<bf16>{});
}

template <class F>
FS_INLINE void dispatch(const Shape& shape, F&& f) {
  dispatch(shape.dtype, [&](auto element) {
    switch (shape.cell) {
      case CellKind::lstm: return f(Tag<Lstm<SimdMath>>{}, element);
      case CellKind::gru: return f(Tag<Gru<SimdMath>>{}, element);
      case CellKind::rnn_tanh: return f(Tag<RnnTanh<SimdMath>>{}, element);
      case CellKind::rnn_relu: return f(Tag<RnnRelu<SimdMath>>{}, element);
      case CellKind::gru_reset_before: return;  // has no driver of layers
    }
  });
}

// h0, c0, h_n, c_n and their gradients: in T or in fp32; a null source reads as zero.
template <class T>
FS_INLINE vf load_state(const Shape& shape, const void* from, int64_t at, int n) {
  if (!from) return vf{};
  return shape.state_is_f32 ? load(static_cast<const float*>(from) + at, n) : load(static_cast<const T*>(from) + at, n);
}

template <class T>
FS_INLINE void store_state(const Shape& shape, void* to, int64_t at, vf x, int n) {
  shape.state_is_f32 ? store(static_cast<float*>(to) + at, x, n) : store(static_cast<T*>(to) + at, x, n);
}

// The step before t in a direction's order, or -1 where the row has none.
FS_INLINE int64_t step_before(const Sequence& seq, int64_t t, int64_t r, bool reverse) {
  const int64_t e = reverse ? t + 1 : t - 1;
  return e >= 0 && e < seq.steps && r < seq.active(e) ? e : -1;
}

// The masks of units [u, u + n) of a row at one step; past n whatever.
FS_INLINE vf load_mask(const View& mask, const Sequence& seq, int64_t t, int64_t r, int64_t u, int n, float set, float without) {
  return mask.data ? load_flags(mask.at<const uint8_t>(seq, t, r) + u, n) * set : splat(without);
}

FS_INLINE Masks<vf> load_masks(const Noise& noise, const Sequence& seq, int64_t t, int64_t r, int64_t u, int n) {
  return {{load_mask(noise.update, seq, t, r, u, n, noise.update_scale, 1.f)},
          load_mask(noise.keep_h, seq, t, r, u, n, 1.f, noise.share_h),
          load_mask(noise.keep_c, seq, t, r, u, n, 1.f, noise.share_c)};
}

// Times the mask of the recurrent product, if there is one: h on its way into W_hh, or its gradient on the way back. at: in [B, H].
template <class T>
FS_INLINE vf recurrent_masked(const Noise& noise, vf h, int64_t at, int n) {
  return noise.recurrent ? h * load(static_cast<const T*>(noise.recurrent) + at, n) : h;
}

// The gate of the input (recurrent) product that adds to a pre-activation column, or -1.
template <class Cell>
constexpr int input_gate(int column) {
  for (int g = 0; g < Cell::kGates; ++g)
    if (Cell::kInput[g] == column) return g;
  return -1;
}

template <class Cell>
constexpr int hidden_gate(int column) {
  for (int g = 0; g < Cell::kGates; ++g)
    if (Cell::kHidden[g] == column) return g;
  return -1;
}

struct Barriers {
  Barrier all, direction[2], step[2][kMaxThreads];
};

// Runs body(direction, team, split, step barriers of the team's row groups) on one parallel region. Two directions are
// independent: with two threads or more they run side by side, each on its half of the team.
template <class Plan, class Body>
void run_directions(int directions, Plan&& plan, int threads, Body&& body) {
  const bool halves = directions == 2 && threads >= 2;
  const int wanted = halves ? 2 * plan(threads / 2).size() : plan(threads).size();
  Barriers barriers;
  parallel(wanted, [&](int rank, int size) {
    if (directions == 2 && size >= 2) {
      const int half = size / 2, d = rank / half;
      if (d < 2) body(d, Team{rank % half, half, &barriers.direction[d]}, plan(half), barriers.step[d]);
    } else {
      for (int d = 0; d < directions; ++d) body(d, Team{rank, size, &barriers.direction[0]}, plan(size), barriers.step[0]);
    }
  });
}

}  // namespace FS_ISA
}  // namespace fastseq
