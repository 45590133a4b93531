#include "csrc/cuda/machine.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

namespace relu_mlp::cuda::emulator {
namespace {

constexpr std::size_t stack_bytes = 128 << 10, guard_bytes = 1024;
constexpr unsigned char guard = 0xa5, poison = 0xff; // poison: NaNs

enum class State { ready, at_barrier, in_warp, done };

// The first switch to a fiber is swapcontext, the others are longjmp, which
// makes no system call.
struct Fiber {
  std::unique_ptr<unsigned char[]> stack{new unsigned char[stack_bytes]};
  ucontext_t start;
  jmp_buf resume;
  bool has_started = false;
  State state = State::ready;
};

struct Warp {
  void* arguments[warp_size];
  Operation operation;
  int arrived;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  jmp_buf scheduler;
  Place place;
  const std::function<void()>* body = nullptr;
  int at_barrier = 0, done = 0;
  bool is_running = false;
  std::string error;
  std::mt19937_64 random;
};

Machine machine;

[[noreturn]] void to_scheduler() {
  _longjmp(machine.scheduler, 1);
}

void switch_away() {
  Fiber& fiber = *machine.fibers[machine.place.thread];
  if (_setjmp(fiber.resume) == 0) {
    to_scheduler();
  }
}

// A fiber serves the same thread of one block after the other.
void live() {
  for (;;) {
    (*machine.body)();
    machine.fibers[machine.place.thread]->state = State::done;
    ++machine.done;
    switch_away();
  }
}

void resume(int thread) {
  Fiber& fiber = *machine.fibers[thread];
  machine.place.thread = thread;
  if (_setjmp(machine.scheduler) != 0) {
    return;
  }
  if (fiber.has_started) {
    _longjmp(fiber.resume, 1);
  }
  fiber.has_started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = stack_bytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, live, 0);
  setcontext(&fiber.start);
}

void check(bool holds, const char* message) {
  if (!holds) {
    // The stacks of the remaining fibers need no unwinding.
    machine.fibers.clear();
    machine.is_running = false;
    throw std::runtime_error(std::string("CUDA on the host: ") + message);
  }
}

void run_block(int threads) {
  machine.warps.assign(threads / warp_size, Warp{});
  machine.at_barrier = machine.done = 0;
  for (int n = 0; n < threads; ++n) {
    machine.fibers[n]->state = State::ready;
  }
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  while (machine.done < threads) {
    std::shuffle(order.begin(), order.end(), machine.random);
    bool has_run = false;
    for (const int thread : order) {
      if (machine.fibers[thread]->state == State::ready) {
        has_run = true;
        resume(thread);
        check(machine.error.empty(), machine.error.c_str());
      }
    }
    check(has_run, "threads wait for others that have left or wait elsewhere");
  }
}

} // namespace

Settings& settings() {
  static Settings settings;
  return settings;
}

int64_t& launches() {
  static int64_t launches = 0;
  return launches;
}

const Place& here() {
  return machine.place;
}

void fail(const std::string& message) {
  machine.error = message;
  to_scheduler();
}

void run(const Launch& shape, const std::function<void()>& body) {
  check(!machine.is_running, "a launch within a kernel");
  check(shape.grid >= 1 && shape.grid < int64_t(1) << 31, "bad grid");
  check(
      shape.block >= warp_size && shape.block <= 1024 &&
          shape.block % warp_size == 0,
      "bad block size");
  check(
      shape.shared_bytes >= 0 &&
          shape.shared_bytes <= settings().device.shared_per_block,
      "more shared memory than a block may have");
  ++launches();
  while (machine.fibers.size() < static_cast<std::size_t>(shape.block)) {
    machine.fibers.push_back(std::make_unique<Fiber>());
  }
  const int64_t bytes = shape.shared_bytes;
  std::vector<Vector16> memory((bytes + 2 * guard_bytes) / 16 + 1);
  auto* const start = reinterpret_cast<unsigned char*>(memory.data());
  machine.body = &body;
  machine.error.clear();
  machine.random.seed(settings().seed);
  machine.place.shared = start + guard_bytes;
  machine.place.threads = shape.block;
  machine.place.grid = static_cast<int>(shape.grid);
  machine.is_running = true;
  std::vector<int64_t> blocks(shape.grid);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), machine.random);
  for (const int64_t block : blocks) {
    machine.place.block = static_cast<int>(block);
    std::memset(start, guard, bytes + 2 * guard_bytes);
    std::memset(start + guard_bytes, poison, bytes);
    run_block(shape.block);
    const auto is_guard = [](unsigned char byte) { return byte == guard; };
    check(
        std::all_of(start, start + guard_bytes, is_guard) &&
            std::all_of(
                start + guard_bytes + bytes, start + bytes + 2 * guard_bytes,
                is_guard),
        "a write outside the block's shared memory");
  }
  machine.is_running = false;
}

