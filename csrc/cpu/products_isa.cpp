// The products of linear layers and of RNN training: panels packed by the team, then tiles; dot products for few tokens.
#include "products.h"

#include "dot.h"
#include "driver.h"
#include "team_products.h"

namespace fastseq {
namespace FS_ISA {
namespace {

constexpr double kSmallProducts = 2e6;  // FLOPs below which a second thread costs more than it brings
constexpr int64_t kDotTokens = kTileRegisters ? 12 : W >= 16 ? 48 : 32;  // tokens up to which unpacked dot products beat packing the weights

int lanes(int64_t left) { return left < W ? static_cast<int>(left) : W; }

// What becomes of a tile: added to the sums of earlier depths, then kept in fp32, or finished.
template <class T>
struct Result {
  float* sums;  // of the tile's first row and column
  int64_t pitch;
  bool first, last;
  T* const* out;  // a row each, from its first column
  int64_t column;
  const T* bias;
  bool add;
};

// The first `columns` of the tile's columns exist; `Whole`: all do.
template <class T, bool Whole, class Count, int MR, int NV>
FS_INLINE void finish(Count count, vf (&acc)[MR][NV], int64_t columns, const Result<T>& to) {
  const auto each = [&](auto&& f) FS_LAMBDA {
    if constexpr (Whole) {
      for_each_sum(count, acc, [&](int m, int v, vf& sum) FS_LAMBDA { f(m, v * W, W, sum); });
    } else {
      for (int v = 0; v < NV && v * W < columns; ++v)
        for (int m = 0; m < count.count(); ++m) f(m, v * W, lanes(columns - v * W), acc[m][v]);
    }
  };
  if (!to.first) each([&](int m, int64_t at, int n, vf& sum) FS_LAMBDA { sum += load(to.sums + m * to.pitch + at, n); });
  if (!to.last) return each([&](int m, int64_t at, int n, vf& sum) FS_LAMBDA { store(to.sums + m * to.pitch + at, sum, n); });
  T* out[MR];
  for (int m = 0; m < count.count(); ++m) out[m] = to.out[m] + to.column;
  if (to.bias) each([&](int, int64_t at, int n, vf& sum) FS_LAMBDA { sum += load(to.bias + to.column + at, n); });
  if (to.add) each([&](int m, int64_t at, int n, vf& sum) FS_LAMBDA { sum += load(out[m] + at, n); });
  each([&](int m, int64_t at, int n, vf& sum) FS_LAMBDA { store(out[m] + at, sum, n); });
}

// One tile of `columns` columns, of which those past kPanel are left alone.
template <class T>
void tile(const uint32_t* const* a, int64_t stride, const uint32_t* panel, int64_t pitch, int64_t depth, int64_t rows, int64_t columns,
          const Result<T>& to) {
  with_tile<kTileRows>(rows, [&](auto count) {
    constexpr int MR = decltype(count)::value;
    auto narrow_or_wide = [&](auto vectors) FS_LAMBDA {
      constexpr int NV = decltype(vectors)::value;
      vf acc[MR][NV];
      static constexpr float kZeros[W] = {};
      FirstSums<NV> zeros;
      for (int v = 0; v < NV; ++v) zeros.from[v] = kZeros, zeros.pitch[v] = 0;
      multiply<T>(count, a, stride, panel, pitch, depth, zeros, acc);
      if constexpr (NV == kVectors)  // few columns: their results are few, and are compiled once
        if (columns >= NV * W) return finish<T, true>(count, acc, columns, to);
      vf part[MR][NV];  // not `acc` itself: an array that a loop walks through has no registers
      for_each_sum(count, acc, [&](int m, int v, vf& sum) FS_LAMBDA { part[m][v] = sum; });
      finish<T, false>(count, part, columns, to);
    };
    columns <= W ? narrow_or_wide(Rows<1>{}) : columns <= 2 * W ? narrow_or_wide(Rows<2>{}) : narrow_or_wide(Rows<kVectors>{});
  });
}

template <class T>
class RowMultiplier {
  static constexpr int kPer = Dot<T>::kPerUnit;

 public:
  RowMultiplier(const RowProduct<T>& product, const RowProductBuffers<T>& buffers, Team team)
      : product_(product), buf_(buffers), team_(team), sums_(buffers.sums + team.rank * kRowBlock * kPanel),
        halves_(buffers.halves + team.rank * kRowBlock) {}

