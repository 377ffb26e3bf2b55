// Scratch memory of one call: measured first, allocated once, carved up. Each thread keeps its last block, up to 64 MiB:
// fresh pages cost a fault each, which took a third of a call at B=1, H=512. Nothing in it outlives the call's meaning.
#pragma once

#include <cstdint>

namespace fastseq {

void* allocate_scratch(int64_t bytes);  // aligned to a cache line; throws std::bad_alloc
void free_scratch(void* memory);
void discard(void* memory, int64_t bytes);  // gives the pages of a large buffer back to the system: its contents are lost
void release_scratch();  // gives back this thread's kept block where it is large
void poison_scratch();  // fills this thread's kept block with NaN, so that tests see a read of what no call has written

namespace FS_ISA {

class Carver {
 public:
  explicit Carver(char* base = nullptr) : base_(base) {}

  template <class E>
  E* take(int64_t count) {
    const int64_t at = used_;
    used_ += (count * static_cast<int64_t>(sizeof(E)) + 63) / 64 * 64;
    return base_ ? reinterpret_cast<E*>(base_ + at) : nullptr;
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free_scratch(memory_); }

  Carver measure;  // run the same takes against it first

  Carver allocate() {
    memory_ = allocate_scratch(measure.used());
    return Carver(static_cast<char*>(memory_));
  }

 private:
  void* memory_ = nullptr;
};

}  // namespace FS_ISA
}  // namespace fastseq
