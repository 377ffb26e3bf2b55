// Fused LSTM/GRU forward over a whole sequence. State stays in fp32; outputs keep the input dtype.
//
// Time is cut into chunks of about chunk_rows tokens. In each, one product projects the chunk's inputs into a small scratch
// (never the whole sequence), then the steps follow: a register tile of the recurrent product holds all gates of W units of
// several rows, so that the cell's element math runs on the accumulators and no pre-activation goes through memory.
#include "dot.h"
#include "driver.h"
#include "rnn_step.h"

namespace fastseq {
namespace FS_ISA {
namespace {

constexpr int64_t kWeightBytes = 3 << 19;  // beyond, W_ih comes from the shared cache for each chunk, which tile registers wait for
constexpr int64_t kProjectedInPlace = kTileRegisters ? 12 : 64;  // tokens up to which W_ih is read as it lies
constexpr bool kReadsInPlace = W >= 16;  // with narrower vectors dot products take 2 to 13 % longer than packing and tiles

template <class Cell, class T>
FS_INLINE int64_t chunk_rows(const Shape& shape) {
  const int64_t bytes = Cell::kGates * shape.hidden * (units<T>(shape.input) + units<T>(shape.hidden)) * 4;
  return kTileRegisters && bytes > kWeightBytes ? 256 : 64;
}

template <class Cell>
constexpr int kTileRows = tile_rows(Cell::kGates > 1 ? Cell::kGates : 2);  // a dozen sums keep the multipliers busy

// The least that a row group of the team takes.
template <class Cell>
constexpr int kPlannedRows = kTileRegisters ? kRegisterRows : kTileRows<Cell>;

// Packed weights of one direction, [W-unit panel][unit of depth][gate][W]: those of W_ih, behind them those of W_hh.
template <class Cell, class T>
struct Panels {
  static constexpr int kG = Cell::kGates;
  int64_t hidden, input, count, depth_x, depth_h;  // depths in 32-bit units

  explicit Panels(const Shape& shape)
      : hidden(shape.hidden), input(shape.input), count((hidden + W - 1) / W), depth_x(units<T>(input)), depth_h(units<T>(hidden)) {}

  int64_t size_x() const { return depth_x * kG * W; }  // of a panel
  int64_t size_h() const { return depth_h * kG * W; }
  int lanes(int64_t p) const { return hidden - p * W < W ? static_cast<int>(hidden - p * W) : W; }

  void pack_input(const void* w, int64_t p, uint32_t* panel) const { pack(w, input, p, panel); }
  void pack_hidden(const void* w, int64_t p, uint32_t* panel) const { pack(w, hidden, p, panel); }

 private:
  void pack(const void* w, int64_t depth, int64_t p, uint32_t* panel) const {
    for (int g = 0; g < kG; ++g)
      pack_transposed(static_cast<const T*>(w) + (g * hidden + p * W) * depth, depth, lanes(p), depth, panel + g * W, kG * W);
  }
};

// What the threads of one direction share.
template <class Cell, class T>
struct Buffers {
  int64_t panels, depth_x, depth_h;
  uint32_t *w_ih, *w_hh;  // packed by this call; w_ih also holds one panel a thread
  float* bias;         // [panels][kColumns][W]
  float* projected;    // [slots][panels][G][W], each row group its own slots: they do not wait for each other
  uint32_t* operand[2];  // [B][depth_h] h in T, of the last step and of this one
  float *h, *c;        // [B][panels * W]
  const uint32_t** x_rows;  // [threads][slots] the inputs of a chunk
  uint32_t* x_copy;    // [threads][slots][depth_x], where x's rows end within a unit
  int64_t chunk, slots;  // tokens of a chunk; slots of those two, a thread

