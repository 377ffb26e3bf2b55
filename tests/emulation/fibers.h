// Fibers: functions with stacks of their own, which one OS thread runs by turns.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define FS_ASAN 1
#else
#define FS_ASAN 0
#endif

#if !defined(__x86_64__) || defined(FS_UCONTEXT)
#include <ucontext.h>
#define FS_SWITCH_BY_UCONTEXT 1
#else
#define FS_SWITCH_BY_UCONTEXT 0
#endif

// Hidden: libraries loaded side by side, each with its own build of the emulation, must not share its state.
namespace fastseq::cuda {
namespace emulation __attribute__((visibility("hidden"))) {

constexpr size_t kStackBytes = FS_ASAN ? 256 * 1024 : 64 * 1024;

// Stacks by number, kept until the OS thread ends. Pages never touched cost nothing; an overflow meets a guard page.
class Stacks {
 public:
  char* at(size_t number) {
    while (mapped_.size() <= number) mapped_.push_back(map());
    return mapped_[number] + page_;
  }

  ~Stacks() {
    for (char* stack : mapped_) munmap(stack, page_ + kStackBytes);
  }

 private:
  char* map() const {
    void* at = mmap(nullptr, page_ + kStackBytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (at == MAP_FAILED || mprotect(at, page_, PROT_NONE) != 0) throw std::bad_alloc();
    return static_cast<char*>(at);
  }

  const size_t page_ = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  std::vector<char*> mapped_;
};

inline thread_local Stacks stacks;

// Where a fiber, or the OS thread's own function, was left.
struct Context {
#if FS_SWITCH_BY_UCONTEXT
  ucontext_t registers;
#else
  void* stack_pointer = nullptr;
#endif
  const void* stack = nullptr;  // its lowest address
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // ASan's
};

#if !FS_SWITCH_BY_UCONTEXT
// Saves what a call must preserve and where it stands, and goes on where another was left. noipa: GCC must not conclude
// from its body what it leaves alone.
__attribute__((naked, noipa)) inline void switch_stack(void** /*saved*/, void* /*next*/) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}
#endif

#if FS_ASAN
inline thread_local Context* left_context = nullptr;
#endif

// To be called first wherever a switch arrives.
inline void arrived_in([[maybe_unused]] Context& context) {
#if FS_ASAN
  __sanitizer_finish_switch_fiber(context.fake_stack, &left_context->stack, &left_context->stack_bytes);
#endif
}

inline void switch_context(Context& from, Context& to, [[maybe_unused]] bool for_good) {
#if FS_ASAN
  left_context = &from;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#if FS_SWITCH_BY_UCONTEXT
  swapcontext(&from.registers, &to.registers);
#else
  switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
  arrived_in(from);
}

// The first switch to it calls `entry`, which never returns.
inline void prepare(Context& context, size_t number, void (*entry)()) {
  char* const stack = stacks.at(number);
  // Tops that lay a multiple of 4 KB apart would share a few sets of the cache.
  const size_t bytes = kStackBytes - number % 32 * 128;
  context.stack = stack;
  context.stack_bytes = bytes;
  context.fake_stack = nullptr;
#if FS_SWITCH_BY_UCONTEXT
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = bytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#else
  // As switch_stack leaves it: six registers and an address to return to, above it what a call would have pushed.
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
#endif
}

// Of a fiber that never finished: ASan still holds its variables' borders against the next one on this stack.
inline void forget([[maybe_unused]] const Context& context) {
#if FS_ASAN
  __asan_unpoison_memory_region(context.stack, context.stack_bytes);
#endif
}

}  // namespace emulation
}  // namespace fastseq::cuda
