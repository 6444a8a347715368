// Stacks of their own that a thread of the CPU changes between. swapcontext asks the kernel for the signal mask at every
// switch; here a switch is some instructions on x86-64 and aarch64, and ucontext elsewhere.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__))
#  define FIBER_ASSEMBLED 1
#else
#  include <ucontext.h>
#endif

#if defined(FIBER_ASSEMBLED)
// Keeps what a callee has to keep on the stack that is left, its pointer in *from, and goes on where `to` was left.
extern "C" void tandem_fiber_swap(void** from, void* to) asm("tandem_fiber_swap"); // A name of this object file alone.
#  if defined(__x86_64__)
asm(R"(
.pushsection .text
.p2align 4
.type tandem_fiber_swap, @function
tandem_fiber_swap:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tandem_fiber_swap, .-tandem_fiber_swap
.popsection
)");
#  else
asm(R"(
.pushsection .text
.p2align 4
.type tandem_fiber_swap, %function
tandem_fiber_swap:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size tandem_fiber_swap, .-tandem_fiber_swap
.popsection
)");
#  endif
#endif

namespace { // See emu.h.
namespace emu {

#if defined(FIBER_ASSEMBLED)
using Place = void*; // Where a fiber was left.
inline void swap(Place& from, Place& to) { tandem_fiber_swap(&from, to); }
#else
using Place = ucontext_t;
inline void swap(Place& from, Place& to) { swapcontext(&from, &to); }
#endif

// A stack that is kept for the life of the process.
struct Fiber {
  static constexpr size_t SIZE = 256 << 10, GUARD = 64 << 10;
  char* stack = nullptr;

  // Where `entry` begins on this stack. It never returns.
  Place begin(void (*entry)(), int number) {
    if (!stack) {
      void* all = mmap(nullptr, SIZE + GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (all == MAP_FAILED || mprotect(static_cast<char*>(all) + GUARD, SIZE, PROT_READ | PROT_WRITE)) {
        perror("the stack of a fiber");
        abort();
      }
      stack = static_cast<char*>(all) + GUARD;
    }
    // The tops of the stacks are spread over a page: else all of them would share a few lines of the cache.
    size_t size = SIZE - number * 320 % 4096 / 64 * 64;
#if defined(FIBER_ASSEMBLED)
    void** top = reinterpret_cast<void**>(stack + size);
#  if defined(__x86_64__)
    top -= 2; // A function finds its stack 8 bytes off a multiple of 16, below the place of a return address.
    top[0] = reinterpret_cast<void*>(entry);
    top[1] = nullptr;
    top -= 6;
#  else
    top -= 20;
    top[11] = reinterpret_cast<void*>(entry);
#  endif
    return top;
#else
    Place place;
    getcontext(&place);
    place.uc_stack.ss_sp = stack;
    place.uc_stack.ss_size = size;
    place.uc_link = nullptr;
    makecontext(&place, entry, 0);
    return place;
#endif
  }
};

}  // namespace emu
}  // namespace
