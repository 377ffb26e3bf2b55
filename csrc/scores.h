// Element math of the attention scores, shared by every driver on host and device: a score is the sum over its units of
// forward(key, query, v). `M` supplies the value type and its tanh, as for the cells.
#pragma once

#include "cells.h"

namespace fastseq {

// Bahdanau et al. 2014, A.1.2: v . tanh(W_a s + U_a h); Luong's concat is the same with W and U side by side.
template <class M>
struct AdditiveScore {
  using V = typename M::V;
  static constexpr bool kHasV = true;

  static FS_HD V forward(V key, V query, V v) { return v * M::tanh(key + query); }

  // d: gradient of the score. d_query and d_v are added to. The tanh is computed again: storing it would take [B, T, S, A].
  static FS_HD void backward(V key, V query, V v, V d, V& d_key, V& d_query, V& d_v) {
    const V t = M::tanh(key + query);
    d_key = d * v * (1.f - t * t);
    d_query = d_query + d_key;
    d_v = d_v + d * t;
  }
};

// Luong et al. 2015, eq. 8: key . query, the keys projected beforehand for "general". Its gradients are plain products.
template <class M>
struct DotScore {
  using V = typename M::V;
  static constexpr bool kHasV = false;

  static FS_HD V forward(V key, V query, V) { return key * query; }
};

}  // namespace fastseq
