// The narrow regime for bfloat16 and float16, on tensor cores.
//
// A warp takes 16 rows, or several times 16, through all layers in registers:
// the accumulators of one product, rounded to 16 bits, are the operand of the
// next. Weights are staged in shared memory once per block. The backward pass
// carries delta down with the same products, with the weights staged
// transposed.
//
// The forward pass reads x and writes y, and the hidden activations if they are
// kept, and nothing else that grows with the rows: 2 (widths[0] + widths[L])
// bytes a row, 256 for 64 -> 64 -> 64 -> 64. That is its limit: at the 4.8 TB/s
// of an H200, 2^20 rows take 56 us. For each tile of 32 rows a warp reads all
// weights from shared memory, 768 bytes a row for these three layers, which at
// 128 bytes a cycle is 6 cycles a row, and 27 us on 132 multiprocessors at
// 1.755 GHz. These are predictions; nothing of it has been measured.
#pragma once

#include "parameters.cuh"

namespace relu_mlp::cuda {

// A (rows, columns) matrix of 16-bit elements in global memory.
struct View16 {
  const uint16_t* data;
  int64_t rows;
  int columns;
  int64_t row_stride, column_stride;
  bool in_chunks; // 16 bytes at once, wherever a chunk is whole
};

RELU_MLP_DEVICE bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <typename T>
RELU_MLP_DEVICE View16 view(const Matrix<const T>& m, int columns) {
  return {
      reinterpret_cast<const uint16_t*>(m.data),
      m.rows,
      columns,
      m.row_stride,
      m.col_stride,
      m.col_stride == 1 && m.row_stride % chunk_width == 0 &&
          is_aligned(m.data)};
}

template <typename T>
RELU_MLP_DEVICE View16
contiguous_view(const T* data, int64_t rows, int columns) {
  return view(Matrix<const T>{data, rows, columns, columns, 1}, columns);
}

// 8 neighbouring elements of a row; zeros outside of the matrix.
RELU_MLP_DEVICE Vector16 load_chunk(const View16& m, int64_t row, int column) {
  Vector16 chunk{};
  if (row >= m.rows || column >= m.columns) {
    return chunk;
  }
  const uint16_t* const first =
      m.data + row * m.row_stride + column * m.column_stride;
  if (m.in_chunks && column + chunk_width <= m.columns) {
    return load16(first);
  }
  RELU_MLP_UNROLL
  for (int i = 0; i < chunk_width; ++i) {
    if (column + i < m.columns) {
      chunk.word[i / 2] |= uint32_t(first[i * m.column_stride])
          << (i % 2 * 16);
    }
  }
  return chunk;
}

// The same into a contiguous matrix.
template <typename T>
RELU_MLP_DEVICE void store_chunk(
    T* data,
    int64_t rows,
    int columns,
    int64_t row,
    int column,
    const Vector16& chunk) {
  if (row >= rows || column >= columns) {
    return;
  }
  uint16_t* const first =
      reinterpret_cast<uint16_t*>(data) + row * columns + column;
  if (columns % chunk_width == 0 && is_aligned(data)) {
    store16(first, chunk);
    return;
  }
  RELU_MLP_UNROLL
  for (int i = 0; i < chunk_width; ++i) {
    if (column + i < columns) {
      first[i] = static_cast<uint16_t>(chunk.word[i / 2] >> (i % 2 * 16));
    }
  }
}

template <bool IsBFloat16>
RELU_MLP_DEVICE Vector16 pack_chunk(const float (&values)[8]) {
  Vector16 chunk;
  RELU_MLP_UNROLL
  for (int i = 0; i < 4; ++i) {
    chunk.word[i] = pack<IsBFloat16>(values[2 * i], values[2 * i + 1]);
  }
  return chunk;
}

template <bool IsBFloat16>
RELU_MLP_DEVICE void unpack_chunk(const Vector16& chunk, float (&values)[8]) {
  RELU_MLP_UNROLL
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = unpack_low<IsBFloat16>(chunk.word[i]);
    values[2 * i + 1] = unpack_high<IsBFloat16>(chunk.word[i]);
  }
}

// 16 * Tiles rows of up to Groups groups of columns, in the registers of a warp
// as the left operand of mma: words[m][s] are the rows of tile m and the
// columns of its 16-wide step s. Lane 4 g + t has, for each of its rows
// 16 m + 8 half + g and each group q, the chunk of columns 32 q + 8 t.
template <int Groups, int Tiles>
struct Rows {
  uint32_t words[Tiles][2 * Groups][4];

