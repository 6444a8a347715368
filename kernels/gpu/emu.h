// Kernels on the CPU: one block at a time, its threads in a fixed order. What `--device emu` runs and what the tests
// judge. A thread runs until it waits for others; only then another stack is begun, so a kernel whose threads never wait
// is a plain loop. One launch at a time in a process: what the threads of a block share is static.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <utility>
#include <vector>

#include "fiber.h"

#if GPU_TILE == 1
#  define WARP 64
#else
#  define WARP 32
#endif
#define __device__
#define __forceinline__ inline
#define LAUNCH(threads, blocks)
#define LAUNCH_UP_TO(threads, blocks)
#define __shared__ static
#define KERNEL void

namespace { // Each layout of lanes has its own copy of everything.
namespace emu {

constexpr int MOST = 1024;

// Where threads wait for each other, and how often it has opened.
struct Gate {
  int arrived = 0;
  long opened = 0;
};

enum class State { fresh, waits, done };
struct Thread {
  State state;
  Place place;  // where it was left,
  Gate* gate;   // and what it waits for: that this gate
  long opened;  // has opened more often than so.
};

int now, threads, bx, by, bz, unfinished;
std::function<void()> body;
Gate block, warps[MOST / WARP];
Thread all[MOST];
Fiber fibers[MOST];
std::vector<int> spare; // Fibers that no thread is on.
Place home;

uint32_t deposit[2][MOST];
uint16_t left[MOST][16], right[MOST][16];
float sums[MOST][8];

inline bool can_run(const Thread& it) {
  return it.state == State::fresh || (it.state == State::waits && it.gate->opened != it.opened);
}

// Who runs after `me`: a thread of the same warp as long as there is one, so that few stacks are in use at a time.
inline int next(int me) {
  int first = me / WARP * WARP;
  for (int i = me + 1; i < first + WARP; ++i)
    if (can_run(all[i])) return i;
  for (int i = first; i < me; ++i)
    if (can_run(all[i])) return i;
  for (int i = 0; i < threads; ++i)
    if (can_run(all[i])) return i;
  fprintf(stderr, "%d of %d threads of block (%d, %d, %d) wait where the others do not come\n", unfinished, threads, bx, by, bz);
  abort();
}

// A stack that runs thread after thread, until one of them waits.
inline void entry() {
  int own = spare.back();
  spare.pop_back();
  for (;;) {
    int me = now;
    body();
    all[me].state = State::done;
    now = --unfinished ? next(me) : -1;
    if (now >= 0 && all[now].state == State::fresh) continue;
    spare.push_back(own);
    Place left;
    swap(left, now < 0 ? home : all[now].place);
  }
}

// Goes to thread `now`, which has not begun or waits no more.
inline void go(Place& from) {
  if (all[now].state == State::waits) return swap(from, all[now].place);
  Place fresh = fibers[spare.back()].begin(entry, spare.back());
  swap(from, fresh);
}

// Waits until `of` threads have come; the last of them does `last` before any goes on.
template <class F>
inline void pass(Gate& gate, int of, F last) {
  if (++gate.arrived == of) {
    last();
    gate.arrived = 0;
    ++gate.opened;
    return;
  }
  int me = now;
  all[me].state = State::waits;
  all[me].gate = &gate;
  all[me].opened = gate.opened;
  now = next(me);
  go(all[me].place);
}

inline Gate& warp() { return warps[now / WARP]; }
inline void pass_warp() { pass(warp(), WARP, [] {}); }

template <class F>
inline void launch(F kernel, int gx, int gy, int gz, int n) {
  if (n <= 0 || n % WARP || n > MOST) {
    fprintf(stderr, "a block of %d threads, of waves of %d\n", n, WARP);
    abort();
  }
  threads = n;
  body = std::move(kernel);
  if (spare.empty())
    for (int i = MOST; i--;) spare.push_back(i);
  for (bz = 0; bz < gz; ++bz)
    for (by = 0; by < gy; ++by)
      for (bx = 0; bx < gx; ++bx) {
        block = Gate();
        for (int i = 0; i < n / WARP; ++i) warps[i] = Gate();
        for (int i = 0; i < n; ++i) all[i].state = State::fresh;
        unfinished = n;
        now = 0;
        go(home);
      }
}

}  // namespace emu

#define TX (emu::now)
#define BX (emu::bx)
#define BY (emu::by)
#define BZ (emu::bz)
inline void block_sync() { emu::pass(emu::block, emu::threads, [] {}); }
inline void warp_sync() { emu::pass_warp(); }
inline int lane_() { return TX % WARP; }
inline int shfl_i(int v, int from) {
  int me = TX, first = me / WARP * WARP;
  // Two places each, in turns: who is through this gate may write again before the last has read.
  uint32_t* deposit = emu::deposit[emu::warp().opened & 1];
  deposit[me] = v;
  emu::pass_warp();
  return deposit[first + (from & (WARP - 1))];
}
inline float exp2_(float x) { return exp2f(x); }
inline float log2_(float x) { return log2f(x); }
inline float rsqrt_(float x) { return 1.f / sqrtf(x); }
inline float rcp_(float x) { return 1.f / x; }
inline float sqrt_(float x) { return sqrtf(x); }
inline float fma_(float a, float b, float c) { return fmaf(a, b, c); }
inline float max_(float a, float b) { return fmaxf(a, b); }
inline float min_(float a, float b) { return fminf(a, b); }
inline float rint_(float x) { return rintf(x); }

}  // namespace
