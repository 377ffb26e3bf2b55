// A block's shared memory, filled with NaN, and a thread's asynchronous copies into it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "fibers.h"

namespace fastseq::cuda {
namespace emulation __attribute__((visibility("hidden"))) {

constexpr int kNanByte = 0xff;  // four or two of them are a NaN in every format

class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes) {
    if (posix_memalign(&allocated_, 128, kGuard + bytes + kGuard) != 0) throw std::bad_alloc();
    std::memset(allocated_, kNanByte, kGuard + bytes + kGuard);
  }

  SharedMemory(SharedMemory&& other) noexcept : allocated_(other.allocated_), bytes_(other.bytes_) {
    other.allocated_ = nullptr;
  }

  ~SharedMemory() { std::free(allocated_); }

  unsigned char* data() const { return static_cast<unsigned char*>(allocated_) + kGuard; }
  size_t bytes() const { return bytes_; }

  bool holds(const void* address, size_t bytes) const {
    const size_t offset = static_cast<const unsigned char*>(address) - data();  // huge if before
    return offset <= bytes_ && bytes <= bytes_ - offset;
  }

  bool untouched() const { return all_nan(data(), bytes_); }
  bool overrun() const { return !all_nan(data() - kGuard, kGuard) || !all_nan(data() + bytes_, kGuard); }

  // Its block has exited: what others still read is NaN, what they write is found by `untouched`, or by ASan at once.
  void close() {
    std::memset(data(), kNanByte, bytes_);
#if FS_ASAN
    __asan_poison_memory_region(data(), bytes_);
#endif
  }

  void reopen() {
#if FS_ASAN
    __asan_unpoison_memory_region(data(), bytes_);
#endif
  }

 private:
  static constexpr size_t kGuard = FS_ASAN ? 0 : 256;  // ASan has its own

  static bool all_nan(const unsigned char* from, size_t bytes) {
    return bytes == 0 || (from[0] == kNanByte && std::memcmp(from, from + 1, bytes - 1) == 0);
  }

  void* allocated_ = nullptr;
  size_t bytes_;
};

// Copies land at the wait that covers them, the latest moment a GPU may choose.
class AsyncCopies {
 public:
  void issue(void* to, const void* from, size_t bytes) {
    Copy copy{to, from, bytes, groups_, {}};
    std::memcpy(copy.seen, from, bytes);
    std::memset(to, kNanByte, bytes);
    copies_.push_back(copy);
  }

  void commit() { ++groups_; }

  // All but the last `n` groups land. False: what one of them copies has changed since.
  bool wait(unsigned n) {
    size_t landed = 0;
    for (; landed < copies_.size() && copies_[landed].group + n < groups_; ++landed) {
      const Copy& copy = copies_[landed];
      if (std::memcmp(copy.seen, copy.from, copy.bytes) != 0) return false;
      std::memcpy(copy.to, copy.seen, copy.bytes);
    }
    copies_.erase(copies_.begin(), copies_.begin() + static_cast<std::ptrdiff_t>(landed));
    return true;
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    unsigned group;
    unsigned char seen[16];  // at the issue
  };

  std::vector<Copy> copies_;
  unsigned groups_ = 0;  // committed
};

}  // namespace emulation
}  // namespace fastseq::cuda
