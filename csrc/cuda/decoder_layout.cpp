#include "decoder_layout.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace fastseq::cuda {
namespace {

constexpr int kTile = 16, kQuadTiles = 4, kBytesOfTile = 512, kWarpsOfBlock = 8, kScratch = 256 * 4 * 4;

int rounded(int n, int to) { return (n + to - 1) / to * to; }
int divided(int n, int by) { return (n + by - 1) / by; }
int line(int bytes) { return rounded(bytes, 128); }
int bytes_of(int kind) { return kind <= static_cast<int>(Kind::kTensor32) ? 4 : 2; }

// Rows start 4 banks apart: 8 rows x 4 lanes then read from 32 of them.
int pitch_of(int depth, int element) { return rounded(divided(depth * element, 4), 32) * 4 / element + 16 / element; }

// The numbers one by one, into plain structs of ints.
class Reader {
 public:
  explicit Reader(const std::vector<int64_t>& numbers) : numbers_(numbers) {}
  template <class S>
  void read(S& into) {
    static_assert(std::is_trivially_copyable_v<S> && sizeof(S) % sizeof(int) == 0, "a struct of ints");
    int found[sizeof(S) / sizeof(int)];
    for (int& number : found) number = next();
    std::memcpy(&into, found, sizeof found);
  }
  template <class S>
  void read(std::vector<S>& into, int most, const char* what) {
    const int count = next();
    if (count > most)
      throw std::invalid_argument("fastseq: a decoder's loop of " + std::to_string(count) + " " + what + ", at most " +
                                  std::to_string(most));
    into.resize(count);
    for (S& one : into) read(one);
  }
  bool ended() const { return at_ == numbers_.size(); }

 private:
  int next() { return static_cast<int>(numbers_.at(at_++)); }
  const std::vector<int64_t>& numbers_;
  size_t at_ = 0;
};

Lying lie(const Place& place, const DecoderArgs& a, int element) {
  if (place.tensor < 0 || !a.at[place.tensor]) return {nullptr, 0, 0};
  const int64_t steps = !place.stepped ? 1 : a.search ? 2 : a.T + place.extra, row = steps * place.length;
  char* const first = static_cast<char*>(a.at[place.tensor]) + (place.lead * a.N * row + place.offset) * element;
  return {first, row, place.stepped ? place.length : 0};
}

}  // namespace

DecoderProgram::DecoderProgram(const std::vector<int64_t>& numbers) {
  Reader reader(numbers);
  for (int* number : {&forward_, &cell_, &cells_, &layers_, &H_, &A_, &D_, &R_, &combine_, &additive_, &query_vector_,
                      &query_shift_, &query_cell_, &query_offset_})
    reader.read(*number);
  reader.read(before_);
  reader.read(offset_);
  reader.read(vectors_, kMostVectors, "vectors");
  reader.read(segments_, kMostSegments, "parts of products");
  reader.read(addends_, kMostAddends, "addends");
  reader.read(phases_, kMostPhases, "phases");
  if (!reader.ended()) throw std::invalid_argument("fastseq: a decoder's program has more numbers than it says");
}

int DecoderProgram::lay_out(const DecoderSizes& sizes, const DecoderShape& shape, const std::vector<int>& near, int kind,
                            const std::vector<uint64_t>& tensors, DecoderArgs& a, DecoderPacking& of) const {
  if (tensors.size() != kDecoderTensors)
    throw std::invalid_argument("fastseq: " + std::to_string(tensors.size()) + " tensors of a decoder's loop, expected " +
                                std::to_string(kDecoderTensors));
  for (int i = 0; i < kDecoderTensors; ++i) a.at[i] = reinterpret_cast<void*>(static_cast<uintptr_t>(tensors[i]));
  const int element = bytes_of(kind);
  begin(sizes, shape, a);
  lay_out_addends(element, a);
  int at = lay_out_vectors(0, element, a);
  int factors = 0;
  lay_out_segments(element, factors, a, of);
  const int biases = lay_out_phases(element, factors, a);
  a.stage = at;
  at += line(shape.chunk * a.stage_pitch * element);
  int work = a.A || a.D ? kScratch : 0, ahead = 0;
  for (int i = 0; i < a.phases; ++i) {
    const DecoderPhase& p = a.phase[i];
    const bool chooses = p.kind == kVocabulary;  // of what it makes it keeps and loads only the logits
    if (p.units) work = std::max(work, std::max(p.slices * p.columns, chooses ? 1 : 4) * shape.chunk * (p.units + 4) * 4);
    ahead = std::max(ahead, (chooses ? 1 : forward_ ? 4 : 7) * p.units);
  }
  a.work = at;
  at += line(work);
  a.ahead = at;
  at += line(ahead * shape.chunk * 4);
  a.state = at;
  const int lines = !forward_ ? layers_ : cell_ == kDecoderLstm ? 2 * layers_ : cell_ == kDecoderGru ? layers_ : layers_ + 2;
  at += line(lines * shape.rows * a.state_units * 4);
  a.biases = at;
  at += line(biases * 4);
  a.gone = at;
  at += line(16);
  if (a.search) {
    a.walks = at;
    at += line(shape.rows * static_cast<int>(sizeof(Walk)) + kWarpsOfBlock * 4);
    a.choices = at;
    at += line(shape.meeting == 2 ? 0 : shape.blocks * shape.rows * static_cast<int>(sizeof(Choice)));
  }
  at = lay_out_attention(at, element, a);
  lay_out_weights(at, near, a);
  return at + a.near_bytes;
}

