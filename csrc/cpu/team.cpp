#include "team.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#include <pthread.h>
#include <sched.h>
#include <time.h>

namespace fastseq {
namespace {

bool in_forked_child = false;  // the pool's threads do not survive a fork, and waiting for them would hang
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

constexpr int kSpins = 4096;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

#if defined(_OPENMP)

int usable_threads(int requested) {
  if (in_forked_child || omp_in_parallel() || requested < 1) return 1;
  return requested < kMaxThreads ? requested : kMaxThreads;
}

void run_parallel(int threads, void (*body)(void*, int, int), void* context) {
  if (threads == 1) return body(context, 0, 1);
#pragma omp parallel num_threads(threads)
  body(context, omp_get_thread_num(), omp_get_num_threads());
}

#else

int usable_threads(int) { return 1; }

void run_parallel(int, void (*body)(void*, int, int), void* context) { body(context, 0, 1); }

#endif

void Barrier::wait(int size) {
  const int phase = __atomic_load_n(&phase_, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == size) {
    __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&phase_, phase + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int spins = 0; __atomic_load_n(&phase_, __ATOMIC_ACQUIRE) == phase; ++spins) {
    spins < kSpins ? relax() : static_cast<void>(sched_yield());
  }
}

double barrier_seconds(int threads, int64_t repeats) {
  Barrier barrier;
  double seconds = 0;
  parallel(threads, [&](int rank, int size) {
    const Team team{rank, size, &barrier};
    team.sync();  // all have come
    timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (int64_t i = 0; i < repeats; ++i) team.sync();
    clock_gettime(CLOCK_MONOTONIC, &end);
    if (rank == 0) seconds = static_cast<double>(end.tv_sec - begin.tv_sec) + 1e-9 * static_cast<double>(end.tv_nsec - begin.tv_nsec);
  });
  return seconds / static_cast<double>(repeats);
}

}  // namespace fastseq
