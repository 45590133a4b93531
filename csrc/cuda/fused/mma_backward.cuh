// The fused backward pass for bfloat16 and float16.
//
// A block processes a tile of rows at a time, 16 rows for each warp. A warp
// stores the inputs of the layers in shared memory, read from global memory or
// recomputed from x, and propagates delta through its rows. At each layer the
// warps synchronize and share the product delta^T a of the whole tile. They add
// it to float32 sums in shared memory. At the end a block writes its sums to
// the workspace, and gradient_sums.cuh adds up the sums of the blocks.
//
// From x, grad_output and the weights alone, the pass reads 2 (widths[0] +
// widths[L]) bytes per row. It writes 2 widths[0] if the gradient of x is
// needed. For 64 -> 64 -> 64 -> 64 these are 256 and 128 bytes, or 84 us for
// 2^20 rows at 4.8 TB/s. Shared memory limits the speed, at 128 bytes per
// cycle. For a layer of 64 x 64 and 16 rows, a warp reads 8 KB of weights in
// the forward direction and 8 KB in the backward direction, and it writes and
// reads 4 KB of activations and deltas. The products for the sums read 12 KB
// and add up 4 KB. This is about 36 KB, or 18 cycles per row. Three layers on
// 132 multiprocessors at 1.755 GHz take 245 us for 2^20 rows. These are
// predictions, not measurements.
#pragma once

#include "gradient_sums.cuh"
#include "mma_layer.cuh"

namespace relu_mlp::cuda {

// One thread's view of its block's work. `row` is the batch row of the warp's
// first row in the current tile.
template <typename T, int Groups, int Tiles>
struct MmaBackward {
  static constexpr bool is_bf16 = is_bfloat16<T>;
  using WarpRows = Rows<Groups, Tiles>;

  const BackwardParameters<T>& p;
  unsigned char* shared;
  int g, t;
  int first; // the warp's first row within the tile
  int64_t row;

  RELU_MLP_DEVICE int width(int l) const {
    return p.network.widths[l];
  }
  RELU_MLP_DEVICE const float* bias(int l) const {
    return reinterpret_cast<const float*>(shared + p.layout.biases[l]);
  }
  RELU_MLP_DEVICE int64_t row_of(int m, int half) const {
    return row + 16 * m + 8 * half + g;
  }
  // The lane's vector in a tile in shared memory.
  RELU_MLP_DEVICE unsigned char* place(
      int tile,
      int groups,
      int m,
      int half,
      int q) const {
    return shared + tile +
        vector_offset(first + 16 * m + 8 * half + g, 4 * q + t, groups);
  }

  // Stores the lane's part of a matrix in its tile. Rows beyond the last are
  // stored as zeros, so they add nothing to a sum, whatever the weights are.
  RELU_MLP_DEVICE void put(
      int tile,
      int groups,
      int m,
      int half,
      int q,
      const Vector16Bytes& vector) const {
    store_16_bytes(
        place(tile, groups, m, half, q),
        row_of(m, half) < p.pass.rows ? vector : Vector16Bytes{});
  }
  RELU_MLP_DEVICE void put(int tile, int columns, const WarpRows& rows) const {
    const int groups = groups_of(columns);
    for_each_vector<Groups, Tiles>(groups, [&](int m, int half, int q) {
      put(tile, groups, m, half, q, rows.get(m, half, q));
    });
  }
  // Loads the part of a tile that the lane itself has stored.
  RELU_MLP_DEVICE WarpRows get(int tile, int columns) const {
    const int groups = groups_of(columns);
    WarpRows rows;
    for_each_vector<Groups, Tiles>(groups, [&](int m, int half, int q) {
      rows.set(m, half, q, load_16_bytes(place(tile, groups, m, half, q)));
    });
    return rows;
  }

  RELU_MLP_DEVICE void stage_weights() const {
    RELU_MLP_NO_UNROLL
    for (int l = 0; l < p.network.layers; ++l) {
      const T* const weight = p.network.weights[l];
      const int in = width(l), out = width(l + 1);
      if (p.pass.recompute) {
        stage(contiguous_view(weight, out, in), shared + p.layout.weights[l]);
        stage_bias(
            p.network.biases[l], out,
            reinterpret_cast<float*>(shared + p.layout.biases[l]));
      }
      if (propagates_through(p, l) && l >= p.pass.lowest) {
        stage(
            view(Matrix<const T>{weight, in, out, 1, in}, out),
            shared + p.layout.transposed[l]);
      }
    }
  }

