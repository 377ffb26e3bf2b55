// Element math of the recurrent cells, shared by every driver on host and device.
// A cell is a pure function of its pre-activations and its state; `M` supplies the value type and its sigmoid and tanh
// (a SIMD vector on the CPU, a float in a CUDA thread), so no driver holds a formula.
//
// Columns. A cell has G gates (rows of the weights / H) and kColumns pre-activation columns. Gate g of the input product adds
// to column kInput[g], gate g of the recurrent product to column kHidden[g]; the gradients use the same columns.
#pragma once

#if defined(__CUDACC__)
#define FS_HD __host__ __device__ __forceinline__
#else
#define FS_HD inline __attribute__((always_inline))
#endif

namespace fastseq {

// What a step writes, whole. Recurrent dropout (Semeniuta 2016) puts a multiplication in its place; both passes apply it.
struct Whole {
  template <class V>
  FS_HD V operator()(V x) const {
    return x;
  }
};

template <class V>
struct Scaled {
  V factor;
  FS_HD V operator()(V x) const { return x * factor; }
};

// Hochreiter & Schmidhuber 1997 with the forget gate of Gers 2000; gates in torch's order i, f, g, o.
//   c' = f c + i g,  h' = o tanh(c')
template <class M>
struct Lstm {
  using V = typename M::V;
  static constexpr int kGates = 4, kColumns = 4;
  static constexpr int kInput[kGates] = {0, 1, 2, 3}, kHidden[kGates] = {0, 1, 2, 3};
  static constexpr bool kCellState = true;

  template <class Update = Whole>
  static FS_HD void forward(const V (&pre)[kColumns], V& h, V& c, V (&saved)[kColumns], Update update = {}) {
    saved[0] = M::sigmoid(pre[0]);
    saved[1] = M::sigmoid(pre[1]);
    saved[2] = M::tanh(pre[2]);
    saved[3] = M::sigmoid(pre[3]);
    c = next_c(saved, c, update);
    h = saved[3] * M::tanh(c);
  }

  template <class Update = Whole>
  static FS_HD V next_c(const V (&saved)[kColumns], V c, Update update = {}) { return saved[1] * c + saved[0] * update(saved[2]); }

  // before, after: the cell state c, c'. carry: in dL/dc' from later steps, out dL/dc.
  template <class Update = Whole>
  static FS_HD void backward(const V (&saved)[kColumns], V before, V after, V dh, V& carry, V (&dpre)[kColumns], Update update = {}) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V squashed = M::tanh(after);
    const V dc = carry + dh * o * (1.f - squashed * squashed);
    dpre[0] = dc * update(g) * i * (1.f - i);
    dpre[1] = dc * before * f * (1.f - f);
    dpre[2] = update(dc * i) * (1.f - g * g);
    dpre[3] = dh * squashed * o * (1.f - o);
    carry = dc * f;
  }

  // What of dL/dh of a step does not go through its gates.
  static FS_HD V direct(V) { return V{} ; }
};

// Ba, Kiros and Hinton 2016, eq. 20 to 22: an LSTM whose output reads c' layer-normalised. A step, and its way back, has two phases
// with the statistics of all units between them. `read`: N(c') with its gain and bias.
//   c' = f c + i g,  h' = o tanh(read)
template <class M>
struct NormLstm {
  using V = typename M::V;
  static constexpr int kGates = 4, kColumns = 4;
  static constexpr int kInput[kGates] = {0, 1, 2, 3}, kHidden[kGates] = {0, 1, 2, 3};
  static constexpr bool kCellState = true;

  // saved: i, f, g, o
  template <class Update = Whole>
  static FS_HD void write(const V (&pre)[kColumns], V& c, V (&saved)[kColumns], Update update = {}) {
    saved[0] = M::sigmoid(pre[0]);
    saved[1] = M::sigmoid(pre[1]);
    saved[2] = M::tanh(pre[2]);
    saved[3] = M::sigmoid(pre[3]);
    c = next_c(saved, c, update);
  }

  template <class Update = Whole>
  static FS_HD V next_c(const V (&saved)[kColumns], V c, Update update = {}) { return Lstm<M>::next_c(saved, c, update); }

  static FS_HD V output(V o, V read) { return o * M::tanh(read); }

