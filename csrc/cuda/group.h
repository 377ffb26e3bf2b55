// The blocks that share one recurrence, and how they wait for each other after each step.
//
// Of three kinds: one block alone; the blocks of one cluster, by its hardware barrier; blocks anywhere on the GPU, by a counter in
// global memory, sound only if all of them are resident (a cooperative launch). Between arrive and wait a block may do
// what no other waits for: stores that stand before arrive are waited for, those after it are not.
#pragma once

#include "portable.h"

namespace fastseq::cuda {

// Where waiting on a counter gives up: a wait longer than this is a fault, not a slow step.
constexpr uint64_t kPatience = 20ull * 1000 * 1000 * 1000;  // ns

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
      cluster_wait();
      return true;
    }
    if (meeting == Meeting::kGrid && threadIdx.x == 0) *gone = !arrived();
    __syncthreads();
    return meeting == Meeting::kAlone || !*gone;
  }

  __device__ __forceinline__ bool arrived() const {
    const auto short_of = [&] { return static_cast<int>(load_acquire(counter) - expected) < 0; };  // it may wrap
    if (!short_of()) return true;
    const uint64_t since = nanoseconds();
    while (short_of()) {
      relax();
      if (load_acquire(stop)) return false;
      if (patience && nanoseconds() - since > patience) {
        add_release(stop, 1);
        return false;
      }
    }
    return true;
  }
};

}  // namespace fastseq::cuda
