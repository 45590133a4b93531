// Which passes the fused kernels serve, and how: tiles, launch shapes and the
// layout of shared memory.
#pragma once

#include <algorithm>

#include "../device.h"
#include "layout.h"

namespace relu_mlp::cuda {

struct FusedPlan {
  int threads; // of a block
  int tile_rows; // rows that a block processes at a time
  int64_t grid; // number of blocks
  int sum_floats; // floats in a block's gradient sums of all layers
  FusedLayout layout;
};

inline int widest_of(const PassSpec& pass) {
  return int(*std::max_element(pass.widths.begin(), pass.widths.end()));
}

inline FusedLayout fused_layout(const PassSpec& pass, int tile_rows) {
  FusedLayout layout{};
  const int layers = int(pass.widths.size()) - 1;
  const auto width = [&](int l) { return int(pass.widths[l]); };
  const bool is_16_bit = pass.element_size == 2;
  const bool is_backward = pass.is_backward;
  // The bytes of a matrix. Weights get as many rows as the products read.
  const auto bytes_of = [&](int rows, int width) {
    return is_16_bit ? rows * groups_of(width) * group_width * 2
                     : rows * fma_stride(width) * 4;
  };
  const auto padded = [&](int width) {
    return round_up(width, is_16_bit ? group_width : 4);
  };
  const auto take = [&](int bytes) {
    const int offset = layout.bytes;
    layout.bytes += round_up(bytes, 16);
    return offset;
  };
  const int widest = widest_of(pass);
  for (int l = 0; l < layers; ++l) {
    const int in = width(l), out = width(l + 1);
    if (!is_backward || pass.recomputes || !is_16_bit) {
      layout.weights[l] = take(bytes_of(padded(out), in));
    }
    if (!is_backward || pass.recomputes) {
      layout.biases[l] = take(padded(out) * 4);
    }
    if (is_backward) {
      if (is_16_bit) {
        layout.transposed[l] = take(bytes_of(padded(in), out));
      }
      layout.inputs[l] = take(bytes_of(tile_rows, in));
      layout.sums[l] = take(sum_floats_of(out, in, pass.element_size) * 4);
    }
  }
  // Two alternating buffers for delta_l, or for the activations of the float32
  // forward pass.
  for (int& delta : layout.deltas) {
    if (is_backward || !is_16_bit) {
      delta = take(bytes_of(tile_rows, widest));
    }
  }
  return layout;
}

// Fills `plan` and returns true if the fused kernels serve the pass. The plan
// has the largest tile that fits into a block's shared memory, and at most as
// many blocks as can be resident on the device.
inline bool fused_serves(const PassSpec& pass, FusedPlan& plan) {
  const int layers = int(pass.widths.size()) - 1;
  const auto [narrowest, widest] =
      std::minmax_element(pass.widths.begin(), pass.widths.end());
  if (pass.rows < 1 || layers < 1 || pass.widths.size() > max_layers + 1 ||
      *narrowest < 1 || *widest > tuning::max_width ||
      (pass.element_size != 2 && pass.element_size != 4)) {
    return false;
  }
  const bool is_16_bit = pass.element_size == 2;
  plan = {};
  for (int l = 0; pass.is_backward && l < layers; ++l) {
    plan.sum_floats += sum_floats_of(
        int(pass.widths[l + 1]), int(pass.widths[l]), pass.element_size);
  }
  // A 16-bit tile with half the rows uses half the threads. A float32 tile
  // always uses all threads.
  for (const int threads : {tuning::fused_threads, tuning::fused_threads / 2}) {
    plan.threads = is_16_bit ? threads : tuning::fused_threads;
    plan.tile_rows = is_16_bit ? threads / 32 * 16 *
            (pass.is_backward ? tuning::backward_row_tiles
                              : tuning::forward_row_tiles)
                               : threads / 4;
    plan.layout = fused_layout(pass, plan.tile_rows);
    if (plan.layout.bytes <= pass.device.shared_per_block) {
      break;
    }
  }
  if (plan.layout.bytes > pass.device.shared_per_block) {
    return false;
  }
  // CUDA reserves 1 KB of shared memory for each block.
  const int fit =
      pass.device.shared_per_multiprocessor / (plan.layout.bytes + 1024);
  const int max_resident = is_16_bit
      ? tuning::fused_residents_16_bit(pass.is_backward, int(*widest))
      : tuning::fused_residents_32_bit;
  const int64_t resident =
      int64_t(pass.device.multiprocessors) * std::clamp(fit, 1, max_resident);
  plan.grid = std::min(ceil_div(pass.rows, plan.tile_rows), resident);
  return true;
}

// The workspace of a backward pass. It holds the gradient sums of each block,
// layer after layer, then one double for each block, its sum of squares. Its
// size does not grow with the rows once there is work for every multiprocessor.
inline int64_t fused_squares_offset(const FusedPlan& plan) {
  return ceil_div(plan.grid * plan.sum_floats * 4, 16) * 16;
}
inline int64_t fused_workspace_bytes(const FusedPlan& plan) {
  return fused_squares_offset(plan) + plan.grid * 8;
}

} // namespace relu_mlp::cuda
