// Attention of whole sequences of queries, forward and backward: nothing of [queries, S, A] is ever stored.
//
// A thread owns memory rows with all their queries, so that every sum has one owner. Scores of the dot form and the gradients of
// weights are dot products along contiguous dimensions; contexts and the gradients of keys, memory and queries of the dot form are
// sums of rows in a register tile. Both read the caller's rows by address: positions that are not attended to cost nothing.
#include "attention_pass.h"

#include "additive.h"
#include "attention.h"
#include "driver.h"

namespace fastseq {
namespace FS_ISA {
namespace {

constexpr int kNV = 4, kMR = kAccumulators / kNV;

// Coefficients of sums of rows: that of row i in sum m.
struct Coefficients {
  const float* at;
  int64_t sum, row;
};

// to[m][column ..] = sum over i of the coefficient times rows[i][column ..], for NV vectors of which the last has n lanes.
template <class T, int MR, int NV>
FS_INLINE void sum_tile(const Coefficients& c, const T* const* rows, int64_t count, int64_t column, int n, T* const* to) {
  vf acc[MR][NV];
  set_zero(Rows<MR>{}, acc);
  for (int64_t i = 0; i < count; ++i) {
    vf row[NV];
    for (int v = 0; v < NV; ++v) row[v] = load(rows[i] + column + v * W, v + 1 < NV ? W : n);
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) acc[m][v] += c.at[m * c.sum + i * c.row] * row[v];
  }
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) store(to[m] + column + v * W, acc[m][v], v + 1 < NV ? W : n);
}

template <class T>
void sum_rows(Coefficients c, int64_t sums, const T* const* rows, int64_t count, int64_t width, T* const* to) {
  const Blocks blocks(sums, kMR);
  int64_t column = 0;
  const auto columns = [&](auto vectors, int n) FS_LAMBDA {
    constexpr int NV = decltype(vectors)::value;
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t m = blocks.begin(b);
      with_rows<kMR>(blocks.begin(b + 1) - m, [&](auto size) {
        sum_tile<T, decltype(size)::value, NV>({c.at + m * c.sum, c.sum, c.row}, rows, count, column, n, to + m);
      });
    }
    column += NV * W;
  };
  while (column + kNV * W <= width) columns(Rows<kNV>{}, W);
  while (column < width) columns(Rows<1>{}, lanes_left(column, width));
}

// results[m][i] = a[m] . rows[i], [MR][pitch], padded to W.
template <class T, int MR>
FS_INLINE void dots_of(const T* const* a, const T* const* rows, int64_t count, int64_t depth, float* results, int64_t pitch) {
  const T* source[MR];
  for (int m = 0; m < MR; ++m) source[m] = a[m];
  for (int64_t i = 0; i < count; i += W) {
    vf block[MR];
    dot_rows<T>(source, [&](int k) FS_LAMBDA { return rows[i + k]; }, lanes_left(i, count), depth, block);
    for (int m = 0; m < MR; ++m) store(results + m * pitch + i, block[m], W);
  }
}

template <class T>
void dot_products(const T* const* a, int64_t queries, const T* const* rows, int64_t count, int64_t depth, float* results, int64_t pitch) {
  int64_t q = 0;
  for (; q + kDotRows <= queries; q += kDotRows) dots_of<T, kDotRows>(a + q, rows, count, depth, results + q * pitch, pitch);
  for (; q < queries; ++q) dots_of<T, 1>(a + q, rows, count, depth, results + q * pitch, pitch);
}

// What a thread needs for the memory row in hand.
template <class T>
struct Workspace {
  int64_t pitch, score_pitch;
  float *weights, *d_scores;  // [queries][score_pitch], of attended positions
  float *query, *key;         // [queries][pitch], [S][pitch]: e^2q, e^2k; additive form only
  float* d_query;             // [queries][pitch], backward of the additive form
  float *v, *d_v;             // [pitch]
  float* d_keys;              // [S][A], backward of the additive form where exponentials overflow
  const T **key_rows, **memory_rows, **query_rows, **context_rows;
  T** to;

  Workspace(Carver& carve, const AttentionPass& of, bool backward)
      : pitch(odd_pitch(of.units)), score_pitch(odd_pitch(of.source)) {
    const int64_t additive = of.v ? 1 : 0, also = backward ? additive : 0;
    weights = carve.take<float>(of.queries * score_pitch);
    d_scores = carve.take<float>(backward ? of.queries * score_pitch : 0);
    query = carve.take<float>(additive * of.queries * pitch);
    key = carve.take<float>(additive * of.source * pitch);
    v = carve.take<float>(additive * pitch);
    d_query = carve.take<float>(also * of.queries * pitch);
    d_v = carve.take<float>(also * pitch);
    d_keys = carve.take<float>(also * of.source * of.units);
    key_rows = carve.take<const T*>(of.source);
    memory_rows = carve.take<const T*>(of.source);
    query_rows = carve.take<const T*>(of.queries);
    context_rows = carve.take<const T*>(backward ? of.queries : 0);
    to = carve.take<T*>(of.source > of.queries ? of.source : of.queries);
  }
};

