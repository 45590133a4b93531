// The sums of the gradients: in a block's shared memory, in the workspace, and
// over the blocks.
#pragma once

#include "parameters.cuh"

namespace relu_mlp::cuda {

// Adds 4 floats to 4 in shared memory.
RELU_MLP_DEVICE void add(float* sums, const float (&c)[4]) {
  Float4 s = *reinterpret_cast<Float4*>(sums);
  RELU_MLP_UNROLL
  for (int i = 0; i < 4; ++i) {
    s.v[i] += c[i];
  }
  *reinterpret_cast<Float4*>(sums) = s;
}

template <typename T>
RELU_MLP_DEVICE int sum_floats_of_layer(const FusedNetwork<T>& network, int l) {
  return sum_floats_of(
      network.widths[l + 1], network.widths[l], static_cast<int>(sizeof(T)));
}

template <typename T>
RELU_MLP_DEVICE void clear_sums(
    const BackwardParameters<T>& p,
    unsigned char* shared) {
  RELU_MLP_NO_UNROLL
  for (int l = 0; l < p.network.layers; ++l) {
    float* const sums = reinterpret_cast<float*>(shared + p.layout.sums[l]);
    for (int n = thread_index(); n < sum_floats_of_layer(p.network, l);
         n += block_size()) {
      sums[n] = 0.0f;
    }
  }
}

// Writes a block's sums to its part of the workspace. The caller synchronizes
// the block first.
template <typename T>
RELU_MLP_DEVICE void write_sums(
    const BackwardParameters<T>& p,
    unsigned char* shared,
    double squares) {
  float* to = p.sums + int64_t(block_index()) * p.sum_floats;
  RELU_MLP_NO_UNROLL
  for (int l = 0; l < p.network.layers; ++l) {
    const float* const sums =
        reinterpret_cast<const float*>(shared + p.layout.sums[l]);
    const int count = sum_floats_of_layer(p.network, l);
    for (int n = thread_index(); n < count; n += block_size()) {
      to[n] = sums[n];
    }
    to += count;
  }
  if (p.pass.squares) {
    sum_over_block(
        squares, reinterpret_cast<double*>(shared + p.layout.deltas[0]),
        p.squares + block_index());
  }
}

template <typename T>
struct SumParameters {
  BackwardParameters<T> backward;
  int blocks;
};

// Each thread adds up one element of the workspace's sums over the blocks, in a
// fixed order, and rounds it to T once. The first warp adds up the squares. The
// L2 cache, which holds the workspace, limits the speed: there are 4 * blocks
// bytes for each element, 7 MB in all for 64 -> 64 -> 64 -> 64 on an H200.
template <typename T>
RELU_MLP_KERNEL void RELU_MLP_BOUNDS(tuning::fused_threads)
    sum_blocks(RELU_MLP_PARAMETER SumParameters<T> parameters) {
  const BackwardParameters<T>& p = parameters.backward;
  const int blocks = parameters.blocks;
  const int n = block_index() * block_size() + thread_index();
  if (p.pass.squares && block_index() == 0 && warp_index() == 0) {
    double sum = 0;
    for (int b = lane_index(); b < blocks; b += warp_size) {
      sum += p.squares[b];
    }
    RELU_MLP_UNROLL
    for (int mask = warp_size / 2; mask > 0; mask /= 2) {
      sum += shuffle_xor(sum, mask);
    }
    if (lane_index() == 0) {
      *p.pass.squares = sum;
    }
  }

  int l = 0, index = n;
  while (l < p.network.layers && index >= sum_floats_of_layer(p.network, l)) {
    index -= sum_floats_of_layer(p.network, l++);
  }
  if (l == p.network.layers) {
    return;
  }
  const int out = p.network.widths[l + 1], in = p.network.widths[l];
  const SumPlace place = sizeof(T) == 2 ? mma_sum_place(index, out, in)
                                        : fma_sum_place(index, out, in);
  T* const to =
      place.column < 0 ? p.pass.grad_biases[l] : p.pass.grad_weights[l];
  if (place.row < 0 || !to) {
    return;
  }
  // Four independent sums.
  float sums[4] = {};
  int b = 0;
  for (; b + 4 <= blocks; b += 4) {
    RELU_MLP_UNROLL
    for (int i = 0; i < 4; ++i) {
      sums[i] += p.sums[int64_t(b + i) * p.sum_floats + n];
    }
  }
  for (; b < blocks; ++b) {
    sums[0] += p.sums[int64_t(b) * p.sum_floats + n];
  }
  const float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  to[place.column < 0 ? place.row : place.row * in + place.column] =
      static_cast<T>(sum);
}

} // namespace relu_mlp::cuda
