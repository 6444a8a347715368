// Kernels on the CPU: a fiber a GPU thread, one block at a time, in a fixed order. What `--device emu` runs and what the
// tests judge; not fast, and one launch at a time in a process.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <utility>
#include <vector>

#if GPU_TILE == 1
#  define WARP 64
#else
#  define WARP 32
#endif
#define __device__
#define __forceinline__ inline
#define LAUNCH(threads, blocks)
#define __shared__ static
#define KERNEL void

namespace { // Each layout of lanes has its own copy of everything.
namespace emu {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
};

// Where threads wait for each other.
struct Gate {
  int arrived = 0;
  long generation = 0;
};

std::vector<Fiber> fibers;
ucontext_t home;
int now, threads, bx, by, bz;
std::function<void()> body;
Gate block;
std::vector<Gate> warps;
uint32_t deposit[1024];
uint16_t left[1024][16], right[1024][16];

inline void yield() { swapcontext(&fibers[now].context, &home); }

inline void pass(Gate& gate, int of) {
  long generation = gate.generation;
  if (++gate.arrived == of) {
    gate.arrived = 0;
    ++gate.generation;
    return;
  }
  while (gate.generation == generation) yield();
}

inline void pass_warp() { pass(warps[now / WARP], WARP); }

inline void entry() {
  body();
  fibers[now].done = true;
  yield();
}

inline void launch(std::function<void()> kernel, int gx, int gy, int gz, int n) {
  threads = n;
  if (n % WARP || n > 1024) {
    fprintf(stderr, "a block of %d threads, of waves of %d\n", n, WARP);
    abort();
  }
  body = std::move(kernel);
  for (bz = 0; bz < gz; ++bz)
    for (by = 0; by < gy; ++by)
      for (bx = 0; bx < gx; ++bx) {
        block = Gate();
        warps.assign(n / WARP, Gate());
        if ((int)fibers.size() < n) fibers.resize(n);
        for (now = 0; now < n; ++now) {
          Fiber& fiber = fibers[now];
          fiber.stack.resize(256 << 10);
          fiber.done = false;
          getcontext(&fiber.context);
          fiber.context.uc_stack.ss_sp = fiber.stack.data();
          fiber.context.uc_stack.ss_size = fiber.stack.size();
          fiber.context.uc_link = &home;
          makecontext(&fiber.context, entry, 0);
        }
        for (int left = n; left;) {
          left = 0;
          for (now = 0; now < n; ++now)
            if (!fibers[now].done) {
              swapcontext(&home, &fibers[now].context);
              left += !fibers[now].done;
            }
        }
      }
}

}  // namespace emu

#define TX (emu::now)
#define BX (emu::bx)
#define BY (emu::by)
#define BZ (emu::bz)
inline void block_sync() { emu::pass(emu::block, emu::threads); }
inline void warp_sync() { emu::pass_warp(); }
inline int lane_() { return TX % WARP; }
inline int shfl_i(int v, int from) {
  int me = TX, first = me / WARP * WARP;
  emu::deposit[me] = v;
  emu::pass_warp();
  v = emu::deposit[first + ((from % WARP) + WARP) % WARP];
  emu::pass_warp();
  return v;
}
inline float exp2_(float x) { return exp2f(x); }
inline float log2_(float x) { return log2f(x); }
inline float rsqrt_(float x) { return 1.f / sqrtf(x); }
inline float rcp_(float x) { return 1.f / x; }
inline float max_(float a, float b) { return fmaxf(a, b); }
inline float min_(float a, float b) { return fminf(a, b); }

}  // namespace
