#include "fused.h"

#include "fma.cuh"
#include "mma.cuh"
#include "mma_backward.cuh"
#include "gradient_sums.cuh"

#include <algorithm>
#include <stdexcept>

namespace relu_mlp::cuda {
namespace {

template <typename T>
NarrowPlanQuestion question(
    const Narrow<T>& network,
    int64_t rows,
    bool is_backward,
    bool recompute,
    const Device& device) {
  NarrowPlanQuestion q{
      network.layers, {}, sizeof(T), rows, is_backward, recompute, device};
  for (int l = 0; l <= network.layers; ++l) {
    q.widths[l] = network.widths[l];
  }
  return q;
}

NarrowPlan plan_of(const NarrowPlanQuestion& question) {
  const NarrowPlan plan = narrow_plan(question);
  if (!plan.serves) {
    throw std::logic_error("relu_mlp: not a call for the narrow regime");
  }
  return plan;
}

template <typename T>
int widest(const Narrow<T>& network) {
  int widest = 0;
  for (int l = 0; l <= network.layers; ++l) {
    widest = std::max(widest, network.widths[l]);
  }
  return widest;
}

// Calls f<Groups>() with room for the widest layer.
template <typename F>
void with_groups(int width, const F& f) {
  const int groups = groups_of(width);
  if (groups == 1) {
    f.template operator()<1>();
  } else if (groups == 2) {
    f.template operator()<2>();
  } else {
    f.template operator()<4>();
  }
}

template <typename T>
int lowest_layer(const Narrow<T>& network, const NarrowBackward<T>& pass) {
  int l = 0;
  while (!pass.grad_x && l < network.layers && !pass.grad_weights[l] &&
         !pass.grad_biases[l]) {
    ++l;
  }
  return l;
}

// Whether y, or anything else that is needed and was not given, has to be
// computed from x. (Of an empty batch nothing has an address.)
template <typename T>
void find_recomputation(
    const Narrow<T>& network,
    BackwardParameters<T>& p) {
  const bool needs_y =
      p.pass.squares || network.output_activation != Activation::none;
  p.recompute_y = needs_y && !p.pass.y;
  p.recompute = p.recompute_y;
  for (int l = std::max(1, p.lowest); l < network.layers; ++l) {
    const bool needs_input = l > p.lowest || p.pass.grad_weights[l];
    p.recompute |= needs_input && !p.pass.hidden[l - 1];
  }
}

} // namespace

template <typename T>
void narrow_forward(
    const Narrow<T>& network,
    const NarrowForward<T>& pass,
    Stream stream) {
  const NarrowPlan plan = plan_of(question(
      network, pass.x.rows, false, false, device_properties()));
  if (plan.grid == 0) {
    return;
  }
  const ForwardParameters<T> p{
      network, pass, plan.layout, plan.tile_rows};
  const Launch shape{plan.grid, plan.threads, plan.layout.bytes};
  if constexpr (sizeof(T) == 2) {
    with_groups(widest(network), [&]<int Groups>() {
      launch(mma_forward<T, Groups, forward_row_tiles>, shape, stream, p);
    });
  } else {
    launch(fma_forward, shape, stream, p);
  }
}

template <typename T>
void narrow_backward(
    const Narrow<T>& network,
    const NarrowBackward<T>& pass,
    void* workspace,
    Stream stream) {
  BackwardParameters<T> p{};
  p.network = network;
  p.pass = pass;
  p.lowest = lowest_layer(network, pass);
  if (p.lowest == network.layers && !pass.squares) {
    return;
  }
  p.rows = pass.squares ? pass.x.rows : pass.grad_output.rows;
  if (p.rows > 0) {
    find_recomputation(network, p);
  }
  const NarrowPlan plan = plan_of(question(
      network, p.rows, true, p.recompute, device_properties()));
  p.layout = plan.layout;
  p.tile_rows = plan.tile_rows;
  p.sum_floats = plan.sum_floats;
  p.sums = static_cast<float*>(workspace);
  p.squares = reinterpret_cast<double*>(
      static_cast<char*>(workspace) + narrow_workspace_squares(plan));
  if (plan.grid > 0) {
    const Launch shape{plan.grid, plan.threads, plan.layout.bytes};
    if constexpr (sizeof(T) == 2) {
      with_groups(widest(network), [&]<int Groups>() {
        launch(mma_backward<T, Groups, backward_row_tiles>, shape, stream, p);
      });
    } else {
      launch(fma_backward, shape, stream, p);
    }
  }
  const int64_t sum_grid = ceil_div(plan.sum_floats, narrow_threads);
  launch(
      sum_blocks<T>, Launch{sum_grid, narrow_threads}, stream,
      SumParameters<T>{p, static_cast<int>(plan.grid)});
}

template <typename T>
int64_t narrow_workspace(
    const Narrow<T>& network,
    int64_t rows,
    const Device& device) {
  int64_t most = 0;
  for (const bool recompute : {false, true}) {
    const NarrowPlan plan =
        narrow_plan(question(network, rows, true, recompute, device));
    if (plan.serves) {
      most = std::max(most, narrow_workspace_bytes(plan));
    }
  }
  return most;
}

#define RELU_MLP_NARROW(T)                                                   \
  template void narrow_forward(                                              \
      const Narrow<T>&, const NarrowForward<T>&, Stream);                    \
  template void narrow_backward(                                             \
      const Narrow<T>&, const NarrowBackward<T>&, void*, Stream);            \
  template int64_t narrow_workspace(                                         \
      const Narrow<T>&, int64_t, const Device&);
RELU_MLP_NARROW(float)
RELU_MLP_NARROW(BFloat16)
RELU_MLP_NARROW(Half)
#undef RELU_MLP_NARROW

} // namespace relu_mlp::cuda
