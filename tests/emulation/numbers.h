// Number formats and the products of tensor cores.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fastseq::cuda {
namespace emulation __attribute__((visibility("hidden"))) {

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float bf16_to_float(uint16_t x) { return bit_cast<float>(uint32_t{x} << 16); }

inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (std::isnan(x)) return 0x7fff;  // the GPU's NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float fp16_to_float(uint16_t x) {
  const uint32_t sign = (uint32_t{x} & 0x8000) << 16, rest = uint32_t{x} & 0x7fff;
  if (rest >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // The exponent's bias is 15 here and 127 there; the product is right for subnormals, too.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f));
}

inline uint16_t float_to_fp16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), rest = bits & 0x7fffffff;
  const uint16_t sign = (bits >> 16) & 0x8000;
  if (rest > 0x7f800000) return 0x7fff;         // the GPU's NaN
  if (rest >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
  if (rest < 0x38800000) {
    // Subnormal: 0.5 + |x| has its last bit where the result has.
    return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(0.5f + std::fabs(x)) - bit_cast<uint32_t>(0.5f)));
  }
  return static_cast<uint16_t>(sign | (rest + 0xfff + ((rest >> 13) & 1) - 0x38000000) >> 13);
}

// To 10 bits of mantissa, ties away from zero.
inline float rounded_to_tf32(float x) {
  if (std::isnan(x)) return x;
  return bit_cast<float>((bit_cast<uint32_t>(x) + 0x1000) & 0xffffe000);
}

inline float flush_subnormal(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

// What the lanes of a warp bring to a product D [16, 8] += A [16, K] B [K, 8], and what they take away: the fragments of
// the PTX ISA. Lane l = 4 g + t; of two values in a register the first is in the lower half.
struct MmaOperands {
  uint32_t a[4][32], b[2][32];
};

struct MmaProduct {
  float d[4][32];
};

using MmaRow = float __attribute__((vector_size(32)));

template <int K>
void multiply(const float (&a)[16][K], const float (&b)[K][8], MmaProduct& product) {
  for (int row = 0; row < 16; ++row) {
    MmaRow sum = {};
    for (int k = 0; k < K; ++k) {
      MmaRow of_b;
      std::memcpy(&of_b, b[k], sizeof of_b);
      sum += a[row][k] * of_b;
    }
    for (int column = 0; column < 8; ++column) {
      product.d[(row >> 3) * 2 + (column & 1)][(row & 7) * 4 + (column >> 1)] = sum[column];
    }
  }
}

// a0, a1: rows g, g + 8 at k = 2t, 2t + 1; a2, a3: the same at k + 8. b0, b1: column g at k = 2t, 2t + 1 and k + 8.
template <float (&to_float)(uint16_t)>
void multiply_halves(const MmaOperands& of, MmaProduct& product) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane >> 2, t = lane & 3;
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < 4; ++r) {
        a[g + (r & 1) * 8][2 * t + half + (r >> 1) * 8] = to_float(static_cast<uint16_t>(of.a[r][lane] >> (16 * half)));
      }
      for (int r = 0; r < 2; ++r) {
        b[2 * t + half + r * 8][g] = to_float(static_cast<uint16_t>(of.b[r][lane] >> (16 * half)));
      }
    }
  }
  multiply(a, b, product);
}

// a0, a1: rows g, g + 8 at k = t; a2, a3: at k = t + 4. b0, b1: column g at k = t, t + 4. The low 13 bits are ignored.
inline void multiply_tf32(const MmaOperands& of, MmaProduct& product) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane >> 2, t = lane & 3;
    for (int r = 0; r < 4; ++r) a[g + (r & 1) * 8][t + (r >> 1) * 4] = bit_cast<float>(of.a[r][lane] & 0xffffe000);
    for (int r = 0; r < 2; ++r) b[t + r * 4][g] = bit_cast<float>(of.b[r][lane] & 0xffffe000);
  }
  multiply(a, b, product);
}

}  // namespace emulation
}  // namespace fastseq::cuda
