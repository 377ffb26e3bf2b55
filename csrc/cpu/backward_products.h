// The large products of the backward pass, over all tokens: dx = dG W_ih, dW = dG^T [x | h before], db = sum of dG.
#pragma once

#include "driver.h"

namespace fastseq {
namespace FS_ISA {

constexpr int kVectors = 4, kPanel = kVectors * W;  // columns of a tile
constexpr int kTileRows = kAccumulators / kVectors;
constexpr int64_t kTokenBlock = 256;                // tokens summed between two visits of dW: panels stay in a core's cache
constexpr int64_t kInPlaceTokens = 16;
constexpr int64_t kBiasUnits = 16;                  // of a token block, summed at a time for db
constexpr int64_t kUnitBlock = 8 * kTileRows;       // rows of dW for which the gate gradients are packed
constexpr int64_t kDepthBlock = 512;                // units of dG summed between two visits of dx
constexpr int64_t kRowBlock = 16 * kTileRows;       // rows of dx for which a panel of W_ih stays in the cache

// Whether a panel of a row-major fp32 matrix is read where it stands: for few tokens a packed copy does not pay.
template <class T>
FS_INLINE bool reads_in_place(int64_t tokens, int64_t columns, int64_t panel) {
  return Dot<T>::kPerUnit == 1 && tokens <= kInPlaceTokens && (panel + 1) * kPanel <= columns;
}

// What the drivers know of a cell, as numbers: the products need no more, and so are compiled once for all cells.
struct Gates {
  int gates, columns;
  const int *input, *hidden;  // [gates] the column of each gate

  template <class Cell>
  static FS_INLINE Gates of() {
    static_assert(Cell::kHidden[0] == 0, "recurrent columns come first, in gate order");
    return {Cell::kGates, Cell::kColumns, Cell::kInput, Cell::kHidden};
  }
};

// What the threads of one direction share. A gate gradient row is [columns][gate_units]: every column starts on a unit.
template <class T>
struct BackwardBuffers {
  Gates cell;
  int64_t gate_units, panels, width;
  uint32_t* w_hh;   // [panels][depth][kPanel]
  uint32_t* gates;  // [N][row_units]
  uint32_t* zeros;  // [row_units]
  float *pending, *carry;  // [B][width]
  T* h0;            // [B][H]

  BackwardBuffers(Carver& carve, Gates gates_of_cell, const Shape& shape, const Sequence& seq)
      : cell(gates_of_cell), gate_units(units<T>(shape.hidden)), panels((shape.hidden + kPanel - 1) / kPanel), width(panels * kPanel) {
    w_hh = carve.take<uint32_t>(panels * depth() * kPanel);
    gates = carve.take<uint32_t>(seq.tokens() * row_units());
    zeros = carve.take<uint32_t>(row_units());
    pending = carve.take<float>(seq.rows * width);
    carry = carve.take<float>(seq.rows * width);
    h0 = carve.take<T>(seq.rows * shape.hidden);
  }

  FS_INLINE int64_t depth() const { return cell.gates * gate_units; }
  FS_INLINE int64_t row_units() const { return cell.columns * gate_units; }
  FS_INLINE uint32_t* gate_row(int64_t token) const { return gates + token * row_units(); }
};

// Shared by the whole team, used for one direction after the other.
template <class T>
struct ProductBuffers {
  int64_t x_panels, h_panels;
  uint32_t* w_ih;          // [x_panels][G * gate_units][kPanel]
  uint32_t *x, *h;         // [panels][kTokenBlock units][kPanel]
  float *d_w_ih, *d_w_hh;  // [G * H][I], [G * H][H]: only where the result is not fp32 itself
  float* d_bias;           // [columns][H]
  uint32_t* own;           // per thread: [kTokenBlock units][kUnitBlock]
  float* d_x;              // per thread: [kRowBlock][x_panels * kPanel]

