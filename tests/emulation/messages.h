// What a block's shared memory gets from other blocks of its cluster by asynchronous stores (PTX: st.async), and the barriers
// that count those bytes (mbarrier). Functions that return text return what was done wrong, or null.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "shared_memory.h"

namespace fastseq::cuda {
namespace emulation __attribute__((visibility("hidden"))) {

struct Message {
  static constexpr size_t kBytes = 16;
  unsigned char* to;
  const void* barrier;
  unsigned char value[kBytes];
};

// An mbarrier that one arrival arms: a phase is over once that has come and all bytes have that it announced.
struct ByteBarrier {
  uint64_t* at;
  unsigned phases = 0;  // completed
  bool armed = false;
  int64_t missing = 0;  // bytes announced, less those that came; below 0 if some came first

  bool complete() {
    if (!armed || missing != 0) return false;
    armed = false;
    ++phases;
    return true;
  }
};

class Inbox {
 public:
  const char* init(uint64_t* at) {
    if (find(at)) return "an mbarrier is initialised a second time";
    *at = kContents;
    barriers_.push_back({at});
    return nullptr;
  }

  const char* expect(const void* at, int64_t bytes) {
    ByteBarrier* const barrier = find(at);
    if (const char* wrong = problem(barrier)) return wrong;
    if (barrier->armed) return "an mbarrier is armed twice for one phase";
    barrier->armed = true;
    barrier->missing += bytes;
    barrier->complete();
    return too_many(*barrier);
  }

  const char* problem(const void* at) { return problem(find(at)); }

  // Whether the phase of this parity is over: true also of the one before an mbarrier's first.
  bool completed(const void* at, unsigned parity) { return (find(at)->phases & 1) != parity; }

  // Until a message lands, whoever looks where it goes sees NaN: it may not have come, or may have come already.
  const char* post(const Message& message) {
    if (const char* wrong = problem(message.barrier)) return wrong;
    std::memset(message.to, kNanByte, Message::kBytes);
    under_way_.push_back(message);
    return nullptr;
  }

  size_t under_way() const { return under_way_.size(); }

  // Message i; sets `completed` where a phase is over by it.
  const char* land(size_t i, bool& completed) {
    const Message message = under_way_[i];
    under_way_.erase(under_way_.begin() + static_cast<std::ptrdiff_t>(i));
    ByteBarrier* const barrier = find(message.barrier);
    if (const char* wrong = problem(barrier)) return wrong;
    std::memcpy(message.to, message.value, Message::kBytes);
    barrier->missing -= Message::kBytes;
    completed = barrier->complete();
    return too_many(*barrier);
  }

  // Of a block that exits.
  const char* leftover() const {
    if (!under_way_.empty()) return "exited before all messages to it had landed: wait for them";
    const auto unexpected = [](const ByteBarrier& barrier) { return barrier.missing < 0; };
    const bool any = std::any_of(barriers_.begin(), barriers_.end(), unexpected);
    return any ? "exited after messages of more bytes than its mbarriers were armed for" : nullptr;
  }

 private:
  static constexpr uint64_t kContents = 0x6d62617272696572;  // opaque
  static constexpr int64_t kMostBytes = (1 << 20) - 1;       // the PTX ISA's range of tx-count

  ByteBarrier* find(const void* at) {
    for (ByteBarrier& barrier : barriers_) {
      if (barrier.at == at) return &barrier;
    }
    return nullptr;
  }

  static const char* problem(const ByteBarrier* barrier) {
    if (!barrier) return "an mbarrier that was not initialised";
    return *barrier->at == kContents ? nullptr : "an mbarrier that something else was written over";
  }

  static const char* too_many(const ByteBarrier& barrier) {
    return std::abs(barrier.missing) > kMostBytes ? "more bytes than an mbarrier counts" : nullptr;
  }

  std::vector<ByteBarrier> barriers_;
  std::vector<Message> under_way_;
};

}  // namespace emulation
}  // namespace fastseq::cuda
