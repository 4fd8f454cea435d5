// Runs a CUDA kernel on the CPU, one block after the other: every thread is a fiber that runs until it waits.
//
// __syncthreads lets nobody pass until all threads of the block wait there, a shuffle until all lanes of the warp do; between barriers
// the warps run one after the other, and so do their lanes between waits, in ascending, descending or shuffled order. A kernel whose result depends on that
// order lacks a barrier. (Most missing barriers go unseen in ascending order: thread 0, which writes, runs first.) A barrier
// that some threads never reach is an error, where a GPU would hang or go on.
//
// Include this, then the .cu file: it defines the names that nvcc would.
#pragma once
#include <setjmp.h>
#include <stdint.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <vector>

namespace cuda_on_cpu {

enum class State { ready, at_shuffle, at_barrier, done };
enum Order { ascending, descending, shuffled };

struct Fiber {
  State state;
  bool started;
  int predicate;      // brought to the barrier
  uint64_t given;     // brought to the shuffle
  uint64_t seen;      // what this lane gave, kept while others read it
  jmp_buf resume;
  std::vector<char> stack;
};

struct Index { uint32_t x; };

inline std::vector<Fiber> fibers;
inline Index thread_index, block_index;
inline int barrier_count;
inline jmp_buf scheduler;
inline const std::function<void()>* kernel;

// _setjmp and _longjmp switch stacks without a system call, which swapcontext makes; that one only starts a fiber.
inline void wait(State at) {
  Fiber& me = fibers[thread_index.x];
  me.state = at;
  if (_setjmp(me.resume) == 0) _longjmp(scheduler, 1);
}

inline void fiber_main() {
  (*kernel)();
  fibers[thread_index.x].state = State::done;
  _longjmp(scheduler, 1);
}

inline void run_until_it_waits(uint32_t thread) {
  Fiber& fiber = fibers[thread];
  thread_index.x = thread;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.data();
  context.uc_stack.ss_size = fiber.stack.size();
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

inline bool release(uint32_t begin, uint32_t end, State from) {
  for (uint32_t t = begin; t < end; ++t)
    if (fibers[t].state != from) return false;
  barrier_count = 0;
  for (uint32_t t = begin; t < end; ++t) {
    barrier_count += fibers[t].predicate != 0;
    fibers[t].seen = fibers[t].given;
    fibers[t].state = State::ready;
  }
  return true;
}

inline std::vector<uint32_t> turns(uint32_t n, Order order, std::mt19937& random) {
  std::vector<uint32_t> turn(n);
  for (uint32_t i = 0; i < n; ++i) turn[i] = order == descending ? n - 1 - i : i;
  if (order == shuffled) std::shuffle(turn.begin(), turn.end(), random);
  return turn;
}

inline void run_block(uint32_t block, uint32_t threads, Order order, const std::function<void()>& body) {
  static std::mt19937 random(1);
  block_index.x = block;
  kernel = &body;
  fibers.resize(threads);
  for (Fiber& fiber : fibers) {
    fiber.state = State::ready;
    fiber.started = false;
    fiber.stack.resize(32768);
  }
  const uint32_t warps = threads / 32;
  for (;;) {
    for (uint32_t warp : turns(warps, order, random)) {  // a warp runs until all of it waits at the barrier: the others have not moved meanwhile
      const std::vector<uint32_t> lane_turn = turns(32, order, random);
      do {
        for (uint32_t lane : lane_turn)
          if (fibers[warp * 32 + lane].state == State::ready) run_until_it_waits(warp * 32 + lane);
      } while (release(warp * 32, warp * 32 + 32, State::at_shuffle));
    }
    if (release(0, threads, State::at_barrier)) continue;
    for (const Fiber& fiber : fibers)
      if (fiber.state != State::done) throw std::runtime_error("some threads wait where the others never come");
    return;
  }
}

template <class T> T from_lane(T value, uint32_t thread_seen_from) {
  fibers[thread_index.x].given = (uint64_t)value;
  wait(State::at_shuffle);
  return (T)fibers[thread_seen_from].seen;
}

}  // namespace cuda_on_cpu

// ---------------------------------------------------------------- CUDA's names

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define threadIdx cuda_on_cpu::thread_index
#define blockIdx cuda_on_cpu::block_index

using std::max;
using std::min;

struct alignas(16) uint4 { uint32_t x, y, z, w; };

inline int __syncthreads_count(int predicate) {
  cuda_on_cpu::fibers[threadIdx.x].predicate = predicate;
  cuda_on_cpu::wait(cuda_on_cpu::State::at_barrier);
  return cuda_on_cpu::barrier_count;
}
inline void __syncthreads() { __syncthreads_count(0); }

template <class T> T __shfl_xor_sync(uint32_t, T value, int mask) { return cuda_on_cpu::from_lane(value, threadIdx.x ^ mask); }

template <class T> T __shfl_up_sync(uint32_t, T value, uint32_t distance) {
  return cuda_on_cpu::from_lane(value, threadIdx.x % 32 >= distance ? threadIdx.x - distance : threadIdx.x);
}

inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  cuda_on_cpu::from_lane(value, threadIdx.x);
  for (uint32_t t = threadIdx.x / 32 * 32, end = t + 32; t < end; ++t) value = max(value, (uint32_t)cuda_on_cpu::fibers[t].seen);
  return value;
}

inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  const uint32_t before = *address;
  *address += value;
  return before;
}
