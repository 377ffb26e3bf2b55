#include "sequence.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace fastseq {

SequencePlan::SequencePlan(int64_t steps, int64_t rows, bool packed)
    : steps_(steps), rows_(rows), packed_(packed), offsets_(steps + 1), order_(rows) {
  std::iota(order_.begin(), order_.end(), int64_t{0});
}

SequencePlan SequencePlan::padded(int64_t steps, int64_t rows, const int64_t* lengths) {
  SequencePlan plan(steps, rows, false);
  if (!lengths) {
    for (int64_t t = 0; t <= steps; ++t) plan.offsets_[t] = t * rows;
    return plan;
  }
  std::vector<int64_t> ending(steps + 1);
  for (int64_t r = 0; r < rows; ++r) {
    if (lengths[r] < 0 || lengths[r] > steps)
      throw std::out_of_range("lengths[" + std::to_string(r) + "] is " + std::to_string(lengths[r]) + ", outside 0 .. " +
                              std::to_string(steps));
    ++ending[lengths[r]];
  }
  std::stable_sort(plan.order_.begin(), plan.order_.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  int64_t active = rows;
  for (int64_t t = 0; t < steps; ++t) {
    active -= ending[t];
    plan.offsets_[t + 1] = plan.offsets_[t] + active;
  }
  return plan;
}

SequencePlan SequencePlan::packed(int64_t steps, int64_t rows, const int64_t* batch_sizes) {
  SequencePlan plan(steps, rows, true);
  int64_t last = rows;
  for (int64_t t = 0; t < steps; ++t) {
    if (batch_sizes[t] < 0 || batch_sizes[t] > last)
      throw std::out_of_range("batch_sizes[" + std::to_string(t) + "] is " + std::to_string(batch_sizes[t]) +
                              ", outside 0 .. " + std::to_string(last) + "; batch sizes never grow");
    last = batch_sizes[t];
    plan.offsets_[t + 1] = plan.offsets_[t] + last;
  }
  return plan;
}

}  // namespace fastseq
