#include "fused.h"

#include "fma.cuh"
#include "mma_backward.cuh"
#include "mma_forward.cuh"

#include <algorithm>

namespace relu_mlp::cuda {
namespace {

// Calls f<Groups>() with enough groups for the widest layer.
template <typename T, typename F>
void with_groups(const FusedNetwork<T>& network, const F& f) {
  const int groups = groups_of(
      *std::max_element(network.widths, network.widths + network.layers + 1));
  if (groups == 1) {
    f.template operator()<1>();
  } else if (groups == 2) {
    f.template operator()<2>();
  } else {
    f.template operator()<4>();
  }
}

} // namespace

template <typename T>
void fused_forward(
    const FusedNetwork<T>& network,
    const FusedForward<T>& pass,
    const FusedPlan& plan,
    Stream stream) {
  const ForwardParameters<T> p{network, pass, plan.layout, plan.tile_rows};
  const LaunchConfig shape{plan.grid, plan.threads, plan.layout.bytes};
  if constexpr (sizeof(T) == 2) {
    with_groups(network, [&]<int Groups>() {
      launch(
          mma_forward<T, Groups, tuning::forward_row_tiles>, shape, stream, p);
    });
  } else {
    launch(fma_forward, shape, stream, p);
  }
}

template <typename T>
void fused_backward(
    const FusedNetwork<T>& network,
    const FusedBackward<T>& pass,
    const FusedPlan& plan,
    void* workspace,
    Stream stream) {
  BackwardParameters<T> p{};
  p.network = network;
  p.pass = pass;
  p.layout = plan.layout;
  p.recompute_y = pass.recompute &&
      (pass.squares || network.output_activation != Activation::none);
  p.tile_rows = plan.tile_rows;
  p.sum_floats = plan.sum_floats;
  p.sums = static_cast<float*>(workspace);
  p.squares = reinterpret_cast<double*>(
      static_cast<char*>(workspace) + fused_squares_offset(plan));
  const LaunchConfig shape{plan.grid, plan.threads, plan.layout.bytes};
  if constexpr (sizeof(T) == 2) {
    with_groups(network, [&]<int Groups>() {
      launch(
          mma_backward<T, Groups, tuning::backward_row_tiles>, shape, stream,
          p);
    });
  } else {
    launch(fma_backward, shape, stream, p);
  }
  const int64_t sum_grid = ceil_div(plan.sum_floats, tuning::fused_threads);
  launch(
      sum_blocks<T>, LaunchConfig{sum_grid, tuning::fused_threads}, stream,
      SumParameters<T>{p, static_cast<int>(plan.grid)});
}

#define RELU_MLP_INSTANTIATE(T)                                          \
  template void fused_forward(                                           \
      const FusedNetwork<T>&, const FusedForward<T>&, const FusedPlan&,  \
      Stream);                                                           \
  template void fused_backward(                                          \
      const FusedNetwork<T>&, const FusedBackward<T>&, const FusedPlan&, \
      void*, Stream);
RELU_MLP_INSTANTIATE(float)
RELU_MLP_INSTANTIATE(BFloat16)
RELU_MLP_INSTANTIATE(Half)
#undef RELU_MLP_INSTANTIATE

} // namespace relu_mlp::cuda
