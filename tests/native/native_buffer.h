// A heap block of exactly so many elements, in fp32 or bf16, that starts as NaN.
#pragma once

#include <cstring>
#include <random>
#include <vector>

#include "cpu/rnn.h"

namespace fastseq {

using Random = std::mt19937;

class Buffer {
 public:
  Buffer(DType dtype, int64_t count) : dtype_(dtype), bytes_(count * width(), 0xff) {}  // all ones is NaN in both types

  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  int64_t count() const { return static_cast<int64_t>(bytes_.size()) / width(); }

  uint32_t bits(int64_t i) const {
    uint32_t bits = 0;
    std::memcpy(&bits, bytes_.data() + i * width(), width());
    return bits;
  }

  float get(int64_t i) const {
    uint32_t bits = 0;
    std::memcpy(reinterpret_cast<char*>(&bits) + 4 - width(), bytes_.data() + i * width(), width());
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  void set(int64_t i, float value) {  // truncates to bf16: any value will do
    std::memcpy(bytes_.data() + i * width(), reinterpret_cast<const char*>(&value) + 4 - width(), width());
  }

  Buffer& fill(Random& random, float scale) {
    std::uniform_real_distribution<float> draw(-scale, scale);
    for (int64_t i = 0; i < count(); ++i) set(i, draw(random));
    return *this;
  }

 private:
  int64_t width() const { return dtype_ == DType::f32 ? 4 : 2; }

  DType dtype_;
  std::vector<unsigned char> bytes_;
};

// Masks of a direction's steps, every one a heap block of exactly its size: rows [steps, rows, hidden], or of tokens if packed.
class Masked {
 public:
  Masked(DType dtype, int64_t tokens, int64_t rows, int64_t hidden, Random& random)
      : step_(rows * hidden), row_(hidden), recurrent_(dtype, rows * hidden) {
    for (std::vector<unsigned char>& mask : masks_) {
      mask.resize(tokens * hidden);
      for (unsigned char& flag : mask) flag = random() % 3 != 0;
    }
    recurrent_.fill(random, 2);
  }

  Noise noise(bool packed, bool cell_state) {
    const auto view = [&](int i) { return View{masks_[i].data(), packed ? 0 : step_, row_}; };
    return {true, view(0), view(1), cell_state ? view(2) : View{}, 1.5f, 0.f, 0.f, recurrent_.data()};
  }

 private:
  int64_t step_, row_;
  std::vector<unsigned char> masks_[3];
  Buffer recurrent_;
};

}  // namespace fastseq
