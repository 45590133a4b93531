// The fused passes on the emulator, for test_cuda_fused.py to call.

#include "csrc/cuda/machine.h"
#include "csrc/cuda/fused/fused.h"

#include <algorithm>
#include <string>
#include <vector>

using namespace relu_mlp;
using namespace relu_mlp::cuda;

namespace {

// As test_cuda_fused.Call, field by field.
struct Arguments {
  int64_t element; // 0: float, 1: BFloat16, 2: Half
  int64_t layers, widths[max_layers + 1];
  int64_t activation;
  int64_t rows;
  const void *weights[max_layers], *biases[max_layers];
  const void* x;
  int64_t x_strides[2];
  void* hidden[max_layers];
  void* y;
  const void* grad_output;
  int64_t grad_strides[2];
  const void* target;
  double loss_scale;
  double* squares;
  void* grad_x;
  void *grad_weights[max_layers], *grad_biases[max_layers];
  int64_t seed, multiprocessors, shared_bytes;
};

template <typename T>
void copy(T* to[max_layers], void* const from[max_layers]) {
  std::transform(
      from, from + max_layers, to, [](void* p) { return static_cast<T*>(p); });
}
template <typename T>
void copy(const T* to[max_layers], const void* const from[max_layers]) {
  std::transform(from, from + max_layers, to, [](const void* p) {
    return static_cast<const T*>(p);
  });
}

template <typename T>
Matrix<const T> matrix(
    const void* data,
    const Arguments& call,
    int64_t columns,
    const int64_t* strides) {
  return {
      static_cast<const T*>(data), call.rows, columns, strides[0], strides[1]};
}

template <typename T>
FusedNetwork<T> network(const Arguments& call) {
  FusedNetwork<T> network{};
  network.layers = static_cast<int>(call.layers);
  std::copy_n(call.widths, max_layers + 1, network.widths);
  copy(network.weights, call.weights);
  copy(network.biases, call.biases);
  network.output_activation = static_cast<Activation>(call.activation);
  return network;
}

Call question(const Arguments& call, bool is_backward, bool recomputes) {
  return {
      call.rows,
      {call.widths, call.widths + call.layers + 1},
      call.element == 0 ? 4 : 2,
      is_backward,
      recomputes,
      {static_cast<int>(call.multiprocessors),
       static_cast<int>(call.shared_bytes),
       static_cast<int>(call.shared_bytes + 1024)}};
}

// Throws if the fused kernels do not serve the call.
FusedPlan plan_of(const Arguments& call, bool is_backward, bool recomputes) {
  FusedPlan plan;
  if (!fused_serves(question(call, is_backward, recomputes), plan)) {
    throw std::logic_error("not a call for the fused kernels");
  }
  return plan;
}

// Needs for the gradients whose pointers are given.
std::string needs_of(const Arguments& call) {
  std::string flags(1, call.grad_x ? '1' : '0');
  for (int64_t l = 0; l < call.layers; ++l) {
    flags += call.grad_weights[l] ? '1' : '0';
  }
  for (int64_t l = 0; l < call.layers; ++l) {
    flags += call.grad_biases[l] ? '1' : '0';
  }
  return flags;
}

// Whether an operand that the pass reads is missing.
bool recomputes(const Arguments& call, const Needs& needs) {
  const auto phi = static_cast<Activation>(call.activation);
  bool missing = (call.squares || needs.reads_y(phi)) && !call.y;
  for (int64_t l = 1; l < call.layers; ++l) {
    missing |= needs.reads_input(l) && !call.hidden[l - 1];
  }
  return missing;
}

template <typename T>
void forward(const Arguments& call) {
  FusedForward<T> pass{};
  pass.x = matrix<T>(call.x, call, call.widths[0], call.x_strides);
  copy(pass.hidden, call.hidden);
  pass.y = static_cast<T*>(call.y);
  fused_forward(
      network<T>(call), pass, plan_of(call, false, false), current_stream());
}

template <typename T>
void backward(const Arguments& call) {
  FusedBackward<T> pass{};
  pass.x = matrix<T>(call.x, call, call.widths[0], call.x_strides);
  copy(pass.hidden, const_cast<const void* const*>(call.hidden));
  pass.y = static_cast<const T*>(call.y);
  pass.grad_output = matrix<T>(
      call.grad_output, call, call.widths[call.layers], call.grad_strides);
  pass.target = static_cast<const T*>(call.target);
  pass.loss_scale = call.loss_scale;
  pass.squares = call.squares;
  pass.grad_x = static_cast<T*>(call.grad_x);
  copy(pass.grad_weights, call.grad_weights);
  copy(pass.grad_biases, call.grad_biases);

  const std::string flags = needs_of(call);
  const Needs needs{flags};
  pass.rows = call.rows;
  pass.lowest = static_cast<int>(needs.lowest_layer());
  if (pass.lowest == call.layers && !pass.squares) {
    return;
  }
  pass.recompute = recomputes(call, needs);
  const FusedPlan plan = plan_of(call, true, pass.recompute);
  const FusedNetwork<T> given = network<T>(call);
  const int64_t bytes = fused_workspace_bytes(plan);
  constexpr uint32_t nans = ~0u, guard = 0xa5a5a5a5u;
  constexpr int64_t guards = 64;
  std::vector<Vector16> memory(
      bytes / 16 + 1 + guards, Vector16{{nans, nans, nans, nans}});
  auto* const end = reinterpret_cast<unsigned char*>(memory.data()) + bytes;
  std::fill(end, reinterpret_cast<unsigned char*>(&*memory.end()), 0xa5);
  fused_backward(given, pass, plan, memory.data(), current_stream());
  for (int64_t n = memory.size() - guards; n < int64_t(memory.size()); ++n) {
    if (memory[n].word[0] != guard || memory[n].word[3] != guard) {
      throw std::runtime_error("a write outside the workspace");
    }
  }
}

template <template <typename> typename Run>
const char* run(const Arguments& call) {
  static std::string error;
  emulator::settings().seed = call.seed;
  emulator::settings().device = {
      static_cast<int>(call.multiprocessors),
      static_cast<int>(call.shared_bytes),
      static_cast<int>(call.shared_bytes + 1024)};
  try {
    if (call.element == 0) {
      Run<float>()(call);
    } else if (call.element == 1) {
      Run<BFloat16>()(call);
    } else {
      Run<Half>()(call);
    }
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

template <typename T>
struct Forward {
  void operator()(const Arguments& call) const {
    forward<T>(call);
  }
};
template <typename T>
struct Backward {
  void operator()(const Arguments& call) const {
    backward<T>(call);
  }
};

// Kernels with mistakes that the emulator has to detect.
struct Mistake {
  int64_t which;
};
void mistaken(const Mistake mistake) {
  if (mistake.which == 1 && thread_index() > 3) {
    sync();
  } else if (mistake.which == 2) {
    shared_memory()[128] = 0;
  } else if (mistake.which == 3) {
    load16(shared_memory() + 4);
  }
}

struct Exchange {
  bool with_barrier;
  int* received;
};
void exchange(const Exchange p) {
  const int n = thread_index();
  int* const sent = reinterpret_cast<int*>(shared_memory());
  sent[n] = n;
  if (p.with_barrier) {
    sync();
  }
  p.received[n] = sent[n ^ 33];
}

} // namespace

extern "C" {

const char* run_mistake(int64_t which) {
  static std::string error;
  try {
    const int64_t bytes = which == 4 ? 1 << 20 : 128;
    launch(mistaken, {1, 64, bytes}, current_stream(), Mistake{which});
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

// The number of threads, of 256, that did not receive another one's value.
int64_t mixed_up(bool with_barrier) {
  std::vector<int> received(256);
  launch(
      exchange, {1, 256, 1024}, current_stream(),
      Exchange{with_barrier, received.data()});
  int64_t count = 0;
  for (int n = 0; n < 256; ++n) {
    count += received[n] != (n ^ 33);
  }
  return count;
}

// Null, or an error message.
const char* run_forward(const Arguments* call) {
  return run<Forward>(*call);
}
const char* run_backward(const Arguments* call) {
  return run<Backward>(*call);
}

int64_t launches() {
  return emulator::launches();
}

// serves, threads, tile_rows, grid, sum_floats, bytes of shared memory, bytes
// of workspace.
void plan(
    const Arguments* call,
    bool is_backward,
    bool recompute,
    int64_t* result) {
  FusedPlan p{};
  const bool serves = fused_serves(question(*call, is_backward, recompute), p);
  const int64_t values[] = {
      serves,
      p.threads,
      p.tile_rows,
      p.grid,
      p.sum_floats,
      p.layout.bytes,
      fused_workspace_bytes(p)};
  std::copy(std::begin(values), std::end(values), result);
}

int64_t index_of_column(int64_t tile, int64_t n) {
  return logical_column(static_cast<int>(tile), static_cast<int>(n));
}
int64_t index_of_chunk(int64_t row, int64_t chunk, int64_t groups) {
  return chunk_offset(
      static_cast<int>(row), static_cast<int>(chunk), static_cast<int>(groups));
}
int64_t stride_of_floats(int64_t width) {
  return fma_stride(static_cast<int>(width));
}
void place_of_sum(
    bool is_16_bit,
    int64_t index,
    int64_t out,
    int64_t in,
    int64_t* result) {
  const auto place = is_16_bit ? mma_sum_place : fma_sum_place;
  const SumPlace found = place(
      static_cast<int>(index), static_cast<int>(out), static_cast<int>(in));
  result[0] = found.row;
  result[1] = found.column;
}

} // extern "C"
