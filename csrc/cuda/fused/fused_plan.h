// Which calls the fused kernels serve, and how: tiles, launch shapes and the
// layout of shared memory.
#pragma once

#include <algorithm>

#include "../device.h"
#include "layout.h"

namespace relu_mlp::cuda {

struct FusedPlan {
  int threads; // of a block
  int tile_rows; // rows that a block takes at a time
  int64_t grid; // number of blocks
  int sum_floats; // sums of all layers' gradients, of a block
  FusedLayout layout;
};

inline int widest_of(const Call& call) {
  return int(*std::max_element(call.widths.begin(), call.widths.end()));
}

inline FusedLayout fused_layout(const Call& call, int tile_rows) {
  FusedLayout layout{};
  const int layers = int(call.widths.size()) - 1;
  const auto width = [&](int l) { return int(call.widths[l]); };
  const bool is_16_bit = call.element_size == 2;
  const bool is_backward = call.is_backward;
  // Bytes of a matrix. Weights get as many rows as the products read.
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
  const int widest = widest_of(call);
  for (int l = 0; l < layers; ++l) {
    const int in = width(l), out = width(l + 1);
    if (!is_backward || call.recomputes || !is_16_bit) {
      layout.weights[l] = take(bytes_of(padded(out), in));
    }
    if (!is_backward || call.recomputes) {
      layout.biases[l] = take(padded(out) * 4);
    }
    if (is_backward) {
      if (is_16_bit) {
        layout.transposed[l] = take(bytes_of(padded(in), out));
      }
      layout.inputs[l] = take(bytes_of(tile_rows, in));
      layout.sums[l] = take(sum_floats_of(out, in, call.element_size) * 4);
    }
  }
  // delta_l, and in float32 the forward pass's activations, by turns.
  for (int& delta : layout.deltas) {
    if (is_backward || !is_16_bit) {
      delta = take(bytes_of(tile_rows, widest));
    }
  }
  return layout;
}

// Fills `plan` if the fused kernels serve the call. It takes the largest tile
// for which a block's shared memory suffices, and as many blocks as are
// resident on the device at a time.
inline bool fused_serves(const Call& call, FusedPlan& plan) {
  const int layers = int(call.widths.size()) - 1;
  const auto [narrowest, widest] =
      std::minmax_element(call.widths.begin(), call.widths.end());
  if (call.rows < 1 || layers < 1 || call.widths.size() > max_layers + 1 ||
      *narrowest < 1 || *widest > tuning::max_width ||
      (call.element_size != 2 && call.element_size != 4)) {
    return false;
  }
  const bool is_16_bit = call.element_size == 2;
  plan = {};
  for (int l = 0; call.is_backward && l < layers; ++l) {
    plan.sum_floats += sum_floats_of(
        int(call.widths[l + 1]), int(call.widths[l]), call.element_size);
  }
  // A 16-bit tile of half the rows has half the threads; a 32-bit one has all.
  for (const int threads : {tuning::fused_threads, tuning::fused_threads / 2}) {
    plan.threads = is_16_bit ? threads : tuning::fused_threads;
    plan.tile_rows = is_16_bit ? threads / 32 * 16 *
            (call.is_backward ? tuning::backward_row_tiles
                              : tuning::forward_row_tiles)
                               : threads / 4;
    plan.layout = fused_layout(call, plan.tile_rows);
    if (plan.layout.bytes <= call.device.shared_per_block) {
      break;
    }
  }
  if (plan.layout.bytes > call.device.shared_per_block) {
    return false;
  }
  // The system keeps 1 KB of each block's shared memory.
  const int fit =
      call.device.shared_per_multiprocessor / (plan.layout.bytes + 1024);
  const int most = is_16_bit
      ? tuning::fused_residents_16_bit(call.is_backward, int(*widest))
      : tuning::fused_residents_32_bit;
  const int64_t resident =
      int64_t(call.device.multiprocessors) * std::clamp(fit, 1, most);
  plan.grid = std::min(ceil_div(call.rows, plan.tile_rows), resident);
  return true;
}

// The workspace of a backward pass: for each block the sums of all layers one
// after the other, then for each block a double, the sum of squares. It does
// not grow with the rows once there is work for every multiprocessor.
inline int64_t fused_squares_offset(const FusedPlan& plan) {
  return ceil_div(plan.grid * plan.sum_floats * 4, 16) * 16;
}
inline int64_t fused_workspace_bytes(const FusedPlan& plan) {
  return fused_squares_offset(plan) + plan.grid * 8;
}

} // namespace relu_mlp::cuda
