// Builds the order of rows and the token offsets of a batch from its lengths or its packed batch sizes.
#pragma once

#include <cstdint>
#include <vector>

#include "rnn.h"

namespace fastseq {

class SequencePlan {
 public:
  // lengths: [rows], each 0 .. steps, in any order, or null for all `steps`.
  static SequencePlan padded(int64_t steps, int64_t rows, const int64_t* lengths);
  // batch_sizes: [steps], falling; rows are already in order.
  static SequencePlan packed(int64_t steps, int64_t rows, const int64_t* batch_sizes);

  Sequence view() const { return {steps_, rows_, offsets_.data(), order_.data(), packed_}; }

 private:
  SequencePlan(int64_t steps, int64_t rows, bool packed);

  int64_t steps_, rows_;
  bool packed_;
  std::vector<int64_t> offsets_, order_;
};

}  // namespace fastseq
