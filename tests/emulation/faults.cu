// Small kernels, right where `fault` is 0, each with the faults that the emulation must find: tests/test_emulation.py.
// Launchers are C functions that return what launch() returns.
#include <stdexcept>

#include "cuda/portable.h"

namespace {

using namespace fastseq::cuda;

constexpr unsigned kAll = 0xffffffff;

// y[row] = sum of x [rows, n]. 1: no barrier between writing and reading the warps' sums; 2: none before they are
// written again.
__global__ void sum_rows(const float* x, float* y, int rows, int n, int fault) {
  FS_SHARED(float, of_warp, 32);
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    float sum = 0.f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[row * n + i];
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAll, sum, lanes);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    if (fault != 1) __syncthreads();
    if (threadIdx.x < 32) {
      sum = threadIdx.x < blockDim.x / 32 ? of_warp[threadIdx.x] : 0.f;
      for (int by = 16; by > 0; by /= 2) sum += __shfl_down_sync(kAll, sum, by);
      if (threadIdx.x == 0) y[row] = sum;
    }
    if (fault != 2) __syncthreads();
  }
}

// Every block of a cluster hands its row of x [gridDim, blockDim] on, `rounds` times; y is what it has then. 1: no cluster
// barrier before the rounds; 2: none between them; 3: none before a block exits; 4: so, and the first block writes late.
__global__ void pass_round(const float* x, float* y, int rounds, int fault) {
  FS_DYNAMIC_SHARED(raw);
  float* const row = reinterpret_cast<float*>(raw);  // [2, blockDim]
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  row[threadIdx.x] = x[at];
  if (fault != 1) cluster_sync();
  const unsigned peer = (cluster_rank() + 1) % cluster_size();
  for (int i = 0; i < rounds; ++i) {
    const float* const now = row + i % 2 * blockDim.x;
    float* const next = row + (i + 1) % 2 * blockDim.x;
    float* const to = map_shared(next, peer);
    if (fault == 4) {
      cluster_sync();
      for (int late = 0; cluster_rank() == 0 && late < 4; ++late) __syncthreads();
    }
    to[threadIdx.x] = now[threadIdx.x];
    if (fault >= 3 && i == rounds - 1) return;
    if (fault == 2 && i < rounds - 1) continue;
    cluster_arrive();
    cluster_wait();
  }
  y[at] = row[rounds % 2 * blockDim.x + threadIdx.x];
}

// Of pass_messages.
enum WrongMessage : int {
  kRight,
  kNoWait,
  kTooFewBytes,
  kTooManyBytes,
  kNotArmed,
  kArmedTwice,
  kOtherParity,
  kOneBuffer,
  kLeaveEarly,
  kNotInitialised,
  kNoBarrierBefore,
  kWrittenOver,
  kMisaligned,
  kBeyond,
  kToItself,
};

// y [gridDim, blockDim]: what a block has after `rounds` rounds, in each of which it gives its row to all of its cluster and
// takes the sum of the rows for its own. x: the first.
__global__ void pass_messages(const float* x, float* y, int rounds, int wrong) {
  FS_DYNAMIC_SHARED(raw);
  const unsigned i = threadIdx.x, n = blockDim.x, size = cluster_size(), rank = cluster_rank();
  uint64_t* const arrivals = reinterpret_cast<uint64_t*>(raw);
  float* const slots = reinterpret_cast<float*>(raw + 16);  // [2, size, n]
  unsigned bytes = (size - 1) * n * sizeof(float);
  if (wrong == kTooFewBytes) bytes -= 16;
  if (wrong == kTooManyBytes) bytes += 16;
  if (i == 0 && wrong != kNotInitialised) init_byte_barriers(arrivals, 2);
  for (int k = 0; k < 2 && i == 0; ++k) {
    if (wrong != kNotArmed) expect_bytes(arrivals + k, bytes);
    if (wrong == kArmedTwice) expect_bytes(arrivals + k, bytes);
  }
  if (wrong == kWrittenOver && i == 0) *arrivals = 0;
  if (wrong != kNoBarrierBefore) cluster_sync();
  float value = x[blockIdx.x * n + i];
  for (int round = 0; round < rounds; ++round) {
    const int half = wrong == kOneBuffer ? 0 : round & 1;
    float* const all = slots + half * size * n;
    all[rank * n + i] = value;
    __syncthreads();
    const uint4 chunk = i < n / 4 ? *reinterpret_cast<const uint4*>(all + rank * n + i * 4) : uint4{};
    const unsigned at = rank * n + i * 4 + (wrong == kMisaligned) + (wrong == kBeyond ? 2 * size * n : 0);
    for (unsigned peer = 0; i < n / 4 && peer < size; ++peer)
      if (peer != rank || wrong == kToItself) send16(all + at, chunk, arrivals + half, peer);
    if (wrong == kLeaveEarly && round == rounds - 1) return;
    const unsigned parity = (wrong == kOneBuffer ? round : round >> 1) + (wrong == kOtherParity);
    while (wrong != kNoWait && !bytes_received(arrivals + half, parity & 1)) {
    }
    if (i == 0 && wrong != kNotArmed && wrong != kNoWait) expect_bytes(arrivals + half, bytes);
    value = 0.f;
    for (unsigned peer = 0; peer < size; ++peer) value += all[peer * n + i];
  }
  y[blockIdx.x * n + i] = value;
}

