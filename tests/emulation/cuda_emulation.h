// The portable layer on a CPU: one OS thread runs a grid's threads by turns, as fibers. Included by portable.h where
// FS_EMULATE is defined; kernels compile with g++ -std=c++17 -x c++ -DFS_EMULATE.
//
// It cannot see missing fences, bank conflicts, registers, or speed: memory is sequentially consistent, and a thread runs
// alone until it waits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>

#include "grid.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::fastseq::cuda::emulation::running->index)
#define blockIdx (::fastseq::cuda::emulation::running->block->index)
#define blockDim (::fastseq::cuda::emulation::grid->threads)
#define gridDim (::fastseq::cuda::emulation::grid->blocks)
#define __expf expf  // the C library declares an __expf of its own and has none

#define FS_HAS_CLUSTERS 1
#define FS_SHARED(type, name, n)  \
  static char name##_declaration; \
  type(&name)[n] = ::fastseq::cuda::emulation::shared_array<type[n]>(&name##_declaration)
#define FS_DYNAMIC_SHARED(name) \
  unsigned char* const name = ::fastseq::cuda::emulation::running->block->dynamic.data()

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace fastseq::cuda {

namespace emulation __attribute__((visibility("hidden"))) {

struct Settings {
  unsigned seed = 0;
  uint64_t spin_limit = 1'000'000;
  unsigned multiprocessors = 132;
  unsigned lost_message = 0;
};

inline thread_local Settings settings;
inline thread_local std::string last_error;

// Of an H100, as far as a kernel's shape alone decides.
constexpr unsigned kMostShared = 227 * 1024, kSharedOfSm = 228 * 1024, kSharedOfSystem = 1024, kThreadsOfSm = 2048,
                   kBlocksOfSm = 32, kSmsOfGpc = 18, kClusterSmsOfGpc = 16;

inline void check_shape(const LaunchShape& shape) {
  const unsigned cluster = std::max(1u, shape.cluster);
  const auto refuse = [](const std::string& why) { throw Fault(kInvalidLaunch, "invalid launch: " + why); };
  if (shape.grid == 0) refuse("no blocks");
  if (shape.block == 0 || shape.block > 1024) refuse(std::to_string(shape.block) + " threads a block");
  if (cluster > 16) refuse("a cluster of " + std::to_string(cluster) + " blocks");
  if (shape.grid % cluster) {
    refuse(std::to_string(shape.grid) + " blocks in clusters of " + std::to_string(cluster));
  }
  if (shape.shared > kMostShared) refuse(std::to_string(shape.shared) + " bytes of shared memory");
}

inline unsigned blocks_of_sm(const LaunchShape& shape) {
  const unsigned by_threads = kThreadsOfSm / ((shape.block + 31) / 32 * 32);
  return std::min({kBlocksOfSm, by_threads, kSharedOfSm / (shape.shared + kSharedOfSystem)});
}

inline unsigned clusters_of_device(const LaunchShape& shape) {
  const unsigned cluster = std::max(1u, shape.cluster), sms = settings.multiprocessors;
  if (cluster == 1) return sms * blocks_of_sm(shape);
  return std::max(1u, sms / kSmsOfGpc) * (std::min(sms, kClusterSmsOfGpc) * blocks_of_sm(shape) / cluster);
}

template <class Call>
int coded(Call call) {
  try {
    call();
    return kSuccess;
  } catch (const Fault& fault) {
    last_error = fault.what();
    return fault.code;
  } catch (const std::exception& exception) {
    last_error = exception.what();
    return kException;
  }
}

inline void run(const LaunchShape& shape, Grid::Body body, const void* kernel) {
  check_shape(shape);
  if (grid) throw Fault(kInvalidLaunch, "invalid launch: from within a kernel");
  if (shape.cooperative && shape.grid > std::max(1u, shape.cluster) * clusters_of_device(shape)) {
    throw Fault(kInvalidLaunch, "invalid launch: a cooperative grid of " + std::to_string(shape.grid) +
                                    " blocks is more than are resident at once");
  }
  Grid made(shape, body, kernel, settings.seed, settings.spin_limit, settings.lost_message);
  struct InFlight {
    explicit InFlight(Grid* made) { grid = made; }
    ~InFlight() { grid = nullptr; }
  } in_flight(&made);
  made.run();
}

template <class Array>
Array& shared_array(const void* declaration) {
  auto& arrays = running->block->arrays;
  for (auto& array : arrays) {
    if (array.declaration == declaration) return *reinterpret_cast<Array*>(array.memory.data());
  }
  arrays.push_back({declaration, SharedMemory(sizeof(Array))});
  return *reinterpret_cast<Array*>(arrays.back().memory.data());
}

template <class T>
T shuffle(At at, Site site, unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "as __shfl_sync");
  if (mask != 0xffffffff) grid->misuse("a shuffle of some lanes only", site);
  const auto bring = [&](Warp& warp, unsigned half) {
    std::memcpy(&warp.shuffled[half][running->lane], &value, sizeof value);
  };
  const unsigned half = grid->meet(at, site, bring, [](Warp&, unsigned) {});
  T taken;
  std::memcpy(&taken, &running->warp->shuffled[half][from], sizeof taken);
  return taken;
}

template <class Multiply>
void mma(At at, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Multiply multiply) {
  const unsigned lane = running->lane;
  const auto bring = [&](Warp& warp, unsigned half) {
    for (int i = 0; i < 4; ++i) warp.operands[half].a[i][lane] = a[i];
    for (int i = 0; i < 2; ++i) warp.operands[half].b[i][lane] = b[i];
  };
  const auto complete = [&](Warp& warp, unsigned half) { multiply(warp.operands[half], warp.product[half]); };
  const unsigned half = grid->meet(at, {}, bring, complete);
  for (int i = 0; i < 4; ++i) d[i] += running->warp->product[half].d[i][lane];
}

inline void async_copy(void* shared, const void* global, size_t bytes, Site site) {
  const Block& block = *running->block;
  const bool held = block.dynamic.holds(shared, bytes) ||
                    std::any_of(block.arrays.begin(), block.arrays.end(),
                                [&](const Block::Array& array) { return array.memory.holds(shared, bytes); });
  if (!held) grid->misuse("an asynchronous copy to outside its block's shared memory", site);
  if (reinterpret_cast<uintptr_t>(shared) % bytes || reinterpret_cast<uintptr_t>(global) % bytes) {
    grid->misuse("an asynchronous copy between addresses that are no multiples of its size", site);
  }
  running->copies.issue(shared, global, bytes);
}

}  // namespace emulation

// Numbers.
inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return emulation::bf16_to_float(x.bits); }
inline float to_float(Fp16 x) { return emulation::fp16_to_float(x.bits); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline Bf16 from_float<Bf16>(float x) {
  return {emulation::float_to_bf16(x)};
}
template <>
inline Fp16 from_float<Fp16>(float x) {
  return {emulation::float_to_fp16(x)};
}

inline float round_tf32(float x) { return emulation::rounded_to_tf32(x); }
inline float tanh_approx(float x) { return emulation::rounded_to_tf32(std::tanh(x)); }  // as exact as the GPU's: 2^-11
inline float exp2_approx(float x) { return emulation::flush_subnormal(std::exp2(x)); }
inline float reciprocal_approx(float x) { return emulation::flush_subnormal(1.f / emulation::flush_subnormal(x)); }

// Tensor cores.
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::mma(emulation::At::kMmaBf16, d, a, b, emulation::multiply_halves<emulation::bf16_to_float>);
}
inline void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::mma(emulation::At::kMmaFp16, d, a, b, emulation::multiply_halves<emulation::fp16_to_float>);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::mma(emulation::At::kMmaTf32, d, a, b, emulation::multiply_tf32);
}

