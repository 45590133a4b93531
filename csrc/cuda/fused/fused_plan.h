// The narrow regime's plans: which calls it serves, tiles and launch shapes,
// what lies where in shared memory and in the workspace, and the index
// arithmetic of its kernels. Plain functions, the same on host and device.
#pragma once

#include "../device.h"

namespace relu_mlp::cuda {

constexpr int max_layers = 16, max_width = 128;

RELU_MLP_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
RELU_MLP_HOST_DEVICE int round_up(int a, int b) {
  return (a + b - 1) / b * b;
}

// ---------------------------------------------------------------------------
// 16-bit elements: products on tensor cores, widths in groups of 32 columns.

constexpr int group_width = 32;
constexpr int chunk_width = 8; // elements of a 16-byte access

RELU_MLP_HOST_DEVICE int groups_of(int width) {
  return (width + group_width - 1) / group_width;
}

// mma gives lane 4 g + t the columns 2 t and 2 t + 1 of each tile of 8. Which
// column of the matrix a tile's column stands for is ours to choose, as long as
// the weights are read accordingly. This choice gives a lane 8 neighbouring
// columns, a chunk, in the 4 tiles of a group: in global and shared memory it
// reads and writes 16 bytes at once. Returns the column of the matrix for
// column n of the given tile.
RELU_MLP_HOST_DEVICE int logical_column(int tile, int n) {
  return group_width * (tile / 4) + chunk_width * (n / 2) + 2 * (tile % 4) +
      n % 2;
}

// The byte offset of a chunk in a matrix of `groups` groups in shared memory.
// Chunks change places within a row so that no two lanes of a phase meet in a
// bank: neither 4 neighbouring chunks of two rows 2 i and 2 i + 1, as products
// read weights and as tiles are written, nor the same chunk of rows
// 8 i ... 8 i + 7, as load_transposed reads them. Rows of an odd number of
// groups start at alternating halves of the banks' 128 bytes by themselves.
// The places are the same ones 8 rows on, row_offset further.
RELU_MLP_HOST_DEVICE int row_offset(int row, int groups) {
  return row * groups * group_width * 2;
}
RELU_MLP_HOST_DEVICE int chunk_offset(int row, int chunk, int groups) {
  const int place =
      (row >> 1 & 3) | (groups % 2 == 0 ? (row & 1) << 2 : 0);
  return row_offset(row, groups) + (chunk ^ place) * 16;
}

// The sums of one layer's weight and bias gradients, float32, as mma leaves
// them: 128 floats for each tile of 16 rows (out) and 8 columns (in), 4 to a
// lane. After the tiles of the columns follows one whose columns are all equal
// to the bias gradient.
constexpr int tile_floats = 128;

RELU_MLP_HOST_DEVICE int sum_tiles_across(int in) {
  return 4 * groups_of(in) + 1;
}
RELU_MLP_HOST_DEVICE int sum_tiles_down(int out) {
  return 2 * groups_of(out);
}

// Where an element of the sums belongs. column is -1 for the bias, and row -1
// for what belongs nowhere.
struct SumPlace {
  int row, column;
};

RELU_MLP_HOST_DEVICE SumPlace mma_sum_place(int index, int out, int in) {
  const int tile = index / tile_floats, lane = index % tile_floats / 4;
  const int element = index % 4, across = sum_tiles_across(in);
  const int row = 16 * (tile / across) + lane / 4 + 8 * (element / 2);
  const int column = 8 * (tile % across) + 2 * (lane % 4) + element % 2;
  if (row >= out) {
    return {-1, 0};
  }
  if (tile % across == across - 1) {
    return {column % 8 == 0 ? row : -1, -1};
  }
  return {column < in ? row : -1, column};
}

// ---------------------------------------------------------------------------
// float32: products on FMAs, widths in multiples of 4.

// Floats from one row to the next in shared memory: an odd number of 16-byte
// parts, so that 8 lanes that read the same part of 8 rows meet in no bank.
RELU_MLP_HOST_DEVICE int fma_stride(int width) {
  return 4 * ((width + 3) / 4 | 1);
}

// The sums: (out rounded up to 4, in rounded up to 4), then the bias's.
RELU_MLP_HOST_DEVICE SumPlace fma_sum_place(int index, int out, int in) {
  const int across = round_up(in, 4), down = round_up(out, 4);
  const int row = index / across, column = index % across;
  if (row >= down) {
    const int bias = index - down * across;
    return {bias < out ? bias : -1, -1};
  }
  return {row < out && column < in ? row : -1, column};
}

// ---------------------------------------------------------------------------
// Both.

struct NarrowPlanQuestion {
  int layers;
  int widths[max_layers + 1]; // of x, hidden ..., y
  int element_size; // 2 or 4 bytes
  int64_t rows;
  bool is_backward;
  bool recompute; // the hidden activations, in the backward pass
  Device device;
};

// Byte offsets in a block's shared memory, and their end.
struct NarrowLayout {
  int weights[max_layers]; // as they lie
  int transposed[max_layers]; // weights, transposed; 16-bit backward only
  int biases[max_layers]; // float32
  int inputs[max_layers]; // a tile's rows of each layer's input
  int deltas[2];
  int sums[max_layers]; // of the layer's gradients
  int bytes;
};

struct NarrowPlan {
  bool serves;
  int threads; // of a block
  int tile_rows; // that a block takes on at a time
  int64_t grid; // 0 if there are no rows
  int sum_floats; // of all layers
  NarrowLayout layout;
};

constexpr int narrow_threads = 256;
// Rows that a warp takes through the layers, in tiles of 16: in the forward
// pass two of them share each read of the weights.
constexpr int forward_row_tiles = 2, backward_row_tiles = 1;

// How many blocks of narrow_threads the registers of a multiprocessor are to be
// enough for; two hide each other's waiting. `widest` is the widest layer.
constexpr int residents_16_bit(bool is_backward, int widest) {
  return widest <= (is_backward ? 32 : 64) ? 2 : 1;
}
constexpr int residents_32_bit = 2;

RELU_MLP_HOST_DEVICE int sum_floats_of(int out, int in, int element_size) {
  return element_size == 2
      ? sum_tiles_down(out) * sum_tiles_across(in) * tile_floats
      : round_up(out, 4) * (round_up(in, 4) + 1);
}

inline NarrowLayout narrow_layout(
    const NarrowPlanQuestion& question,
    int tile_rows) {
  NarrowLayout layout{};
  const bool is_16_bit = question.element_size == 2;
  const bool is_backward = question.is_backward;
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
  int widest = 0;
  for (int l = 0; l <= question.layers; ++l) {
    widest = question.widths[l] > widest ? question.widths[l] : widest;
  }
  for (int l = 0; l < question.layers; ++l) {
    const int in = question.widths[l], out = question.widths[l + 1];
    if (!is_backward || question.recompute || !is_16_bit) {
      layout.weights[l] = take(bytes_of(padded(out), in));
    }
    if (!is_backward || question.recompute) {
      layout.biases[l] = take(padded(out) * 4);
    }
    if (is_backward) {
      if (is_16_bit) {
        layout.transposed[l] = take(bytes_of(padded(in), out));
      }
      layout.inputs[l] = take(bytes_of(tile_rows, in));
      layout.sums[l] = take(sum_floats_of(out, in, question.element_size) * 4);
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

// The largest tile for which a block's shared memory is enough, and as many
// blocks as are resident on the device at a time.
inline NarrowPlan narrow_plan(const NarrowPlanQuestion& question) {
  NarrowPlan plan{};
  const bool is_16_bit = question.element_size == 2;
  if (question.layers < 1 || question.layers > max_layers ||
      (!is_16_bit && question.element_size != 4)) {
    return plan;
  }
  int widest = 0;
  for (int l = 0; l <= question.layers; ++l) {
    if (question.widths[l] < 1 || question.widths[l] > max_width) {
      return plan;
    }
    widest = question.widths[l] > widest ? question.widths[l] : widest;
  }
  for (int l = 0; question.is_backward && l < question.layers; ++l) {
    plan.sum_floats += sum_floats_of(
        question.widths[l + 1], question.widths[l], question.element_size);
  }
  for (int threads = narrow_threads; threads >= narrow_threads / 2;
       threads /= 2) {
    plan.threads = is_16_bit ? threads : narrow_threads;
    plan.tile_rows = !is_16_bit
        ? threads / 4
        : threads / 32 * 16 *
            (question.is_backward ? backward_row_tiles : forward_row_tiles);
    plan.layout = narrow_layout(question, plan.tile_rows);
    plan.serves =
        plan.layout.bytes <= question.device.shared_per_block;
    if (plan.serves) {
      break;
    }
  }
  // The system keeps 1 KB of each block's shared memory.
  const int fit = question.device.shared_per_multiprocessor /
      (plan.layout.bytes + 1024);
  const int most = is_16_bit ? residents_16_bit(question.is_backward, widest)
                             : residents_32_bit;
  const int64_t resident = int64_t(question.device.multiprocessors) *
      (fit < 1 ? 1 : fit < most ? fit : most);
  const int64_t tiles = ceil_div(question.rows, plan.tile_rows);
  plan.grid = tiles < resident ? tiles : resident;
  return plan;
}

inline bool narrow_serves(const NarrowPlanQuestion& question) {
  return narrow_plan(question).serves;
}

// The workspace: for each block the sums of all layers one after the other,
// then for each block a double, the sum of squares.
inline int64_t narrow_workspace_squares(const NarrowPlan& plan) {
  return ceil_div(plan.grid * plan.sum_floats * 4, 16) * 16;
}
inline int64_t narrow_workspace_bytes(const NarrowPlan& plan) {
  return narrow_workspace_squares(plan) + plan.grid * 8;
}

} // namespace relu_mlp::cuda
