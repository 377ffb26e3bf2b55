#include "scratch.h"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastseq {
namespace {

constexpr int64_t kKeptBytes = int64_t{64} << 20;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr int64_t kLargeBytes = int64_t{1} << 20;  // of which fresh pages cost little beside the call

// What is not kept has fresh pages in every call, which took half of one at B = 4, H = 2048: 2 MiB of them cost one fault.
void* allocate(int64_t bytes) {
  const bool fresh = bytes > kKeptBytes;
  void* memory = nullptr;
  if (posix_memalign(&memory, fresh ? kHugePage : 64, static_cast<size_t>(bytes > 0 ? bytes : 64))) throw std::bad_alloc();
#if defined(__linux__)
  if (fresh) madvise(memory, static_cast<size_t>(bytes) / kHugePage * kHugePage, MADV_HUGEPAGE);  // a wish
#endif
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

void discard([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  if (bytes < kLargeBytes) return;
  const uintptr_t from = reinterpret_cast<uintptr_t>(memory), begin = (from + page - 1) / page * page, end = (from + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
#endif
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