// Clusters.
inline unsigned cluster_rank() { return emulation::running->block->rank; }
inline unsigned cluster_size() { return emulation::grid->cluster_size; }
inline void cluster_arrive(emulation::Site site = emulation::Site::here()) { emulation::grid->cluster_arrive(site); }
inline void cluster_wait(emulation::Site site = emulation::Site::here()) { emulation::grid->cluster_wait(site); }
inline void cluster_sync(emulation::Site site = emulation::Site::here()) {
  emulation::grid->cluster_arrive(site);
  emulation::grid->cluster_wait(site);
}

template <class T>
T* map_shared(T* address, unsigned rank, emulation::Site site = emulation::Site::here()) {
  emulation::grid->may_interrupt();
  return emulation::grid->mapped(address, rank, site);
}

template <class T>
void store_shared16(void* to, const T& value, emulation::Site site = emulation::Site::here()) {
  static_assert(sizeof(T) == 16, "one instruction a store");
  if (reinterpret_cast<uintptr_t>(to) % 16) emulation::grid->misuse("a store of 16 bytes to no multiple of 16", site);
  std::memcpy(to, &value, 16);
}

// Messages between the blocks of a cluster.
inline void init_byte_barriers(uint64_t* first, int count, emulation::Site site = emulation::Site::here()) {
  for (int i = 0; i < count; ++i) emulation::grid->init_byte_barrier(first + i, site);
}
inline void expect_bytes(uint64_t* barrier, unsigned bytes, emulation::Site site = emulation::Site::here()) {
  emulation::grid->expect_bytes(barrier, bytes, site);
}
inline bool bytes_received(uint64_t* barrier, unsigned parity, emulation::Site site = emulation::Site::here()) {
  return emulation::grid->bytes_received(barrier, parity, site);
}
template <class T>
void send16(void* to, const T& value, uint64_t* barrier, unsigned rank,
            emulation::Site site = emulation::Site::here()) {
  static_assert(sizeof(T) == 16, "one instruction a message");
  emulation::grid->send(to, &value, barrier, rank, site);
}

