// The decoder's kernels of one kind of numbers: CMake compiles this file once for each, with FS_KIND one of product.h and
// FS_LAUNCHES the name of its table.
#include "decoder_backward.h"
#include "decoder_forward.h"
#include "decoder_launches.h"
#include "decoder_search.h"

namespace fastseq::cuda {
namespace {

template <class P> struct Numbers;  // the type of y, and the cells' math
template <> struct Numbers<Full32> { using T = float; using M = Exact; };
template <> struct Numbers<Tensor32> { using T = float; using M = Exact; };
template <> struct Numbers<BrainHalf> { using T = Bf16; using M = Approximate; };
template <> struct Numbers<Half> { using T = Fp16; using M = Rounded; };

using P = FS_KIND;
using T = Numbers<P>::T;
using M = Numbers<P>::M;

LaunchShape launch_shape(const DecoderShape& shape, int shared, void* stream) {
  const unsigned blocks = shape.blocks, cluster = shape.meeting == static_cast<int>(Meeting::kCluster) ? blocks : 1;
  return {blocks * shape.groups, kDecoderThreads, cluster, static_cast<unsigned>(shared),
          shape.meeting == static_cast<int>(Meeting::kGrid), stream};
}

}  // namespace

namespace decoder {

const DecoderLaunches FS_LAUNCHES = {
    [](const DecoderArgs& a, const DecoderPacking& of, void* stream) {
      const LaunchShape shape{static_cast<unsigned>(a.shape.blocks), kDecoderThreads, 1, 0, false, stream};
      return launch(decoder_pack<P, T>, shape, a, of);
    },
    [](const DecoderArgs& a, int shared, void* stream) {
      const LaunchShape shape = launch_shape(a.shape, shared, stream);
      return a.search ? launch(decoder_search<P, T, M>, shape, a) : launch(decoder_forward<P, T, M>, shape, a);
    },
    [](const DecoderArgs& a, int shared, void* stream) {
      return launch(decoder_backward<P, T, M>, launch_shape(a.shape, shared, stream), a);
    },
};

}  // namespace decoder
}  // namespace fastseq::cuda