  // dL/d read; dpre_o: column 3.
  static FS_HD V output_backward(V o, V read, V dh, V& dpre_o) {
    const V squashed = M::tanh(read);
    dpre_o = dh * squashed * o * (1.f - o);
    return dh * o * (1.f - squashed * squashed);
  }

  // before: c. dc: dL/dc', through `read` too. carry: dL/dc. dpre: columns 0 to 2.
  template <class Update = Whole>
  static FS_HD void write_backward(const V (&saved)[kColumns], V before, V dc, V& carry, V (&dpre)[kColumns], Update update = {}) {
    const V i = saved[0], f = saved[1], g = saved[2];
    dpre[0] = dc * update(g) * i * (1.f - i);
    dpre[1] = dc * before * f * (1.f - f);
    dpre[2] = update(dc * i) * (1.f - g * g);
    carry = dc * f;
  }

  static FS_HD V direct(V) { return V{} ; }
};

// Cho 2014 in torch's form (reset after the product); gates r, z, n; columns r, z, U_n h + b_hn, W_n x + b_in.
//   n = tanh(W_n x + b_in + r (U_n h + b_hn)),  h' = (1 - z) n + z h
template <class M>
struct Gru {
  using V = typename M::V;
  static constexpr int kGates = 3, kColumns = 4;
  static constexpr int kInput[kGates] = {0, 1, 3}, kHidden[kGates] = {0, 1, 2};
  static constexpr bool kCellState = false;

  // saved: r, z, U_n h + b_hn, n
  template <class Update = Whole>
  static FS_HD void forward(const V (&pre)[kColumns], V& h, V&, V (&saved)[kColumns], Update update = {}) {
    saved[0] = M::sigmoid(pre[0]);
    saved[1] = M::sigmoid(pre[1]);
    saved[2] = pre[2];
    saved[3] = M::tanh(pre[3] + saved[0] * pre[2]);
    const V written = update(saved[3]);
    h = written + saved[1] * (h - written);
  }

  // before: the state h. carry: in and out, the part of dL/dh that bypasses the gates (z dL/dh').
  template <class Update = Whole>
  static FS_HD void backward(const V (&saved)[kColumns], V before, V, V dh, V& carry, V (&dpre)[kColumns], Update update = {}) {
    const V r = saved[0], z = saved[1], u = saved[2], n = saved[3];
    dh = dh + carry;
    const V dn = update(dh * (1.f - z)) * (1.f - n * n);
    dpre[0] = dn * u * r * (1.f - r);
    dpre[1] = dh * (before - update(n)) * z * (1.f - z);
    dpre[2] = dn * r;
    dpre[3] = dn;
    carry = dh * z;
  }

  static FS_HD V direct(V carry) { return carry; }
};

// Elman 1990, as in torch.nn.RNN: one gate, no carry.
//   h' = f(W_h h + b_hh + W_x x + b_ih)
template <class M, class Activation>
struct Elman {
  using V = typename M::V;
  static constexpr int kGates = 1, kColumns = 1;
  static constexpr int kInput[kGates] = {0}, kHidden[kGates] = {0};
  static constexpr bool kCellState = false;

  // saved: h'. What it writes is all of h': nothing of it is dropped.
  template <class Update = Whole>
  static FS_HD void forward(const V (&pre)[kColumns], V& h, V&, V (&saved)[kColumns], Update = {}) {
    h = saved[0] = Activation::of(pre[0]);
  }

  template <class Update = Whole>
  static FS_HD void backward(const V (&saved)[kColumns], V, V, V dh, V& carry, V (&dpre)[kColumns], Update = {}) {
    dpre[0] = (dh + carry) * Activation::slope(saved[0]);
    carry = V{};
  }

  static FS_HD V direct(V) { return V{} ; }
};

template <class M>
struct Tanh {
  using V = typename M::V;
  static FS_HD V of(V x) { return M::tanh(x); }
  static FS_HD V slope(V y) { return 1.f - y * y; }
};

template <class M>
struct Relu {  // max(x, 0), but NaN of NaN
  using V = typename M::V;
  static FS_HD V of(V x) { return x <= V{} ? V{} : x; }
  static FS_HD V slope(V y) { return y <= V{} ? V{} : V{} + 1.f; }
};

