// The passes on the CPU: how results are allocated, how activations are
// applied, and which class does the products.
#include "passes.h"

#include "../device_passes.h"
#include "../direct.h"
#include "bf16_layers.h"
#include "call.h"
#include "huge_pages.h"
#include "library_layers.h"
#include "packed_layers.h"
#include "walk.h"

namespace relu_mlp::cpu {
namespace {

// z = phi(z) for `count` contiguous elements.
template <typename T>
void activate(Activation phi, T* z, int64_t count) {
  with_row(phi, [&]<typename Row>() {
    if constexpr (Row::applied_by == AppliedBy::pytorch) {
      apply_in_place(Row::in_place, z, count, aoti_torch_device_type_cpu(), 0);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        z[i] = T(Row::forward(compute_t<T>(z[i])));
      }
    }
  });
}

// Rejects matrices that fit into no memory. Sizes can then be multiplied and
// added without an overflow. (A tensor may be that large: x and a weight may
// have a stride of 0.)
template <typename T>
void check_sizes(const Network<T>& network) {
  constexpr double most = double(int64_t(1) << 48);
  const double rows = double(network.x.rows);
  for (const Layer<T>& layer : network.layers) {
    const double out = double(layer.weight.rows),
                 in = double(layer.weight.cols);
    const double largest = std::max({out * in, rows * in, rows * out});
    if (largest > most) {
      fail_to_allocate(largest * sizeof(T));
    }
  }
}

// Calls f<L>(plan) with the class that does the products of the plan.
template <typename T, typename F>
void with_layers(const Network<T>& network, const F& f) {
  check_sizes(network);
  const Plan plan = make_plan(call_of(network));
  switch (plan.layers) {
    case LayersKind::packed:
      return f.template operator()<PackedLayers<T>>(plan);
    case LayersKind::library:
      return f.template operator()<LibraryLayers<T>>(plan);
    case LayersKind::bf16:
      if constexpr (std::is_same_v<T, BFloat16>) {
        f.template operator()<Bf16Layers<float>>(plan);
      }
      return;
    case LayersKind::bf16_one_block:
      if constexpr (std::is_same_v<T, BFloat16>) {
        f.template operator()<Bf16Layers<BFloat16>>(plan);
      }
      return;
  }
}

template <typename T>
void run_forward(
    const Network<T>& network,
    const std::vector<T*>& hidden,
    T* y) {
  with_layers(network, [&]<typename L>(const Plan& plan) {
    walk_forward<L>(network, plan, hidden, y);
  });
}

template <typename T>
void run_backward(const Network<T>& network, const BackwardPass<T>& pass) {
  with_layers(network, [&]<typename L>(const Plan& plan) {
    walk_backward<L>(network, plan, pass);
  });
}

template <typename T>
void run_vjp(const Network<T>& network, const VjpPass<T>& pass) {
  with_layers(network, [&]<typename L>(const Plan& plan) {
    walk_vjp<L>(network, plan, pass);
  });
}

template <typename T>
class CpuDevice {
 public:
  static constexpr bool has_vjp = true;
  static constexpr bool needs_contiguous = false;
  static constexpr int64_t unknown_width = 0;
  static constexpr Activate<T> activate = cpu::activate<T>;
  static constexpr bool serves(Loss) {
    return true;
  }

  explicit CpuDevice(const Tensor& like) : like_(like) {}

  Tensor new_matrix(int64_t rows, int64_t cols) const {
    Tensor tensor = empty<2>({rows, cols}, like_);
    prefer_huge_pages(
        tensor.data<T>(), tensor.numel() * static_cast<int64_t>(sizeof(T)));
    return tensor;
  }
  void forward(const Network<T>& network, const std::vector<T*>& hidden, T* y)
      const {
    run_forward(network, hidden, y);
  }
  void backward(const Network<T>& network, const BackwardPass<T>& pass) const {
    run_backward(network, pass);
  }
  void vjp(const Network<T>& network, const VjpPass<T>& pass) const {
    run_vjp(network, pass);
  }

 private:
  const Tensor& like_;
};

} // namespace

constinit const Passes passes = passes_of<CpuDevice>(/*checks_devices=*/false);

namespace {

template <typename T>
constexpr DirectPasses<T> direct_passes{
    activate<T>, run_forward<T>, run_backward<T>, run_vjp<T>};

constexpr Direct direct{direct_layout,           prefer_huge_pages,
                        direct_passes<float>,    direct_passes<double>,
                        direct_passes<BFloat16>, direct_passes<Half>};

} // namespace
} // namespace relu_mlp::cpu

extern "C" __attribute__((visibility("default"))) const relu_mlp::Direct*
relu_mlp_direct() {
  return &relu_mlp::cpu::direct;
}