  ProductBuffers(Carver& carve, Gates cell, const Shape& shape, int threads) {
    const int64_t H = shape.hidden, I = shape.input;
    x_panels = (I + kPanel - 1) / kPanel, h_panels = (H + kPanel - 1) / kPanel;
    w_ih = carve.take<uint32_t>(x_panels * cell.gates * units<T>(H) * kPanel);
    x = carve.take<uint32_t>(x_panels * units<T>(kTokenBlock) * kPanel);
    h = carve.take<uint32_t>(h_panels * units<T>(kTokenBlock) * kPanel);
    const bool convert = sizeof(T) != sizeof(float);
    d_w_ih = carve.take<float>(convert ? cell.gates * H * I : 0);
    d_w_hh = carve.take<float>(convert ? cell.gates * H * H : 0);
    d_bias = carve.take<float>(cell.columns * H);
    own = carve.take<uint32_t>(threads * units<T>(kTokenBlock) * kUnitBlock);
    d_x = carve.take<float>(threads * kRowBlock * x_panels * kPanel);
  }
};

// A product's result: rows of fp32, `pitch` apart, set or added to.
struct Sums {
  float* to;
  int64_t pitch;
  bool add;
};

// One tile of `columns` columns, of which those past kPanel are left alone.
template <class T>
void tile(const uint32_t* const* a, int64_t stride, const uint32_t* panel, int64_t pitch, int64_t depth, int64_t rows, int64_t columns,
          Sums sums) {
  with_rows<kTileRows>(rows, [&](auto count) {
    constexpr int MR = decltype(count)::value;
    auto narrow_or_wide = [&](auto vectors) FS_LAMBDA {
      constexpr int NV = decltype(vectors)::value;
      vf acc[MR][NV] = {};
      multiply<T, MR, NV>(a, stride, panel, pitch, depth, acc);
      auto finish = [&](int v, int n) FS_LAMBDA {
        float* to = sums.to + v * W;
        if (sums.add)
          for (int m = 0; m < MR; ++m) acc[m][v] += load(to + m * sums.pitch, n);
        for (int m = 0; m < MR; ++m) store(to + m * sums.pitch, acc[m][v], n);
      };
      if (columns >= NV * W) {
        for (int v = 0; v < NV; ++v) finish(v, W);
      } else {
        for (int v = 0; v < NV && v * W < columns; ++v) finish(v, columns - v * W < W ? static_cast<int>(columns - v * W) : W);
      }
    };
    columns <= W ? narrow_or_wide(Rows<1>{}) : columns <= 2 * W ? narrow_or_wide(Rows<2>{}) : narrow_or_wide(Rows<kVectors>{});
  });
}

template <class T>
class Products {
  static constexpr int kPer = Dot<T>::kPerUnit;

 public:
  Products(const Shape& shape, const Sequence& seq, const BackwardPass& pass, const BackwardBuffers<T>& gates,
           const ProductBuffers<T>& buffers, Team team)
      : seq_(seq), pass_(pass), cell_(gates.cell), gates_(gates), buf_(buffers), team_(team), H_(shape.hidden),
        I_(shape.input), N_(seq.tokens()), own_(buf_.own + team.rank * units<T>(kTokenBlock) * kUnitBlock) {
    d_w_ih_ = pass.d_w_ih ? (sizeof(T) == 4 ? static_cast<float*>(pass.d_w_ih) : buf_.d_w_ih) : nullptr;
    d_w_hh_ = pass.d_w_hh ? (sizeof(T) == 4 ? static_cast<float*>(pass.d_w_hh) : buf_.d_w_hh) : nullptr;
  }

  void run() {
    if (pass_.d_x.data) {
      pack_w_ih();
      team_.sync();
      input_gradient();
    }
    if (d_w_ih_ || d_w_hh_ || pass_.d_b_ih || pass_.d_b_hh) {
      for (int64_t k = 0; k == 0 || k < N_; k += kTokenBlock) {
        const int64_t depth = N_ - k < kTokenBlock ? N_ - k : kTokenBlock;
        pack_tokens(k, depth);
        team_.sync();
        weight_gradients(k, depth);
        team_.sync();
      }
      write_out();
    }
    team_.sync();
  }

 private:
  void pack_w_ih() {
    const T* w = static_cast<const T*>(pass_.dir.w_ih);
    const Range own = share(buf_.x_panels, team_.rank, team_.size);
    for (int64_t p = own.begin; p < own.end; ++p)
      for (int g = 0; g < cell_.gates && !reads_in_place<T>(N_, I_, p); ++g)
        pack_rows<T>([&](int64_t k) { return w + (g * H_ + k) * I_ + p * kPanel; }, H_, I_ - p * kPanel,
                     buf_.w_ih + (p * cell_.gates + g) * gates_.gate_units * kPanel, kPanel);
  }

  // f(t, position) for tokens [begin, end).
  template <class F>
  FS_INLINE void for_tokens(int64_t begin, int64_t end, F&& f) const {
    int64_t low = 0, high = seq_.steps;  // the step of token `begin`
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (seq_.offsets[middle] <= begin ? low : high) = middle;
    }
    for (int64_t k = begin; k < end; ++k) {
      while (k >= seq_.offsets[low + 1]) ++low;
      f(low, k - seq_.offsets[low]);
    }
  }

