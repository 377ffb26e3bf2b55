// The blocks that share one recurrence, and how they meet: of decoders after each phase of a step; of layers a cluster's before and
// after the steps alone, within which they send messages (rnn_exchange.h). Of three kinds: one block alone; the blocks of one
// cluster, by its hardware barrier; blocks anywhere on the GPU, by a counter in global memory, sound only if all of them are
// resident (a cooperative launch). Between arrive and wait a block may do what no other waits for: stores that stand before arrive
// are waited for, those after it are not.
#pragma once

#include "portable.h"

namespace fastseq::cuda {

constexpr uint64_t kFirst = 30;      // times as patient until all blocks have been seen: 10 minutes
constexpr unsigned kLooks = 1024;    // at a counter, between two at the clock and at what others found
constexpr unsigned kSuspended = 64;  // such looks, where the hardware suspends a thread at each

enum class Meeting : int { kAlone, kCluster, kGrid };

struct Group {
  Meeting meeting;
  unsigned rank, size;
  unsigned* counter;   // kGrid: how often a block has arrived
  unsigned* stop;      // set by the first block that lost its patience; all leave by it
  uint64_t patience;   // ns; 0: none, as under a debugger
  unsigned expected;   // of counter, once all have arrived

  // The blocks of a group have neighbouring numbers. `stop` and `patience` as above, `counters` one for each group.
  template <class Shape>
  static __device__ __forceinline__ Group of(const Shape& shape, unsigned* counters, unsigned* stop, uint64_t patience) {
    const unsigned size = shape.blocks;
    return {static_cast<Meeting>(shape.meeting), blockIdx.x % size, size, counters + blockIdx.x / size, stop, patience, 0};
  }

  __device__ __forceinline__ void arrive() {
    if (meeting == Meeting::kCluster) {
      __syncwarp();  // the instruction is one of whole warps
      cluster_arrive();
    } else if (meeting == Meeting::kGrid) {
      __syncthreads();  // so that thread 0 releases what all have written
      if (threadIdx.x == 0) add_release(counter, 1);
      expected += size;
    }
  }

  // False, to every thread of every block, if the others did not come: the kernel must then end. `gone` is the block's own.
  __device__ __forceinline__ bool wait(unsigned* gone) {
    if (meeting == Meeting::kCluster) {
      __syncwarp();
      cluster_wait();
      return true;
    }
    if (meeting == Meeting::kGrid && threadIdx.x == 0) *gone = !arrived();
    __syncthreads();
    return meeting == Meeting::kAlone || !*gone;
  }

  // Looks until `ready`. False if that took longer than `limit`, or another block has given up. The clock is for slow waits.
  template <class Ready>
  __device__ __forceinline__ bool until(Ready ready, uint64_t limit, unsigned looks) const {
    uint64_t since = 0;
    for (unsigned look = 1; !ready(); ++look) {
      if (look % looks) continue;  // `stop` is host memory: a look at it takes longer than a whole step
      if (load_acquire(stop)) return false;
      const uint64_t now = nanoseconds();
      if (!since) since = now;
      if (limit && now - since > limit) {
        store_cg(stop, 1u);  // no atomic: not every bus has them
        return false;
      }
    }
    return true;
  }

  __device__ __forceinline__ bool arrived() const {
    // Only the first meeting waits for blocks that have no multiprocessor yet, as long as other kernels hold those.
    const auto counted = [&] {
      const bool all = static_cast<int>(load_acquire(counter) - expected) >= 0;  // it may wrap
      if (!all) relax();
      return all;
    };
    return until(counted, expected == size ? kFirst * patience : patience, kLooks);
  }
};

}  // namespace fastseq::cuda
