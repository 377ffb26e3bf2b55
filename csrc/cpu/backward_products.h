// The large products of the backward pass, over all tokens: dx = dG W_ih, dW = dG^T [x | h before], db = sum of dG.
#pragma once

#include "driver.h"
#include "team_products.h"

namespace fastseq {
namespace FS_ISA {

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
  float *pending, *carry, *kept;  // [B][width]; kept: only with masks
  T* h0;            // [B][H]
  T* operands;      // [N][H] what W_hh multiplied, where a mask did too

  BackwardBuffers(Carver& carve, Gates gates_of_cell, const Shape& shape, const Sequence& seq, const Noise& noise)
      : cell(gates_of_cell), gate_units(units<T>(shape.hidden)), panels((shape.hidden + kPanel - 1) / kPanel), width(panels * kPanel) {
    w_hh = carve.take<uint32_t>(panels * depth() * kPanel);
    gates = carve.take<uint32_t>(seq.tokens() * row_units());
    zeros = carve.take<uint32_t>(row_units());
    pending = carve.take<float>(seq.rows * width);
    carry = carve.take<float>(seq.rows * width);
    kept = carve.take<float>(noise.any ? seq.rows * width : 0);
    h0 = carve.take<T>(seq.rows * shape.hidden);
    operands = carve.take<T>(noise.recurrent ? seq.tokens() * shape.hidden : 0);
  }

  FS_INLINE int64_t depth() const { return cell.gates * gate_units; }
  FS_INLINE int64_t row_units() const { return cell.columns * gate_units; }
  FS_INLINE uint32_t* gate_row(int64_t token) const { return gates + token * row_units(); }
};

// The products of one direction, as team_products.h takes them. Its steps and rows are found when a product asks for them.
template <class T>
class Products {
 public:
  Products(const Shape& shape, const Sequence& seq, const BackwardPass& pass, const BackwardBuffers<T>& gates)
      : seq_(seq), pass_(pass), gates_(gates), H_(shape.hidden) {
    const Gates& cell = gates.cell;
    const bool joins = H_ % Dot<T>::kPerUnit == 0;  // neighbouring columns are one segment
    for (int g = 0; g < cell.gates; ++g) {
      if (g && joins && cell.input[g] == cell.input[g - 1] + 1) {
        segments_[segment_count_ - 1].count += H_;
      } else {
        segments_[segment_count_++] = {cell.input[g] * gates.gate_units, g * H_, H_};
      }
    }
    for (int j = 0; j < cell.columns; ++j)
      groups_[j] = {j * gates.gate_units * Dot<T>::kPerUnit, H_, {row_of(cell.input, j), row_of(cell.hidden, j)}};
    const T *w_ih = static_cast<const T*>(pass.dir.w_ih), *none = nullptr;
    input_ = {seq.tokens(), shape.input, {this, gate_rows}, segments_, segment_count_, true, w_ih, shape.input, false, none,
              pass.add_to_d_x, {this, d_x_rows}};
    const auto factor = [&](auto* rows, int64_t columns, void* d_w, void* d_b) {
      return Factor<T>{{this, rows}, cell.gates * H_, columns, static_cast<T*>(d_w), columns, static_cast<T*>(d_b)};
    };
    weights_ = {seq.tokens(), {this, gate_rows}, groups_, cell.columns,
                {factor(x_rows, shape.input, pass.d_w_ih, pass.d_b_ih), factor(h_rows, H_, pass.d_w_hh, pass.d_b_hh)}, 2};
  }
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

  struct Buffers {
    RowProductBuffers<T> input;
    TokenSumsBuffers<T> weights;

    Buffers(Carver& carve, const Products& of, int threads)
        : input(carve, of.input_.columns, units<T>(of.segments_, of.segment_count_), threads), weights(carve, of.weights_, threads) {}
  };

  void run(const Buffers& buffers, Team team) const {
    if (pass_.d_x.data) multiply_rows<T>(input_, buffers.input, team);
    if (pass_.d_w_ih || pass_.d_w_hh || pass_.d_b_ih || pass_.d_b_hh) sum_over_tokens<T>(weights_, buffers.weights, team);
    team.sync();  // the other direction uses the same buffers
  }

 private:
  int64_t row_of(const int* columns, int column) const {
    for (int g = 0; g < gates_.cell.gates; ++g)
      if (columns[g] == column) return g * H_;
    return -1;
  }

  // rows[i] = at(t, position) of token begin + i.
  template <class E, class F>
  FS_INLINE void for_tokens(int64_t begin, int64_t count, E** rows, F&& at) const {
    int64_t low = 0, high = seq_.steps;  // the step of token `begin`
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (seq_.offsets[middle] <= begin ? low : high) = middle;
    }
    for (int64_t k = begin; k < begin + count; ++k) {
      while (k >= seq_.offsets[low + 1]) ++low;
      rows[k - begin] = at(low, k - seq_.offsets[low]);
    }
  }

  static const Products& of(const void* context) { return *static_cast<const Products*>(context); }

  static void gate_rows(const void* context, int64_t begin, int64_t count, const T** rows) {
    for (int64_t i = 0; i < count; ++i) rows[i] = reinterpret_cast<const T*>(of(context).gates_.gate_row(begin + i));
  }

  static void x_rows(const void* context, int64_t begin, int64_t count, const T** rows) {
    const Products& p = of(context);
    p.for_tokens(begin, count, rows, [&](int64_t t, int64_t position) { return p.pass_.x.template at<T>(p.seq_, t, position); });
  }

  static void d_x_rows(const void* context, int64_t begin, int64_t count, T** rows) {
    const Products& p = of(context);
    p.for_tokens(begin, count, rows, [&](int64_t t, int64_t position) { return p.pass_.d_x.template at<T>(p.seq_, t, position); });
  }

  // What W_hh multiplied at each token: the hidden state before it; zeros, where its row started anew.
  static void h_rows(const void* context, int64_t begin, int64_t count, const T** rows) {
    const Products& p = of(context);
    if (p.pass_.noise.recurrent) {
      for (int64_t i = 0; i < count; ++i) rows[i] = p.gates_.operands + (begin + i) * p.H_;
      return;
    }
    p.for_tokens(begin, count, rows, [&](int64_t t, int64_t position) -> const T* {
      if (p.seq_.starts_anew(t, position, p.pass_.dir.reverse)) return reinterpret_cast<const T*>(p.gates_.zeros);
      const int64_t e = step_before(p.seq_, t, position, p.pass_.dir.reverse);
      return e >= 0 ? p.pass_.out.template at<T>(p.seq_, e, position) : p.gates_.h0 + position * p.H_;
    });
  }

  const Sequence& seq_;
  const BackwardPass& pass_;
  const BackwardBuffers<T>& gates_;
  int64_t H_;
  Segment segments_[4];
  int segment_count_ = 0;
  Group groups_[4];
  RowProduct<T> input_;
  TokenSums<T> weights_;
};

}  // namespace FS_ISA
}  // namespace fastseq
