// fastseq._cuda: raw pointers and a stream; Python has allocated and checked everything (fastseq/cuda). Torch is unknown here.
// With FS_EMULATE the same functions run on a CPU, for tests.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <tuple>

#include "host.h"
#include "rnn_launches.h"

#if !defined(FS_MODULE)
#define FS_MODULE _cuda
#endif

namespace py = pybind11;

namespace fastseq::cuda {

void bind_decoder(py::module_& m);  // decoder_bindings.cpp

namespace {

using Address = std::uintptr_t;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

const RnnLaunches& of_kind(int kind) {
  switch (static_cast<Kind>(kind)) {
    case Kind::kFull32: return full32_launches;
    case Kind::kTensor32: return tensor32_launches;
    case Kind::kBrainHalf: return brain_half_launches;
    default: return half_launches;
  }
}

void check(int code, const char* what) {
  if (code == 0) return;
  const std::string why = code == kNoSuchKernel ? "there is no kernel of this shape" : error_of(code);
  throw std::runtime_error(std::string("fastseq: ") + what + " was not started: " + why);
}

// As fastseq/cuda/plan.py's Shape: meeting, blocks, units, rows, groups, kept.
using ShapeTuple = std::tuple<int, int, int, int, int, int>;
RnnShape shape_of(const ShapeTuple& t) {
  return std::apply([](auto... x) { return RnnShape{x...}; }, t);
}

// T, B, tokens, step, row, starts, lengths, whether those are int64, resets.
using BatchTuple = std::tuple<int, int, int64_t, int64_t, int64_t, Address, Address, bool, Address>;
RnnBatch batch_of(const BatchTuple& t) {
  const auto& [T, B, tokens, step, row, starts, lengths, wide, resets] = t;
  return {T, B, tokens, step, row, at<const int64_t>(starts), at(lengths), wide, at<const uint8_t>(resets)};
}

// Whether there are any; masks of update, h and c, and of the recurrent product; their scale and shares.
using NoiseTuple = std::tuple<bool, Address, Address, Address, Address, float, float, float>;
RnnNoise noise_of(const NoiseTuple& t) {
  const auto& [any, update, keep_h, keep_c, recurrent, scale, share_h, share_c] = t;
  return {any, at<const uint8_t>(update), at<const uint8_t>(keep_h), at<const uint8_t>(keep_c), at(recurrent), scale, share_h, share_c};
}

using Two = std::tuple<Address, Address>;  // of both directions

// exchange, counters, stop, patience in ns.
using GroupTuple = std::tuple<Address, Address, Address, uint64_t>;

// Where a kernel runs: the index of a GPU, and one of its streams.
using Where = std::tuple<int, Address>;
void* stream_of(const Where& where) {
  check(use_device(std::get<0>(where)), "a kernel");
  return at(std::get<1>(where));
}

void forward(int kind, int cell, const BatchTuple& batch, const ShapeTuple& shape, int H, int directions, bool wide,
             Address inputs, const Two& w_hh, const Two& b_ih, const Two& b_hh, Address h0, Address c0, Address out, Address h_n,
             Address c_n, Address gates, Address cells, const GroupTuple& group, const NoiseTuple& noise, const Where& where) {
  const auto& [exchange, counters, stop, patience] = group;
  const RnnForward a{batch_of(batch), shape_of(shape), H, directions, wide, at(inputs),
                     {at(std::get<0>(w_hh)), at(std::get<1>(w_hh))}, {at(std::get<0>(b_ih)), at(std::get<1>(b_ih))},
                     {at(std::get<0>(b_hh)), at(std::get<1>(b_hh))}, at(h0), at(c0), at(out), at(h_n), at(c_n), at(gates),
                     at<float>(cells), at(exchange), at<unsigned>(counters), at<unsigned>(stop), patience, noise_of(noise)};
  check(of_kind(kind).forward(static_cast<CellKind>(cell), a, stream_of(where)), "rnn_forward");
}

void backward(int kind, int cell, const BatchTuple& batch, const ShapeTuple& shape, int H, int directions, bool wide,
              Address d_out, Address d_h_n, Address d_c_n, Address d_cells, const Two& w_hh, Address h0, Address c0, Address out,
              Address gates, Address cells, Address d_gates, Address h_before, Address d_h0, Address d_c0, const GroupTuple& group,
              const NoiseTuple& noise, const Where& where) {
  const auto& [exchange, counters, stop, patience] = group;
  const RnnBackward a{batch_of(batch), shape_of(shape), H, directions, wide, at(d_out), at(d_h_n), at(d_c_n),
                      at<const float>(d_cells), {at(std::get<0>(w_hh)), at(std::get<1>(w_hh))}, at(h0), at(c0), at(out), at(gates), at<float>(cells),
                      at(d_gates), at(h_before), at(d_h0), at(d_c0), at<float>(exchange), at<unsigned>(counters),
                      at<unsigned>(stop), patience, noise_of(noise)};
  check(of_kind(kind).backward(static_cast<CellKind>(cell), a, stream_of(where)), "rnn_backward");
}

void step(int kind, int cell, int B, int I, int H, int64_t x_row, bool wide, Address x, Address w_ih, Address w_hh, Address b_ih,
          Address b_hh, Address h0, Address c0, Address out, Address h, Address c, Address gates, Address cells, const Where& where) {
  const RnnStep a{B, I, H, x_row, wide, at(x), at(w_ih), at(w_hh), at(b_ih), at(b_hh), at(h0), at(c0), at(out), at(h), at(c),
                  at(gates), at<float>(cells)};
  check(of_kind(kind).step(static_cast<CellKind>(cell), a, stream_of(where)), "rnn_step");
}

std::tuple<int, int, int> sizes(int kind, int cell, bool forward, const ShapeTuple& shape, int H) {
  const RnnSizes found = of_kind(kind).sizes(static_cast<CellKind>(cell), forward, shape_of(shape), H);
  return {found.shared, found.pitch, found.element};
}

int clusters(int device, int kind, int cell, bool forward, const ShapeTuple& shape, int H, int shared) {
  int count = 0;
  check(use_device(device), "a question about clusters");
  check(of_kind(kind).clusters(static_cast<CellKind>(cell), forward, shape_of(shape), H, shared, &count),
        "a question about clusters");
  return count;
}

}  // namespace

PYBIND11_MODULE(FS_MODULE, m) {
  m.doc() = "fastseq's CUDA kernels, without torch.";
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("rnn_forward", forward, unlocked);
  m.def("rnn_backward", backward, unlocked);
  m.def("rnn_step", step, unlocked);
  m.def("rnn_sizes", sizes, "(bytes of shared memory of a block, elements between exchanged rows or parts of a sum, their bytes)");
  m.def("rnn_clusters", clusters, "How many clusters of this kernel that GPU holds at once, each block with so many bytes of shared memory.");
  m.def("obstacle", obstacle, "Why nothing can run here, or an empty string.");
#if defined(FS_EMULATE)
  m.def("seed_schedule", seed_schedule);
  m.def("lose_message", lose_message);
  m.def("limit_spins", limit_spins);
#endif
  bind_decoder(m);
}

}  // namespace fastseq::cuda