  void input_gradient() {
    float* sums = buf_.d_x + team_.rank * kRowBlock * buf_.x_panels * kPanel;
    const int64_t pitch = buf_.x_panels * kPanel, blocks = (N_ + kRowBlock - 1) / kRowBlock;
    const Range own = share(blocks, team_.rank, team_.size);
    for (int64_t b = own.begin; b < own.end; ++b) {
      const int64_t begin = b * kRowBlock, rows = N_ - begin < kRowBlock ? N_ - begin : kRowBlock;
      for (int g = 0, next; g < cell_.gates; g = next) {  // neighbouring columns are one product, up to kDepthBlock
        for (next = g + 1; next < cell_.gates && cell_.input[next] == cell_.input[next - 1] + 1 &&
                           (next + 1 - g) * gates_.gate_units <= kDepthBlock;)
          ++next;
        for (int64_t p = 0; p < buf_.x_panels; ++p) input_gradient_panel(begin, rows, p, g, next, sums + p * kPanel, pitch);
      }
      write_input_gradient(begin, rows, sums, pitch);
    }
  }

  FS_INLINE void input_gradient_panel(int64_t begin, int64_t rows, int64_t p, int g, int next, float* sums, int64_t pitch) const {
    const bool in_place = reads_in_place<T>(N_, I_, p);
    const uint32_t* panel = in_place ? static_cast<const uint32_t*>(pass_.dir.w_ih) + g * H_ * I_ + p * kPanel
                                     : buf_.w_ih + (p * cell_.gates + g) * gates_.gate_units * kPanel;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t count = rows - r < kTileRows ? rows - r : kTileRows;
      const uint32_t* a[kTileRows];
      for (int64_t m = 0; m < count; ++m) a[m] = gates_.gate_row(begin + r + m) + cell_.input[g] * gates_.gate_units;
      tile<T>(a, 1, panel, in_place ? I_ : kPanel, (next - g) * gates_.gate_units, count, I_ - p * kPanel,
              {sums + r * pitch, pitch, g > 0});
    }
  }

  void write_input_gradient(int64_t begin, int64_t rows, const float* sums, int64_t pitch) const {
    for_tokens(begin, begin + rows, [&](int64_t t, int64_t position) {
      T* to = pass_.d_x.template at<T>(seq_, t, position);
      for (int64_t i = 0; i < I_; i += W) {
        const int n = I_ - i < W ? static_cast<int>(I_ - i) : W;
        const vf sum = load_vector<vf>(sums + i);
        store(to + i, pass_.add_to_d_x ? load(to + i, n) + sum : sum, n);
      }
      sums += pitch;
    });
  }

  // x and the hidden states before each token, as panels with the tokens as the summed dimension.
  void pack_tokens(int64_t begin, int64_t depth) {
    const T *x[kTokenBlock], *h[kTokenBlock];
    int64_t k = 0;
    for_tokens(begin, begin + depth, [&](int64_t t, int64_t position) {
      x[k] = pass_.x.template at<T>(seq_, t, position);
      const int64_t e = pass_.dir.reverse ? t + 1 : t - 1;
      const bool has_earlier = e >= 0 && e < seq_.steps && position < seq_.active(e);
      h[k++] = has_earlier ? pass_.out.template at<T>(seq_, e, position) : gates_.h0 + position * H_;
    });
    const Range own = share(buf_.x_panels + buf_.h_panels, team_.rank, team_.size);
    const int64_t panel_units = units<T>(kTokenBlock) * kPanel;
    for (int64_t i = own.begin; i < own.end; ++i) {
      const int64_t p = i < buf_.x_panels ? i : i - buf_.x_panels;
      if (i < buf_.x_panels) {
        if (d_w_ih_)
          pack_rows<T>([&](int64_t j) { return x[j] + p * kPanel; }, depth, I_ - p * kPanel, buf_.x + p * panel_units, kPanel);
      } else if (d_w_hh_) {
        pack_rows<T>([&](int64_t j) { return h[j] + p * kPanel; }, depth, H_ - p * kPanel, buf_.h + p * panel_units, kPanel);
      }
    }
  }

