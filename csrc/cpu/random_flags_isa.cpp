// Generators side by side in the lanes of vectors; every block begins anew, so that threads share the blocks out.
#include "driver.h"
#include "random_flags.h"

namespace fastseq {
namespace FS_ISA {
namespace {

constexpr int kLanes = 16, kDraws = 128, kBlock = kLanes * kDraws * 2;  // whatever W is
constexpr int64_t kWorth = 1 << 14;  // flags from which a second thread pays

FS_INLINE uint64_t split_mix(uint64_t& state) {  // Steele, Lea and Flood 2014
  uint64_t z = state += 0x9E3779B97F4A7C15;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

FS_INLINE vu rotate(vu x, int bits) { return x << bits | x >> (32 - bits); }

// W of the block's generators from lane `first` on.
FS_INLINE void draw_lanes(const RandomFlags& flags, int64_t block, int first, uint8_t* to) {
  uint32_t words[4][W];
  for (int i = 0; i < W; ++i) {
    uint64_t state = flags.seed + static_cast<uint64_t>(block * kLanes + first + i) * RandomFlags::kStride;
    const uint64_t a = split_mix(state), b = split_mix(state);
    words[0][i] = static_cast<uint32_t>(a), words[1][i] = static_cast<uint32_t>(a >> 32);
    words[2][i] = static_cast<uint32_t>(b), words[3][i] = static_cast<uint32_t>(b >> 32);
  }
  vu s[4];
  unroll<4>([&](int k) FS_LAMBDA { s[k] = load_vector<vu>(words[k]); });
  for (int draw = 0; draw < kDraws; ++draw, to += 2 * kLanes) {
    const vu x = rotate(s[0] + s[3], 7) + s[0], shifted = s[1] << 9;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= shifted;
    s[3] = rotate(s[3], 11);
    const vb low = __builtin_convertvector(((x & 0xffff) < flags.bound) & 1, vb);
    const vb high = __builtin_convertvector(((x >> 16) < flags.bound) & 1, vb);
    __builtin_memcpy(to + first, &low, sizeof(low));
    __builtin_memcpy(to + kLanes + first, &high, sizeof(high));
  }
}

}  // namespace

void random_flags(const RandomFlags& flags, int threads) {
  const int64_t blocks = (flags.count + kBlock - 1) / kBlock;
  parallel(flags.count < kWorth ? 1 : usable_threads(threads), [&](int rank, int size) {
    const Range own = share(blocks, rank, size);
    uint8_t last[kBlock];
    for (int64_t b = own.begin; b < own.end; ++b) {
      const int64_t left = flags.count - b * kBlock;
      uint8_t* to = left < kBlock ? last : flags.to + b * kBlock;
      for (int first = 0; first < kLanes; first += W) draw_lanes(flags, b, first, to);
      if (left < kBlock) std::memcpy(flags.to + b * kBlock, last, left);
    }
  });
}

}  // namespace FS_ISA
}  // namespace fastseq
