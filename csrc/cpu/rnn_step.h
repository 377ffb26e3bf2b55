// One step straight from the caller's weights; see rnn_step_isa.cpp.
#pragma once

#include "rnn.h"

namespace fastseq {
namespace FS_ISA {

constexpr int64_t kStepRows = 16;          // rows up to which unpacked dot products beat packing the weights
constexpr double kParallelProducts = 1e6;  // multiplications per gate from which a second thread pays

FS_ALWAYS_INLINE double step_products(const Shape& shape, int64_t rows) { return 1.0 * rows * shape.hidden * (shape.input + shape.hidden); }

bool is_step(const Shape& shape, const Sequence& seq, const ForwardPass& pass);
void rnn_step(const Shape& shape, const Sequence& seq, const ForwardPass* passes, int directions, int threads);

}  // namespace FS_ISA
}  // namespace fastseq