  RELU_MLP_DEVICE Vector16 get(int m, int half, int q) const {
    const auto& step = words[m];
    return {
        {step[2 * q][half], step[2 * q][half + 2], step[2 * q + 1][half],
         step[2 * q + 1][half + 2]}};
  }
  RELU_MLP_DEVICE void set(int m, int half, int q, const Vector16& chunk) {
    auto& step = words[m];
    step[2 * q][half] = chunk.word[0];
    step[2 * q][half + 2] = chunk.word[1];
    step[2 * q + 1][half] = chunk.word[2];
    step[2 * q + 1][half + 2] = chunk.word[3];
  }
};

// Calls f(m, half, q) for the lane's chunks in the first `groups` groups.
template <int Groups, int Tiles, typename F>
RELU_MLP_DEVICE void for_each_chunk(int groups, const F& f) {
  RELU_MLP_UNROLL
  for (int q = 0; q < Groups; ++q) {
    if (q < groups) {
      RELU_MLP_UNROLL
      for (int m = 0; m < Tiles; ++m) {
        f(m, 0, q);
        f(m, 1, q);
      }
    }
  }
}

// Group p of the columns of (in B^T), where B (columns, in) lies in shared
// memory as chunk_offset says; `values` are a lane's 8 neighbouring columns of
// each of its rows.
template <bool IsBFloat16, int Groups, int Tiles>
RELU_MLP_DEVICE void product(
    const Rows<Groups, Tiles>& in,
    int groups_in,
    const unsigned char* b,
    int p,
    float (&values)[Tiles][2][8]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  float c[Tiles][4][4] = {};
  RELU_MLP_UNROLL
  for (int q = 0; q < Groups; ++q) {
    if (q < groups_in) {
      RELU_MLP_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = logical_column(4 * p + i, g);
        const Vector16 v = load16(b + chunk_offset(row, 4 * q + t, groups_in));
        RELU_MLP_UNROLL
        for (int m = 0; m < Tiles; ++m) {
          mma<IsBFloat16>(c[m][i], in.words[m][2 * q], v.word[0], v.word[1]);
          mma<IsBFloat16>(
              c[m][i], in.words[m][2 * q + 1], v.word[2], v.word[3]);
        }
      }
    }
  }
  RELU_MLP_UNROLL
  for (int m = 0; m < Tiles; ++m) {
    RELU_MLP_UNROLL
    for (int i = 0; i < 16; ++i) {
      values[m][i / 2 % 2][i / 4 * 2 + i % 2] = c[m][i / 4][i % 4];
    }
  }
}

// The pre-activations of group p of a layer, with zeros in the columns beyond
// its width: there a product of an infinity and a padded weight would be NaN.
template <bool IsBFloat16, int Groups, int Tiles>
RELU_MLP_DEVICE void pre_activations(
    const Rows<Groups, Tiles>& in,
    int width_in,
    int width_out,
    const unsigned char* weight,
    const float* bias,
    int p,
    float (&z)[Tiles][2][8]) {
  product<IsBFloat16>(in, groups_of(width_in), weight, p, z);
  const int column = group_width * p + chunk_width * (lane_index() % 4);
  const auto for_each = [&](const auto& f) {
    RELU_MLP_UNROLL
    for (int i = 0; i < chunk_width; ++i) {
      RELU_MLP_UNROLL
      for (int m = 0; m < Tiles; ++m) {
        f(i, z[m][0][i]);
        f(i, z[m][1][i]);
      }
    }
  };
  const Float4* const b = reinterpret_cast<const Float4*>(bias + column);
  const Float4 halves[2] = {b[0], b[1]};
  for_each([&](int i, float& z) { z += halves[i / 4].v[i % 4]; });
  if (column + chunk_width > width_out) {
    for_each([&](int i, float& z) { z = column + i < width_out ? z : 0.0f; });
  }
}

