// Which token comes next, of the scores that a decoder's loop gives: the likeliest of each row, or the likeliest continuations of
// the k rows (beams) of a memory row. The rules are those of fastseq/generation/search.py.
#pragma once

#include <cmath>

#include "attention.h"
#include "decoder.h"

namespace fastseq {
namespace FS_ISA {

FS_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }

FS_INLINE bool any_reaches(vf x, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(x, splat(limit), _CMP_GE_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(x, splat(limit), _CMP_GE_OQ)) != 0;
#else
  bool any = false;
  for (int i = 0; i < W; ++i) any |= x[i] >= limit;
  return any;
#endif
}

// The largest of [V rounded up to W] scores.
FS_INLINE float largest(const float* scores, int64_t vocabulary) {
  vf most = splat(-INFINITY);
  for (int64_t i = 0; i < vocabulary; i += W) most = larger(load_vector<vf>(scores + i), most);
  return fold_lanes(most, [](vf a, vf b) FS_LAMBDA { return larger(a, b); });
}

// What a row of logits comes to.
struct Likelihood {
  float norm;  // log of the sum of their exponentials: what log-probabilities are less by
  float most;  // the largest, -inf where nothing may come
};

// logits [V rounded up to W]: what stands behind V becomes -inf. A NaN makes the norm NaN.
FS_INLINE Likelihood likelihood(float* logits, int64_t vocabulary) {
  for (int64_t i = vocabulary; i < round_up(vocabulary, W); ++i) logits[i] = -INFINITY;
  const float top = largest(logits, vocabulary);
  if (top == -INFINITY) {  // or all are NaN
    float sum = 0;
    for (int64_t i = 0; i < vocabulary; ++i) sum += logits[i] == -INFINITY ? 0.f : logits[i];
    return {sum, top};
  }
  vf sums = {};
  for (int64_t i = 0; i < vocabulary; i += W) sums += SimdMath::exp(load_vector<vf>(logits + i) - top);
  return {top + logf(sum_lanes(sums)), top};
}

// A continuation: row `parent` of a memory row's k goes on with `token`.
struct Candidate {
  float score;  // the hypothesis' log-probability; of whole ones its final score
  int32_t parent, token;
  int64_t step;  // that chose it
};

// At most `most` candidates, the best first; of equals the first that came.
class Best {
 public:
  Best(Candidate* found, int64_t most) : found_(found), most_(most) {}

  int64_t count = 0;

  FS_INLINE float least() const { return count < most_ ? -INFINITY : found_[most_ - 1].score; }
  FS_INLINE const Candidate& operator[](int64_t i) const { return found_[i]; }

  FS_INLINE void add(Candidate c) {
    if (!(c.score > least())) return;
    int64_t i = count < most_ ? count++ : most_ - 1;
    for (; i > 0 && c.score > found_[i - 1].score; --i) found_[i] = found_[i - 1];
    found_[i] = c;
  }

 private:
  Candidate* found_;
  int64_t most_;
};

// The state of a search, of all rows; each thread touches those of its own memory rows.
struct SearchBuffers {
  float *logits, *total;                 // [N][pitch] by slot; [N] log-probability of each row's tokens
  int64_t* tokens;                       // [N] what each row reads next
  int32_t *chosen, *parent, *parents;    // [N][T] the token of each step and the row that it was chosen from; beams only; [N]
  Candidate *whole, *candidates, *next;  // [B][k] finished hypotheses, the best first; [B][2 k]; [B][k]
  int64_t* whole_count;                  // [B]
  bool* done;                            // [B]
  int64_t pitch;