  void run() {
    const int64_t panels = (product_.columns + kPanel - 1) / kPanel;
    const Range packs = share(panels, team_.rank, team_.size);
    for (int64_t p = packs.begin; p < packs.end; ++p) pack(p);
    team_.sync();
    constexpr int64_t kStep = kTileRegisters ? kRegisterRows : kTileRows;
    const int64_t tiles = (product_.tokens + kStep - 1) / kStep;
    if (tiles >= 4 * team_.size) {
      const Range own = share(tiles, team_.rank, team_.size);
      const int64_t end = own.end * kStep;
      run({own.begin * kStep, end < product_.tokens ? end : product_.tokens}, {0, panels});
    } else {
      run({0, product_.tokens}, packs);
    }
  }

 private:
  // A panel that one block of rows reads pays for no copy.
  bool in_place(int64_t p) const { return !product_.transposed && product_.tokens <= kRowBlock && is_panel<T>(product_.columns, p); }

  void pack(int64_t p) const {
    if (in_place(p)) return;
    uint32_t* panel = buf_.packed + p * buf_.depth * kPanel;
    const int64_t column = p * kPanel, left = product_.columns - column, pitch = product_.pitch;
    for (int s = 0; s < product_.segment_count; ++s) {
      const Segment& segment = product_.segments[s];
      if (product_.transposed) {
        for (int64_t v = 0; v < kPanel; v += W)
          pack_transposed<T>(product_.w + (column + v) * pitch + segment.row, pitch, left < v ? 0 : lanes(left - v), segment.count, panel + v, kPanel);
      } else {
        pack_rows<T>([&](int64_t k) { return product_.w + (segment.row + k) * pitch + column; }, segment.count, left, panel, kPanel);
      }
      panel += units<T>(segment.count) * kPanel;
    }
  }

  void run(Range rows, Range panels) const {
    const Blocks blocks(rows.end - rows.begin, kRowBlock);
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t begin = rows.begin + blocks.begin(b), count = blocks.begin(b + 1) - blocks.begin(b);
      const T* a[kRowBlock];
      T* out[kRowBlock];
      product_.a.find(product_.a.context, begin, count, a);
      product_.out.find(product_.out.context, begin, count, out);
      for (int64_t p = panels.begin; p < panels.end; ++p) panel_of_rows(a, out, count, p);
    }
  }

  void panel_of_rows(const T* const* a, T* const* out, int64_t count, int64_t p) const {
    const bool here = in_place(p);
    const int64_t column = p * kPanel, pitch = here ? product_.pitch : kPanel;
    const uint32_t* panel = buf_.packed + p * buf_.depth * kPanel;
    for (int s = 0; s < product_.segment_count; ++s) {
      const Segment& segment = product_.segments[s];
      const bool half = !product_.padded && segment.count % kPer;
      const int64_t whole = half ? segment.count / kPer : units<T>(segment.count);
      if (here) panel = reinterpret_cast<const uint32_t*>(product_.w + segment.row * product_.pitch + column);
      for (int64_t k = 0; k == 0 || k < whole; k += kDepthBlock) {
        const int64_t depth = whole - k < kDepthBlock ? whole - k : kDepthBlock;
        const bool last = s + 1 == product_.segment_count && k + depth == whole && !half;
        rows_of_tiles(count, p, panel + k * pitch, pitch, depth, s == 0 && k == 0, last, out,
                      [&](int64_t r) FS_LAMBDA { return reinterpret_cast<const uint32_t*>(a[r]) + segment.from + k; });
      }
      panel += whole * pitch;
      if constexpr (kPer == 2) {
        if (!half) continue;
        for (int64_t r = 0; r < count; ++r) halves_[r] = a[r][segment.from * kPer + segment.count - 1].bits;
        rows_of_tiles(count, p, panel, pitch, 1, false, s + 1 == product_.segment_count, out,
                      [&](int64_t r) FS_LAMBDA { return halves_ + r; });
        panel += pitch;
      }
    }
  }

  template <class A>
  FS_INLINE void rows_of_tiles(int64_t count, int64_t p, const uint32_t* panel, int64_t pitch, int64_t depth, bool first, bool last,
                               T* const* out, A&& row) const {
    const Blocks tiles(count, kTileRows, kTileRegisters);
    const int64_t column = p * kPanel;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t r = tiles.begin(t), rows = tiles.begin(t + 1) - r;
      const uint32_t* a[kTileRows];
      for (int64_t m = 0; m < rows; ++m) a[m] = row(r + m);
      tile<T>(a, 1, panel, pitch, depth, rows, product_.columns - column,
              {sums_ + r * kPanel, kPanel, first, last, out + r, column, product_.bias, product_.add});
    }
  }

