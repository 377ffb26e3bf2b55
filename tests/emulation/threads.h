// What a grid consists of, and where its threads are.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "fibers.h"
#include "messages.h"
#include "numbers.h"
#include "shared_memory.h"

namespace fastseq::cuda {
namespace emulation __attribute__((visibility("hidden"))) {

enum Code : int { kSuccess, kInvalidLaunch, kDeadlock, kLivelock, kDivergence, kMisuse, kException };

// Ends the launch with its code and text.
struct Fault : std::runtime_error {
  Fault(Code code, const std::string& text) : std::runtime_error(text), code(code) {}
  Code code;
};

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Where a thread is.
enum class At {
  kRunning,
  kExited,
  kRelax,
  kLoadAcquire,
  kBytesReceived,
  kSyncThreads,
  kClusterArrive,
  kClusterWait,
  kSyncWarp,
  kShuffle,
  kShuffleXor,
  kShuffleDown,
  kMmaBf16,
  kMmaFp16,
  kMmaTf32,
};

inline std::string name_of(At at) {
  static constexpr const char* kNames[] = {"run", "have exited", "relax", "load_acquire", "bytes_received",
                                           "__syncthreads", "cluster_arrive", "cluster_wait", "__syncwarp", "__shfl_sync",
                                           "__shfl_xor_sync", "__shfl_down_sync", "mma_bf16", "mma_fp16", "mma_tf32"};
  return kNames[static_cast<int>(at)];
}

// A line of the kernel's source; line 0 is unknown.
struct Site {
  const char* file = "";
  int line = 0;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
  std::string text() const {
    const std::string path = file;
    return line ? " (" + path.substr(path.rfind('/') + 1) + ":" + std::to_string(line) + ")" : "";
  }
};

struct Fiber;

// Of a barrier that all threads of a warp must execute together: where they did so last.
struct Convergence {
  unsigned generation = ~0u;
  Site site;
};

struct Warp {
  unsigned number = 0, lanes = 0;
  // A meeting of all lanes, in a shuffle, a product or __syncwarp.
  At meets_at = At::kRunning;
  unsigned meetings = 0;  // completed
  std::vector<Fiber*> waiting;
  Convergence threads, arrive, wait;
  // Alternate, since a lane may bring to the next meeting before another has taken from this one.
  uint64_t shuffled[2][32];
  MmaOperands operands[2];
  MmaProduct product[2];
};

struct Cluster {
  unsigned first = 0;               // its first block, of those in flight
  unsigned threads = 0;             // that have not exited
  unsigned missing = 0, phase = 0;  // threads yet to arrive; barriers completed
  std::vector<Fiber*> waiting;
};

struct Block {
  Block(unsigned number, unsigned shared) : number(number), dynamic(shared) {}

  struct Array {
    const void* declaration;
    SharedMemory memory;
  };

  const unsigned number;  // blockIdx.x
  Index index;
  unsigned rank = 0;
  Cluster* cluster = nullptr;
  const Fiber* threads = nullptr;
  unsigned exited = 0, barriers = 0;  // threads; block barriers completed
  bool started = false;
  std::vector<Fiber*> waiting;
  std::vector<Warp> warps;
  SharedMemory dynamic;
  std::vector<Array> arrays;
  Inbox inbox;

  std::string name() const { return "block " + std::to_string(number); }
};

// A thread.
struct Fiber {
  Context context;
  Index index;
  unsigned lane = 0;
  Block* block = nullptr;
  Warp* warp = nullptr;
  At at = At::kRunning;
  Site site;
  size_t group = 0;  // that shares a priority
  bool arrived = false;  // at the cluster's barrier, and has not waited
  unsigned phase = 0;    // of that arrival
  AsyncCopies copies;

  std::string name() const { return "thread " + std::to_string(index.x) + " of " + block->name(); }

  // "wait in __syncthreads (file.cu:12)"
  std::string state() const {
    if (at <= At::kExited) return name_of(at);
    return (at <= At::kBytesReceived ? "spin in " : "wait in ") + name_of(at) + site.text();
  }
};

}  // namespace emulation
}  // namespace fastseq::cuda
