// The decoder's part of fastseq._cuda: a program made once, then raw pointers and a stream for each call (fastseq/cuda/decoder.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "decoder_keys.h"
#include "decoder_launches.h"
#include "decoder_layout.h"
#include "host.h"

namespace py = pybind11;

namespace fastseq::cuda {
namespace {

using Numbers = std::vector<int64_t>;
using Tensors = std::vector<uint64_t>;
using Near = std::vector<int>;  // of each segment, the tiles of k whose weights stay
using SizesTuple = std::tuple<int, int, int, int, bool, bool, int, int, int>;           // DecoderSizes
using ShapeTuple = std::tuple<int, int, int, int, int, int, bool, bool>;               // DecoderShape
using GroupTuple = std::tuple<uint64_t, uint64_t, uint64_t>;                         // counters, stop, patience in ns
using Where = std::tuple<int, uint64_t>;                                              // a GPU's index, and a stream of it

template <class S, class Tuple>
S of(const Tuple& t) {
  return std::apply([](auto... x) { return S{x...}; }, t);
}

template <class T = void>
T* at(uint64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

const DecoderLaunches& launches(int kind) {
  switch (static_cast<Kind>(kind)) {
    case Kind::kFull32: return decoder::full32_launches;
    case Kind::kTensor32: return decoder::tensor32_launches;
    case Kind::kBrainHalf: return decoder::brain_half_launches;
    default: return decoder::half_launches;
  }
}

void check(int code, const char* what) {
  if (code) throw std::runtime_error(std::string("fastseq: ") + what + " was not started: " + error_of(code));
}

struct LaidOut {
  DecoderArgs args{};
  DecoderPacking packing{};
  int shared;

  LaidOut(const DecoderProgram& program, int kind, const SizesTuple& sizes, const ShapeTuple& shape, const Near& near,
          const Tensors& tensors)
      : shared(program.lay_out(of<DecoderSizes>(sizes), of<DecoderShape>(shape), near, kind, tensors, args, packing)) {}
};

// Bytes of shared memory of a block, and of all blocks' packed weights.
std::tuple<int, int64_t> sizes_of(const DecoderProgram& program, int kind, const SizesTuple& sizes, const ShapeTuple& shape,
                                  const Near& near) {
  const Tensors anywhere(kDecoderTensors, 64);
  const auto made = std::make_unique<LaidOut>(program, kind, sizes, shape, near, anywhere);
  return {made->shared, static_cast<int64_t>(made->args.packed_bytes) * made->args.shape.blocks};
}

void run(const DecoderProgram& program, int kind, const SizesTuple& sizes, const ShapeTuple& shape, const Near& near,
         const Tensors& tensors, uint64_t packed, bool pack, const GroupTuple& group, const Where& where) {
  const auto made = std::make_unique<LaidOut>(program, kind, sizes, shape, near, tensors);
  DecoderArgs& a = made->args;
  a.packed = made->packing.packed = at<unsigned char>(packed);
  const auto& [counters, stop, patience] = group;
  a.counters = at<unsigned>(counters), a.stop = at<unsigned>(stop), a.patience = patience;
  const char* name = a.search ? "decoder_search" : program.forward() ? "decoder_forward" : "decoder_backward";
  const DecoderLaunches& with = launches(kind);
  check(use_device(std::get<0>(where)), name);
  void* const stream = at(std::get<1>(where));
  if (pack) check(with.pack(a, made->packing, stream), "decoder_pack");  // else `packed` has them from a call before
  check((program.forward() ? with.forward : with.backward)(a, made->shared, stream), name);
}

void keys(int kind, int B, int M, int S, int A, uint64_t queries, uint64_t of, uint64_t v, uint64_t d_scores,
          uint64_t d_keys, uint64_t d_v, const Where& where) {
  check(use_device(std::get<0>(where)), "decoder_keys");
  const DecoderKeys a{B, M, S, A, at(queries), at(of), at(v), at<const float>(d_scores), at<float>(d_keys), at<float>(d_v)};
  check(launch_decoder_keys(static_cast<Kind>(kind), a, at(std::get<1>(where))), "decoder_keys");
}

std::vector<std::string> tensor_names() {
  std::vector<std::string> names;
#define FS_LIST(name, count) \
  for (int i = 0; i < count; ++i) names.push_back(count == 1 ? #name : #name "." + std::to_string(i));
  FS_DECODER_TENSORS(FS_LIST)
#undef FS_LIST
  return names;
}

}  // namespace

void bind_decoder(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  // module_local: the emulated module has one too
  py::class_<DecoderProgram>(m, "DecoderProgram", py::module_local()).def(py::init<const Numbers&>());
  m.def("decoder_sizes", sizes_of, "(bytes of shared memory of a block, bytes of the packed weights of all blocks)");
  m.def("decoder_run", run, unlocked);
  m.def("decoder_keys", keys, unlocked);
  m.def("decoder_key_blocks", decoder_key_blocks);
  m.def("decoder_tensors", tensor_names);
}

}  // namespace fastseq::cuda