void DecoderProgram::begin(const DecoderSizes& sizes, const DecoderShape& shape, DecoderArgs& a) const {
  a.shape = shape;
  a.N = sizes.N, a.T = sizes.T, a.S = sizes.S, a.copies = sizes.copies;
  a.wide = sizes.wide, a.save = sizes.save;
  a.eos = sizes.eos, a.pad = sizes.pad, a.fewest = sizes.fewest;
  a.search = !phases_.empty() && phases_.back().kind == kVocabulary;
  a.H = H_, a.A = A_, a.D = D_, a.R = R_;
  a.cells = cells_, a.layers = layers_, a.cell = cell_, a.combine = combine_;
  a.additive = additive_, a.query_vector = query_vector_, a.query_shift = query_shift_;
  a.query_cell = query_cell_, a.query_offset = query_offset_;
  std::copy(before_, before_ + kMostCells, a.before);
  std::copy(offset_, offset_ + kMostCells, a.offset);
  a.vectors = static_cast<int>(vectors_.size());
  a.phases = static_cast<int>(phases_.size());
}

int DecoderProgram::lay_out_vectors(int at, int element, DecoderArgs& a) const {
  const bool grid = a.shape.meeting == 2;
  for (int i = 0; i < a.vectors; ++i) {
    const Vector& from = vectors_[i];
    DecoderVector& v = a.vector[i];
    v.values = lie(from.place, a, element);
    v.steps = a.T + from.place.extra;
    v.blocks = from.blocks, v.width = from.width, v.padded = rounded(from.width, kTile);
    v.slots = from.slots, v.raw = from.raw, v.initial = from.initial;
    for (int b = 0; b < 4; ++b) v.column[b] = from.column[b];
    for (int b = 0; b < from.blocks; ++b) v.block[from.column[b]] = b;
    v.pitch = pitch_of(v.blocks * v.padded, element);
    v.shared = at;
    if (!grid) at += line(v.slots * a.shape.rows * v.pitch * element);
  }
  return at;
}

// The number of a new factor, -1 where there is none.
int DecoderProgram::factor(const Place& place, int shift, int element, int& used, DecoderArgs& a) {
  const Lying from = lie(place, a, element);
  if (!from.at) return -1;
  if (used == kMostFactors)
    throw std::invalid_argument("fastseq: a decoder's loop of more than " + std::to_string(kMostFactors) + " factors");
  a.factor[used] = {from, shift};
  return used++;
}

void DecoderProgram::lay_out_segments(int element, int& factors, DecoderArgs& a, DecoderPacking& of) const {
  for (size_t i = 0; i < segments_.size(); ++i) {
    const Segment& from = segments_[i];
    DecoderSegment& s = a.segment[i];
    s.vector = from.vector, s.shift = from.shift, s.first = from.first, s.blocks = from.blocks;
    s.mask = factor(from.mask, 0, element, factors, a);
    s.tiles = from.blocks * a.vector[from.vector].padded / (element == 4 ? 8 : 16);
    DecoderWeights& w = of.weights[i];
    w.w = static_cast<const char*>(a.at[from.tensor]) + static_cast<int64_t>(from.offset) * element;
    w.unit = from.unit, w.k = from.k, w.gate = from.gate;
    std::copy(from.columns, from.columns + 4, w.columns);
    std::copy(from.gates, from.gates + 4, w.gates);
  }
}

void DecoderProgram::lay_out_addends(int element, DecoderArgs& a) const {
  for (size_t i = 0; i < addends_.size(); ++i) {
    const Addend& from = addends_[i];
    DecoderAddend& to = a.addend[i];
    to.wide = from.state && a.wide;
    to.from = lie(from.place, a, to.wide ? 4 : element);
    to.vector = from.vector, to.shift = from.shift, to.gate = from.gate, to.unit = from.unit;
    to.bias = from.bias, to.last = from.last, to.token = from.token;
    std::copy(from.columns, from.columns + 4, to.columns);
  }
}

// Each product's successor.
void DecoderProgram::link(DecoderArgs& a) const {
  a.first = 0;
  while (a.first < a.phases - 1 && !a.phase[a.first].width) ++a.first;
  int next = a.first;
  for (int i = a.phases - 1; i >= 0; --i) {
    a.phase[i].next = next;
    if (a.phase[i].width) next = i;
  }
}

