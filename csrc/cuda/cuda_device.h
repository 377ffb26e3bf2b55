// The portable layer on a GPU, from sm_80 on. Included by portable.h.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FS_HAS_CLUSTERS 1
#else
#define FS_HAS_CLUSTERS 0
#endif

#define FS_SHARED(type, name, n) __shared__ type name[n]
#define FS_DYNAMIC_SHARED(name)                                       \
  extern __shared__ __align__(128) unsigned char fs_dynamic_shared[]; \
  unsigned char* const name = fs_dynamic_shared

namespace fastseq::cuda {

// Numbers. Rounding is to nearest even unless a name says otherwise; NaN stays NaN.
__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ float to_float(Bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

__device__ __forceinline__ float to_float(Fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class T>
__device__ __forceinline__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

template <>
__device__ __forceinline__ Bf16 from_float<Bf16>(float x) {
  Bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

template <>
__device__ __forceinline__ Fp16 from_float<Fp16>(float x) {
  Fp16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// To 10 bits of mantissa, ties away from zero.
__device__ __forceinline__ float round_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return __uint_as_float(y);
}

__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Subnormal results become 0: scaling them costs more than the exponential.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Subnormals are 0, as argument and as result.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Tensor cores: D += A B of a warp, fp32 sums, fragments as the PTX ISA lays them out.
#define FS_MMA(name, instruction)                                                                                   \
  __device__ __forceinline__ void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {             \
    asm volatile("mma.sync.aligned." instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                               \
  }
FS_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FS_MMA(mma_fp16, "m16n8k16.row.col.f32.f16.f16.f32")
FS_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FS_MMA

// Clusters. Without them a block is a cluster of its own, and the barrier is that of the block.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
#if FS_HAS_CLUSTERS
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

__device__ __forceinline__ unsigned cluster_size() {
  unsigned size = 1;
#if FS_HAS_CLUSTERS
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}

__device__ __forceinline__ void cluster_arrive() {
#if FS_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if FS_HAS_CLUSTERS
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The address, in block `rank` of the cluster, of what `address` is in this block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T* map_shared(T* address, unsigned rank) {
#if FS_HAS_CLUSTERS
  T* mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(address), "r"(rank));
  return mapped;
#else
  return address;
#endif
}

__device__ __forceinline__ uint32_t shared_address(const void* address) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(address));
}

// To shared memory, by one instruction: nvcc takes a vector of floats apart.
template <class T>
__device__ __forceinline__ void store_shared16(void* to, const T& value) {
  static_assert(sizeof(T) == 16, "one instruction a store");
  uint4 v;
  memcpy(&v, &value, sizeof v);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(to)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// Messages between the blocks of a cluster: stores into another block's shared memory, and barriers there that count their
// bytes (mbarrier), so that only the reader waits. All addresses are those of this block's dynamic shared memory; `rank` says
// in which block the store's and its barrier's are. Without clusters there is nobody to send to.
// Each takes one arrival a phase, by expect_bytes. A cluster barrier must come before others send.
__device__ __forceinline__ void init_byte_barriers(uint64_t* first, int count) {
#if FS_HAS_CLUSTERS
  for (int i = 0; i < count; ++i)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(first + i)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// By one thread, once a phase, before or after the bytes come: the count may be negative meanwhile.
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, unsigned bytes) {
#if FS_HAS_CLUSTERS
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Whether the barrier's last phase of this parity is over, and what came with it visible; false after a time of the GPU's choice.
__device__ __forceinline__ bool bytes_received(uint64_t* barrier, unsigned parity) {
#if FS_HAS_CLUSTERS
  uint32_t over;
  asm volatile(
      "{\n\t.reg .pred over;\n\t"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, over;\n\t}"
      : "=r"(over)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return over != 0;
#else
  return true;
#endif
}

template <class T>
__device__ __forceinline__ void send16(void* to, const T& value, uint64_t* barrier, unsigned rank) {
  static_assert(sizeof(T) == 16, "one instruction a message");
#if FS_HAS_CLUSTERS
  uint32_t at, on;
  uint4 v;
  memcpy(&v, &value, sizeof v);
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(to)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(on) : "r"(shared_address(barrier)), "r"(rank));
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(at),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(on)
               : "memory");
#endif
}

// Asynchronous copies to shared memory; a thread waits for its own.
__device__ __forceinline__ void async_copy16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global))
               : "memory");
}

__device__ __forceinline__ void async_copy4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global))
               : "memory");
}

