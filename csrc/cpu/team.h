// Threads of one call: a parallel region around the whole job and a spinning barrier inside it.
#pragma once

#include <cstdint>

namespace fastseq {

constexpr int kMaxThreads = 64;

int usable_threads(int requested);  // at most kMaxThreads; 1 inside another parallel region and in a forked child
void run_parallel(int threads, void (*body)(void* context, int rank, int size), void* context);

// Sized by the team that really came. Costs about 0.1 us where every thread has a core; yields after a while where not.
class Barrier {
 public:
  void wait(int size);

 private:
  alignas(64) int arrived_ = 0;
  alignas(64) int phase_ = 0;
};

struct Team {
  int rank, size;
  Barrier* barrier;

  __attribute__((always_inline)) void sync() const {
    if (size > 1) barrier->wait(size);
  }
};

double barrier_seconds(int threads, int64_t repeats);  // of one wait, in a team of so many that does nothing else

template <class F>
void parallel(int threads, F&& body) {
  run_parallel(
      threads, [](void* context, int rank, int size) { (*static_cast<F*>(context))(rank, size); }, &body);
}

}  // namespace fastseq
