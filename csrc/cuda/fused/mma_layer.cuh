// One layer of bfloat16 or float16 on tensor cores: rows in the registers of a
// warp, weights in shared memory, and their product.
#pragma once

#include "vectors.cuh"

namespace relu_mlp::cuda {

// 16 * Tiles rows of up to Groups groups of columns, in the registers of a warp
// as the left operand of mma: words[m][s] holds the rows of tile m and the
// columns of its 16-wide step s. Lane 4 g + t holds, for each of its rows 16 m
// + 8 half + g and each group q, the vector that starts at column 32 q + 8 t.
template <int Groups, int Tiles>
struct Rows {
  uint32_t words[Tiles][2 * Groups][4];

  RELU_MLP_DEVICE Vector16Bytes get(int m, int half, int q) const {
    const auto& step = words[m];
    return {
        {step[2 * q][half], step[2 * q][half + 2], step[2 * q + 1][half],
         step[2 * q + 1][half + 2]}};
  }
  RELU_MLP_DEVICE void set(
      int m,
      int half,
      int q,
      const Vector16Bytes& vector) {
    auto& step = words[m];
    step[2 * q][half] = vector.word[0];
    step[2 * q][half + 2] = vector.word[1];
    step[2 * q + 1][half] = vector.word[2];
    step[2 * q + 1][half + 2] = vector.word[3];
  }
};

// Calls f(m, half, q) for the lane's vectors in the first `groups` groups.
template <int Groups, int Tiles, typename F>
RELU_MLP_DEVICE void for_each_vector(int groups, const F& f) {
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

// Computes group p of the columns of (in B^T). B (columns, in) is in shared
// memory in the layout of vector_offset. `values` receives a lane's 8
// neighboring columns of each of its rows.
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
        const Vector16Bytes v =
            load_16_bytes(b + vector_offset(row, 4 * q + t, groups_in));
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

// Computes the pre-activations of group p of a layer. They are zero in the
// columns beyond its width, where the product of an infinity and a padded
// weight would be NaN.
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
  const int column = group_width * p + vector_width * (lane_index() % 4);
  const auto for_each = [&](const auto& f) {
    RELU_MLP_UNROLL
    for (int i = 0; i < vector_width; ++i) {
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
  if (column + vector_width > width_out) {
    for_each([&](int i, float& z) { z = column + i < width_out ? z : 0.0f; });
  }
}

// Returns the activations of a hidden layer.
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
      pre_activations<IsBFloat16>(in, width_in, width_out, weight, bias, p, z);
      RELU_MLP_UNROLL
      for (int m = 0; m < Tiles; ++m) {
        RELU_MLP_UNROLL
        for (int half = 0; half < 2; ++half) {
          Vector16Bytes vector = pack_vector<IsBFloat16>(z[m][half]);
          RELU_MLP_UNROLL
          for (uint32_t& word : vector.word) {
            word = relu<IsBFloat16>(word);
          }
          out.set(m, half, p, vector);
        }
      }
    }
  }
  return out;
}

// Loads the warp's rows of x, or of any matrix, starting at `row`.
template <int Groups, int Tiles>
RELU_MLP_DEVICE Rows<Groups, Tiles> load_rows(const View16& m, int64_t row) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  Rows<Groups, Tiles> rows;
  if (m.has_aligned_vectors && m.columns % group_width == 0 &&
      row + 16 * Tiles <= m.rows) {
    // No lane branches, so all loads are in flight together.
    const uint16_t* const first =
        m.data + (row + g) * m.row_stride + vector_width * t;
    for_each_vector<Groups, Tiles>(
        m.columns / group_width, [&](int tile, int half, int q) {
          rows.set(
              tile, half, q,
              load_16_bytes(
                  first + (16 * tile + 8 * half) * m.row_stride +
                  group_width * q));
        });
    return rows;
  }
  for_each_vector<Groups, Tiles>(
      groups_of(m.columns), [&](int tile, int half, int q) {
        rows.set(
            tile, half, q,
            load_vector(
                m, row + 16 * tile + 8 * half + g,
                group_width * q + vector_width * t));
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
  for_each_vector<Groups, Tiles>(
      groups_of(columns), [&](int tile, int half, int q) {
        store_vector(
            data, count, columns, row + 16 * tile + 8 * half + g,
            group_width * q + vector_width * t, rows.get(tile, half, q));
      });
}

// Copies a weight matrix, or its transpose, to shared memory with all threads
// of the block. Rows and columns are padded with zeros to whole groups.
RELU_MLP_DEVICE void stage(const View16& m, unsigned char* shared) {
  const int rows = groups_of(static_cast<int>(m.rows)) * group_width;
  const int groups = groups_of(m.columns), vectors = 4 * groups;
  RELU_MLP_NO_UNROLL
  for (int n = thread_index(); n < rows * vectors; n += block_size()) {
    // Neighboring threads read neighboring memory.
    const bool by_column = m.row_stride == 1 && m.column_stride != 1;
    const int row = by_column ? n % rows : n / vectors;
    const int vector = by_column ? n / rows : n % vectors;
    store_16_bytes(
        shared + vector_offset(row, vector, groups),
        load_vector(m, row, vector * vector_width));
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

} // namespace relu_mlp::cuda
