// What this CPU can do at most, for benchmarks to measure against: the register tile on operands that stay in the
// first-level cache, and loads from buffers that fit one cache or another.
#include "driver.h"

#include <time.h>

#include <cstring>

#include "scratch.h"
#include "team.h"

namespace fastseq {
namespace FS_ISA {
namespace {

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

template <class T>
double rate(int64_t repeats) {
  constexpr int kNV = 4, kMR = tile_rows(kNV), kDepth = 128;
  alignas(64) static thread_local uint32_t panel[kDepth * kNV * W], rows[kMR][kDepth];
  const uint32_t* a[kMR];
  for (int m = 0; m < kMR; ++m) a[m] = rows[m];
  vf acc[kMR][kNV] = {};
  [[maybe_unused]] const TileRegisters registers;
  const double begin = now();
  with_tile<kMR>(kMR, [&](auto count) {
    if constexpr (decltype(count)::value == kMR)
      for (int64_t i = 0; i < repeats; ++i) {
        multiply<T>(count, a, 1, panel, kNV * W, kDepth, acc);
        asm volatile("" ::: "memory");
      }
  });
  const double seconds = now() - begin;
  float sum = 0;
  for (auto& row : acc)
    for (vf v : row) sum += v[0];
  panel[0] = sum != 0;  // the sums are used, so the loop stays
  return 2.0 * kMR * kNV * W * kDepth * Dot<T>::kPerUnit * static_cast<double>(repeats) / seconds;
}

}  // namespace

bool holds(DType dtype) { return dtype == DType::bf16 || kHasF32; }

double tile_rate(DType dtype, int64_t repeats) {
  double flops = 0;
  dispatch(dtype, [&](auto element) { flops = rate<typename decltype(element)::type>(repeats); });
  return flops;
}

double load_rate(int64_t bytes, int64_t repeats, int threads) {
  constexpr int kLoads = 8, kPiece = kLoads * W * 4;  // as many sums as hide an addition's latency
  const int64_t size = (bytes + kPiece - 1) / kPiece * kPiece;
  Barrier barrier;
  double total = 0;
  parallel(threads, [&](int rank, int team_size) {
    const Team team{rank, team_size, &barrier};
    void* buffer = allocate_scratch(size);
    std::memset(buffer, 0, static_cast<size_t>(size));
    const float* data = static_cast<const float*>(buffer);
    vf sum[kLoads] = {};
    team.sync();
    const double begin = now();
    for (int64_t i = 0; i < repeats; ++i) {
      for (int64_t k = 0; k < size / 4; k += kPiece / 4)
        unroll<kLoads>([&](int j) FS_LAMBDA { sum[j] += load_vector<vf>(data + k + j * W); });
      asm volatile("" : "+r"(data) : : "memory");  // it may have changed: the loads stay
    }
    team.sync();
    if (rank == 0) total = static_cast<double>(size * repeats) * team_size / (now() - begin);
    for (vf& v : sum) asm volatile("" : : "m"(v));  // and the sums are used
    free_scratch(buffer);
  });
  return total;
}

}  // namespace FS_ISA
}  // namespace fastseq
