// The recurrent kernels of one kind of numbers: CMake compiles this file once for each, with FS_KIND one of product.h and
// FS_LAUNCHES the name of its table in rnn_launches.h.
#include <type_traits>

#include "rnn_backward.h"
#include "rnn_forward.h"
#include "rnn_launches.h"
#include "rnn_step.h"

namespace fastseq::cuda {
namespace {

template <class P> struct Numbers;  // the type of x, and the cells' math
template <> struct Numbers<Full32> { using T = float; using M = Exact; };
template <> struct Numbers<Tensor32> { using T = float; using M = Exact; };
template <> struct Numbers<BrainHalf> { using T = Bf16; using M = Approximate; };
template <> struct Numbers<Half> { using T = Fp16; using M = Rounded; };

using P = FS_KIND;
using T = Numbers<P>::T;
using M = Numbers<P>::M;

LaunchShape launch_shape(const RnnShape& shape, int directions, int shared, void* stream) {
  const unsigned blocks = shape.blocks, cluster = shape.meeting == static_cast<int>(Meeting::kCluster) ? blocks : 1;
  return {blocks * shape.groups * directions, kThreads, cluster, static_cast<unsigned>(shared),
          shape.meeting == static_cast<int>(Meeting::kGrid), stream};
}

// Of one cell. Each with_ gives f the variant that a shape asks for, and what that needs; two tiles of rows at once save loads of
// weights where those are in shared memory.
template <template <class> class Cell>
struct Of {
  static constexpr int kGates = Cell<M>::kGates;
  // Not Full32, of which a lane would hold 16 of a tile's 128 numbers, not 4; nor one gate, whose weights are few.
  static constexpr bool kInRegisters = !std::is_same_v<P, Full32> && kGates > 1;
  static constexpr int kStepShared = step_shared<P, Cell<M>>();
  static_assert(kStepShared <= 99 * 1024);
  using Forward = ForwardSizes<P, kGates, Cell<M>::kColumns>;
  template <int kM> using Backward = BackwardSizes<P, kGates, kM>;

  template <class F>
  static int with_forward(const RnnShape& shape, int H, F f) {
    const Forward sizes = Forward::of(shape, H);
    const RnnSizes needs{sizes.shared(shape), sizes.pitch, Forward::kElement};
    if (shape.kept == 0 && shape.rows % (2 * kTileColumns) == 0) return f(rnn_forward<P, T, Cell, M, 0, 2>, needs);
    if (shape.kept == 0) return f(rnn_forward<P, T, Cell, M, 0, 1>, needs);
    if constexpr (kInRegisters)
      if (shape.kept == 8) return f(rnn_forward<P, T, Cell, M, 8, 1>, needs);
    return kNoSuchKernel;
  }

  template <int kM>
  static RnnSizes backward_needs(const RnnShape& shape, int H) {
    const Backward<kM> sizes = Backward<kM>::of(shape, H);
    return {sizes.shared(shape), sizes.slots(), 4};
  }
  template <class F>
  static int with_backward(const RnnShape& shape, int H, F f) {
    const RnnSizes needs = backward_needs<4>(shape, H);
    if (shape.kept == 0 && shape.rows % (2 * kTileColumns) == 0) return f(rnn_backward<P, T, Cell, M, 4, 0, 2>, needs);
    if (shape.kept == 0) return f(rnn_backward<P, T, Cell, M, 4, 0, 1>, needs);
    if constexpr (kInRegisters) {
      constexpr int kWide = kGates == 4 ? 7 : 6;  // one more and registers spill, or it is more than there are
      if (shape.kept == kWide) return f(rnn_backward<P, T, Cell, M, 4, kWide, 1>, needs);
      if (shape.kept == 3) return f(rnn_backward<P, T, Cell, M, 8, 3, 1>, backward_needs<8>(shape, H));
    }
    return kNoSuchKernel;
  }

  static int forward(const RnnForward& a, void* stream) {
    return with_forward(a.shape, a.H, [&](auto kernel, const RnnSizes& needs) {
      return launch(kernel, launch_shape(a.shape, a.directions, needs.shared, stream), a);
    });
  }
  static int backward(const RnnBackward& a, void* stream) {
    return with_backward(a.shape, a.H, [&](auto kernel, const RnnSizes& needs) {
      return launch(kernel, launch_shape(a.shape, a.directions, needs.shared, stream), a);
    });
  }
  static int step(const RnnStep& a, void* stream) {
    const unsigned grid = (a.B + kStepRows - 1) / kStepRows * ((a.H + kTileRows - 1) / kTileRows);
    return launch(rnn_step<P, T, Cell, M>, {grid, kThreads, 1, kStepShared, false, stream}, a);
  }
  static int clusters(bool forward, const RnnShape& shape, int H, int shared, int* count) {
    const auto ask = [&](auto kernel, const RnnSizes&) {
      return clusters_resident(kernel, launch_shape(shape, 1, shared, nullptr), count);
    };
    return forward ? with_forward(shape, H, ask) : with_backward(shape, H, ask);
  }
  static RnnSizes sizes(bool forward, const RnnShape& shape, int H) {
    RnnSizes found{};
    const auto ask = [&](auto, const RnnSizes& needs) { return found = needs, 0; };
    forward ? with_forward(shape, H, ask) : with_backward(shape, H, ask);
    return found;
  }
};

template <class F>
auto with_cell(CellKind cell, F f) {
  switch (cell) {
    case CellKind::kLstm: return f(Of<Lstm>{});
    case CellKind::kGru: return f(Of<Gru>{});
    case CellKind::kRnnTanh: return f(Of<RnnTanh>{});
    case CellKind::kRnnRelu: break;
  }
  return f(Of<RnnRelu>{});
}

}  // namespace

const RnnLaunches FS_LAUNCHES = {
    [](CellKind cell, const RnnForward& a, void* stream) {
      return with_cell(cell, [&](auto of) { return of.forward(a, stream); });
    },
    [](CellKind cell, const RnnBackward& a, void* stream) {
      return with_cell(cell, [&](auto of) { return of.backward(a, stream); });
    },
    [](CellKind cell, const RnnStep& a, void* stream) {
      return with_cell(cell, [&](auto of) { return of.step(a, stream); });
    },
    [](CellKind cell, bool forward, const RnnShape& shape, int H) {
      return with_cell(cell, [&](auto of) { return of.sizes(forward, shape, H); });
    },
    [](CellKind cell, bool forward, const RnnShape& shape, int H, int shared, int* count) {
      return with_cell(cell, [&](auto of) { return of.clusters(forward, shape, H, shared, count); });
    },
};

}  // namespace fastseq::cuda