  // Stores the needed inputs among a_0 ... a_{L-1} in their tiles. Returns
  // a_{L-1} if all were recomputed from x.
  RELU_MLP_DEVICE WarpRows put_inputs() const {
    const int layers = p.network.layers;
    WarpRows a{};
    if (p.pass.recompute || (p.pass.grad_weights[0] && p.pass.lowest == 0)) {
      a = load_rows<Groups, Tiles>(view(p.pass.x, width(0)), row);
      put(p.layout.inputs[0], width(0), a);
    }
    RELU_MLP_NO_UNROLL
    for (int l = 1; l < layers; ++l) {
      if (p.pass.recompute) {
        a = hidden_layer<is_bf16>(
            a, width(l - 1), width(l), shared + p.layout.weights[l - 1],
            bias(l - 1));
      } else if (l >= p.pass.lowest && p.pass.hidden[l - 1]) {
        a = load_rows<Groups, Tiles>(
            contiguous_view(p.pass.hidden[l - 1], p.pass.rows, width(l)), row);
      } else {
        continue;
      }
      put(p.layout.inputs[l], width(l), a);
    }
    return a;
  }

  // Gets 8 elements of y in each row, rounded to T, or zeros if y is not
  // needed.
  RELU_MLP_DEVICE void get_y(const WarpRows& a, int q, float (&y)[Tiles][2][8])
      const {
    const int l = p.network.layers - 1, columns = width(l + 1);
    const int column = group_width * q + vector_width * t;
    if (p.recompute_y) {
      pre_activations<is_bf16>(
          a, width(l), columns, shared + p.layout.weights[l], bias(l), q, y);
    }
    const View16 given = contiguous_view(
        p.pass.y, p.recompute_y || !p.pass.y ? 0 : p.pass.rows, columns);
    RELU_MLP_UNROLL
    for (int m = 0; m < Tiles; ++m) {
      RELU_MLP_UNROLL
      for (int half = 0; half < 2; ++half) {
        Vector16Bytes vector;
        if (p.recompute_y) {
          activate(p.network.output_activation, y[m][half]);
          vector = pack_vector<is_bf16>(y[m][half]);
        } else {
          vector = load_vector(given, row_of(m, half), column);
        }
        unpack_vector<is_bf16>(vector, y[m][half]);
      }
    }
  }

  // Computes one vector of the last layer's delta from the gradient of y, or
  // from the target. With a target it adds the squared errors to `squares`.
  RELU_MLP_DEVICE Vector16Bytes last_delta(
      const View16& source,
      int64_t row,
      int column,
      const float (&y)[8],
      double& squares) const {
    float delta[8];
    unpack_vector<is_bf16>(load_vector(source, row, column), delta);
    const float scale = static_cast<float>(2 * p.pass.loss_scale);
    if (p.pass.squares) {
      RELU_MLP_UNROLL
      for (int i = 0; i < vector_width; ++i) {
        const bool is_inside = row < source.rows && column + i < source.columns;
        const float error = is_inside ? y[i] - delta[i] : 0.0f;
        squares += static_cast<double>(error) * static_cast<double>(error);
        delta[i] = scale * error;
      }
    }
    activation_backward(p.network.output_activation, delta, y);
    return pack_vector<is_bf16>(delta);
  }

  RELU_MLP_DEVICE WarpRows
  put_last_delta(const WarpRows& a, double& squares) const {
    const int l = p.network.layers - 1, columns = width(l + 1);
    const int groups = groups_of(columns), tile = p.layout.deltas[l % 2];
    const View16 source = p.pass.squares
        ? contiguous_view(p.pass.target, p.pass.rows, columns)
        : view(p.pass.grad_output, columns);
    RELU_MLP_NO_UNROLL
    for (int q = 0; q < groups; ++q) {
      float y[Tiles][2][8];
      get_y(a, q, y);
      RELU_MLP_UNROLL
      for (int m = 0; m < Tiles; ++m) {
        RELU_MLP_UNROLL
        for (int half = 0; half < 2; ++half) {
          put(tile, groups, m, half, q,
              last_delta(
                  source, row_of(m, half), group_width * q + vector_width * t,
                  y[m][half], squares));
        }
      }
    }
    return get(tile, columns);
  }