// What forward and backward share: the attended rows of a memory row, and their exponentials.
template <class T>
class Attention {
 public:
  Attention(const AttentionPass& pass, const Positions& positions, const Workspace<T>& work)
      : of_(pass), positions_(positions), work_(work), Q_(pass.queries), S_(pass.source), A_(pass.units), D_(pass.features) {
    if (!of_.v) return;
    const T* v = static_cast<const T*>(of_.v);
    for (int64_t u = 0; u < work_.pitch; u += W) store(work_.v + u, u < A_ ? load(v + u, lanes_left(u, A_)) : vf{}, W);
  }

 protected:
  // Finds the rows of memory row b; after this `fits_` says whether the exponentials do.
  void begin(int64_t b) {
    positions_.fill(of_.mask, b);
    at_ = positions_.at + b * S_, count_ = positions_.count[b];
    const T *keys = static_cast<const T*>(of_.keys) + b * S_ * A_, *memory = static_cast<const T*>(of_.memory) + b * S_ * D_;
    row_ = {keys, memory, A_, D_, at_, count_};
    for (int64_t i = 0; i < count_; ++i) work_.key_rows[i] = keys + at_[i] * A_, work_.memory_rows[i] = memory + at_[i] * D_;
    point(work_.query_rows, static_cast<const T*>(of_.q) + b * Q_ * A_, A_);
    if (!of_.v) return;
    fits_ = true;
    for (int64_t i = 0; i < count_; ++i) fits_ &= exp_row(work_.key_rows[i], A_, work_.key + i * work_.pitch);
    for (int64_t q = 0; q < Q_; ++q) fits_ &= exp_row(work_.query_rows[q], A_, work_.query + q * work_.pitch);
    if (fits_) return;
    for (int64_t q = 0; q < Q_; ++q)  // as attention.h takes them
      for (int64_t u = 0; u < A_; u += W)
        store(work_.query + q * work_.pitch + u, load(work_.query_rows[q] + u, lanes_left(u, A_)), W);
  }

  template <class E>
  void point(E** rows, E* first, int64_t width) const {
    for (int64_t q = 0; q < Q_; ++q) rows[q] = first + q * width;
  }

  const AttentionPass& of_;
  const Positions& positions_;
  const Workspace<T>& work_;
  int64_t Q_, S_, A_, D_;
  const int32_t* at_ = nullptr;
  int64_t count_ = 0;
  MemoryRow<T> row_{};
  bool fits_ = true;
};

template <class T>
class AttentionForwards : Attention<T> {
 public:
  AttentionForwards(const AttentionForward& pass, const Positions& positions, const Workspace<T>& work)
      : Attention<T>(pass, positions, work), pass_(pass) {}

  void run(int64_t b) {
    this->begin(b);
    scores();
    for (int64_t q = 0; q < Q_; ++q) softmax(work_.weights + q * work_.score_pitch, count_);
    this->point(work_.to, static_cast<T*>(pass_.context) + b * Q_ * D_, D_);
    sum_rows<T>({work_.weights, work_.score_pitch, 1}, Q_, work_.memory_rows, count_, D_, work_.to);
    if (pass_.weights) store_weights(static_cast<T*>(pass_.weights) + b * Q_ * S_);
  }

 private:
  using Attention<T>::work_, Attention<T>::Q_, Attention<T>::S_, Attention<T>::A_, Attention<T>::D_, Attention<T>::count_;

  void scores() const {
    if (!pass_.v) return dot_products<T>(work_.query_rows, Q_, work_.key_rows, count_, A_, work_.weights, work_.score_pitch);
    for (int64_t q = 0; q < Q_; ++q) {
      const float* query = work_.query + q * work_.pitch;
      float* to = work_.weights + q * work_.score_pitch;
      this->fits_ ? additive_scores(work_.key, work_.pitch, count_, query, work_.v, round_up(A_, W), to)
                  : score_row<AdditiveScore<SimdMath>>(this->row_, query, work_.v, to);
    }
  }

  void store_weights(T* to) const {
    for (int64_t q = 0; q < Q_; ++q, to += S_) {
      const float* weights = work_.weights + q * work_.score_pitch;
      if (count_ == S_) {
        for (int64_t s = 0; s < S_; s += W) store(to + s, load_vector<vf>(weights + s), lanes_left(s, S_));
      } else {
        std::memset(to, 0, sizeof(T) * S_);
        for (int64_t i = 0; i < count_; ++i) store(to + this->at_[i], splat(weights[i]), 1);
      }
    }
  }