  const RowProduct<T>& product_;
  const RowProductBuffers<T>& buf_;
  Team team_;
  float* sums_;
  uint32_t* halves_;
};

template <class T>
class TokenSummer {
  static constexpr int kPer = Dot<T>::kPerUnit;
  static constexpr int64_t kUnits = kTokenBlock / kPer, kOwn = kUnits * kUnitBlock;
  static_assert(!kTileRegisters || (kUnits % W == 0 && kUnitBlock % W == 0), "whole blocks are turned");

 public:
  TokenSummer(const TokenSums<T>& sums, const TokenSumsBuffers<T>& buffers, Team team)
      : of_(sums), buf_(buffers), team_(team), own_(buffers.own + team.rank * kOwn), turned_(buffers.turned + team.rank * kOwn) {
    for (int f = 0; f < of_.factor_count; ++f) {
      const Factor<T>& factor = of_.factors[f];
      if constexpr (kPer == 1) {
        to_[f] = factor.d_w, pitch_[f] = factor.pitch;
      } else {
        to_[f] = buf_.sums[f], pitch_[f] = factor.columns;
      }
    }
  }

  void run() const {
    const int64_t rows = of_.rows();
    const Range tiles = share((rows + kTileRows - 1) / kTileRows, team_.rank, team_.size);
    const Range own = {tiles.begin * kTileRows, tiles.end * kTileRows < rows ? tiles.end * kTileRows : rows};
    for (int64_t k = 0; k == 0 || k < of_.tokens; k += kTokenBlock) {
      const int64_t depth = of_.tokens - k < kTokenBlock ? of_.tokens - k : kTokenBlock;
      pack(k, depth);
      team_.sync();
      add_block(own, k, depth);
      team_.sync();
    }
    write_bias(own);
  }

 private:
  // The factors' rows as panels with the tokens as the summed dimension.
  void pack(int64_t begin, int64_t depth) const {
    int64_t first = 0, all = 0;
    for (int f = 0; f < of_.factor_count; ++f) all += of_.factors[f].panels();
    const Range own = share(all, team_.rank, team_.size);
    for (int f = 0; f < of_.factor_count; first += of_.factors[f++].panels()) {
      const Factor<T>& factor = of_.factors[f];
      const int64_t from = own.begin > first ? own.begin - first : 0;
      const int64_t to = own.end - first < factor.panels() ? own.end - first : factor.panels();
      if (from >= to) continue;
      const T* rows[kTokenBlock];
      factor.at.find(factor.at.context, begin, depth, rows);
      for (int64_t p = from; p < to; ++p)
        pack_rows<T>([&](int64_t k) { return rows[k] + p * kPanel; }, depth, factor.columns - p * kPanel, panel(f, p), kPanel);
    }
  }

  FS_INLINE uint32_t* panel(int f, int64_t p) const { return buf_.panels[f] + p * units<T>(kTokenBlock) * kPanel; }

  // f(group, begin, end of its elements, row among all groups) for what of [begin, end) is in each group, in blocks.
  template <class F>
  FS_INLINE void for_blocks(Range own, F&& f) const {
    int64_t first = 0;
    for (int g = 0; g < of_.group_count; first += of_.groups[g++].count) {
      const Group& group = of_.groups[g];
      const int64_t end = own.end - first < group.count ? own.end - first : group.count;
      for (int64_t u = own.begin > first ? own.begin - first : 0; u < end; u += kUnitBlock)
        f(group, u, end - u < kUnitBlock ? end - u : kUnitBlock, first + u);
    }
  }

  void add_block(Range own, int64_t begin, int64_t depth) const {
    const T* rows[kTokenBlock];
    of_.dy.find(of_.dy.context, begin, depth, rows);
    for_blocks(own, [&](const Group& group, int64_t u, int64_t count, int64_t row) {
      pack_rows<T>([&](int64_t k) { return rows[k] + group.from + u; }, depth, count, own_, kUnitBlock);
      turn(count, units<T>(depth));
      add_bias(begin == 0, row, count, units<T>(depth));
      for (int f = 0; f < of_.factor_count; ++f)
        if (of_.factors[f].d_w && group.to[f] >= 0)
          add_tiles(begin == 0, begin + depth == of_.tokens, f, group.to[f] + u, count, units<T>(depth));
    });
  }

