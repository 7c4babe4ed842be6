// A block of CUDA threads on a CPU, so that a kernel's own source can be run and tested where there is no card. Threads are coroutines:
// a barrier, or an operation of a warp, suspends one until all others have come. Who goes on next is drawn, so that a missing barrier shows.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <random>
#include <vector>

struct Index { unsigned x, y, z; };
struct int4 { int x, y, z, w; };
struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };
static int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static Index threadIdx, blockIdx, blockDim, gridDim;
using std::max;
using std::min;

namespace block {

enum State { READY, AT_WARP, AT_BARRIER, ENDED };
struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  State state;
  int operations;     // of its warp so far
  int exchanged[2];  // two of them: a slow thread may still read what a fast one wrote before its next
};
static std::vector<Thread> threads;
static ucontext_t scheduler;
static std::function<void()> body;
static int current;

static void wait(State state) {
  threads[current].state = state;
  swapcontext(&threads[current].context, &scheduler);
}

static void begin() {
  body();
  threads[current].state = ENDED;
}

// The values that all lanes of the warp bring.
static std::vector<int> exchange(int value) {
  const int me = current, which = threads[me].operations++ & 1;
  threads[me].exchanged[which] = value;
  wait(AT_WARP);
  std::vector<int> all(32);
  for (int lane = 0; lane < 32; ++lane) all[lane] = threads[(me & ~31) + lane].exchanged[which];
  return all;
}

static bool all_wait(int from, int to, State state) {
  return std::all_of(&threads[from], &threads[to], [=](const Thread& t) { return t.state == state; });
}

static bool release(int from, int to, State state) {
  if (!all_wait(from, to, state)) return false;
  for (int i = from; i < to; ++i) threads[i].state = READY;
  return true;
}

// Runs `what` by `count` threads, a multiple of 32; false if they wait for one another for ever.
static bool run(int count, unsigned seed, std::function<void()> what) {
  std::mt19937 random(seed);
  body = what;
  threads = std::vector<Thread>(count);
  blockDim = {unsigned(count), 1, 1}, gridDim = {1, 1, 1}, blockIdx = {0, 0, 0};
  for (Thread& t : threads) {
    t.stack.resize(32768);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.data();
    t.context.uc_stack.ss_size = t.stack.size();
    t.context.uc_link = &scheduler;
    makecontext(&t.context, begin, 0);
  }
  for (;;) {
    std::vector<int> ready;
    for (int i = 0; i < count; ++i)
      if (threads[i].state == READY) ready.push_back(i);
    std::shuffle(ready.begin(), ready.end(), random);
    for (int i : ready) {
      current = i;
      threadIdx = {unsigned(i), 0, 0};
      swapcontext(&scheduler, &threads[i].context);
    }
    if (all_wait(0, count, ENDED)) return true;
    bool released = release(0, count, AT_BARRIER);
    for (int warp = 0; warp < count; warp += 32) released |= release(warp, warp + 32, AT_WARP);
    if (!released) return false;
  }
}

}  // namespace block

static void __syncthreads() { block::wait(block::AT_BARRIER); }
static unsigned __ballot_sync(unsigned, bool flag) {
  unsigned bits = 0;
  const std::vector<int> all = block::exchange(flag);
  for (int lane = 0; lane < 32; ++lane) bits |= unsigned(all[lane]) << lane;
  return bits;
}
static int __shfl_up_sync(unsigned, int value, int by) {
  const int lane = threadIdx.x & 31;
  return block::exchange(value)[lane < by ? lane : lane - by];
}
static int __ffs(unsigned bits) { return __builtin_ffs(bits); }

// What headers name and the kernels run here do not use.
static float __shfl_xor_sync(unsigned, float, int);
static float __uint_as_float(unsigned);

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define asm HOST_ASM  // PTX is left out, whether volatile or not
#define HOST_ASM(...)
#define volatile(...)
static int HOST_ASM;