  const AttentionForward& pass_;
};

template <class T>
class AttentionBackwards : Attention<T> {
 public:
  AttentionBackwards(const AttentionBackward& pass, const Positions& positions, const Workspace<T>& work)
      : Attention<T>(pass, positions, work), pass_(pass) {
    if (of_.v) std::memset(work_.d_v, 0, sizeof(float) * work_.pitch);
  }

  void run(int64_t b) {
    this->begin(b);
    weights_and_scores(b);
    T *d_keys = static_cast<T*>(pass_.d_keys) + b * S_ * A_, *d_memory = static_cast<T*>(pass_.d_memory) + b * S_ * D_;
    if (count_ < S_) std::memset(d_keys, 0, sizeof(T) * S_ * A_);
    if (count_ < S_ || !pass_.d_context) std::memset(d_memory, 0, sizeof(T) * S_ * D_);
    if (pass_.d_context) {
      point_attended(d_memory, D_);
      sum_rows<T>({work_.weights, 1, work_.score_pitch}, count_, work_.context_rows, Q_, D_, work_.to);
    }
    T* d_q = static_cast<T*>(pass_.d_q) + b * Q_ * A_;
    !of_.v ? to_dot(d_q, d_keys) : fits_ ? to_additive(d_keys) : to_large(d_keys);
    if (of_.v) store_d_query(d_q);
  }

 private:
  using Attention<T>::of_, Attention<T>::work_, Attention<T>::Q_, Attention<T>::S_, Attention<T>::A_, Attention<T>::D_;
  using Attention<T>::at_, Attention<T>::count_, Attention<T>::fits_;

  void point_attended(T* first, int64_t width) const {
    for (int64_t i = 0; i < count_; ++i) work_.to[i] = first + at_[i] * width;
  }

  // The weights of attended positions, and the gradients of their scores.
  void weights_and_scores(int64_t b) {
    if (pass_.d_context) {
      this->point(work_.context_rows, static_cast<const T*>(pass_.d_context) + b * Q_ * D_, D_);
      dot_products<T>(work_.context_rows, Q_, work_.memory_rows, count_, D_, work_.d_scores, work_.score_pitch);
    }
    const int64_t padded = round_up(count_, W);
    for (int64_t q = 0; q < Q_; ++q) {
      float *weights = work_.weights + q * work_.score_pitch, *d = work_.d_scores + q * work_.score_pitch;
      if (!pass_.d_context) std::memset(d, 0, sizeof(float) * padded);
      gather(pass_.weights, (b * Q_ + q) * S_, weights, false);
      if (pass_.d_weights) gather(pass_.d_weights, (b * Q_ + q) * S_, d, true);
      for (int64_t i = count_; i < padded; ++i) weights[i] = d[i] = 0;
      vf sum = {};
      for (int64_t i = 0; i < padded; i += W) sum += load_vector<vf>(weights + i) * load_vector<vf>(d + i);
      const float inner = sum_lanes(sum);
      for (int64_t i = 0; i < padded; i += W) store(d + i, load_vector<vf>(weights + i) * (load_vector<vf>(d + i) - inner), W);
    }
  }

  void gather(const void* from, int64_t first, float* to, bool add) const {
    const T* row = static_cast<const T*>(from) + first;
    for (int64_t i = 0; i < count_; i += count_ == S_ ? W : 1) {
      const int n = count_ == S_ ? lanes_left(i, S_) : 1;
      const vf x = load(row + at_[i], n);
      store(to + i, add ? load(to + i, n) + x : x, n);
    }
  }

  void to_dot(T* d_q, T* d_keys) const {
    this->point(work_.to, d_q, A_);
    sum_rows<T>({work_.d_scores, work_.score_pitch, 1}, Q_, work_.key_rows, count_, A_, work_.to);
    point_attended(d_keys, A_);
    sum_rows<T>({work_.d_scores, 1, work_.score_pitch}, count_, work_.query_rows, Q_, A_, work_.to);
  }

