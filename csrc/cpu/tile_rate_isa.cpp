// The rate of the register tile on operands that stay in the first-level cache: the ceiling that benchmarks measure against.
#include "driver.h"

#include <time.h>

namespace fastseq {
namespace FS_ISA {
namespace {

template <class T>
double rate(int64_t repeats) {
  constexpr int kNV = 4, kMR = kAccumulators / kNV, kDepth = 128;
  alignas(64) static thread_local uint32_t panel[kDepth * kNV * W], rows[kMR][kDepth];
  const uint32_t* a[kMR];
  for (int m = 0; m < kMR; ++m) a[m] = rows[m];
  vf acc[kMR][kNV] = {};
  timespec begin, end;
  clock_gettime(CLOCK_MONOTONIC, &begin);
  for (int64_t i = 0; i < repeats; ++i) {
    multiply<T, kMR, kNV>(a, 1, panel, kNV * W, kDepth, acc);
    asm volatile("" ::: "memory");
  }
  clock_gettime(CLOCK_MONOTONIC, &end);
  float sum = 0;
  for (auto& row : acc)
    for (vf v : row) sum += v[0];
  panel[0] = sum != 0;  // the sums are used, so the loop stays
  const double seconds = static_cast<double>(end.tv_sec - begin.tv_sec) + 1e-9 * static_cast<double>(end.tv_nsec - begin.tv_nsec);
  return 2.0 * kMR * kNV * W * kDepth * Dot<T>::kPerUnit * static_cast<double>(repeats) / seconds;
}

}  // namespace

bool holds(DType dtype) { return dtype == DType::bf16 || kHasF32; }

double tile_rate(DType dtype, int64_t repeats) {
  double flops = 0;
  dispatch(dtype, [&](auto element) { flops = rate<typename decltype(element)::type>(repeats); });
  return flops;
}

}  // namespace FS_ISA
}  // namespace fastseq