  Buffers(Carver& carve, const Shape& shape, const Sequence& seq, bool packs, int threads) {
    constexpr int kG = Cell::kGates;
    const int64_t blocks = (seq.rows + kPlannedRows<Cell> - 1) / kPlannedRows<Cell>, groups = blocks < threads ? blocks : threads;
    panels = (shape.hidden + W - 1) / W;
    depth_x = units<T>(shape.input), depth_h = units<T>(shape.hidden);
    chunk = chunk_rows<Cell, T>(shape), chunk = chunk < seq.tokens() ? chunk : seq.tokens(), slots = chunk + seq.rows;
    w_ih = carve.take<uint32_t>(packs ? (panels > threads ? panels : threads) * depth_x * kG * W : 0);
    w_hh = carve.take<uint32_t>(packs ? panels * depth_h * kG * W : 0);
    bias = carve.take<float>(panels * Cell::kColumns * W);
    projected = carve.take<float>((groups * (chunk + 1) + seq.rows) * panels * kG * W);
    for (auto& buffer : operand) buffer = carve.take<uint32_t>(seq.rows * depth_h);
    h = carve.take<float>(seq.rows * panels * W);
    c = Cell::kCellState ? carve.take<float>(seq.rows * panels * W) : nullptr;
    x_rows = carve.take<const uint32_t*>(threads * slots);
    x_copy = shape.input % Dot<T>::kPerUnit ? carve.take<uint32_t>(threads * slots * depth_x) : nullptr;
  }
};

template <class Cell, class T>
class Forward {
  static constexpr int kG = Cell::kGates, kMR = kTileRows<Cell>;

 public:
  Forward(const Shape& shape, const Sequence& seq, const ForwardPass& pass, const Buffers<Cell, T>& buffers, Team team,
          Partition split, Barrier* step_barriers)
      : shape_(shape), seq_(seq), pass_(pass), buf_(buffers), at_(shape), team_(team), H_(shape.hidden),
        width_(buffers.panels * W) {
    const uint32_t* packed = static_cast<const uint32_t*>(pass.dir.packed);
    w_ih_ = packed ? packed : buf_.w_ih, w_hh_ = packed ? packed + at_.count * at_.size_x() : buf_.w_hh;
    idle_ = team.rank >= split.size();
    own_ = {idle_ ? 0 : team.rank / split.unit_groups, split.row_groups};
    const int64_t group_slots = buf_.chunk + (seq.rows + own_.groups - 1) / own_.groups;
    projected_ = buf_.projected + own_.group * group_slots * buf_.panels * kG * W;
    x_rows_ = buf_.x_rows + team.rank * buf_.slots;
    x_copy_ = buf_.x_copy ? buf_.x_copy + team.rank * buf_.slots * buf_.depth_x : nullptr;
    panels_ = share(buf_.panels, team.rank % split.unit_groups, split.unit_groups);
    step_team_ = {team.rank % split.unit_groups, split.unit_groups, step_barriers + own_.group};
    packs_early_ = !packed && own_.groups > 1, packs_late_ = !packed && own_.groups == 1;
    const bool one_chunk = packs_late_ && seq.steps && chunk_end(0) == seq.steps;
    projects_in_place_ = kReadsInPlace && one_chunk && seq.tokens() <= kProjectedInPlace && shape.input >= kDotDepth;
    steps_in_place_ = kReadsInPlace && packs_late_ && seq.rows == 1 && seq.steps <= kDotSteps && H_ >= kDotDepth;
    passing_ = one_chunk && !projects_in_place_;
  }

  void run() {
    prepare();
    team_.sync();
    if (!idle_) {
      const int64_t T_ = seq_.steps;
      for (int64_t s = 0; s < T_;) {
        const int64_t end = chunk_end(s);
        project(s, end);
        int64_t slot = 0;
        for (; s < end; ++s) {
          slot = step(s, slot);
          step_team_.sync();
        }
      }
      finish();
    }
  }

 private:
  int64_t time(int64_t s) const { return pass_.dir.reverse ? seq_.steps - 1 - s : s; }

  int64_t chunk_end(int64_t s) const {
    int64_t rows = own_.count(seq_.active(time(s)));
    for (++s; s < seq_.steps; ++s) {
      rows += own_.count(seq_.active(time(s)));
      if (rows > buf_.chunk) break;
    }
    return s;
  }

