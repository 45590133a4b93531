// The fused passes for float32, on plain FMAs.
//
// A block of 256 threads takes a tile of 64 or 32 rows through all layers in
// shared memory. In each product a thread computes 4 x 4 elements. Its position
// is (thread / 16, thread % 16). Weights are staged once per block and not
// transposed: both passes read them in 16-byte vectors without bank conflicts.
//
// Arithmetic limits the speed. In the forward pass a layer of 64 x 64 takes
// 4096 FMAs per row. In the backward pass it takes 8192, or 12288 if the pass
// recomputes. A multiprocessor does 128 FMAs per cycle. In the forward pass
// 2^20 rows of 64 -> 64 -> 64 -> 64 take 435 us on an H200 at 1.755 GHz; memory
// traffic would take 112 us. For every 64 FMAs a thread reads 8 vectors of 16
// bytes, so shared memory runs at three quarters of its bandwidth. These are
// predictions, not measurements.
#pragma once

#include "fma_layer.cuh"
#include "gradient_sums.cuh"

namespace relu_mlp::cuda {

// The forward pass of a network of any widths.
RELU_MLP_KERNEL void RELU_MLP_BOUNDS(
    tuning::fused_threads,
    tuning::fused_residents_32_bit)
    fma_forward(RELU_MLP_PARAMETER ForwardParameters<float> p) {
  unsigned char* const shared = shared_memory();
  const FusedNetwork<float>& network = p.network;
  const int layers = network.layers, tile_rows = p.tile_rows;
  const int64_t rows = p.pass.x.rows;
  for (int l = 0; l < layers; ++l) {
    stage_layer(network, l, shared, p.layout, true);
  }
  RELU_MLP_NO_UNROLL
  for (int64_t first = int64_t(block_index()) * tile_rows; first < rows;
       first += int64_t(grid_size()) * tile_rows) {
    load_tile(
        p.pass.x, first, tile_rows,
        tile(shared, p.layout.deltas[0], network.widths[0]));
    RELU_MLP_NO_UNROLL
    for (int l = 0; l < layers; ++l) {
      sync(); // a_l is complete, and a_{l-1} may be overwritten
      const int in = network.widths[l], out = network.widths[l + 1];
      const bool is_last = l == layers - 1;
      const Tile to = tile(shared, p.layout.deltas[(l + 1) % 2], out);
      float* const memory = is_last ? p.pass.y : p.pass.hidden[l];
      for_each_pre_activation(
          tile(shared, p.layout.deltas[l % 2], in), tile_rows,
          tile(shared, p.layout.weights[l], in), out,
          reinterpret_cast<const float*>(shared + p.layout.biases[l]),
          [&](int row, int column, float z) {
            float a[1] = {z};
            activate(is_last ? network.output_activation : Activation::relu, a);
            if (!is_last) {
              to.at(row, column) = a[0];
            }
            if (memory && first + row < rows && column < out) {
              memory[(first + row) * out + column] = a[0];
            }
          });
    }
    sync();
  }
}

// One thread's view of its block's work; `first` is the first row of the tile.
struct FmaBackward {
  const BackwardParameters<float>& p;
  unsigned char* shared;
  int64_t first;

  RELU_MLP_DEVICE int width(int l) const {
    return p.network.widths[l];
  }
  RELU_MLP_DEVICE Tile input(int l) const {
    return tile(shared, p.layout.inputs[l], width(l));
  }
  RELU_MLP_DEVICE Tile weight(int l) const {
    return tile(shared, p.layout.weights[l], width(l));
  }
  RELU_MLP_DEVICE Tile delta(int l) const {
    return tile(shared, p.layout.deltas[l % 2], width(l + 1));
  }
  RELU_MLP_DEVICE const float* bias(int l) const {
    return reinterpret_cast<const float*>(shared + p.layout.biases[l]);
  }

  // Stores the needed inputs among a_0 ... a_{L-1} in their tiles.
  RELU_MLP_DEVICE void put_inputs() const {
    if (p.pass.recompute || (p.pass.grad_weights[0] && p.pass.lowest == 0)) {
      load_tile(p.pass.x, first, p.tile_rows, input(0));
    }
    RELU_MLP_NO_UNROLL
    for (int l = 1; l < p.network.layers; ++l) {
      const Tile to = input(l);
      if (p.pass.recompute) {
        sync();
        for_each_pre_activation(
            input(l - 1), p.tile_rows, weight(l - 1), width(l), bias(l - 1),
            [&](int row, int column, float z) {
              to.at(row, column) = first + row < p.pass.rows
                  ? ActivationRow<Activation::relu>::forward(z)
                  : 0.0f;
            });
      } else if (l >= p.pass.lowest && p.pass.hidden[l - 1]) {
        load_tile(
            {p.pass.hidden[l - 1], p.pass.rows, width(l), width(l), 1}, first,
            p.tile_rows, to);
      }
    }
  }

