// The passes on plain data. Threads take chunks of rows. Each chunk goes
// through the network in blocks of rows.
//
// A block goes through all layers while it is in the cache. The forward pass
// stores the hidden activations that are to be saved (block_forward.h). In the
// backward pass, the gradient of a hidden layer never exists whole
// (block_backward.h), and neither does its tangent in a second derivative
// (block_vjp.h). The number of chunks depends on the plan alone, and each
// chunk has its own sums (chunk_sums.h). If there is only one chunk, threads
// may share each product instead.
#pragma once

#include <vector>

#include "block_backward.h"
#include "block_forward.h"
#include "block_vjp.h"
#include "chunk_sums.h"

namespace relu_mlp::cpu {

// Calls f(c, begin, end) for every chunk c of the rows, on several threads.
template <typename F>
void for_each_chunk(const Plan& plan, int64_t rows, const F& f) {
  parallel_for(plan.chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      f(c, std::min(rows, c * plan.chunk),
        std::min(rows, (c + 1) * plan.chunk));
    }
  });
}

// Writes y (rows, out), and the hidden activations a_1 ... a_{L-1} if `hidden`
// has pointers for them. All are contiguous.
template <typename L, typename T>
  requires Layers<L, T>
void walk_forward(
    const Network<T>& network,
    const Plan& plan,
    const std::vector<T*>& hidden,
    T* y) {
  const L layers(network, plan, PassNeeds{true, nullptr});
  for_each_chunk(
      plan, network.x.rows, [&](int64_t, int64_t begin, int64_t end) {
        BlockForward<T, L>(network, layers, plan.block)
            .run(begin, end, hidden, y);
      });
}

// Writes the gradients that `pass` needs.
template <typename L, typename T>
  requires Layers<L, T>
void walk_backward(
    const Network<T>& network,
    const Plan& plan,
    const BackwardPass<T>& pass) {
  const L layers(network, plan, PassNeeds{pass.recompute, &pass.needs});
  ChunkSums<T, typename L::Sum> sums(
      network, plan, pass.grad_weights, pass.grad_biases);
  std::vector<double> losses(plan.chunks);
  for_each_chunk(
      plan, network.x.rows, [&](int64_t c, int64_t begin, int64_t end) {
        BlockBackward<T, L>(network, layers, plan, pass)
            .run(begin, end, sums.weights_of(c), sums.biases_of(c), &losses[c]);
      });
  if (pass.loss) {
    double sum = 0;
    for (const double of_chunk : losses) {
      sum += of_chunk;
    }
    *pass.loss = T(compute_t<T>(pass.loss_scale * sum));
  }
  sums.write_results();
}

// Writes the gradients that `pass` wants.
template <typename L, typename T>
  requires Layers<L, T>
void walk_vjp(
    const Network<T>& network,
    const Plan& plan,
    const VjpPass<T>& pass) {
  const VjpNeeds<T> needs(network, pass);
  const int64_t rows = network.x.rows;
  const auto write_zeros_unless = [](bool is_computed, T* to, int64_t count) {
    if (to && !is_computed) {
      std::fill_n(to, count, T(compute_t<T>(0)));
    }
  };
  const std::size_t layers = network.layers.size();
  const int64_t outputs = rows * network.width(layers);
  write_zeros_unless(needs.of_grad_output(), pass.of_grad_output, outputs);
  write_zeros_unless(needs.of_y(), pass.of_y, outputs);
  std::vector<T*> of_weights(layers);
  for (std::size_t l = 0; l < layers; ++l) {
    const int64_t out = network.width(l + 1), in = network.width(l);
    write_zeros_unless(needs.of_weight(l), pass.of_weights[l], out * in);
    write_zeros_unless(needs.of_input(l), pass.of_inputs[l], rows * in);
    of_weights[l] = needs.of_weight(l) ? pass.of_weights[l] : nullptr;
  }

  const L of_network(network, plan, typename VjpNeeds<T>::OfWeights{needs});
  const L of_tangents(
      pass.tangents, plan, typename VjpNeeds<T>::OfTangents{needs});
  const std::vector<T*> no_biases(layers);
  ChunkSums<T, typename L::Sum> sums(network, plan, of_weights, no_biases);
  for_each_chunk(plan, rows, [&](int64_t c, int64_t begin, int64_t end) {
    BlockVjp<T, L>(network, of_network, of_tangents, plan, pass, needs)
        .run(begin, end, sums.weights_of(c));
  });
  sums.write_results();
}

} // namespace relu_mlp::cpu
