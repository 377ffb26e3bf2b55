// How the blocks of a group hand a step's numbers to each other. A grid, through global memory, meets after each step (group.h).
// A cluster sends messages instead: stores into another block's shared memory, which count themselves on a barrier there. So a
// block goes on as soon as all that it needs has come, and no fence waits for what it stored elsewhere.
//
// Messages of step s go into the buffer, and to the barrier, of s & 1, and nothing but the wait keeps a sender from being too
// early. That suffices, if each block that receives also sends to all that send to it, reads a buffer only after its wait, and
// has a __syncthreads between its reading of step s and its sending of step s + 1: who sends step s + 2 has waited for step
// s + 1 from all, so all had read step s by then. For the same reason no thread still waits for a phase when the next one ends.
// A wait says nothing of a block's own warps: what they hand to each other takes a __syncthreads.
#pragma once

#include "group.h"

namespace fastseq::cuda {

struct Exchange {
  static constexpr int kBytes = 32;  // of shared memory: two barriers of bytes, `gone`, `left`, `bytes`

  Group group;
  uint64_t* barriers;   // kCluster
  unsigned* gone;       // what this block waited for did not come
  unsigned* left;       // kCluster: so it was with any block of it; read when all meet
  unsigned* bytes;      // kCluster: of a step's messages to this block
  unsigned parity = 0;  // bit i: of the phase that barrier i is in

  // memory: kBytes of the block's shared memory; count: of bytes. Afterwards, and before the first message, all must `meet`.
  __device__ __forceinline__ Exchange(const Group& of, unsigned char* memory, unsigned count)
      : group(of), barriers(reinterpret_cast<uint64_t*>(memory)), gone(reinterpret_cast<unsigned*>(barriers + 2)),
        left(gone + 1), bytes(gone + 2) {
    if (threadIdx.x != 0) return;
    *gone = *left = 0;
    *bytes = count;
    if (!sends()) return;
    init_byte_barriers(barriers, 2);
    expect_bytes(barriers, count);
    expect_bytes(barriers + 1, count);
  }

  __device__ __forceinline__ bool sends() const { return group.meeting == Meeting::kCluster; }

  // What is at `at` in this block's shared memory, to the same place in block `peer`'s.
  template <class Chunk>
  __device__ __forceinline__ void send(void* at, const Chunk& value, unsigned peer, int s) const {
    send16(at, value, barriers + (s & 1), peer);
  }

  // All of step s is handed out; messages say so themselves.
  __device__ __forceinline__ void arrive() {
    if (!sends()) group.arrive();
  }

  // For all of step s. False to every thread if a grid broke up; of a cluster `broken` says so after the next __syncthreads, and
  // until the one after that.
  __device__ __forceinline__ bool wait(int s) {
    if (!sends()) return group.wait(gone);
    uint64_t* const barrier = barriers + (s & 1);
    const unsigned of = parity >> (s & 1) & 1;
    if (!group.until([&] { return bytes_received(barrier, of); }, group.patience, kSuspended))
      give_up();
    else if (threadIdx.x == 0)
      expect_bytes(barrier, *bytes);  // of step s + 2, which nobody sends yet
    __syncwarp();  // the loop's threads go on together
    parity ^= 1u << (s & 1);
    return true;
  }
  __device__ __forceinline__ bool broken() const { return FS_HAS_CLUSTERS && sends() && *gone; }

  // All threads of all blocks, outside the steps; false if the group broke up. `whole`: this block had all that it waited for.
  __device__ __forceinline__ bool meet(bool whole = true) {
    if (!sends() && !whole) return false;
    group.arrive();  // also of a cluster that broke up: nobody may leave while others still send to it
    return group.wait(gone) && !(sends() && *left);
  }

 private:
  __device__ __forceinline__ void give_up() const {
    *gone = 1;
#pragma unroll 1
    for (unsigned peer = 0; peer < group.size; ++peer) *map_shared(left, peer) = 1;
  }
};

}  // namespace fastseq::cuda