// Returns how many biases a block has.
int DecoderProgram::lay_out_phases(int element, int& factors, DecoderArgs& a) const {
  const bool grid = a.shape.meeting == 2;
  int biases = 0;
  a.stage_pitch = a.state_units = 0;
  for (int i = 0; i < a.phases; ++i) {
    const Phase& from = phases_[i];
    DecoderPhase& p = a.phase[i];
    p.kind = from.kind, p.cell = from.cell, p.layer = from.layer;
    p.output = from.output, p.first = from.first, p.blocks = from.blocks, p.each = from.each;
    p.meets = true;
    for (int c = 0; c < 4; ++c) {
      const Factor& by = from.factors[c];
      p.factors[c] = factor(by.place, by.shift, element, factors, a);
    }
    p.width = from.width, p.columns = from.columns;
    p.segment = from.segment, p.segments = from.segments, p.addend = from.addend, p.addends = from.addends;
    p.ahead = -1;
    for (int j = p.addend; j < p.addend + p.addends && p.ahead < 0; ++j) {
      const DecoderAddend& of = a.addend[j];
      if (of.from.at && !of.bias && !of.last && !of.wide && of.vector < 0) p.ahead = j;
    }
    if (!p.width) continue;
    p.units = rounded(divided(p.width, a.shape.blocks), kTile);
    p.quads = divided(p.units / kTile * p.columns, kQuadTiles);
    p.slices = p.quads < kWarpsOfBlock ? kWarpsOfBlock / p.quads : 1;
    p.bias = biases;
    biases += p.columns * p.units;
    if (p.kind <= kCandidate) a.state_units = p.units;
    int staged = 0;
    for (int j = p.segment; j < p.segment + p.segments; ++j) {
      DecoderSegment& s = a.segment[j];
      s.pattern = 0;
      for (int m = 0; m < kQuadTiles; ++m)
        if (segments_[j].columns[m % p.columns] >= 0) s.pattern |= 1u << m;
      s.staged = grid || s.mask >= 0 ? staged : -1;
      if (s.staged >= 0) staged += s.blocks * a.vector[s.vector].padded;
    }
    p.stages = staged > 0;
    if (p.stages) a.stage_pitch = std::max(a.stage_pitch, pitch_of(staged, element));
  }
  link(a);
  return biases;
}

int DecoderProgram::lay_out_attention(int at, int element, DecoderArgs& a) const {
  a.slots = a.span_s = a.span_f = 0;
  if (std::none_of(phases_.begin(), phases_.end(), [](const Phase& p) { return p.kind == kScore; })) return at;
  const DecoderShape& shape = a.shape;
  const int over = forward_ ? D_ : A_;  // features of what is summed over positions, and
  const int width = forward_ ? A_ : D_;  // of what is summed over features
  a.slots = divided(shape.rows * shape.pieces, shape.blocks);
  a.span_s = divided(a.S, shape.pieces);
  a.span_f = rounded(divided(over, shape.pieces), kTile);
  a.asked = at;
  at += line(rounded(std::max(A_, D_), 4) * 4);
  a.v = at;
  at += line(additive_ ? rounded(A_, 4) * 4 : 0);
  a.scores = at;
  at += line(a.slots * rounded(a.S, 4) * 4);
  const int pitch = rounded(width, 16), pitch_over = a.span_f;
  (forward_ ? a.keys_rows : a.memory_rows) = a.span_s;
  (forward_ ? a.keys_pitch : a.memory_pitch) = pitch;
  (forward_ ? a.memory_rows : a.keys_rows) = a.S;
  (forward_ ? a.memory_pitch : a.keys_pitch) = pitch_over;
  a.keys = at;
  if (shape.keys) at += line(a.slots * a.keys_rows * a.keys_pitch * element);
  a.memory = at;
  if (shape.memory) at += line(a.slots * a.memory_rows * a.memory_pitch * element);
  for (int i = 0; i < a.phases; ++i)
    if (a.phase[i].kind == kScore) a.phase[i].meets = shape.pieces > 1;
  return at;
}

// First those that stay, as they do in shared memory from `at` on.
void DecoderProgram::lay_out_weights(int at, const std::vector<int>& near, DecoderArgs& a) const {
  int packed = 0;
  for (size_t i = 0; i < segments_.size(); ++i) a.segment[i].near = std::min(near.at(i), a.segment[i].tiles);
  for (const bool stay : {true, false}) {
    for (int i = 0; i < a.phases; ++i) {
      DecoderPhase& p = a.phase[i];
      if (!p.units) continue;
      const int tiles = p.units / kTile * p.columns;
      int full = 0, rest = 0;  // tiles of weights of a quad, and of the last if that is none
      for (int j = p.segment; j < p.segment + p.segments; ++j)
        for (int m = 0; m < kQuadTiles; ++m) {
          const DecoderSegment& s = a.segment[j];
          const int count = (s.pattern >> m & 1) * (stay ? s.near : s.tiles - s.near);
          full += count;
          rest += m < tiles % kQuadTiles ? count : 0;
        }
      (stay ? p.near : p.far) = packed + (stay ? at : 0);
      (stay ? p.near_quad : p.far_quad) = full * kBytesOfTile;
      packed += (tiles / kQuadTiles * full + rest) * kBytesOfTile;
    }
    if (stay) a.near_bytes = packed;
  }
  a.near = at;
  a.packed_bytes = packed;
}

}  // namespace fastseq::cuda
