// Chooses among the ISA variants of the kernels, once, at import.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "attention_pass.h"
#include "decoder.h"
#include "products.h"
#include "random_flags.h"
#include "rnn_norm.h"

namespace fastseq {

struct Kernels {
  const char* isa;
  bool (*supported)();
  bool (*holds)(DType);
  void (*forward)(const Shape&, const Sequence&, const ForwardPass*, int, int);
  void (*backward)(const Shape&, const Sequence&, const BackwardPass*, int, int);
  void (*decoder_forward)(const Decoder&, int);
  void (*decoder_backward)(const Decoder&, int);
  void (*product)(const Product&, int);
  void (*input_gradient)(const Product&, int);
  void (*weight_gradient)(const WeightGradient&, int);
  void (*attention_forward)(const AttentionForward&, int);
  void (*attention_backward)(const AttentionBackward&, int);
  double (*tile_rate)(DType, int64_t);
  double (*load_rate)(int64_t, int64_t, int);
  int64_t (*packed_bytes)(const Shape&);
  void (*pack)(const Shape&, const Direction&, void*, int);
  void (*random_flags)(const RandomFlags&, int);
  void (*norm_forward)(const Shape&, const Sequence&, const NormForwardPass&, int);
  void (*norm_backward)(const Shape&, const Sequence&, const NormBackwardPass&, int);
};

const char* isa();                              // the chosen variant
const Kernels& kernels(DType dtype);            // the last up to it that is compiled for the dtype
std::vector<const char*> available_isas();      // in the order of their making
void choose_isa(const std::string& name);       // "" chooses the best; throws std::invalid_argument naming the available ones
std::vector<std::pair<const char*, bool>> cpu_features();

}  // namespace fastseq