  // Packs the weights and spreads the initial state, each thread its share. A thread that alone reads a panel packs it where it
  // first multiplies by it, while it is in the cache; or does not, where its rows are read as they stand: see project and step.
  void prepare() {
    const Range own = share(buf_.panels, team_.rank, team_.size);
    for (int64_t p = own.begin; p < own.end; ++p) {
      if (packs_early_) pack_input(p), pack_hidden(p);  // several groups: nothing is read in place
      prepare_bias(p, lanes(p));
    }
    const Range rows = share(seq_.rows, team_.rank, team_.size);
    for (int64_t r = rows.begin; r < rows.end; ++r) prepare_row(r);
  }

  void pack_input(int64_t p) const { at_.pack_input(pass_.dir.w_ih, p, buf_.w_ih + input_at(p)); }
  void pack_hidden(int64_t p) const { at_.pack_hidden(pass_.dir.w_hh, p, buf_.w_hh + hidden_at(p)); }

  // In a sequence of one chunk, one panel at a time: it never leaves the core's cache.
  FS_INLINE int64_t input_at(int64_t p) const { return (passing_ ? team_.rank : p) * at_.size_x(); }
  FS_INLINE int64_t hidden_at(int64_t p) const { return p * at_.size_h(); }

  void prepare_bias(int64_t p, int n) {
    vf sums[Cell::kColumns];
    set_zero(sums);
    for (int g = 0; g < kG && pass_.dir.b_ih; ++g) {
      sums[Cell::kInput[g]] += load(static_cast<const T*>(pass_.dir.b_ih) + g * H_ + p * W, n);
      sums[Cell::kHidden[g]] += load(static_cast<const T*>(pass_.dir.b_hh) + g * H_ + p * W, n);
    }
    for (int j = 0; j < Cell::kColumns; ++j) store(buf_.bias + (p * Cell::kColumns + j) * W, sums[j], W);
  }

  void prepare_row(int64_t r) {
    uint32_t* operands[2] = {buf_.operand[0] + r * buf_.depth_h, buf_.operand[1] + r * buf_.depth_h};
    for (uint32_t* operand : operands) operand[buf_.depth_h - 1] = 0;  // the half unit past an odd H
    const int64_t from = seq_.order[r] * H_;
    const bool anew = !pass_.dir.reverse && seq_.starts_anew(0, r, false);
    for (int64_t p = 0; p < buf_.panels; ++p) {
      const int n = lanes(p);
      const vf h = anew ? vf{} : load_state<T>(shape_, pass_.dir.h0, from + p * W, n);
      store(buf_.h + r * width_ + p * W, h, W);
      for (uint32_t* operand : operands) store(reinterpret_cast<T*>(operand) + p * W, recurrent_masked<T>(pass_.noise, h, from + p * W, n), n);
      if constexpr (Cell::kCellState)
        store(buf_.c + r * width_ + p * W, anew ? vf{} : load_state<T>(shape_, pass_.dir.c0, from + p * W, n), W);
    }
  }

  int lanes(int64_t p) const { return at_.lanes(p); }

  // W_ih x + bias, for the input's gates, all steps of the chunk, one slot a row and step: a panel of weights serves them all
  // while it is in the cache.
  void project(int64_t s, int64_t end) {
    const bool packs = packs_late_ && s == 0;
    int64_t slots = 0;
    for (; s < end; ++s) {
      const int64_t t = time(s);
      const int64_t rows = own_.count(seq_.active(t));
      for (int64_t i = 0; i < rows; ++i, ++slots) x_rows_[slots] = operand_of_x(t, own_.row(i), slots);
    }
    const Blocks tiles(slots, kMR, kTileRegisters);
    for (int64_t p = panels_.begin; p < panels_.end; ++p) {
      if (projects_in_place_) {
        project_dots(p, slots);
        continue;
      }
      if (packs) pack_input(p);
      for (int64_t i = 0; i < tiles.count; ++i) project_tile(p, tiles.begin(i), tiles.begin(i + 1));
    }
  }

