// Which fiber runs next.
//
// Seed 0: in order. Odd seeds: at random, with switches where a GPU might let another warp go first. Even seeds: blocks,
// warps or threads have priorities, drawn at random and now and then anew: those of low priority run only when no others
// can (Burckhardt 2010, "A randomized scheduler with probabilistic guarantees of finding bugs").
//
// Messages land when nobody can run without them: in order of sending, or in random order. On odd seeds some land before, on
// every second even one all at once, so that a block of high priority runs ahead of the others as far as it can.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

namespace fastseq::cuda {
namespace emulation __attribute__((visibility("hidden"))) {

// SplitMix64 (Steele 2014): the same numbers everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint32_t any() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
  }

  size_t below(size_t n) { return any() % n; }

 private:
  uint64_t state_;
};

template <class Fiber>
class Scheduler {
 public:
  Scheduler(unsigned seed, uint64_t spin_limit) : random(seed), seed_(seed), spin_limit_(spin_limit) {}

  Random random;

  bool in_order() const { return seed_ == 0; }
  bool has_priorities() const { return seed_ != 0 && seed_ % 2 == 0; }
  bool delivers_at_once() const { return seed_ % 4 == 2; }
  bool has_ready() const { return !ready_in_order_.empty() || !ready_.empty(); }
  bool interrupts() { return seed_ % 2 == 1 && random.below(8) == 0; }

  // Fibers of the same `group` share a priority.
  void draw_priorities(size_t groups) {
    priorities_.resize(groups);
    for (uint32_t& priority : priorities_) priority = random.any();
  }

  void ready(Fiber* fiber) {
    if (in_order()) return ready_in_order_.push_back(fiber);
    const uint64_t priority = has_priorities() ? priorities_[fiber->group] : 0;
    ready_.push_back({priority << 32 | random.any(), fiber});
    std::push_heap(ready_.begin(), ready_.end());
  }

  // Something happened that a spinning fiber may wait for.
  void progressed() {
    ++progress_;
    looks_ = 0;
    idle_ = false;
  }

  // It was written to global memory, or a message came.
  void published() {
    progressed();
    published_ = true;
  }

  // A look at what others may change. False: for longer than the limit nothing else has happened.
  bool look() { return ++looks_ <= spin_limit_; }

  void spin(Fiber* fiber) {
    clock_ += idle_ ? kIdleSpin : kSpin;
    spinning_.push_back(fiber);
  }

  // Nanoseconds. Runs fast while nothing but spinning happens, so that a kernel's own timeouts come before the spin limit.
  uint64_t now() { return ++clock_; }

  // Null: all that are left wait.
  Fiber* next() {
    if (has_priorities() && published_) look_again();
    if (ready_in_order_.empty() && ready_.empty()) {
      if (spinning_.empty()) return nullptr;
      idle_ = looked_ == progress_;
      look_again();
    }
    return take();
  }

 private:
  static constexpr uint64_t kSpin = 20, kIdleSpin = 1'000'000;

  void look_again() {
    looked_ = progress_;
    published_ = false;
    for (Fiber* fiber : spinning_) ready(fiber);
    spinning_.clear();
  }

  Fiber* take() {
    if (in_order()) {
      Fiber* const taken = ready_in_order_.front();
      ready_in_order_.pop_front();
      return taken;
    }
    if (has_priorities() && random.below(1024) == 0) {
      priorities_[random.below(priorities_.size())] = random.any();
    }
    std::pop_heap(ready_.begin(), ready_.end());
    Fiber* const taken = ready_.back().second;
    ready_.pop_back();
    return taken;
  }

  const unsigned seed_;
  const uint64_t spin_limit_;
  std::vector<uint32_t> priorities_;
  std::deque<Fiber*> ready_in_order_;
  std::vector<std::pair<uint64_t, Fiber*>> ready_;  // a heap, the highest priority first; at random where they are equal
  std::vector<Fiber*> spinning_;
  uint64_t progress_ = 1, looked_ = 0;  // how much has happened; how much had when spinning fibers looked last
  uint64_t looks_ = 0, clock_ = 1'000'000'000;
  bool idle_ = false, published_ = false;
};

}  // namespace emulation
}  // namespace fastseq::cuda