  SearchBuffers(Carver& carve, const Decoder& d, int64_t logits_pitch) : pitch(logits_pitch) {
    const int64_t N = d.search ? d.rows : 0, B = d.search ? d.memory_rows() : 0, k = d.copies, paths = k > 1 ? N * d.steps : 0;
    logits = carve.take<float>(N * pitch), total = carve.take<float>(N), tokens = carve.take<int64_t>(N);
    chosen = carve.take<int32_t>(paths), parent = carve.take<int32_t>(paths), parents = carve.take<int32_t>(N);
    whole = carve.take<Candidate>(N), candidates = carve.take<Candidate>(2 * N), next = carve.take<Candidate>(N);
    whole_count = carve.take<int64_t>(B), done = carve.take<bool>(B);
  }
};

// A thread's part of the search: memory rows [first, end).
class Searcher {
 public:
  Searcher(const Decoder& decoder, const SearchBuffers& buffers, Range own)
      : d(decoder), s(*decoder.search), buf_(buffers), own_(own), k_(decoder.copies), past_(s.forced - 1) {}

  void begin() const {
    for (int64_t b = own_.begin; b < own_.end; ++b) {
      buf_.done[b] = false, buf_.whole_count[b] = 0;
      for (int64_t i = 0; i < k_; ++i) {
        buf_.tokens[b * k_ + i] = s.prefix[b * s.forced];
        buf_.total[b * k_ + i] = i ? -INFINITY : 0;  // all beams are the same so far
      }
    }
  }

  // Whether step t's logits are looked at: those of forced tokens are not.
  bool wants_logits(int64_t t) const { return t >= past_; }

  void read_forced(int64_t t) const {
    for (int64_t n = own_.begin * k_; n < own_.end * k_; ++n) buf_.tokens[n] = s.prefix[n / k_ * s.forced + t + 1];
  }

  // Takes step t's logits of `count` running rows. move(n, parent rows [k]) rearranges those of a memory row, the first of which is
  // n. How many go on: they come first in `running` then.
  template <class Move>
  int64_t advance(int64_t t, int64_t* running, int64_t count, Move&& move) const {
    int64_t left = 0;
    for (int64_t i = 0; i < count; i += k_) {
      const int64_t first = running[i], b = first / k_;
      float* logits = buf_.logits + (own_.begin * k_ + i) * buf_.pitch;
      k_ == 1 ? follow(b, t, logits) : advance_beams(b, t, logits, move);
      for (int64_t j = 0; j < k_ && !buf_.done[b]; ++j) running[left++] = first + j;
    }
    return left;
  }

 private:
  // eos may not come before the fewest tokens are there.
  Likelihood look(float* logits, int64_t made) const {
    Likelihood found = likelihood(logits, s.vocabulary);
    if (found.norm != found.norm) __atomic_store_n(s.wrong, 1, __ATOMIC_RELAXED);
    if (made < s.fewest && found.most > -INFINITY) {
      logits[s.eos] = -INFINITY;
      found.most = largest(logits, s.vocabulary);
    }
    return found;
  }

  void follow(int64_t b, int64_t t, float* logits) const {
    const int64_t made = t - past_;
    const Likelihood found = look(logits, made);
    int64_t length = t;
    if (found.most > -INFINITY) {
      int64_t token = 0;  // the first of equals
      while (token + W < s.vocabulary && !any_reaches(load_vector<vf>(logits + token), found.most)) token += W;
      while (token + 1 < s.vocabulary && !(logits[token] >= found.most)) ++token;
      buf_.total[b] += found.most - found.norm;
      buf_.tokens[b] = s.tokens[b * d.steps + t] = token;
      ++length;
      buf_.done[b] = token == s.eos;
    } else {
      buf_.done[b] = true;  // nothing may come next
    }
    buf_.done[b] |= t + 1 == d.steps;
    if (!buf_.done[b]) return;
    const int64_t count = length - past_;
    s.lengths[b] = length;
    s.scores[b] = buf_.total[b] / s.norms[count > 1 ? count : 1];
    for (int64_t i = 0; i < past_; ++i) s.tokens[b * d.steps + i] = s.prefix[b * s.forced + i + 1];
    for (int64_t i = 0; i < length; ++i) s.trail[b * d.steps + i] = 0;
  }

