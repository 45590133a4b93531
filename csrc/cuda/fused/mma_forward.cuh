// The fused forward pass for bfloat16 and float16, on tensor cores.
//
// A warp takes 16 rows, or a multiple of 16, through all layers in registers:
// the accumulators of one product, rounded to 16 bits, are the operand of the
// next. Weights are staged in shared memory once per block. The backward pass
// propagates delta with the same products, with the weights staged transposed.
//
// The forward pass reads x, and writes y and the hidden activations that are
// saved. No other memory traffic grows with the rows. Without hidden
// activations this is 2 (widths[0] + widths[L]) bytes per row, or 256 for 64 ->
// 64 -> 64 -> 64. This limits the speed: at the 4.8 TB/s of an H200, 2^20 rows
// take 56 us. For each tile of 32 rows a warp reads all weights from shared
// memory, 768 bytes per row for these three layers. At 128 bytes per cycle this
// takes 6 cycles per row, or 27 us on 132 multiprocessors at 1.755 GHz. These
// are predictions, not measurements.
#pragma once

#include "mma_layer.cuh"

namespace relu_mlp::cuda {

// The forward pass of layers with at most 32 * Groups columns. Warps are
// independent of each other once the weights are staged.
template <typename T, int Groups, int Tiles>
RELU_MLP_KERNEL void RELU_MLP_BOUNDS(
    tuning::fused_threads,
    tuning::fused_residents_16_bit(false, group_width* Groups))
    mma_forward(RELU_MLP_PARAMETER ForwardParameters<T> p) {
  constexpr bool is_bf16 = is_bfloat16<T>;
  unsigned char* const shared = shared_memory();
  const FusedNetwork<T>& network = p.network;
  const int layers = network.layers;
  const int* const widths = network.widths;
  RELU_MLP_NO_UNROLL
  for (int l = 0; l < layers; ++l) {
    stage(
        contiguous_view(network.weights[l], widths[l + 1], widths[l]),
        shared + p.layout.weights[l]);
    stage_bias(
        network.biases[l], widths[l + 1],
        reinterpret_cast<float*>(shared + p.layout.biases[l]));
  }
  sync();

  const int g = lane_index() / 4, t = lane_index() % 4;
  const int warps = block_size() / warp_size;
  const View16 x = view(p.pass.x, widths[0]);
  constexpr int rows_of_warp = 16 * Tiles;
  // Fits into an int: no device has memory for 2^31 tiles of 32 rows.
  const int tiles = static_cast<int>(ceil_div(x.rows, rows_of_warp));
  RELU_MLP_NO_UNROLL
  for (int tile = block_index() * warps + warp_index(); tile < tiles;
       tile += grid_size() * warps) {
    const int64_t row = int64_t(tile) * rows_of_warp;
    auto a = load_rows<Groups, Tiles>(x, row);
    RELU_MLP_NO_UNROLL
    for (int l = 0; l < layers - 1; ++l) {
      a = hidden_layer<is_bf16>(
          a, widths[l], widths[l + 1], shared + p.layout.weights[l],
          reinterpret_cast<const float*>(shared + p.layout.biases[l]));
      if (p.pass.hidden[l]) {
        store_rows(a, p.pass.hidden[l], x.rows, widths[l + 1], row);
      }
    }
    const int l = layers - 1, width = widths[layers];
    RELU_MLP_NO_UNROLL
    for (int q = 0; q < groups_of(width); ++q) {
      float z[Tiles][2][8];
      pre_activations<is_bf16>(
          a, widths[l], width, shared + p.layout.weights[l],
          reinterpret_cast<const float*>(shared + p.layout.biases[l]), q, z);
      RELU_MLP_UNROLL
      for (int m = 0; m < Tiles; ++m) {
        RELU_MLP_UNROLL
        for (int half = 0; half < 2; ++half) {
          activate(network.output_activation, z[m][half]);
          store_vector(
              p.pass.y, x.rows, width, row + 16 * m + 8 * half + g,
              group_width * q + vector_width * t,
              pack_vector<is_bf16>(z[m][half]));
        }
      }
    }
  }
}

} // namespace relu_mlp::cuda