  // Computes one element of the last layer's delta from the gradient of y, or
  // from the target. With a target it adds the squared error to `squares`.
  RELU_MLP_DEVICE void put_last_delta(
      int row,
      int column,
      const float (&y)[1],
      double& squares) const {
    const int l = p.network.layers - 1, columns = width(l + 1);
    const int64_t i = first + row;
    float grad[1] = {};
    if (i < p.pass.rows && column < columns) {
      if (p.pass.squares) {
        const float error = y[0] - p.pass.target[i * columns + column];
        squares += static_cast<double>(error) * static_cast<double>(error);
        grad[0] = static_cast<float>(2 * p.pass.loss_scale) * error;
      } else {
        grad[0] = element(p.pass.grad_output, i, column);
      }
      activation_backward(p.network.output_activation, grad, y);
    }
    delta(l).at(row, column) = grad[0];
  }
  RELU_MLP_DEVICE void put_last_delta(double& squares) const {
    const int l = p.network.layers - 1, columns = width(l + 1);
    if (p.recompute_y) {
      sync();
      for_each_pre_activation(
          input(l), p.tile_rows, weight(l), columns, bias(l),
          [&](int row, int column, float z) {
            float y[1] = {z};
            activate(p.network.output_activation, y);
            put_last_delta(row, column, y, squares);
          });
      return;
    }
    const int padded = round_up(columns, 4);
    for (int n = thread_index(); n < p.tile_rows * padded; n += block_size()) {
      const int row = n / padded, column = n % padded;
      const bool is_inside = first + row < p.pass.rows && column < columns;
      const float y[1] = {
          p.pass.y && is_inside ? p.pass.y[(first + row) * columns + column]
                                : 0.0f};
      put_last_delta(row, column, y, squares);
    }
  }

  // Adds delta^T a and the column sums of delta over the tile to the sums of
  // layer l.
  RELU_MLP_DEVICE void add_gradients(int l) const {
    const Tile left = delta(l), right = input(l);
    const int out = left.columns, in = right.columns;
    const int across = round_up(in, 4);
    float* const sums = reinterpret_cast<float*>(shared + p.layout.sums[l]);
    if (p.pass.grad_weights[l]) {
      const int ty = thread_index() / 16, tx = thread_index() % 16;
      for (int o = 4 * ty; o < out; o += 64) {
        for (int i = 4 * tx; i < in; i += 64) {
          float c[4][4] = {};
          RELU_MLP_NO_UNROLL
          for (int row = 0; row < p.tile_rows; ++row) {
            const Float4 d = left.four(row, o), a = right.four(row, i);
            RELU_MLP_UNROLL
            for (int e = 0; e < 16; ++e) {
              c[e / 4][e % 4] = fmaf(d.v[e / 4], a.v[e % 4], c[e / 4][e % 4]);
            }
          }
          RELU_MLP_UNROLL
          for (int u = 0; u < 4; ++u) {
            add(sums + (o + u) * across + i, c[u]);
          }
        }
      }
    }
    if (p.pass.grad_biases[l] && thread_index() < out) {
      float sum = 0.0f;
      for (int row = 0; row < p.tile_rows; ++row) {
        sum += left.at(row, thread_index());
      }
      sums[round_up(out, 4) * across + thread_index()] += sum;
    }
  }

  // Computes delta_{l-1} from delta_l and stores it in its tile. For l = 0 this
  // is the gradient of x, which goes to global memory.
  RELU_MLP_DEVICE void propagate(int l) const {
    const Tile from = delta(l), w = weight(l), a = input(l);
    const Tile to = tile(shared, p.layout.deltas[(l + 1) % 2], a.columns);
    const int ty = thread_index() / 16, tx = thread_index() % 16;
    const int in = a.columns;
    RELU_MLP_NO_UNROLL
    for (int n = 4 * tx; n < in; n += 64) {
      float c[4][4] = {};
      RELU_MLP_NO_UNROLL
      for (int k = 0; k < from.columns; k += 4) {
        Float4 left[4], right[4];
        RELU_MLP_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = ty + 16 * i;
          left[i] = from.four(row < p.tile_rows ? row : 0, k);
          right[i] = w.four(k + i, n);
        }
        RELU_MLP_UNROLL
        for (int e = 0; e < 16; ++e) {
          RELU_MLP_UNROLL
          for (int u = 0; u < 4; ++u) {
            c[e / 4][e % 4] =
                fmaf(left[e / 4].v[u], right[u].v[e % 4], c[e / 4][e % 4]);
          }
        }
      }
      RELU_MLP_UNROLL
      for (int e = 0; e < 16; ++e) {
        const int row = ty + 16 * (e / 4), column = n + e % 4;
        if (row >= p.tile_rows) {
          continue;
        }
        if (l > 0) {
          // The padding becomes zero too, because a is zero there.
          to.at(row, column) =
              a.at(row, column) <= 0.0f || first + row >= p.pass.rows
              ? 0.0f
              : c[e / 4][e % 4];
        } else if (first + row < p.pass.rows && column < in) {
          p.pass.grad_x[(first + row) * in + column] = c[e / 4][e % 4];
        }
      }
    }
  }

  RELU_MLP_DEVICE void run_tile(double& squares) const {
    put_inputs();
    put_last_delta(squares);
    RELU_MLP_NO_UNROLL
    for (int l = p.network.layers - 1; l >= p.pass.lowest; --l) {
      sync(); // the tiles of delta_l and a_{l-1} are complete
      add_gradients(l);
      if (propagates_through(p, l)) {
        propagate(l);
      }
    }
    sync(); // the tiles may be overwritten
  }
};

RELU_MLP_KERNEL void RELU_MLP_BOUNDS(
    tuning::fused_threads,
    tuning::fused_residents_32_bit)
    fma_backward(RELU_MLP_PARAMETER BackwardParameters<float> p) {
  FmaBackward work{p, shared_memory(), 0};
  for (int l = p.pass.recompute ? 0 : p.pass.lowest; l < p.network.layers;
       ++l) {
    if (p.pass.recompute || propagates_through(p, l)) {
      stage_layer(p.network, l, work.shared, p.layout, p.pass.recompute);
    }
  }
  clear_sums(p, work.shared);
  sync();
  double squares = 0;
  RELU_MLP_NO_UNROLL
  for (work.first = int64_t(block_index()) * p.tile_rows;
       work.first < p.pass.rows;
       work.first += int64_t(grid_size()) * p.tile_rows) {
    work.run_tile(squares);
  }
  write_sums(p, work.shared, squares);
}

} // namespace relu_mlp::cuda