__device__ void wait_for(const unsigned* counter, unsigned count) {
  while (load_acquire(counter) < count) relax();
}

// Block b adds what block b + 1 has to its own, `rounds` times. x: [2, gridDim]; the result is in x[rounds % 2]. 1: no
// grid barrier.
__global__ void add_neighbours(float* x, unsigned* counter, int rounds, int fault) {
  const unsigned blocks = gridDim.x, own = blockIdx.x, next = (own + 1) % blocks;
  for (int i = 0; i < rounds; ++i) {
    const float* const now = x + i % 2 * blocks;
    if (threadIdx.x == blockDim.x - 1) store_cg(x + (i + 1) % 2 * blocks + own, load_cg(now + own) + load_cg(now + next));
    __syncthreads();
    if (threadIdx.x == 0) {
      add_release(counter, 1);
      if (fault != 1) wait_for(counter, (i + 1) * blocks);
    }
    __syncthreads();
  }
}

// a [32, 4], b [32, 2], d [32, 4]: the registers of each lane.
template <void (&Multiply)(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2])>
__global__ void multiply(const uint32_t* a, const uint32_t* b, float* d) {
  const unsigned lane = threadIdx.x;
  uint32_t of_a[4], of_b[2];
  float of_d[4];
  for (int i = 0; i < 4; ++i) of_a[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) of_b[i] = b[lane * 2 + i];
  for (int i = 0; i < 4; ++i) of_d[i] = d[lane * 4 + i];
  Multiply(of_d, of_a, of_b);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = of_d[i];
}

// y = x, [steps, 4 * blockDim], through a ring of three buffers. 1: no wait; 2: a wait that leaves one group too many out.
__global__ void copy_ahead(const float* x, float* y, int steps, int fault) {
  FS_DYNAMIC_SHARED(raw);
  float* const ring = reinterpret_cast<float*>(raw);
  const int row = 4 * blockDim.x, own = 4 * threadIdx.x;
  const auto fetch = [&](int step) {
    if (step < steps) async_copy16(ring + step % 3 * row + own, x + step * row + own);
    async_commit();
  };
  fetch(0);
  fetch(1);
  for (int step = 0; step < steps; ++step) {
    fetch(step + 2);
    if (fault == 0) async_wait<2>();
    if (fault == 2) async_wait<3>();
    for (int i = 0; i < 4; ++i) y[step * row + own + i] = ring[step % 3 * row + own + i];
  }
}

// What a thread may do wrong by itself.
enum Wrong : int {
  kNothing,
  kDivergentBarrier,
  kTwoBarriers,
  kTwoKinds,
  kEarlyExit,
  kStoreOutsideDynamic,
  kStoreOutsideArray,
  kStoreOutsideGlobal,
  kReadUnwritten,
  kSpinForever,
  kSpinWithoutRelax,
  kWaitWithoutArrive,
  kMapOutside,
  kCopyOutside,
  kSourceChanges,
  kThrow,
};

// y: [blockDim]; dynamic shared memory: as much.
__global__ void go_wrong(float* y, float* source, unsigned* counter, int wrong) {
  FS_DYNAMIC_SHARED(raw);
  FS_SHARED(float, array, 32);
  float* const dynamic = reinterpret_cast<float*>(raw);
  const unsigned i = threadIdx.x, last = blockDim.x - 1;
  if (wrong != kReadUnwritten) dynamic[i] = 1.f;
  if (i < 32) array[i] = 2.f;
  if (wrong == kDivergentBarrier && i >= 16) __syncthreads();
  if (wrong == kTwoBarriers) {
    if (i < 16) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (wrong == kTwoKinds) {
    if (i < 16) {
      __syncwarp();
    } else {
      y[i] = __shfl_sync(kAll, y[i], 0);
    }
  }
  if (wrong == kEarlyExit && i >= 16 && i < 32) return;
  __syncthreads();
  if (wrong == kStoreOutsideDynamic && i == last) dynamic[blockDim.x] = 0.f;
  if (wrong == kStoreOutsideArray && i == last) array[i / 2 + 1] = 0.f;
  if (wrong == kStoreOutsideGlobal && i == last) y[blockDim.x] = 0.f;
  if (wrong == kSpinForever && i == last) wait_for(counter, 1);
#if defined(FS_EMULATE)
  if (wrong == kSpinWithoutRelax && i == last) {
    while (load_acquire(counter) < 1) {
    }
  }
  if (wrong == kThrow && i == last) throw std::logic_error("of the kernel's own");
#endif
  if (wrong == kWaitWithoutArrive) cluster_wait();
  if (wrong == kMapOutside) *map_shared(array, 0) = 0.f;
  if (wrong == kCopyOutside && i == 0) async_copy4(y, source);
  if (wrong == kSourceChanges && i == 0) {
    async_copy4(dynamic, source);
    async_commit();
    *source += 1.f;
    async_wait<0>();
  }
  __syncthreads();
  y[i] = dynamic[i] + array[i % 32];
}

// The order in which threads come past a barrier, [gridDim * blockDim]. Not a kernel for a GPU, where they would race.
__global__ void trace(unsigned* order, unsigned* count) {
  for (int i = 0; i < 2; ++i) {
    order[(*count)++] = blockIdx.x * blockDim.x + threadIdx.x;
    __syncthreads();
  }
}

// Gives up waiting after `patience` nanoseconds; y: [gridDim], 1 where a block did.
__global__ void wait_with_patience(unsigned* counter, unsigned count, uint64_t patience, float* y) {
  add_release(counter, 1);
  const uint64_t since = nanoseconds();
  while (load_acquire(counter) < count && nanoseconds() - since < patience) relax();
  y[blockIdx.x] = nanoseconds() - since < patience ? 0.f : 1.f;
}

// y [5, n]: x as bf16, fp16, tf32; tanh and reciprocal of x.
__global__ void convert(const float* x, float* y, int n) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= static_cast<unsigned>(n)) return;
  y[i] = to_float(from_float<Bf16>(x[i]));
  y[n + i] = to_float(from_float<Fp16>(x[i]));
  y[2 * n + i] = round_tf32(x[i]);
  y[3 * n + i] = tanh_approx(x[i]);
  y[4 * n + i] = reciprocal_approx(x[i]);
}

}  // namespace