  // Work items: blocks of units of every column, the same ones to the same thread for every block of tokens.
  void weight_gradients(int64_t begin, int64_t depth) const {
    const int64_t blocks = (H_ + kUnitBlock - 1) / kUnitBlock;
    const Range own = share(cell_.columns * blocks, team_.rank, team_.size);
    for (int64_t item = own.begin; item < own.end; ++item) {
      const int j = static_cast<int>(item / blocks);
      const int64_t u = item % blocks * kUnitBlock, count = H_ - u < kUnitBlock ? H_ - u : kUnitBlock;
      pack_rows<T>(
          [&](int64_t k) {
            return reinterpret_cast<const T*>(gates_.gate_row(begin + k)) + j * gates_.gate_units * kPer + u;
          },
          depth, count, own_, kUnitBlock);
      add_bias(begin == 0, j, u, count, units<T>(depth));
      const int gi = gate_of(cell_.input, j), gh = gate_of(cell_.hidden, j);
      if (d_w_ih_ && gi >= 0) weight_block(begin == 0, d_w_ih_ + (gi * H_ + u) * I_, I_, buf_.x, buf_.x_panels, count, units<T>(depth));
      if (d_w_hh_ && gh >= 0) weight_block(begin == 0, d_w_hh_ + (gh * H_ + u) * H_, H_, buf_.h, buf_.h_panels, count, units<T>(depth));
    }
  }

  int gate_of(const int* columns, int column) const {
    for (int g = 0; g < cell_.gates; ++g)
      if (columns[g] == column) return g;
    return -1;
  }

  FS_INLINE void weight_block(bool first, float* to, int64_t columns, const uint32_t* panels, int64_t panel_count, int64_t count,
                              int64_t depth) const {
    for (int64_t p = 0; p < panel_count; ++p) {
      for (int64_t u = 0; u < count; u += kTileRows) {
        const uint32_t* a[kTileRows];
        for (int m = 0; m < kTileRows; ++m) a[m] = own_ + u + m;
        tile<T>(a, kUnitBlock, panels + p * units<T>(kTokenBlock) * kPanel, kPanel, depth, count - u < kTileRows ? count - u : kTileRows,
                columns - p * kPanel, {to + u * columns + p * kPanel, columns, !first});
      }
    }
  }

  // In two levels: one chain of sums over a block of tokens would err by up to 12 ulp.
  void add_bias(bool first, int j, int64_t u, int64_t count, int64_t depth) const {
    for (int64_t c = 0; c < count; c += W) {
      vf sum = {};
      for (int64_t k = 0; k < depth; k += kBiasUnits)
        sum += sum_units(own_ + k * kUnitBlock + c, depth - k < kBiasUnits ? depth - k : kBiasUnits);
      const int n = count - c < W ? static_cast<int>(count - c) : W;
      float* to = buf_.d_bias + j * H_ + u + c;
      store(to, first ? sum : load(to, n) + sum, n);
    }
  }

  // The sum of `count` units, kUnitBlock apart, for each of W columns.
  static FS_INLINE vf sum_units(const uint32_t* from, int64_t count) {
    vf sum = {};
    for (int64_t k = 0; k < count; ++k) {
      const vu unit = load_vector<vu>(from + k * kUnitBlock);
      if constexpr (kPer == 2) {
        sum += bits_of<vf>(unit << 16) + bits_of<vf>(unit & (vu{} + 0xffff0000u));
      } else {
        sum += bits_of<vf>(unit);
      }
    }
    return sum;
  }

  void write_out() const {
    const Range own = share(cell_.gates * H_, team_.rank, team_.size);
    for (int64_t row = own.begin; row < own.end && sizeof(T) != sizeof(float); ++row) {
      if (d_w_ih_) copy_row(d_w_ih_ + row * I_, static_cast<T*>(pass_.d_w_ih) + row * I_, I_);
      if (d_w_hh_) copy_row(d_w_hh_ + row * H_, static_cast<T*>(pass_.d_w_hh) + row * H_, H_);
    }
    for (int g = 0; g < cell_.gates && team_.rank == 0; ++g) {
      if (pass_.d_b_ih) copy_row(buf_.d_bias + cell_.input[g] * H_, static_cast<T*>(pass_.d_b_ih) + g * H_, H_);
      if (pass_.d_b_hh) copy_row(buf_.d_bias + cell_.hidden[g] * H_, static_cast<T*>(pass_.d_b_hh) + g * H_, H_);
    }
  }

  static void copy_row(const float* from, T* to, int64_t count) {
    for (int64_t i = 0; i < count; i += W) {
      const int n = count - i < W ? static_cast<int>(count - i) : W;
      store(to + i, load(from + i, n), n);
    }
  }

  const Sequence& seq_;
  const BackwardPass& pass_;
  const Gates cell_;
  const BackwardBuffers<T>& gates_;
  const ProductBuffers<T>& buf_;
  Team team_;
  int64_t H_, I_, N_;
  uint32_t* own_;
  float *d_w_ih_, *d_w_hh_;
};

}  // namespace FS_ISA
}  // namespace fastseq
