#include "scratch.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace fastseq {
namespace {

constexpr int64_t kKeptBytes = int64_t{64} << 20;
constexpr int64_t kLargeBytes = int64_t{4} << 20;

void* allocate(int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, static_cast<size_t>(bytes > 0 ? bytes : 64))) throw std::bad_alloc();
  return memory;
}

struct Kept {
  void* memory = nullptr;
  int64_t bytes = 0;
  bool taken = false;

  ~Kept() { std::free(memory); }
};

thread_local Kept kept;

}  // namespace

void* allocate_scratch(int64_t bytes) {
  if (bytes > kKeptBytes || kept.taken) return allocate(bytes);
  if (bytes > kept.bytes) {
    std::free(kept.memory);
    kept.memory = nullptr;
    kept.bytes = 0;
    kept.memory = allocate(bytes);
    kept.bytes = bytes;
  }
  kept.taken = true;
  return kept.memory;
}

void free_scratch(void* memory) {
  if (memory && memory == kept.memory) {
    kept.taken = false;
  } else {
    std::free(memory);
  }
}

void release_scratch() {
  if (kept.taken || kept.bytes < kLargeBytes) return;
  std::free(kept.memory);
  kept.memory = nullptr;
  kept.bytes = 0;
}

void poison_scratch() {
  if (kept.memory && !kept.taken) std::memset(kept.memory, 0xff, static_cast<size_t>(kept.bytes));
}

}  // namespace fastseq