  const uint32_t* operand_of_x(int64_t t, int64_t position, int64_t slot) const {
    const T* x = pass_.x.template at<T>(seq_, t, position);
    if (!x_copy_) return reinterpret_cast<const uint32_t*>(x);
    uint32_t* copy = x_copy_ + slot * buf_.depth_x;
    copy[buf_.depth_x - 1] = 0;
    std::memcpy(copy, x, sizeof(T) * shape_.input);
    return copy;
  }

  FS_INLINE void project_tile(int64_t p, int64_t begin, int64_t end) const {
    with_tile<kMR>(end - begin, [&](auto count) {
      vf acc[decltype(count)::value][kG];
      FirstSums<kG> bias;
      for (int g = 0; g < kG; ++g) bias.from[g] = buf_.bias + (p * Cell::kColumns + Cell::kInput[g]) * W, bias.pitch[g] = 0;
      multiply<T>(count, x_rows_ + begin, 1, w_ih_ + input_at(p), kG * W, buf_.depth_x, bias, acc);
      for (int m = 0; m < count.count(); ++m)
        for (int g = 0; g < kG; ++g) store(slot_of(begin + m, p) + g * W, acc[m][g], W);
    });
  }

  // A sequence of one chunk asks for W_ih once, with few rows: they meet its rows where these stand.
  void project_dots(int64_t p, int64_t slots) const {
    for (int g = 0; g < kG; ++g) {
      int64_t slot = 0;
      for (; slot + kDotRows <= slots; slot += kDotRows) project_dots<kDotRows>(p, g, slot);
      for (; slot < slots; ++slot) project_dots<1>(p, g, slot);
    }
  }

  template <int MR>
  void project_dots(int64_t p, int g, int64_t slot) const {
    const T* x[MR];
    for (int m = 0; m < MR; ++m) x[m] = reinterpret_cast<const T*>(x_rows_[slot + m]);
    vf sums[MR];
    dot_rows<T>(x, row_of(pass_.dir.w_ih, shape_.input, g, p), lanes(p), shape_.input, sums);
    const vf bias = load_vector<vf>(buf_.bias + (p * Cell::kColumns + Cell::kInput[g]) * W);
    for (int m = 0; m < MR; ++m) store(slot_of(slot + m, p) + g * W, sums[m] + bias, W);
  }

  // The rows of a gate's units from panel p on.
  FS_INLINE auto row_of(const void* w, int64_t depth, int g, int64_t p) const {
    const T* first = static_cast<const T*>(w) + (g * H_ + p * W) * depth;
    return [=](int i) { return first + i * depth; };
  }

  FS_INLINE float* slot_of(int64_t slot, int64_t p) const { return projected_ + (slot * buf_.panels + p) * kG * W; }

  // One step: every own panel of units for all own active rows, whose projections start at `first`. Panels alternate
  // in direction: what the cache still holds of the last step is what this one reads first. Returns the slot past its last.
  int64_t step(int64_t s, int64_t first) const {
    const int64_t t = time(s);
    for (int64_t i = panels_.begin; i < panels_.end; ++i) {
      const int64_t p = s & 1 ? panels_.begin + panels_.end - 1 - i : i;
      if (packs_late_ && !steps_in_place_ && s == 0) pack_hidden(p);
      own_.for_blocks(seq_.active(t), kMR, [&](int64_t begin, int64_t end) {
        with_tile<kMR>(end - begin, [&](auto count) { step_tile(count, s, t, p, begin, first + begin); });
      });
    }
    return first + own_.count(seq_.active(t));
  }