  void add_tiles(bool first, bool last, int f, int64_t row, int64_t count, int64_t depth) const {
    const Factor<T>& factor = of_.factors[f];
    const Blocks tiles(count, kTileRows, kTileRegisters);
    for (int64_t p = 0; p < factor.panels(); ++p) {
      for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t r = tiles.begin(t), rows = tiles.begin(t + 1) - r;
        const uint32_t* a[kTileRows];
        T* out[kTileRows];
        for (int m = 0; m < kTileRows; ++m) a[m] = kTileRegisters ? turned_ + (r + m) * kUnits : own_ + r + m;
        for (int64_t m = 0; m < rows; ++m) out[m] = factor.d_w + (row + r + m) * factor.pitch;
        tile<T>(a, kTileRegisters ? 1 : kUnitBlock, panel(f, p), kPanel, depth, rows, factor.columns - p * kPanel,
                {to_[f] + (row + r) * pitch_[f] + p * kPanel, pitch_[f], first, last, out, p * kPanel, nullptr, false});
      }
    }
  }

  // Tile registers take rows of units, where splats take them from anywhere.
  void turn(int64_t count, int64_t depth) const {
    if constexpr (kTileRegisters)
      for (int64_t r = 0; r < count; r += W)
        for (int64_t k = 0; k < depth; k += W)
          transpose(reinterpret_cast<const T*>(own_ + k * kUnitBlock + r), kUnitBlock * kPer, turned_ + r * kUnits + k, kUnits);
  }

