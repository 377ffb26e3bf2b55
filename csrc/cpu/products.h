// The boundary of the products of a linear layer, over tokens at any two strides: out = x w^T (+ b), dx = dy w, dw = dy^T x.
// As in rnn.h the caller owns every buffer and has checked every shape; sums are fp32.
#pragma once

#include "rnn.h"

namespace fastseq {

// The rows of [outer, inner, features], whose features are contiguous. Strides count elements.
struct Tokens {
  void* data;
  int64_t inner, outer_stride, inner_stride;
};

// out [tokens, columns] = x [tokens, depth] times w: [columns, depth] in `product`, [depth, columns] in `input_gradient`.
struct Product {
  DType dtype;
  int64_t tokens, depth, columns;
  Tokens x, out;
  const void* w;
  int64_t pitch;     // elements between two rows of w
  const void* bias;  // [columns] or null
  bool add;          // to what `out` holds
};

// d_w [rows, columns] = sum over tokens of dy [rows] x [columns]; d_b [rows] = sum of dy.
struct WeightGradient {
  DType dtype;
  int64_t tokens, rows, columns;
  Tokens dy, x;
  void* d_w;
  int64_t pitch;
  void* d_b;  // or null
};

}  // namespace fastseq
