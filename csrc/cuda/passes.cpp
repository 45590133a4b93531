// The passes on a GPU. Each pass makes its plan and follows it. Kernels run on
// the device of the tensors, on PyTorch's current stream of that device.
#include "passes.h"

#include "../device_passes.h"
#include "fused/fused.h"
#include "layered/layered.h"
#include "plan.h"

namespace relu_mlp::cuda {
namespace {

// Makes a tensor's device current for the lifetime of the guard, in PyTorch and
// in the CUDA runtime that launches our kernels. Afterwards PyTorch's device is
// restored.
class DeviceGuard {
 public:
  explicit DeviceGuard([[maybe_unused]] const Tensor& tensor) {
#ifndef RELU_MLP_CUDA_ON_HOST
    const int32_t device = tensor.device_index();
    int32_t current;
    check_call(aoti_torch_get_current_device_index(&current));
    if (device != current) {
      check_call(aoti_torch_create_device_guard(device, &guard_));
    }
    set_device(device);
#endif
  }
  DeviceGuard(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (guard_) {
      aoti_torch_delete_device_guard(guard_);
    }
  }

 private:
  DeviceGuardHandle guard_ = nullptr;
};

// Whether a pass must recompute hidden activations or y.
template <typename T>
bool recomputes(const Network<T>& network, const BackwardPass<T>& pass) {
  bool reads = pass.reads_y(network.output_activation);
  for (std::size_t l = 1; l < network.layers.size(); ++l) {
    reads |= pass.needs.reads_input(l);
  }
  return pass.recompute && reads;
}

// The layers from `first` on.
template <typename T>
FusedNetwork<T> fused_network(const Network<T>& network, std::size_t first) {
  FusedNetwork<T> fused{};
  fused.layers = int(network.layers.size() - first);
  fused.output_activation = network.output_activation;
  for (int l = 0; l <= fused.layers; ++l) {
    fused.widths[l] = int(network.width(first + l));
  }
  for (int l = 0; l < fused.layers; ++l) {
    fused.weights[l] = network.layers[first + l].weight.data;
    fused.biases[l] = network.layers[first + l].bias;
  }
  return fused;
}

// One call with elements of type T.
template <typename T>
class CudaDevice {
 public:
  static constexpr bool has_vjp = false;
  static constexpr bool needs_contiguous = true;
  static constexpr int64_t unknown_width = 1; // fused kernels reject width 0
  static constexpr Activate<T> activate = nullptr;
  // The other losses are computed between the passes (relu_mlp/ops/backend.py).
  static constexpr bool serves(Loss loss) {
    return loss == Loss::sse || loss == Loss::half_sse || loss == Loss::mse;
  }

  explicit CudaDevice(const Tensor& like)
      : guard_(like), like_(like), stream_(current_stream()) {}

  Tensor new_matrix(int64_t rows, int64_t cols) const {
    return empty<2>({rows, cols}, like_);
  }

  void forward(const Network<T>& network, const std::vector<T*>& hidden, T* y)
      const {
    const PassPlan plan = plan_pass(
        {network.x.rows, network.widths(), int(sizeof(T)), false, false,
         device_properties()});
    if (plan.method == Method::fused) {
      if constexpr (has_fused) {
        FusedForward<T> to{network.x, {}, y};
        std::copy(hidden.begin(), hidden.end(), to.hidden);
        fused_forward(fused_network(network, 0), to, plan.fused, stream_);
      }
    } else {
      LayeredPasses<T>(network, like_, stream_).forward(hidden, y);
    }
  }

  void backward(const Network<T>& network, const BackwardPass<T>& pass) const {
    const std::size_t lowest = pass.needs.lowest_layer();
    if (lowest == network.layers.size()) {
      return; // no gradient is needed
    }
    // The layers below the lowest one with a gradient are left out.
    const std::size_t first = pass.recompute ? 0 : lowest;
    const PassPlan plan = plan_pass(
        {network.x.rows, network.widths(first), int(sizeof(T)), true,
         recomputes(network, pass), device_properties()});
    if (plan.method == Method::fused) {
      if constexpr (has_fused) {
        run_fused(network, pass, first, plan.fused);
      }
    } else {
      LayeredPasses<T>(network, like_, stream_).backward(pass);
    }
  }

 private:
  static constexpr bool has_fused = !std::is_same_v<T, double>;

  void run_fused(
      const Network<T>& network,
      const BackwardPass<T>& pass,
      std::size_t first,
      const FusedPlan& plan) const {
    const FusedNetwork<T> layers = fused_network(network, first);
    FusedBackward<T> to{};
    to.rows = network.x.rows;
    to.lowest = int(pass.needs.lowest_layer() - first);
    to.recompute = recomputes(network, pass);
    to.x = first > 0 ? pass.hidden[first - 1] : network.x;
    for (int l = 0; l < layers.layers; ++l) {
      if (!pass.recompute && l + 1 < layers.layers) {
        to.hidden[l] = pass.hidden[first + l].data;
      }
      to.grad_weights[l] = pass.grad_weights[first + l];
      to.grad_biases[l] = pass.grad_biases[first + l];
    }
    to.y = pass.y.data;
    to.grad_output = pass.grad_output;
    to.target = pass.target.values.data;
    to.loss_scale = pass.loss_scale;
    to.grad_x = pass.grad_x;

    const int64_t bytes = fused_workspace_bytes(plan);
    const Tensor workspace = empty<1>({bytes / int64_t(sizeof(T)) + 1}, like_);
    const Tensor squares =
        empty<1>({int64_t(sizeof(double) / sizeof(T))}, like_);
    to.squares = pass.loss ? squares.data<double>() : nullptr;
    fused_backward(layers, to, plan, workspace.data<void>(), stream_);
    if (pass.loss) {
      write_loss(pass.loss, to.squares, pass.loss_scale, stream_);
    }
  }

  const DeviceGuard guard_;
  const Tensor& like_;
  const Stream stream_;
};

} // namespace

constinit const Passes passes = passes_of<CudaDevice>(/*checks_devices=*/true);

} // namespace relu_mlp::cuda