__device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All but the last N groups have landed.
template <int N>
__device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Global memory past L1. Volatile: a loop reads again what another block wrote.
template <class T>
__device__ __forceinline__ T load_cg(const T* from) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one instruction a load");
  const size_t at = __cvta_generic_to_global(from);
  T value;
  if constexpr (sizeof(T) == 2) {
    uint16_t v;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(at) : "memory");
    memcpy(&value, &v, sizeof v);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    memcpy(&value, &v, sizeof v);
  } else if constexpr (sizeof(T) == 8) {
    uint2 v;
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at) : "memory");
    memcpy(&value, &v, sizeof v);
  } else {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at)
                 : "memory");
    memcpy(&value, &v, sizeof v);
  }
  return value;
}

template <class T>
__device__ __forceinline__ void store_cg(T* to, T value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one instruction a store");
  const size_t at = __cvta_generic_to_global(to);
  if constexpr (sizeof(T) == 2) {
    uint16_t v;
    memcpy(&v, &value, sizeof v);
    asm volatile("st.global.cg.u16 [%0], %1;" ::"l"(at), "h"(v) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    uint32_t v;
    memcpy(&v, &value, sizeof v);
    asm volatile("st.global.cg.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    uint2 v;
    memcpy(&v, &value, sizeof v);
    asm volatile("st.global.cg.v2.u32 [%0], {%1, %2};" ::"l"(at), "r"(v.x), "r"(v.y) : "memory");
  } else {
    uint4 v;
    memcpy(&v, &value, sizeof v);
    asm volatile("st.global.cg.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  }
}

// Counters that the blocks of a grid wait on.
__device__ __forceinline__ void add_release(unsigned* counter, unsigned n) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(counter)), "r"(n) : "memory");
}

__device__ __forceinline__ unsigned load_acquire(const unsigned* counter) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
  return value;
}

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

// In every spin loop.
__device__ __forceinline__ void relax() { __nanosleep(20); }

// Host. All return 0 or an error code.
inline const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

namespace detail {

// The runtime keeps a failed call's code for whoever asks next, PyTorch too: take it out.
inline int taken(cudaError_t code) {
  if (code != cudaSuccess) cudaGetLastError();
  return static_cast<int>(code);
}

struct LaunchConfig {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2] = {};

  LaunchConfig(const LaunchConfig&) = delete;  // config points to attributes
  explicit LaunchConfig(const LaunchShape& shape) {
    config.gridDim = dim3(shape.grid);
    config.blockDim = dim3(shape.block);
    config.dynamicSmemBytes = shape.shared;
    config.stream = static_cast<cudaStream_t>(shape.stream);
    config.attrs = attributes;
    if (shape.cluster > 1) {
      cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = shape.cluster;
      cluster.val.clusterDim.y = 1;
      cluster.val.clusterDim.z = 1;
    }
    if (shape.cooperative) {
      cudaLaunchAttribute& cooperative = attributes[config.numAttrs++];
      cooperative.id = cudaLaunchAttributeCooperative;
      cooperative.val.cooperative = 1;
    }
  }
};

// What a kernel must be told before it is launched, or asked about, in this shape.
template <class... P>
cudaError_t allow(void (*kernel)(P...), const LaunchShape& shape) {
  cudaError_t code = cudaSuccess;
  if (shape.shared > 0) {
    // All that the GPU gives, and not what this launch needs: the limit is the function's, for every thread that launches it.
    int device = 0, most = 0;
    cudaFuncAttributes of{};
    code = cudaGetDevice(&device);
    if (code == cudaSuccess) code = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (code == cudaSuccess) code = cudaFuncGetAttributes(&of, kernel);
    most -= static_cast<int>(of.sharedSizeBytes);
    if (code == cudaSuccess) code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (code == cudaSuccess && shape.cluster > 8) {
    code = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return code;
}

}  // namespace detail

template <class... P, class... A>
int launch(void (*kernel)(P...), const LaunchShape& shape, A... args) {
  const detail::LaunchConfig made(shape);
  cudaError_t code = detail::allow(kernel, shape);
  if (code == cudaSuccess) code = cudaLaunchKernelEx(&made.config, kernel, static_cast<P>(args)...);
  return detail::taken(code);
}

// How many clusters of this shape a device holds at once.
template <class... P>
int clusters_resident(void (*kernel)(P...), const LaunchShape& shape, int* count) {
  const detail::LaunchConfig made(shape);
  cudaError_t code = detail::allow(kernel, shape);
  if (code == cudaSuccess) code = cudaOccupancyMaxActiveClusters(count, kernel, &made.config);
  return detail::taken(code);
}

// How many blocks of this shape a multiprocessor holds at once.
template <class... P>
int blocks_resident(void (*kernel)(P...), const LaunchShape& shape, int* per_sm) {
  cudaError_t code = detail::allow(kernel, shape);
  if (code == cudaSuccess) {
    code = cudaOccupancyMaxActiveBlocksPerMultiprocessor(per_sm, kernel, static_cast<int>(shape.block), shape.shared);
  }
  return detail::taken(code);
}

}  // namespace fastseq::cuda