  void to_additive(T* d_keys) const {
    std::memset(work_.d_query, 0, sizeof(float) * Q_ * work_.pitch);
    for (int64_t u = 0; u < A_; u += W) {
      const vf v = load_vector<vf>(work_.v + u);
      vf d_v = {};
      for (int64_t i = 0; i < count_; i += kScoreRows) {
        const int rows = count_ - i < kScoreRows ? static_cast<int>(count_ - i) : kScoreRows;
        vf key[kScoreRows], d_key[kScoreRows];
        set_zero(d_key);
        for (int m = 0; m < kScoreRows; ++m) key[m] = load_vector<vf>(work_.key + (i + (m < rows ? m : 0)) * work_.pitch + u);
        additive_backward(key, work_.query + u, work_.d_query + u, work_.pitch, Q_, work_.d_scores + i, work_.score_pitch, d_key, d_v);
        for (int m = 0; m < rows; ++m) store(d_keys + at_[i + m] * A_ + u, 4.f * v * d_key[m], lanes_left(u, A_));
      }
      store(work_.d_v + u, load_vector<vf>(work_.d_v + u) + 2.f * d_v, W);
      for (int64_t q = 0; q < Q_; ++q) {
        float* d_query = work_.d_query + q * work_.pitch + u;
        store(d_query, 4.f * v * load_vector<vf>(d_query), W);
      }
    }
  }

  void to_large(T* d_keys) const {
    std::memset(work_.d_keys, 0, sizeof(float) * S_ * A_);
    for (int64_t q = 0; q < Q_; ++q)
      score_backward(this->row_, work_.query + q * work_.pitch, work_.v, work_.d_scores + q * work_.score_pitch,
                                               work_.d_query + q * work_.pitch, {work_.d_keys, nullptr, work_.d_v});
    for (int64_t i = 0; i < count_; ++i) copy(work_.d_keys + at_[i] * A_, d_keys + at_[i] * A_);
  }

  void store_d_query(T* d_q) const {
    for (int64_t q = 0; q < Q_; ++q) copy(work_.d_query + q * work_.pitch, d_q + q * A_);
  }

  void copy(const float* from, T* to) const {
    for (int64_t u = 0; u < A_; u += W) store(to + u, load(from + u, lanes_left(u, A_)), lanes_left(u, A_));
  }

  const AttentionBackward& pass_;
};

constexpr double kSmallWork = 2e5;  // units and features of pairs of positions below which a second thread does not pay

// Runs work(memory rows, workspace, positions) on every thread of a team, then finish(each thread's d_v, threads).
template <class T, class Work, class Finish>
void run_rows(const AttentionPass& pass, bool backward, int threads, Work&& work, Finish&& finish) {
  const double pairs = 1.0 * static_cast<double>(pass.batch * pass.queries) * static_cast<double>(pass.source * (pass.units + pass.features));
  threads = pairs < kSmallWork ? 1 : usable_threads(threads);
  if (threads > pass.batch) threads = pass.batch > 0 ? static_cast<int>(pass.batch) : 1;
  Carver one;
  Workspace<T>(one, pass, backward);
  Scratch scratch;
  Positions(scratch.measure, pass.batch, pass.source);
  scratch.measure.take<char>(threads * one.used());
  Carver carve = scratch.allocate();
  const Positions positions(carve, pass.batch, pass.source);
  char* block = carve.take<char>(threads * one.used());
  const float* d_v[kMaxThreads];
  int came = 1;
  parallel(threads, [&](int rank, int size) {
    Carver own(block + rank * one.used());
    const Workspace<T> space(own, pass, backward);
    if (rank == 0) came = size;
    d_v[rank] = space.d_v;
    work(share(pass.batch, rank, size), space, positions);
  });
  finish(d_v, came);
}

template <class T>
void run(const AttentionForward& pass, int threads) {
  run_rows<T>(
      pass, false, threads,
      [&](Range rows, const Workspace<T>& space, const Positions& positions) {
        AttentionForwards<T> attention(pass, positions, space);
        for (int64_t b = rows.begin; b < rows.end; ++b) attention.run(b);
      },
      [](const float* const*, int) {});
}

template <class T>
void run(const AttentionBackward& pass, int threads) {
  run_rows<T>(
      pass, true, threads,
      [&](Range rows, const Workspace<T>& space, const Positions& positions) {
        AttentionBackwards<T> attention(pass, positions, space);
        for (int64_t b = rows.begin; b < rows.end; ++b) attention.run(b);
      },
      [&](const float* const* d_v, int count) {
        for (int64_t u = 0; pass.v && u < pass.units; u += W) {
          vf sum = {};
          for (int i = 0; i < count; ++i) sum += load_vector<vf>(d_v[i] + u);
          store(static_cast<T*>(pass.d_v) + u, sum, lanes_left(u, pass.units));
        }
      });
}

}  // namespace

void attention_forward(const AttentionForward& pass, int threads) {
  dispatch(pass.dtype, [&](auto element) { run<typename decltype(element)::type>(pass, threads); });
}

void attention_backward(const AttentionBackward& pass, int threads) {
  dispatch(pass.dtype, [&](auto element) { run<typename decltype(element)::type>(pass, threads); });
}

}  // namespace FS_ISA
}  // namespace fastseq
