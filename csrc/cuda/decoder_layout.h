// From a program (fastseq/cuda/decoder_program.py) and a shape (decoder_plan.py) to what the kernels are told.
#pragma once

#include <vector>

#include "decoder.h"

namespace fastseq::cuda {

// Numbers of a call that no program has.
struct DecoderSizes {
  int N, T, S, copies;
  bool wide, save;
  int eos, pad, fewest;  // of a search
};

// Where a tensor's elements lie: [lead, N, T + extra, length] from `offset` on; without steps [lead, N, length].
struct Place {
  int tensor, lead, extra, stepped, length, offset;
};

// A loop's phases, without sizes of the batch.
class DecoderProgram {
 public:
  explicit DecoderProgram(const std::vector<int64_t>& numbers);  // in the order of decoder_phases.py's `flat`

  // Fills `a` and `of`, but for counters and their like; returns the bytes of shared memory of a block.
  // near: of each segment, the tiles of k whose weights stay in shared memory.
  int lay_out(const DecoderSizes& sizes, const DecoderShape& shape, const std::vector<int>& near, int kind,
              const std::vector<uint64_t>& tensors, DecoderArgs& a, DecoderPacking& of) const;

  bool forward() const { return forward_; }

 private:
  struct Vector { Place place; int blocks, width, slots, raw, initial, column[4]; };
  struct Segment {
    int vector, shift, first, blocks, columns[4], gates[4], tensor, offset, unit, k, gate;
    Place mask;
  };
  struct Addend { Place place; int vector, shift, gate, unit, columns[4], bias, state, last, token; };
  struct Factor { Place place; int shift; };
  struct Phase {
    int kind, cell, layer, width, columns, segment, segments, addend, addends, output, first, blocks, each;
    Factor factors[4];
  };

  int forward_, cell_, cells_, layers_, H_, A_, D_, R_, combine_, additive_;
  int query_vector_, query_shift_, query_cell_, query_offset_;
  int before_[kMostCells], offset_[kMostCells];
  std::vector<Vector> vectors_;
  std::vector<Segment> segments_;
  std::vector<Addend> addends_;
  std::vector<Phase> phases_;

  void begin(const DecoderSizes& sizes, const DecoderShape& shape, DecoderArgs& a) const;
  static int factor(const Place& place, int shift, int element, int& used, DecoderArgs& a);
  int lay_out_vectors(int at, int element, DecoderArgs& a) const;
  void lay_out_segments(int element, int& factors, DecoderArgs& a, DecoderPacking& of) const;
  void lay_out_addends(int element, DecoderArgs& a) const;
  int lay_out_phases(int element, int& factors, DecoderArgs& a) const;
  void link(DecoderArgs& a) const;
  int lay_out_attention(int at, int element, DecoderArgs& a) const;
  void lay_out_weights(int at, const std::vector<int>& near, DecoderArgs& a) const;
};

}  // namespace fastseq::cuda