extern "C" {

int run_sum_rows(const float* x, float* y, int rows, int n, int fault) {
  return launch(sum_rows, {2, 128}, x, y, rows, n, fault);
}

int run_pass_round(const float* x, float* y, unsigned blocks, unsigned cluster, int rounds, int fault) {
  return launch(pass_round, {blocks, 64, cluster, 2 * 64 * sizeof(float)}, x, y, rounds, fault);
}

int run_pass_messages(const float* x, float* y, unsigned blocks, unsigned cluster, int rounds, int wrong) {
  return launch(pass_messages, {blocks, 64, cluster, 16 + 2 * cluster * 64 * unsigned{sizeof(float)}}, x, y, rounds, wrong);
}

int run_add_neighbours(float* x, unsigned* counter, unsigned blocks, unsigned block, int rounds, int fault) {
  return launch(add_neighbours, {blocks, block, 1, 0, true}, x, counter, rounds, fault);
}

int run_multiply_bf16(const uint32_t* a, const uint32_t* b, float* d) {
  return launch(multiply<mma_bf16>, {1, 32}, a, b, d);
}

int run_multiply_fp16(const uint32_t* a, const uint32_t* b, float* d) {
  return launch(multiply<mma_fp16>, {1, 32}, a, b, d);
}

int run_multiply_tf32(const uint32_t* a, const uint32_t* b, float* d) {
  return launch(multiply<mma_tf32>, {1, 32}, a, b, d);
}

int run_copy_ahead(const float* x, float* y, int steps, int fault) {
  return launch(copy_ahead, {1, 32, 1, 3 * 4 * 32 * sizeof(float)}, x, y, steps, fault);
}

int run_go_wrong(float* y, float* source, unsigned* counter, int wrong) {
  return launch(go_wrong, {1, 64, 1, 64 * sizeof(float)}, y, source, counter, wrong);
}

int run_trace(unsigned* order, unsigned* count, unsigned blocks) {
  return launch(trace, {blocks, 64, 1, 0, true}, order, count);
}

int run_wait_with_patience(unsigned* counter, unsigned count, uint64_t patience, float* y, unsigned blocks) {
  return launch(wait_with_patience, {blocks, 1, 1, 0, true}, counter, count, patience, y);
}

int run_convert(const float* x, float* y, int n) {
  return launch(convert, {static_cast<unsigned>(n + 255) / 256, 256}, x, y, n);
}

// A launch that does nothing, of any shape.
int run_shape(unsigned grid, unsigned block, unsigned cluster, unsigned shared, int cooperative) {
  return launch(convert, {grid, block, cluster, shared, cooperative != 0}, nullptr, nullptr, 0);
}

int resident(unsigned block, unsigned cluster, unsigned shared, int* clusters, int* blocks_of_sm) {
  const LaunchShape shape = {cluster, block, cluster, shared};
  const int code = clusters_resident(convert, shape, clusters);
  return code ? code : blocks_resident(convert, shape, blocks_of_sm);
}

const char* text_of(int code) { return error_text(code); }

#if defined(FS_EMULATE)
void choose_seed(unsigned seed) { set_seed(seed); }
void choose_spin_limit(uint64_t looks) { set_spin_limit(looks); }
void choose_lost_message(unsigned which) { set_lost_message(which); }
void choose_multiprocessors(unsigned count) { set_multiprocessors(count); }
#endif

}  // extern "C"