  // Adds delta^T a and the column sums of delta over the block's tile to the
  // sums of layer l. A warp computes 16 rows and 32 columns of the gradient at
  // a time. The column sums are a product with ones.
  RELU_MLP_DEVICE void add_gradients(int l) const {
    const int lane = lane_index(), warps = block_size() / warp_size;
    const int tile_rows = 16 * Tiles * warps;
    const int groups_in = groups_of(width(l));
    const int groups_out = groups_of(width(l + 1));
    const bool has_weight = p.pass.grad_weights[l];
    const bool has_bias = p.pass.grad_biases[l];
    // The rows that the lane addresses in the four matrices of load_transposed.
    // For delta these are the upper and lower 8 rows of the left half of the
    // operand, then those of its right half. For a they are the upper and lower
    // 8 rows of two tiles.
    const int left_row = lane % 8 + 8 * (lane / 16);
    const int right_row = lane % 8 + 8 * (lane / 8 % 2);
    const unsigned char* const delta = shared + p.layout.deltas[l % 2];
    const unsigned char* const a = shared + p.layout.inputs[l];
    const uint32_t ones = pack<is_bf16>(1.0f, 1.0f);
    const int units = (width(l + 1) + 15) / 16 * groups_in;
    RELU_MLP_NO_UNROLL
    for (int unit = warp_index(); unit < units; unit += warps) {
      const int down = unit / groups_in, q = unit % groups_in;
      float weight_sums[4][4] = {}, bias_sums[4] = {};
      // The swizzle is the same 16 rows further down.
      const unsigned char* const first =
          delta + vector_offset(left_row, 2 * down + lane / 8 % 2, groups_out);
      const unsigned char* const firsts[2] = {
          a + vector_offset(right_row, 4 * q + lane / 16, groups_in),
          a + vector_offset(right_row, 4 * q + 2 + lane / 16, groups_in)};
      RELU_MLP_UNROLL_TWICE
      for (int k = 0; k < tile_rows; k += 16) {
        uint32_t left[4], right[4];
        load_transposed(left, first + row_offset(k, groups_out));
        if (has_weight) {
          RELU_MLP_UNROLL
          for (int pair = 0; pair < 2; ++pair) {
            load_transposed(right, firsts[pair] + row_offset(k, groups_in));
            mma<is_bf16>(weight_sums[2 * pair], left, right[0], right[1]);
            mma<is_bf16>(weight_sums[2 * pair + 1], left, right[2], right[3]);
          }
        }
        if (has_bias && q == 0) {
          mma<is_bf16>(bias_sums, left, ones, ones);
        }
      }
      const int across = sum_tiles_across(width(l));
      float* const sums = reinterpret_cast<float*>(shared + p.layout.sums[l]) +
          down * across * tile_floats + 4 * lane;
      if (has_weight) {
        RELU_MLP_UNROLL
        for (int j = 0; j < 4; ++j) {
          add(sums + (4 * q + j) * tile_floats, weight_sums[j]);
        }
      }
      if (has_bias && q == 0) {
        add(sums + (across - 1) * tile_floats, bias_sums);
      }
    }
  }

  // Computes delta_{l-1} from delta_l and stores it in its tile. For l = 0 this
  // is the gradient of x, which goes to global memory.
  RELU_MLP_DEVICE WarpRows propagate(int l, const WarpRows& delta) const {
    const int columns = width(l), groups = groups_of(columns);
    const int tile = p.layout.deltas[(l + 1) % 2];
    RELU_MLP_NO_UNROLL
    for (int q = 0; q < groups; ++q) {
      float values[Tiles][2][8];
      product<is_bf16>(
          delta, groups_of(width(l + 1)), shared + p.layout.transposed[l], q,
          values);
      RELU_MLP_UNROLL
      for (int m = 0; m < Tiles; ++m) {
        RELU_MLP_UNROLL
        for (int half = 0; half < 2; ++half) {
          if (l == 0) {
            store_vector(
                p.pass.grad_x, p.pass.rows, columns, row_of(m, half),
                group_width * q + vector_width * t,
                pack_vector<is_bf16>(values[m][half]));
            continue;
          }
          const Vector16Bytes a =
              load_16_bytes(place(p.layout.inputs[l], groups, m, half, q));
          Vector16Bytes vector = pack_vector<is_bf16>(values[m][half]);
          RELU_MLP_UNROLL
          for (int i = 0; i < 4; ++i) {
            vector.word[i] =
                select_positive<is_bf16>(vector.word[i], a.word[i]);
          }
          put(tile, groups, m, half, q, vector);
        }
      }
    }
    return l == 0 ? delta : get(tile, columns);
  }

  // Runs all layers for the block's current tile. Two tiles hold the deltas in
  // turn, so one barrier for each layer is enough.
  RELU_MLP_DEVICE void run_tile(double& squares) const {
    const WarpRows a = put_inputs();
    WarpRows delta = put_last_delta(a, squares);
    RELU_MLP_NO_UNROLL
    for (int l = p.network.layers - 1; l >= p.pass.lowest; --l) {
      sync(); // the tiles of delta_l and a_{l-1} are complete
      if (p.pass.grad_weights[l] || p.pass.grad_biases[l]) {
        add_gradients(l);
      }
      if (propagates_through(p, l)) {
        delta = propagate(l, delta);
      }
    }
    sync(); // the tiles may be overwritten
  }
};

template <typename T, int Groups, int Tiles>
RELU_MLP_KERNEL void RELU_MLP_BOUNDS(
    tuning::fused_threads,
    tuning::fused_residents_16_bit(true, group_width* Groups))
    mma_backward(RELU_MLP_PARAMETER BackwardParameters<T> p) {
  const int warps = block_size() / warp_size, lane = lane_index();
  MmaBackward<T, Groups, Tiles> work{
      p, shared_memory(), lane / 4, lane % 4, 16 * Tiles * warp_index(), 0};
  work.stage_weights();
  clear_sums(p, work.shared);
  sync();
  const int tile_rows = 16 * Tiles * warps;
  double squares = 0;
  RELU_MLP_NO_UNROLL
  for (int64_t tile = block_index(); tile * tile_rows < p.pass.rows;
       tile += grid_size()) {
    work.row = tile * tile_rows + work.first;
    work.run_tile(squares);
  }
  write_sums(p, work.shared, squares);
}

} // namespace relu_mlp::cuda