  template <class Count>
  FS_INLINE void step_tile(Count count, int64_t s, int64_t t, int64_t p, int64_t begin, int64_t slot) const {
    const uint32_t* h[Count::value];
    vf acc[Count::value][kG];
    for (int m = 0; m < count.count(); ++m) h[m] = buf_.operand[s & 1] + own_.row(begin + m) * buf_.depth_h;
    FirstSums<kG> first;
    for (int g = 0; g < kG; ++g) {
      const bool joined = input_gate<Cell>(Cell::kHidden[g]) >= 0;
      first.from[g] = joined ? slot_of(slot, p) + g * W : buf_.bias + (p * Cell::kColumns + Cell::kHidden[g]) * W;
      first.pitch[g] = joined ? buf_.panels * kG * W : 0;
    }
    if (steps_in_place_) {
      add_hidden_dots(h[0], p, first, acc[0]);
    } else {
      multiply<T>(count, h, 1, w_hh_ + hidden_at(p), kG * W, buf_.depth_h, first, acc);
    }
    for (int m = 0; m < count.count(); ++m)
      finish_row(s, t, p, own_.row(begin + m), acc[m], slot_of(slot + m, p));
  }

  // One row takes W_hh from memory as fast as a packed copy, which it saves.
  void add_hidden_dots(const uint32_t* h, int64_t p, const FirstSums<kG>& first, vf (&acc)[kG]) const {
    const T* source[1] = {reinterpret_cast<const T*>(h)};
    for (int g = 0; g < kG; ++g) {
      vf sums[1];
      dot_rows<T>(source, row_of(pass_.dir.w_hh, H_, g, p), lanes(p), H_, sums);
      acc[g] = load_vector<vf>(first.from[g]) + sums[0];
    }
  }

  FS_INLINE void finish_row(int64_t s, int64_t t, int64_t p, int64_t r, const vf (&acc)[kG], const float* projected) const {
    const int n = lanes(p);
    const int64_t u = p * W;
    vf pre[Cell::kColumns], saved[Cell::kColumns];
    for (int j = 0; j < Cell::kColumns; ++j) {
      const int g = hidden_gate<Cell>(j);
      pre[j] = g >= 0 ? acc[g] : load_vector<vf>(projected + input_gate<Cell>(j) * W);
    }
    float* h_state = buf_.h + r * width_ + u;
    float* c_state = Cell::kCellState ? buf_.c + r * width_ + u : nullptr;
    vf h = load_vector<vf>(h_state), c = {};
    if constexpr (Cell::kCellState) c = load_vector<vf>(c_state);
    if (pass_.noise.any) {
      masked_forward<Cell>(pre, h, c, saved, load_masks(pass_.noise, seq_, t, r, u, n));
    } else {
      Cell::forward(pre, h, c, saved);
    }
    store(h_state, h, W);
    if constexpr (Cell::kCellState) store(c_state, c, W);
    T* operand = reinterpret_cast<T*>(buf_.operand[(s + 1) & 1] + r * buf_.depth_h) + u;
    store(operand, recurrent_masked<T>(pass_.noise, h, seq_.order[r] * H_ + u, n), n);
    store(pass_.out.template at<T>(seq_, t, r) + u, h, n);
    if (pass_.gates) {
      const int64_t token = seq_.offsets[t] + r;
      for (int j = 0; j < Cell::kColumns; ++j)
        store(static_cast<T*>(pass_.gates) + (token * Cell::kColumns + j) * H_ + u, saved[j], n);
      if constexpr (Cell::kCellState) store(pass_.cells + token * H_ + u, c, n);
    }
    if constexpr (Cell::kCellState)
      if (pass_.c_out.data) store(pass_.c_out.template at<T>(seq_, t, r) + u, c, n);
    if (seq_.starts_anew(pass_.dir.reverse ? t - 1 : t + 1, r, pass_.dir.reverse)) {  // now: later other threads read it
      store(h_state, vf{}, W);
      if constexpr (Cell::kCellState) store(c_state, vf{}, W);
      store(operand, vf{}, n);
    }
  }

