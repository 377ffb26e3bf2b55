// Random bools for masks within a recurrence, the same for every ISA and number of threads.
#pragma once

#include <cstdint>

namespace fastseq {

// `count` bools, each true with probability bound / 65536: halves of 32-bit numbers below the bound, lower half first. Every 4096
// flags have sixteen generators xoshiro128++ 1.0 (Blackman and Vigna 2021), whose states are two numbers of SplitMix64 begun at
// seed + (block * 16 + lane) * kStride; of draw i, half k and lane j, flag block * 4096 + (2 i + k) * 16 + j.
struct RandomFlags {
  static constexpr uint64_t kStride = 0xD1342543DE82EF95;  // odd, so that no two lanes of a seed begin at one number

  uint64_t seed;
  int64_t count;
  uint32_t bound;
  uint8_t* to;
};

}  // namespace fastseq
