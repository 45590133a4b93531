// The CUDA machine on the host: the other form of csrc/cuda/machine.h.
//
// A block's threads are fibers of one processor thread. A fiber runs until it
// reaches a barrier or a warp-wide operation. The fibers take turns in an order
// that is shuffled each time, so that a missing barrier shows as a wrong result
// under some seed. Blocks run one after the other, also in a shuffled order.
// Device memory is host memory. Shared memory starts as NaNs and has guards
// around it. The emulator checks that no thread ends while others wait, that a
// warp's threads meet in the same operation, that 16-byte accesses are aligned
// and that the launch is within the device's limits.
//
// It does not emulate concurrent blocks, truly concurrent accesses of two
// threads between two barriers, the order and the rounding of a tensor core's
// sums, or anything about time. The functions here replace those of machine.h,
// which the host never runs.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#define RELU_MLP_DEVICE inline
#define RELU_MLP_KERNEL
#define RELU_MLP_BOUNDS(...)
#define RELU_MLP_PARAMETER const
#define RELU_MLP_UNROLL
#define RELU_MLP_NO_UNROLL
#define RELU_MLP_UNROLL_TWICE

namespace relu_mlp::cuda {
namespace emulator {

// Settings that a test may change before a launch.
struct Settings {
  uint64_t seed = 0; // of the orders of threads and blocks
  Device device{132, 232448, 233472};
};
Settings& settings();

// The number of kernels launched so far.
int64_t& launches();

// The position of the running thread.
struct Place {
  int thread, block;
  int threads, grid;
  unsigned char* shared;
};
const Place& here();

// Runs body() as every thread of every block.
void run(const Launch& shape, const std::function<void()>& body);

// A barrier of the block.
void wait_for_block();

// The running thread's part of a warp-wide operation. When all 32 threads have
// arrived, `operation` gets their arguments in the order of the lanes.
using Operation = void (*)(void* const* arguments);
void with_warp(Operation operation, void* argument);

// Ends the launch with an error.
[[noreturn]] void fail(const std::string& message);

} // namespace emulator

inline Stream current_stream() {
  return nullptr;
}
inline Device device_properties() {
  return emulator::settings().device;
}

template <typename P>
void launch(
    void (*kernel)(P),
    const Launch& shape,
    Stream,
    const P& parameters) {
  emulator::run(shape, [&] { kernel(parameters); });
}

inline int thread_index() {
  return emulator::here().thread;
}
inline int block_size() {
  return emulator::here().threads;
}
inline int block_index() {
  return emulator::here().block;
}
inline int grid_size() {
  return emulator::here().grid;
}
inline int lane_index() {
  return thread_index() % warp_size;
}
inline int warp_index() {
  return thread_index() / warp_size;
}

inline void sync() {
  emulator::wait_for_block();
}

namespace emulator {

template <typename V>
struct Shuffle {
  V given;
  int source;
  V received;
};

template <typename V>
V shuffle_from(V value, int source) {
  Shuffle<V> mine{value, source, value};
  with_warp(
      [](void* const* arguments) {
        for (int lane = 0; lane < warp_size; ++lane) {
          auto* to = static_cast<Shuffle<V>*>(arguments[lane]);
          to->received = static_cast<Shuffle<V>*>(arguments[to->source])->given;
        }
      },
      &mine);
  return mine.received;
}

} // namespace emulator

template <typename V>
V shuffle_xor(V value, int mask) {
  return emulator::shuffle_from(value, lane_index() ^ mask);
}
inline unsigned char* shared_memory() {
  return emulator::here().shared;
}

namespace emulator {

inline void check_alignment(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    fail("a 16-byte access that is not aligned");
  }
}

} // namespace emulator

inline Vector16 load16(const void* address) {
  emulator::check_alignment(address);
  Vector16 v;
  std::memcpy(&v, address, 16);
  return v;
}
inline void store16(void* address, const Vector16& v) {
  emulator::check_alignment(address);
  std::memcpy(address, &v, 16);
}

namespace emulator {

struct LoadTransposed {
  const void* row;
  uint32_t words[4];
};
void load_transposed(void* const* arguments);

// The operands of one lane, by address; see mma() in machine.h.
struct Mma {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};
template <bool IsBFloat16>
void mma(void* const* arguments);

} // namespace emulator

inline void load_transposed(uint32_t (&words)[4], const void* row) {
  emulator::check_alignment(row);
  emulator::LoadTransposed mine{row, {}};
  emulator::with_warp(emulator::load_transposed, &mine);
  std::memcpy(words, mine.words, sizeof(words));
}

template <bool IsBFloat16>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Mma mine{c, a, {b0, b1}};
  emulator::with_warp(emulator::mma<IsBFloat16>, &mine);
}

template <bool IsBFloat16>
using Element16 = std::conditional_t<
    IsBFloat16,
    torch::headeronly::BFloat16,
    torch::headeronly::Half>;

template <bool IsBFloat16>
uint32_t pack(float low, float high) {
  const Element16<IsBFloat16> a(low), b(high);
  return uint32_t(a.x) | uint32_t(b.x) << 16;
}
template <bool IsBFloat16>
float unpack_low(uint32_t word) {
  using T = Element16<IsBFloat16>;
  return T(static_cast<unsigned short>(word & 0xffff), T::from_bits());
}
template <bool IsBFloat16>
float unpack_high(uint32_t word) {
  using T = Element16<IsBFloat16>;
  return T(static_cast<unsigned short>(word >> 16), T::from_bits());
}

template <bool IsBFloat16>
uint32_t relu(uint32_t z) {
  const auto relu = [](float z) { return z <= 0.0f ? 0.0f : z; };
  return pack<IsBFloat16>(
      relu(unpack_low<IsBFloat16>(z)), relu(unpack_high<IsBFloat16>(z)));
}
template <bool IsBFloat16>
uint32_t select_positive(uint32_t change, uint32_t a) {
  return (unpack_low<IsBFloat16>(a) <= 0.0f ? 0 : change & 0x0000ffffu) |
      (unpack_high<IsBFloat16>(a) <= 0.0f ? 0 : change & 0xffff0000u);
}

} // namespace relu_mlp::cuda