// Asynchronous copies.
inline void async_copy16(void* shared, const void* global, emulation::Site site = emulation::Site::here()) {
  emulation::async_copy(shared, global, 16, site);
}
inline void async_copy4(void* shared, const void* global, emulation::Site site = emulation::Site::here()) {
  emulation::async_copy(shared, global, 4, site);
}
inline void async_commit() { emulation::running->copies.commit(); }
template <int N>
void async_wait(emulation::Site site = emulation::Site::here()) {
  if (!emulation::running->copies.wait(N)) {
    emulation::grid->misuse("what an asynchronous copy reads changed before its wait", site);
  }
}

// Global memory that other blocks read and write.
template <class T>
T load_cg(const T* from) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one instruction a load");
  emulation::grid->may_interrupt();
  asm volatile("" ::: "memory");  // a loop reads again
  return *from;
}
template <class T>
void store_cg(T* to, T value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one instruction a store");
  emulation::grid->may_interrupt();
  *to = value;
  emulation::grid->published();
}
inline void add_release(unsigned* counter, unsigned n) {
  emulation::grid->may_interrupt();
  *counter += n;
  emulation::grid->published();
}
inline unsigned load_acquire(const unsigned* counter, emulation::Site site = emulation::Site::here()) {
  emulation::grid->look(emulation::At::kLoadAcquire, site);
  return load_cg(counter);
}
inline uint64_t nanoseconds() { return emulation::grid->now(); }
inline void relax(emulation::Site site = emulation::Site::here()) { emulation::grid->relax(site); }

// Host.
inline const char* error_text(int code) { return code == 0 ? "no error" : emulation::last_error.c_str(); }

template <class... P, class... A>
int launch(void (*kernel)(P...), const LaunchShape& shape, A... args) {
  const std::tuple<P...> given(static_cast<P>(args)...);
  const auto call = [&] { std::apply(kernel, given); };
  const auto body = [](const void* call_of) { (*static_cast<const decltype(call)*>(call_of))(); };
  return emulation::coded([&] { emulation::run(shape, body, &call); });
}

template <class... P>
int clusters_resident(void (*)(P...), const LaunchShape& shape, int* count) {
  return emulation::coded([&] {
    emulation::check_shape(shape);
    *count = static_cast<int>(emulation::clusters_of_device(shape));
  });
}

template <class... P>
int blocks_resident(void (*)(P...), const LaunchShape& shape, int* per_sm) {
  return emulation::coded([&] {
    emulation::check_shape(shape);
    *per_sm = static_cast<int>(emulation::blocks_of_sm(shape));
  });
}

// Of the emulation alone, for later launches of the calling OS thread: the schedule (scheduler.h); how many relaxations and
// acquiring loads, without anything else, are a livelock; the size of the device; which message of a launch never lands, from 1.
inline void set_seed(unsigned seed) { emulation::settings.seed = seed; }
inline void set_spin_limit(uint64_t looks) { emulation::settings.spin_limit = looks; }
inline void set_lost_message(unsigned which) { emulation::settings.lost_message = which; }
inline void set_multiprocessors(unsigned count) { emulation::settings.multiprocessors = count; }

}  // namespace fastseq::cuda

inline void __syncthreads(fastseq::cuda::emulation::Site site = fastseq::cuda::emulation::Site::here()) {
  fastseq::cuda::emulation::grid->sync_threads(site);
}

inline void __syncwarp(unsigned mask = 0xffffffff,
                       fastseq::cuda::emulation::Site site = fastseq::cuda::emulation::Site::here()) {
  namespace emulation = fastseq::cuda::emulation;
  if (mask != 0xffffffff) emulation::grid->misuse("__syncwarp of some lanes only", site);
  const auto nothing = [](emulation::Warp&, unsigned) {};
  emulation::grid->meet(emulation::At::kSyncWarp, site, nothing, nothing);
}

template <class T>
T __shfl_sync(unsigned mask, T value, unsigned lane,
              fastseq::cuda::emulation::Site site = fastseq::cuda::emulation::Site::here()) {
  namespace emulation = fastseq::cuda::emulation;
  return emulation::shuffle(emulation::At::kShuffle, site, mask, value, lane % 32);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes,
                  fastseq::cuda::emulation::Site site = fastseq::cuda::emulation::Site::here()) {
  namespace emulation = fastseq::cuda::emulation;
  return emulation::shuffle(emulation::At::kShuffleXor, site, mask, value, (emulation::running->lane ^ lanes) % 32);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by,
                   fastseq::cuda::emulation::Site site = fastseq::cuda::emulation::Site::here()) {
  namespace emulation = fastseq::cuda::emulation;
  const unsigned lane = emulation::running->lane, from = lane + by;
  return emulation::shuffle(emulation::At::kShuffleDown, site, mask, value, from < 32 ? from : lane);
}