  void finish() const {
    for (int64_t i = 0; i < own_.count(seq_.rows); ++i) {
      const int64_t r = own_.row(i);
      for (int64_t p = panels_.begin; p < panels_.end; ++p) {
        const int64_t to = seq_.order[r] * H_ + p * W;
        store_state<T>(shape_, pass_.h_n, to, load_vector<vf>(buf_.h + r * width_ + p * W), lanes(p));
        if constexpr (Cell::kCellState)
          store_state<T>(shape_, pass_.c_n, to, load_vector<vf>(buf_.c + r * width_ + p * W), lanes(p));
      }
    }
  }

  const Shape& shape_;
  const Sequence& seq_;
  const ForwardPass& pass_;
  const Buffers<Cell, T>& buf_;
  const Panels<Cell, T> at_;
  Team team_, step_team_;
  int64_t H_;
  OwnRows own_;
  int64_t width_;
  float* projected_;
  const uint32_t** x_rows_;
  uint32_t* x_copy_;
  const uint32_t *w_ih_, *w_hh_;  // packed: this call's or the caller's
  Range panels_;
  bool idle_;
  bool packs_early_, packs_late_, projects_in_place_, steps_in_place_, passing_;  // passing: panels of W_ih pass through one place a thread
};

template <class Cell, class T>
void run(const Shape& shape, const Sequence& seq, const ForwardPass* passes, int directions, int threads) {
  using B = Buffers<Cell, T>;
  threads = usable_threads(threads);
  Scratch scratch;
  const bool packs = !passes[0].dir.packed;
  for (int d = 0; d < directions; ++d) B(scratch.measure, shape, seq, packs, threads);
  Carver carve = scratch.allocate();
  const B first(carve, shape, seq, packs, threads), second = directions == 2 ? B(carve, shape, seq, packs, threads) : first;
  const B* buffers[2] = {&first, &second};

  const Blocks blocks(seq.rows, kPlannedRows<Cell>, kTileRegisters);
  const int64_t depth = buffers[0]->depth_h;
  const int64_t rows = blocks.count ? (seq.rows + blocks.count - 1) / blocks.count : 0;
  auto plan = [&](int size) {
    return Partition::choose(size, blocks.count, buffers[0]->panels, tile_cycles(rows, Cell::kGates, depth) + 100 * rows,
                             depth * Cell::kGates * W * 4);
  };
  run_directions(directions, plan, threads, [&](int d, Team team, Partition split, Barrier* steps) {
    Forward<Cell, T>(shape, seq, passes[d], *buffers[d], team, split, steps).run();
  });
}

}  // namespace

void rnn_forward(const Shape& shape, const Sequence& seq, const ForwardPass* passes, int directions, int threads) {
  if (is_step(shape, seq, passes[0])) return rnn_step(shape, seq, passes, directions, threads);
  dispatch(shape, [&](auto cell, auto element) {
    run<typename decltype(cell)::type, typename decltype(element)::type>(shape, seq, passes, directions, threads);
  });
}

int64_t rnn_packed_bytes(const Shape& shape) {
  int64_t found = 0;
  dispatch(shape, [&](auto cell, auto element) {
    const Panels<typename decltype(cell)::type, typename decltype(element)::type> at(shape);
    found = at.count * (at.size_x() + at.size_h()) * static_cast<int64_t>(sizeof(uint32_t));
  });
  return found;
}

void rnn_pack(const Shape& shape, const Direction& dir, void* to, int threads) {
  dispatch(shape, [&](auto cell, auto element) {
    const Panels<typename decltype(cell)::type, typename decltype(element)::type> at(shape);
    uint32_t *w_ih = static_cast<uint32_t*>(to), *w_hh = w_ih + at.count * at.size_x();
    parallel(usable_threads(threads), [&](int rank, int size) {
      const Range own = share(at.count, rank, size);
      for (int64_t p = own.begin; p < own.end; ++p) {
        at.pack_input(dir.w_ih, p, w_ih + p * at.size_x());
        at.pack_hidden(dir.w_hh, p, w_hh + p * at.size_h());
      }
    });
  });
}

}  // namespace FS_ISA
}  // namespace fastseq
