// After the loop, of additive scores: gradients of keys and of v, over all steps of all rows that asked the same keys.
//
// A block has kKeys positions of one row of keys and kUnits units; a thread one unit of some of the positions. It takes the tanh
// again for every query. Each sum has one owner and the queries' order, so the same numbers give the same bits.
#include "../scores.h"
#include "cell_math.h"
#include "decoder_keys.h"

namespace fastseq::cuda {
namespace {

constexpr int kUnits = 64, kGroups = 4, kOfThread = 4, kKeys = kGroups * kOfThread, kKeyThreads = kUnits * kGroups, kQueries = 32;

template <class T, class M>
__global__ void __launch_bounds__(kKeyThreads) decoder_keys(const __grid_constant__ DecoderKeys a) {
  FS_SHARED(float, d, kQueries * kKeys);  // gradients of some queries' scores
  FS_SHARED(float, of_v, kGroups * kUnits);
  const int across = (a.A + kUnits - 1) / kUnits, down = (a.S + kKeys - 1) / kKeys;
  const int unit = blockIdx.x % across * kUnits + threadIdx.x % kUnits, group = threadIdx.x / kUnits;
  const int s0 = blockIdx.x / across % down * kKeys;
  const int64_t b = blockIdx.x / across / down;
  const T *keys = static_cast<const T*>(a.keys), *queries = static_cast<const T*>(a.queries) + b * a.M * a.A;
  float key[kOfThread], d_key[kOfThread] = {}, d_v = 0.f;
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) {
    const int s = s0 + group * kOfThread + i;
    key[i] = s < a.S && unit < a.A ? to_float(keys[(b * a.S + s) * a.A + unit]) : 0.f;
  }
  for (int m0 = 0; m0 < a.M; m0 += kQueries) {
    __syncthreads();
    for (int i = threadIdx.x; i < kQueries * kKeys; i += kKeyThreads) {
      const int m = m0 + i / kKeys, s = s0 + i % kKeys;
      d[i] = m < a.M && s < a.S ? a.d_scores[(b * a.M + m) * a.S + s] : 0.f;
    }
    __syncthreads();
    for (int m = 0; m < kQueries && m0 + m < a.M; ++m) {
      const float query = unit < a.A ? to_float(queries[static_cast<int64_t>(m0 + m) * a.A + unit]) : 0.f;
#pragma unroll
      for (int i = 0; i < kOfThread; ++i) {
        const float gradient = d[m * kKeys + group * kOfThread + i];
        const float t = gradient == 0.f ? 0.f : M::tanh(key[i] + query);  // behind the mask may be NaN
        d_key[i] = fmaf(gradient, 1.f - t * t, d_key[i]);
        d_v = fmaf(gradient, t, d_v);
      }
    }
  }
  of_v[threadIdx.x] = d_v;
  __syncthreads();
  if (unit >= a.A) return;
  const float v = to_float(static_cast<const T*>(a.v)[unit]);
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) {
    const int s = s0 + group * kOfThread + i;
    if (s < a.S) a.d_keys[(b * a.S + s) * a.A + unit] = d_key[i] * v;
  }
  if (group > 0) return;
  float sum = 0.f;
  for (int g = 0; g < kGroups; ++g) sum += of_v[g * kUnits + threadIdx.x];
  a.d_v[(b * down + s0 / kKeys) * a.A + unit] = sum;
}

template <class T, class M>
int start(const DecoderKeys& a, void* stream) {
  const unsigned grid = static_cast<unsigned>(a.B) * decoder_key_blocks(a.S) * ((a.A + kUnits - 1) / kUnits);
  return launch(decoder_keys<T, M>, {grid, kKeyThreads, 1, 0, false, stream}, a);
}

}  // namespace

int decoder_key_blocks(int S) { return (S + kKeys - 1) / kKeys; }

int launch_decoder_keys(Kind kind, const DecoderKeys& a, void* stream) {
  if (kind == Kind::kBrainHalf) return start<Bf16, Approximate>(a, stream);
  if (kind == Kind::kHalf) return start<Fp16, Rounded>(a, stream);
  return start<float, Exact>(a, stream);
}

}  // namespace fastseq::cuda