  template <class Move>
  void advance_beams(int64_t b, int64_t t, float* logits, Move&& move) const {
    const int64_t made = t - past_ + 1;
    Best best(buf_.candidates + 2 * b * k_, 2 * k_), whole(buf_.whole + b * k_, k_);
    whole.count = buf_.whole_count[b];
    for (int64_t i = 0; i < k_; ++i) add_continuations(b, i, t, logits + i * buf_.pitch, best);
    Candidate* next = buf_.next + b * k_;
    int64_t going = 0;
    for (int64_t rank = 0; rank < best.count; ++rank) {
      Candidate c = best[rank];
      if (c.token != s.eos) {
        if (going < k_) next[going++] = c;
      } else if (rank < k_) {
        c.score /= s.norms[made];
        whole.add(c);
      }
    }
    const float reach = going ? next[0].score / s.norms[s.stopping == Stopping::never && s.rewards_length ? d.steps - past_ : made] : 0.f;
    bool done = going == 0 || (whole.count == k_ && (s.stopping == Stopping::first || whole[k_ - 1].score >= reach));
    if (!done && t + 1 == d.steps) {
      for (int64_t i = 0; i < going; ++i) next[i].score /= s.norms[made], whole.add(next[i]);
      done = true;
    }
    buf_.whole_count[b] = whole.count, buf_.done[b] = done;
    done ? finish(b, whole) : go_on(b, t, next, going, move);
  }

  // Of row i, those of its tokens that are among the best so far.
  void add_continuations(int64_t b, int64_t i, int64_t t, float* logits, Best& best) const {
    const int64_t n = b * k_ + i;
    if (buf_.total[n] == -INFINITY) return;
    const Likelihood found = look(logits, t - past_);
    if (found.most == -INFINITY) return;
    const float shift = buf_.total[n] - found.norm;
    for (int64_t v = 0; v < s.vocabulary; v += W) {
      const vf scores = load_vector<vf>(logits + v) + shift;
      if (!any_reaches(scores, best.least())) continue;
      for (int lane = 0; lane < W; ++lane) best.add({scores[lane], static_cast<int32_t>(i), static_cast<int32_t>(v + lane), t});
    }
  }

  template <class Move>
  void go_on(int64_t b, int64_t t, const Candidate* next, int64_t going, Move&& move) const {
    int32_t* parents = buf_.parents + b * k_;
    for (int64_t j = 0; j < k_; ++j) {
      const int64_t n = b * k_ + j;
      const bool lives = j < going;
      buf_.total[n] = lives ? next[j].score : -INFINITY;
      buf_.tokens[n] = buf_.chosen[n * d.steps + t] = lives ? next[j].token : static_cast<int32_t>(s.pad);
      parents[j] = buf_.parent[n * d.steps + t] = lives ? next[j].parent : static_cast<int32_t>(j);
    }
    move(b * k_, parents);
  }

  // The best hypotheses as results, read backwards through the rows that chose their tokens.
  void finish(int64_t b, const Best& whole) const {
    for (int64_t r = 0; r < s.returned; ++r) {
      const int64_t at = b * s.returned + r;
      int64_t *tokens = s.tokens + at * d.steps, *trail = s.trail + at * d.steps;
      const bool there = r < whole.count;
      s.scores[at] = there ? whole[r].score : -INFINITY;
      s.lengths[at] = there ? whole[r].step + 1 : 0;
      if (!there) continue;
      int64_t row = whole[r].parent;
      tokens[whole[r].step] = whole[r].token, trail[whole[r].step] = row;
      for (int64_t t = whole[r].step - 1; t >= past_; --t) {
        const int64_t from = (b * k_ + row) * d.steps + t;
        tokens[t] = buf_.chosen[from], trail[t] = row = buf_.parent[from];
      }
      for (int64_t t = 0; t < past_; ++t) tokens[t] = s.prefix[b * s.forced + t + 1], trail[t] = 0;
    }
  }

  const Decoder& d;
  const Search& s;
  const SearchBuffers& buf_;
  Range own_;
  int64_t k_, past_;
};

}  // namespace FS_ISA
}  // namespace fastseq