template <class M>
struct RnnTanh : Elman<M, Tanh<M>> {};

template <class M>
struct RnnRelu : Elman<M, Relu<M>> {};

// One unit's random masks at one step. keep_h, keep_c: the share of the old state that stays (zoneout, Krueger 2016).
template <class V>
struct Masks {
  Scaled<V> update;
  V keep_h, keep_c;
};

// A step of Cell under masks. Forward: h, c before the step in, after it out.
template <class Cell, class V = typename Cell::V>
FS_HD void masked_forward(const V (&pre)[Cell::kColumns], V& h, V& c, V (&saved)[Cell::kColumns], const Masks<V>& masks) {
  V new_h = h, new_c = c;
  Cell::forward(pre, new_h, new_c, saved, masks.update);
  h = masks.keep_h * h + (1.f - masks.keep_h) * new_h;  // exact where all of one is kept
  c = masks.keep_c * c + (1.f - masks.keep_c) * new_c;
}

// before: as Cell::backward has it, c or h. carry as there; kept: in what later steps add to dL/dh' beside the gates and carry, out
// the same for dL/dh.
template <class Cell, class V = typename Cell::V>
FS_HD void masked_backward(const V (&saved)[Cell::kColumns], V before, V dh, V& carry, V& kept, V (&dpre)[Cell::kColumns],
                           const Masks<V>& masks) {
  dh = dh + kept;
  if constexpr (Cell::kCellState) {
    const V held = carry * masks.keep_c;
    carry = carry - held;
    Cell::backward(saved, before, Cell::next_c(saved, before, masks.update), dh - dh * masks.keep_h, carry, dpre, masks.update);
    carry = carry + held;
    kept = dh * masks.keep_h;
  } else {
    dh = dh + carry;
    carry = V{};
    Cell::backward(saved, before, V{}, dh - dh * masks.keep_h, carry, dpre, masks.update);
    kept = dh * masks.keep_h;
  }
}

// Cho 2014, eq. 5 to 8: the reset gate before the product; gates and columns r, z, n. Bahdanau 2014, A.1.1 and A.2 have the same
// with 1 - z for z; here z keeps the state, as in Cho and in torch.
//   n = tanh(W_n x + b_in + U_n (r h) + b_hn),  h' = (1 - z) n + z h
// U_n reads r h: each pass has two phases with that product between them. Its sequence driver comes with the decoder.
template <class M>
struct GruResetBefore {
  using V = typename M::V;
  static constexpr int kGates = 3, kColumns = 3, kSaved = 4;
  static constexpr int kInput[kGates] = {0, 1, 2}, kHidden[kGates] = {0, 1, 2};
  static constexpr bool kCellState = false;

  // pre: columns r and z. saved: r, z, r h, (n); the third is what U_n reads.
  static FS_HD void reset(const V (&pre)[kColumns], V h, V (&saved)[kSaved]) {
    saved[0] = M::sigmoid(pre[0]);
    saved[1] = M::sigmoid(pre[1]);
    saved[2] = saved[0] * h;
  }

  // pre: column n, U_n (r h) included.
  static FS_HD void candidate(const V (&pre)[kColumns], V& h, V (&saved)[kSaved]) {
    saved[3] = M::tanh(pre[2]);
    h = saved[3] + saved[1] * (h - saved[3]);
  }

  // dpre: columns z and n. before, carry: as in Gru::backward.
  static FS_HD void candidate_backward(const V (&saved)[kSaved], V before, V dh, V& carry, V (&dpre)[kColumns]) {
    const V z = saved[1], n = saved[3];
    dh = dh + carry;
    dpre[1] = dh * (before - n) * z * (1.f - z);
    dpre[2] = dh * (1.f - z) * (1.f - n * n);
    carry = dh * z;
  }

  // d_reset: dL/d(r h) = U_n^T dpre_n. dpre: column r. carry: gains the part of dL/dh that comes through r h.
  static FS_HD void reset_backward(const V (&saved)[kSaved], V d_reset, V& carry, V (&dpre)[kColumns]) {
    const V r = saved[0];
    dpre[0] = d_reset * saved[2] * (1.f - r);
    carry = carry + d_reset * r;
  }

  static FS_HD V direct(V carry) { return carry; }
};

}  // namespace fastseq