  // In two levels: one chain of sums over a block of tokens would err by up to 12 ulp.
  void add_bias(bool first, int64_t row, int64_t count, int64_t depth) const {
    for (int64_t c = 0; c < count; c += W) {
      vf sum = {};
      for (int64_t k = 0; k < depth; k += kBiasUnits)
        sum += sum_units(own_ + k * kUnitBlock + c, depth - k < kBiasUnits ? depth - k : kBiasUnits);
      const int n = lanes(count - c);
      store(buf_.bias + row + c, first ? sum : load(buf_.bias + row + c, n) + sum, n);
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

  void write_bias(Range own) const {
    for_blocks(own, [&](const Group& group, int64_t u, int64_t count, int64_t row) {
      for (int f = 0; f < of_.factor_count; ++f) {
        if (!of_.factors[f].d_b || group.to[f] < 0) continue;
        for (int64_t i = 0; i < count; i += W)
          store(of_.factors[f].d_b + group.to[f] + u + i, load(buf_.bias + row + i, lanes(count - i)), lanes(count - i));
      }
    });
  }

  const TokenSums<T>& of_;
  const TokenSumsBuffers<T>& buf_;
  Team team_;
  uint32_t *own_, *turned_;
  float* to_[2];
  int64_t pitch_[2];
};

// Few tokens: W rows of w at a time, which then stay in the cache for all tokens.
template <class T>
class DotProduct {
 public:
  explicit DotProduct(const RowProduct<T>& product) : product_(product), depth_(product.segments[0].count) {
    product.a.find(product.a.context, 0, product.tokens, a_);
    product.out.find(product.out.context, 0, product.tokens, out_);
  }

  void run(Range blocks) const {
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      int64_t r = 0;
      for (; r + kDotRows <= product_.tokens; r += kDotRows) rows<kDotRows>(b * W, r);
      if constexpr (kDotRows > 2)
        for (; r + 2 <= product_.tokens; r += 2) rows<2>(b * W, r);
      for (; r < product_.tokens; ++r) rows<1>(b * W, r);
    }
  }

 private:
  template <int MR>
  void rows(int64_t column, int64_t r) const {
    const int n = lanes(product_.columns - column);
    const T* a[MR];
    for (int m = 0; m < MR; ++m) a[m] = a_[r + m];
    vf results[MR];
    dot_rows<T>(a, [&](int i) FS_LAMBDA { return product_.w + (column + i) * product_.pitch; }, n, depth_, results);
    const vf bias = product_.bias ? load(product_.bias + column, n) : vf{};
    for (int m = 0; m < MR; ++m) {
      T* to = out_[r + m] + column;
      const vf sum = results[m] + bias;
      store(to, product_.add ? sum + load(to, n) : sum, n);
    }
  }

  const RowProduct<T>& product_;
  int64_t depth_;
  const T* a_[kDotTokens];
  T* out_[kDotTokens];
};

template <class T, class E>
RowsAt<E> rows_of(const Tokens& tokens) {
  return {&tokens, [](const void* context, int64_t begin, int64_t count, E** rows) {
            if (!count) return;
            const Tokens& of = *static_cast<const Tokens*>(context);
            int64_t outer = begin / of.inner, inner = begin % of.inner;
            for (int64_t i = 0; i < count; ++i) {
              rows[i] = static_cast<T*>(of.data) + outer * of.outer_stride + inner * of.inner_stride;
              if (++inner == of.inner) inner = 0, ++outer;
            }
          }};
}

template <class T>
void run(const Product& of, bool transposed, int threads) {
  const Segment whole{0, 0, of.depth};
  const RowProduct<T> product{of.tokens, of.columns, rows_of<T, const T>(of.x), &whole, 1, false, static_cast<const T*>(of.w), of.pitch,
                              transposed, static_cast<const T*>(of.bias), of.add, rows_of<T, T>(of.out)};
  const double flops = 2.0 * of.tokens * of.depth * of.columns;
  threads = flops < kSmallProducts ? 1 : usable_threads(threads);
  if (transposed && of.tokens <= kDotTokens) {
    return parallel(threads, [&](int rank, int size) { DotProduct<T>(product).run(share((of.columns + W - 1) / W, rank, size)); });
  }
  Scratch scratch;
  RowProductBuffers<T>(scratch.measure, of.columns, units<T>(of.depth), threads);
  Carver carve = scratch.allocate();
  const RowProductBuffers<T> buffers(carve, of.columns, units<T>(of.depth), threads);
  Barrier barrier;
  parallel(threads, [&](int rank, int size) { multiply_rows<T>(product, buffers, {rank, size, &barrier}); });
}

template <class T>
void run(const WeightGradient& of, int threads) {
  const Group all{0, of.rows, {0, -1}};
  const TokenSums<T> sums{of.tokens, rows_of<T, const T>(of.dy), &all, 1,
                          {{rows_of<T, const T>(of.x), of.rows, of.columns, static_cast<T*>(of.d_w), of.pitch, static_cast<T*>(of.d_b)}, {}}, 1};
  threads = 2.0 * of.tokens * of.rows * of.columns < kSmallProducts ? 1 : usable_threads(threads);
  Scratch scratch;
  TokenSumsBuffers<T>(scratch.measure, sums, threads);
  Carver carve = scratch.allocate();
  const TokenSumsBuffers<T> buffers(carve, sums, threads);
  Barrier barrier;
  parallel(threads, [&](int rank, int size) { sum_over_tokens<T>(sums, buffers, {rank, size, &barrier}); });
}

}  // namespace

template <class T>
void multiply_rows(const RowProduct<T>& product, const RowProductBuffers<T>& buffers, Team team) {
  RowMultiplier<T>(product, buffers, team).run();
}

template <class T>
void sum_over_tokens(const TokenSums<T>& sums, const TokenSumsBuffers<T>& buffers, Team team) {
  TokenSummer<T>(sums, buffers, team).run();
}

#if !defined(FS_ONLY_BF16)
template void multiply_rows(const RowProduct<float>&, const RowProductBuffers<float>&, Team);
template void sum_over_tokens(const TokenSums<float>&, const TokenSumsBuffers<float>&, Team);
#endif
template void multiply_rows(const RowProduct<bf16>&, const RowProductBuffers<bf16>&, Team);
template void sum_over_tokens(const TokenSums<bf16>&, const TokenSumsBuffers<bf16>&, Team);

void product(const Product& of, int threads) {
  dispatch(of.dtype, [&](auto element) { run<typename decltype(element)::type>(of, true, threads); });
}

void input_gradient(const Product& of, int threads) {
  dispatch(of.dtype, [&](auto element) { run<typename decltype(element)::type>(of, false, threads); });
}

void weight_gradient(const WeightGradient& of, int threads) {
  dispatch(of.dtype, [&](auto element) { run<typename decltype(element)::type>(of, threads); });
}

}  // namespace FS_ISA
}  // namespace fastseq