// A hidden layer: the activations after it.
template <bool IsBFloat16, int Groups, int Tiles>
RELU_MLP_DEVICE Rows<Groups, Tiles> hidden_layer(
    const Rows<Groups, Tiles>& in,
    int width_in,
    int width_out,
    const unsigned char* weight,
    const float* bias) {
  Rows<Groups, Tiles> out;
  RELU_MLP_UNROLL
  for (int p = 0; p < Groups; ++p) {
    if (p < groups_of(width_out)) {
      float z[Tiles][2][8];
      pre_activations<IsBFloat16>(
          in, width_in, width_out, weight, bias, p, z);
      RELU_MLP_UNROLL
      for (int m = 0; m < Tiles; ++m) {
        RELU_MLP_UNROLL
        for (int half = 0; half < 2; ++half) {
          Vector16 chunk = pack_chunk<IsBFloat16>(z[m][half]);
          RELU_MLP_UNROLL
          for (uint32_t& word : chunk.word) {
            word = relu<IsBFloat16>(word);
          }
          out.set(m, half, p, chunk);
        }
      }
    }
  }
  return out;
}

// The rows of x, or of any matrix, that are the warp's from `row` on.
template <int Groups, int Tiles>
RELU_MLP_DEVICE Rows<Groups, Tiles> load_rows(const View16& m, int64_t row) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  Rows<Groups, Tiles> rows;
  if (m.in_chunks && m.columns % group_width == 0 &&
      row + 16 * Tiles <= m.rows) {
    // Nothing to decide for a lane, and all loads under way together.
    const uint16_t* const first =
        m.data + (row + g) * m.row_stride + chunk_width * t;
    for_each_chunk<Groups, Tiles>(
        m.columns / group_width, [&](int tile, int half, int q) {
          rows.set(
              tile, half, q,
              load16(
                  first + (16 * tile + 8 * half) * m.row_stride +
                  group_width * q));
        });
    return rows;
  }
  for_each_chunk<Groups, Tiles>(
      groups_of(m.columns), [&](int tile, int half, int q) {
        rows.set(
            tile, half, q,
            load_chunk(
                m, row + 16 * tile + 8 * half + g,
                group_width * q + chunk_width * t));
      });
  return rows;
}

template <int Groups, int Tiles, typename T>
RELU_MLP_DEVICE void store_rows(
    const Rows<Groups, Tiles>& rows,
    T* data,
    int64_t count,
    int columns,
    int64_t row) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  for_each_chunk<Groups, Tiles>(
      groups_of(columns), [&](int tile, int half, int q) {
        store_chunk(
            data, count, columns, row + 16 * tile + 8 * half + g,
            group_width * q + chunk_width * t, rows.get(tile, half, q));
      });
}

// A matrix of weights, or its transpose, into shared memory, by all threads of
// the block. Rows and columns are filled up to whole groups with zeros.
RELU_MLP_DEVICE void stage(const View16& m, unsigned char* shared) {
  const int rows = groups_of(static_cast<int>(m.rows)) * group_width;
  const int groups = groups_of(m.columns), chunks = 4 * groups;
  RELU_MLP_NO_UNROLL
  for (int n = thread_index(); n < rows * chunks; n += block_size()) {
    // Neighbouring threads read neighbouring memory.
    const bool by_column = m.row_stride == 1 && m.column_stride != 1;
    const int row = by_column ? n % rows : n / chunks;
    const int chunk = by_column ? n / rows : n % chunks;
    store16(
        shared + chunk_offset(row, chunk, groups),
        load_chunk(m, row, chunk * chunk_width));
  }
}

template <typename T>
RELU_MLP_DEVICE void stage_bias(const T* bias, int width, float* shared) {
  for (int n = thread_index(); n < groups_of(width) * group_width;
       n += block_size()) {
    shared[n] = bias && n < width ? static_cast<float>(bias[n]) : 0.0f;
  }
}

template <typename T>
constexpr bool is_bfloat16 = std::is_same_v<T, BFloat16>;

// The forward pass of at most 32 Groups wide layers. Warps are independent of
// each other once the weights are staged.
template <typename T, int Groups, int Tiles>
RELU_MLP_KERNEL void RELU_MLP_BOUNDS(
    narrow_threads,
    residents_16_bit(false, group_width * Groups))
    mma_forward(RELU_MLP_PARAMETER ForwardParameters<T> p) {
  constexpr bool is_bf16 = is_bfloat16<T>;
  unsigned char* const shared = shared_memory();
  const Narrow<T>& network = p.network;
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
  // 2^31 tiles of 32 rows are more than a device has memory for.
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
          store_chunk(
              p.pass.y, x.rows, width, row + 16 * m + 8 * half + g,
              group_width * q + chunk_width * t,
              pack_chunk<is_bf16>(z[m][half]));
        }
      }
    }
  }
}

} // namespace relu_mlp::cuda