void wait_for_block() {
  machine.fibers[machine.place.thread]->state = State::at_barrier;
  if (++machine.at_barrier == machine.place.threads) {
    machine.at_barrier = 0;
    for (int n = 0; n < machine.place.threads; ++n) {
      machine.fibers[n]->state = State::ready;
    }
  }
  // The last fiber to arrive waits for its turn too.
  switch_away();
}

void with_warp(Operation operation, void* argument) {
  const int thread = machine.place.thread, lane = thread % warp_size;
  Warp& warp = machine.warps[thread / warp_size];
  if (warp.arrived > 0 && warp.operation != operation) {
    fail("the threads of a warp meet in different operations");
  }
  warp.operation = operation;
  warp.arguments[lane] = argument;
  machine.fibers[thread]->state = State::in_warp;
  if (++warp.arrived == warp_size) {
    warp.arrived = 0;
    operation(warp.arguments);
    for (int n = 0; n < warp_size; ++n) {
      machine.fibers[thread - lane + n]->state = State::ready;
    }
  }
  switch_away();
}

void load_transposed(void* const* arguments) {
  const auto argument = [&](int lane) {
    return static_cast<LoadTransposed*>(arguments[lane]);
  };
  for (int lane = 0; lane < warp_size; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int m = 0; m < 4; ++m) {
      uint16_t low, high;
      std::memcpy(
          &low, static_cast<const uint16_t*>(argument(8 * m + 2 * t)->row) + g,
          2);
      std::memcpy(
          &high,
          static_cast<const uint16_t*>(argument(8 * m + 2 * t + 1)->row) + g,
          2);
      argument(lane)->words[m] = uint32_t(low) | uint32_t(high) << 16;
    }
  }
}

template <bool IsBFloat16>
void mma(void* const* arguments) {
  float a[16][16], b[16][8], c[16][8];
  const auto argument = [&](int lane) {
    return static_cast<Mma*>(arguments[lane]);
  };
  const auto put = [](float* pair, std::ptrdiff_t stride, uint32_t word) {
    pair[0] = unpack_low<IsBFloat16>(word);
    pair[stride] = unpack_high<IsBFloat16>(word);
  };
  for (int lane = 0; lane < warp_size; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const Mma& mine = *argument(lane);
    for (int part = 0; part < 4; ++part) {
      put(&a[g + 8 * (part % 2)][2 * t + 8 * (part / 2)], 1, mine.a[part]);
      c[g + 8 * (part / 2)][2 * t + part % 2] = mine.c[part];
    }
    for (int part = 0; part < 2; ++part) {
      put(&b[2 * t + 8 * part][g], 8, mine.b[part]);
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) {
        c[i][j] += a[i][k] * b[k][j];
      }
    }
  }
  for (int lane = 0; lane < warp_size; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int part = 0; part < 4; ++part) {
      argument(lane)->c[part] = c[g + 8 * (part / 2)][2 * t + part % 2];
    }
  }
}

template void mma<true>(void* const*);
template void mma<false>(void* const*);

} // namespace relu_mlp::cuda::emulator
